"""Merging of the checkpoints of a run: task arithmetic, TIES, and by Fisher information."""

import torch
from peft.utils.merge_utils import task_arithmetic, ties
from transformers import PreTrainedModel

from trl_interfere.analysis.objectives import nll
from trl_interfere.analysis.references import References


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


def squared_gradients(model: PreTrainedModel, references: References) -> Tensors:
    """Diagonal of the Fisher information: the mean over a model's own samples of the squared gradient of `log p`."""
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for row in range(len(references.completions)):
        model.zero_grad()
        for batch in references.take([row]).batches(1, 0, model.device):
            nll(model, batch).backward()
        for name, parameter in model.named_parameters():
            total[name] += parameter.grad.square() / len(references.completions)
    return total


@torch.no_grad()
def fisher(models: list[PreTrainedModel], weights: list[Tensors], floor: float = 1e-12) -> PreTrainedModel:
    """
    `θ = Σ_i F_i θ_i / Σ_i F_i`, elementwise (Fisher merging, arXiv 2111.09832), with each F_i over its mean. The last
    model is changed.
    """
    scaled = [{name: tensor / _mean(own) + floor for name, tensor in own.items()} for own in weights]
    merged = {}
    for name, _ in models[-1].named_parameters():
        parts = [(own[name], model.get_parameter(name)) for own, model in zip(scaled, models, strict=True)]
        merged[name] = sum(weight * tensor for weight, tensor in parts) / sum(weight for weight, _ in parts)
    for name, tensor in merged.items():
        models[-1].get_parameter(name).copy_(tensor)
    return models[-1]


def _mean(tensors: Tensors) -> float:
    return float(sum(tensor.sum() for tensor in tensors.values()) / sum(tensor.numel() for tensor in tensors.values()))
