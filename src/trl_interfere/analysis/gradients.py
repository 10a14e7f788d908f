"""Loss and gradient of a domain."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .objectives import Objective, nll


Tensors = dict[str, torch.Tensor]
Batches = list[dict[str, torch.Tensor]]
# Of what a pass takes beside the weights: passes over longer sequences come later, and memory is in fragments.
_MARGIN = 1.25


class Shard(list):
    """
    Every n-th of a list of batches, for one of n processes of accelerate, which call together: [`mean_loss`] and
    [`mean_gradient`] of a shard are those of the whole list.
    """

    def __init__(self, batches: Batches):
        state = PartialState()
        super().__init__(batches[state.process_index :: state.num_processes])
        self.tokens = num_tokens(batches)


def num_tokens(batches: Batches) -> int:
    """Number of completion tokens that are predicted, in all processes: all but a first one without a prompt."""
    if isinstance(batches, Shard):
        return batches.tokens
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


def mean_loss(model: PreTrainedModel, batches: Batches, objective: Objective = nll) -> float:
    """Mean objective over the completion tokens, in nats."""
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    with torch.no_grad():
        for batch in batches:
            total += objective(model, batch).double().to(total.device)
    if isinstance(batches, Shard):
        total = reduce(total, "sum")
    return float(total) / num_tokens(batches)


def mean_gradient(
    model: PreTrainedModel, batches: Batches, objective: Objective = nll, tokens: int | None = None
) -> tuple[float, Tensors]:
    """
    [`mean_loss`] and its gradient by parameter name, divided by a number of tokens, by default that of `batches`: with
    that of a larger set, the parts of disjoint subsets sum to the gradient of the whole.
    """
    tokens = num_tokens(batches) if tokens is None else tokens
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for batch in batches:
        loss = objective(model, batch) / tokens
        loss.backward()
        total += loss.detach().double().to(total.device)
    shared = isinstance(batches, Shard)
    gradient = {}
    for name, parameter in model.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
        parameter.grad = None
        gradient[name] = reduce(found, "sum") if shared else found
    return float(reduce(total, "sum") if shared else total), gradient


def half_gradients(model: PreTrainedModel, halves: list[Batches], objective: Objective) -> tuple[float, list[Tensors]]:
    """Mean objective of some references in parts, and the gradients of the parts, which sum to that of the whole."""
    tokens, total, gradients = sum(map(num_tokens, halves)), 0.0, []
    devices = {parameter.device for parameter in model.parameters()}
    for half in halves:
        held = {device: torch.cuda.memory_allocated(device) for device in devices if device.type == "cuda"}
        loss, gradient = mean_gradient(model, half, objective, tokens)
        # The way to host memory and back can take as long as a pass.
        if not all(device.type == "cpu" or (device in held and _has_room(device, held[device])) for device in devices):
            gradient = {name: gradient.pop(name).cpu() for name in list(gradient)}
        total += loss
        gradients.append(gradient)
    return total, gradients


def _has_room(device: torch.device, held: int) -> bool:
    """
    Whether a device can keep the gradient of a pass beside the next pass; `held` was allocated before it. The peak of
    the process counts as taken by the pass: the answer errs toward no.
    """
    taken = torch.cuda.max_memory_allocated(device) - held
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused >= _MARGIN * taken


def summed(parts: list[Tensors]) -> Tensors:
    """The gradient of the whole, in the memory of its first part."""
    gradient, *rest = parts
    for part in rest:
        for name, tensor in part.items():
            gradient[name] += tensor.to(gradient[name].device)
    return gradient


@contextmanager
def checkpointed(model: PreTrainedModel, enabled: bool = True) -> Iterator[PreTrainedModel]:
    """
    Context of gradient checkpointing. The layers alone are told that they train, which is when transformers
    checkpoints; their parts stay in evaluation mode, so that dropout stays off.
    """
    layers = [module for module in model.modules() if enabled and isinstance(module, GradientCheckpointingLayer)]
    if enabled and not layers:
        raise ValueError(f"gradient_checkpointing: expected a model with layers that support it, found {type(model)}")
    for layer in layers:
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = layer.training = True
    try:
        yield model
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False
