"""Task arithmetic and TIES between the checkpoints of the stages: baselines that know no routes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.utils.merge_utils import task_arithmetic, ties
from transformers import PreTrainedModel

from ..analysis.gradients import Tensors


METHODS = ("task_arithmetic", "ties")


def merge(base: Tensors, tasks: list[Tensors], method: str, scale: float, density: float = 0.2) -> Tensors:
    """
    Merge checkpoints that started from the same base, through peft's functions.

    ```
    θ = θ_base + λ Σ_i τ_i                    τ_i = θ_i - θ_base        task arithmetic (arXiv 2212.04089)
    θ = θ_base + λ mean of the τ_i that agree with the elected sign, each trimmed to its largest entries
                                                                        TIES (arXiv 2306.01708)
    ```

    Args:
        base (`dict[str, torch.Tensor]`):
            Parameters of the base, by name.
        tasks (`list[dict[str, torch.Tensor]]`):
            Parameters of the checkpoints.
        method (`str`):
            `"task_arithmetic"` or `"ties"`.
        scale (`float`):
            λ.
        density (`float`, *optional*, defaults to `0.2`):
            Share of the entries of each tensor of a task that TIES keeps.

    Returns:
        `dict[str, torch.Tensor]`: The merged parameters.

    Raises:
        `ValueError`: If the method is unknown, there are no checkpoints, or the density is out of range.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {list(METHODS)}, found {method!r}")
    if not tasks:
        raise ValueError("tasks: expected at least one checkpoint, found none")
    if not 0 < density < 1:
        raise ValueError(f"density: expected a share above 0 and below 1, found {density}")
    merged = {}
    for name, start in base.items():
        start = start.detach()
        deltas = [task[name].detach().to(start) - start for task in tasks]
        weights = torch.full((len(deltas),), float(scale), dtype=start.dtype, device=start.device)
        change = task_arithmetic(deltas, weights) if method == "task_arithmetic" else ties(deltas, weights, density)
        merged[name] = start + change
    return merged


@contextmanager
def held(model: PreTrainedModel, tensors: Tensors) -> Iterator[PreTrainedModel]:
    """
    Context in which a model holds other parameters; afterwards every parameter is as before, to the bit.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        tensors (`dict[str, torch.Tensor]`):
            Parameters by name.
    """
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors[name])
        yield model
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])
