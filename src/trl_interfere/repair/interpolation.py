"""Interpolation of all weights between two checkpoints: the baseline that knows no routes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from ..analysis.gradients import Tensors


@contextmanager
def interpolated(model: PreTrainedModel, before: Tensors, share: float) -> Iterator[PreTrainedModel]:
    """
    Context in which the model holds `after - share * (after - before)` (WiSE-FT, arXiv 2109.01903).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model after the update; afterwards every parameter is as before, to the bit.
        before (`dict[str, torch.Tensor]`):
            Parameters before the update, by name.
        share (`float`):
            Share of the update that is taken back, of all parameters alike.
    """
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.lerp_(before[name].detach().to(parameter), share)
        yield model
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])
