"""Other weights in a model for a while, and rolled-back routes in memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel

from ..analysis.gradients import Tensors
from ..analysis.routes import RouteMap


@contextmanager
def held(model: PreTrainedModel, weights: Tensors) -> Iterator[PreTrainedModel]:
    """Context in which a model holds other parameters; afterwards every one is as before, to the bit."""
    kept = {name: model.get_parameter(name).detach().clone() for name in weights}
    try:
        _copy(model, weights)
        yield model
    finally:
        _copy(model, kept)


def rolled_back_weights(
    model: PreTrainedModel, before: Tensors, route_map: RouteMap, routes: np.ndarray, step: float
) -> Tensors:
    """
    Parameters that change as slices of routes go from θ1 to `θ1 - step (θ1 - θ0)`. A step of 1 gives θ0 to the bit.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model that holds θ1.
        before (`dict[str, torch.Tensor]`):
            θ0, parameters by name.
        route_map ([`RouteMap`]):
            The routes.
        routes (`numpy.ndarray` of shape `(chosen,)`):
            Indices of the routes.
        step (`float`):
            Share of the update that is taken back.
    """
    steps, found = np.zeros(route_map.num_routes), {}
    steps[routes] = step
    for name, parameter in model.named_parameters():
        share = route_map.spread(name, steps, parameter)
        if share is not None and share.any():
            found[name] = torch.lerp(parameter.detach(), before[name].detach().to(parameter), share)
    return found


def rolled_back(
    model: PreTrainedModel, before: Tensors, route_map: RouteMap, routes: np.ndarray, step: float
) -> Iterator[PreTrainedModel]:
    """Context in which routes are rolled back, see [`rolled_back_weights`]."""
    return held(model, rolled_back_weights(model, before, route_map, routes, step))


def roll_back(model: PreTrainedModel, before: Tensors, route_map: RouteMap, routes: np.ndarray, step: float) -> None:
    """Roll routes back in place, see [`rolled_back_weights`]."""
    _copy(model, rolled_back_weights(model, before, route_map, routes, step))


@torch.no_grad()
def _copy(model: PreTrainedModel, weights: Tensors) -> None:
    for name, value in weights.items():
        model.get_parameter(name).copy_(value)
