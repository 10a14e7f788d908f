"""Interpolation of all weights between two checkpoints."""

import torch

from .held import held


def interpolated(model, before: dict[str, torch.Tensor], share: float):
    """Context in which a model holds `after - share * (after - before)` (WiSE-FT, arXiv 2109.01903)."""
    weights = {
        name: torch.lerp(value.detach(), before[name].detach(), share) for name, value in model.named_parameters()
    }
    return held(model, weights)
