"""Baselines that know no routes: task arithmetic and TIES between the checkpoints of a run."""

import torch
from peft.utils.merge_utils import task_arithmetic, ties


Tensors = dict[str, torch.Tensor]
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
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {list(METHODS)}, found {method!r}")
    merged = {}
    for name, start in base.items():
        start = start.detach()
        deltas = [task[name].detach().to(start) - start for task in tasks]
        weights = torch.full((len(deltas),), float(scale), dtype=start.dtype, device=start.device)
        change = task_arithmetic(deltas, weights) if method == "task_arithmetic" else ties(deltas, weights, density)
        merged[name] = start + change
    return merged
