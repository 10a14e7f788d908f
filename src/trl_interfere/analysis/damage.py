"""Damage of an update to an earlier domain: first order, second order, and its attribution to routes."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from .gradients import Batches, Tensors, mean_gradient
from .routes import RouteMap


class UpdatePath:
    """
    The straight line between two checkpoints, walked by one model in memory: θ(t) = θ0 + t δ.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A model that holds the parameters of `before`; they are overwritten.
        after (`dict[str, torch.Tensor]`):
            Parameters of `after`, by name.
    """

    def __init__(self, model: PreTrainedModel, after: Tensors):
        self.model = model
        self.start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.delta = {name: after[name].detach().to(start) - start for name, start in self.start.items()}

    def move(self, t: float) -> PreTrainedModel:
        """
        Put the model at θ(t).

        Args:
            t (`float`):
                0 is before, 1 is after.

        Returns:
            [`~transformers.PreTrainedModel`]: The model.
        """
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                torch.add(self.start[name], self.delta[name], alpha=t, out=parameter.data)
        return self.model


@dataclass
class RouteTerms:
    """
    A sum over all parameters, split by route.

    Args:
        routes (`numpy.ndarray` of shape `(num_routes,)`):
            Part of each route.
        outside (`float`):
            Part of the parameters outside routes.
    """

    routes: np.ndarray
    outside: float

    @property
    def total(self) -> float:
        """The whole sum."""
        return float(self.routes.sum()) + self.outside


def _dot(route_map: RouteMap, first: Tensors, second: Tensors, scale: float = 1.0) -> RouteTerms:
    routes, outside = route_map.sum_by_route({name: first[name] * second[name] for name in first})
    return RouteTerms(scale * routes, scale * outside)


def first_order(path: UpdatePath, batches: Batches, route_map: RouteMap) -> RouteTerms:
    """
    First-order damage, ∇L(θ0)·δ, by route. One gradient pass.

    Args:
        path ([`UpdatePath`]):
            The update.
        batches (`list[dict[str, torch.Tensor]]`):
            References of the damaged domain.
        route_map ([`RouteMap`]):
            The routes.

    Returns:
        [`RouteTerms`]: Terms in nats per token.
    """
    _, gradient = mean_gradient(path.move(0.0), batches)
    return _dot(route_map, gradient, path.delta)


def second_order(path: UpdatePath, batches: Batches, route_map: RouteMap, step: float) -> RouteTerms:
    """
    Second-order damage, ½ δᵀHδ, by route: ½ δ_r·(Hδ)_r. Two gradient passes.

    ```
    Hδ = (∇L(θ0 + ε δ) - ∇L(θ0 - ε δ)) / (2 ε)
    ```

    the central difference, with an error of order ε² (arXiv 2606.02398 for ½ δᵀHδ as the damage).

    Args:
        path ([`UpdatePath`]):
            The update.
        batches (`list[dict[str, torch.Tensor]]`):
            References of the damaged domain.
        route_map ([`RouteMap`]):
            The routes.
        step (`float`):
            ε, as a share of the update.

    Returns:
        [`RouteTerms`]: Terms in nats per token.
    """
    _, ahead = mean_gradient(path.move(step), batches)
    _, behind = mean_gradient(path.move(-step), batches)
    product = {name: (ahead[name] - behind[name]) / (2 * step) for name in ahead}
    return _dot(route_map, product, path.delta, scale=0.5)


def attribution(
    path: UpdatePath,
    batches: Batches,
    route_map: RouteMap,
    nodes: int,
    progress: Callable[[], None] = lambda: None,
) -> RouteTerms:
    """
    Damage attributed to each route: integrated gradients along the update (arXiv 1703.01365, with a checkpoint for the
    baseline).

    ```
    a_r = ∫₀¹ ∇_r L(θ0 + t δ)·δ_r dt
    ```

    by Gauss-Legendre quadrature, one gradient pass per node. It is complete: the parts of all routes and of the
    parameters outside routes sum to L(θ1) - L(θ0), up to the error of the quadrature.

    Args:
        path ([`UpdatePath`]):
            The update.
        batches (`list[dict[str, torch.Tensor]]`):
            References of the damaged domain.
        route_map ([`RouteMap`]):
            The routes.
        nodes (`int`):
            Number of nodes; the quadrature is exact for losses that are polynomials of degree `2 * nodes` in t.
        progress (`Callable`, *optional*):
            Called after each pass.

    Returns:
        [`RouteTerms`]: Terms in nats per token.
    """
    positions, weights = np.polynomial.legendre.leggauss(nodes)
    total = RouteTerms(np.zeros(route_map.num_routes), 0.0)
    for position, weight in zip(positions, weights, strict=True):
        _, gradient = mean_gradient(path.move((position + 1) / 2), batches)
        terms = _dot(route_map, gradient, path.delta, scale=weight / 2)
        total = RouteTerms(total.routes + terms.routes, total.outside + terms.outside)
        progress()
    return total
