"""Linear layers of a block: `nn.Linear`, GPT-2's `Conv1D`, and experts whose weights are one tensor."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .block_stream import Entry


@dataclass(frozen=True)
class Layer:
    """
    One matrix of a block.

    Args:
        path (`str`):
            Module that holds it, relative to the block.
        parameter (`str`):
            Name of the parameter: `"weight"`, or that of a tensor of experts.
        expert (`int`, *optional*):
            Position in that tensor.
    """

    path: str
    parameter: str = "weight"
    expert: int | None = None

    @property
    def name(self) -> str:
        """Path of the module, or of the tensor of experts."""
        return self.path if self.expert is None else f"{self.path}.{self.parameter}"

    def weight(self, block: nn.Module) -> torch.Tensor:
        """The matrix as a view of shape `(outputs, inputs)`."""
        module = block.get_submodule(self.path)
        weight = getattr(module, self.parameter).detach()
        if self.expert is not None:
            weight = weight[self.expert]
        return weight.T if isinstance(module, Conv1D) or getattr(module, "is_transposed", False) else weight

    def bias(self, block: nn.Module) -> torch.Tensor | None:
        module = block.get_submodule(self.path)
        if self.expert is None:
            return module.bias
        bias = getattr(module, f"{self.parameter}_bias", None)
        return None if bias is None else bias[self.expert]


@dataclass
class Group:
    """
    Layers that get the same input, in the order in which a forward pass reaches them.

    Args:
        stop (`str`):
            Module at which a forward pass has what it needs.
        layers (`list[Layer]`):
            The layers.
    """

    stop: str
    layers: list[Layer]

    def inputs(self, block: nn.Module, call: "Call", routing: torch.Tensor | None) -> torch.Tensor:
        """What the layers get for the tokens that count, of shape `(tokens, inputs)`."""
        layer = self.layers[0]
        if layer.expert is None:
            return call.entry.tokens(call.arguments[0])
        experts, hidden = block.get_submodule(layer.path), call.arguments[0]
        chosen = (routing == layer.expert).any(-1) & call.entry.mask.flatten().to(routing.device)
        hidden = hidden.flatten(0, -2)[chosen]
        if layer.parameter != "down_proj":
            return hidden
        up = Layer(layer.path, "gate_up_proj" if experts.has_gate else "up_proj", layer.expert)
        hidden = nn.functional.linear(hidden, up.weight(block), up.bias(block))
        return experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)


class Captured(Exception):
    """Ends a forward pass where what it was run for has been seen."""


@dataclass
class Call:
    """What a module of a block gets in a forward pass."""

    entry: Entry
    arguments: tuple[torch.Tensor, ...]

    @classmethod
    def capture(cls, entry: Entry, block: nn.Module, index: int, path: str) -> "Call":
        def stop(module, args, kwargs):
            found.extend((*args, *kwargs.values()))
            raise Captured

        found: list[torch.Tensor] = []
        handle = block.get_submodule(path).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            entry.run(block, index)
        except Captured:
            pass
        finally:
            handle.remove()
        return cls(entry, tuple(found))


def steps(block: nn.Module, entry: Entry, index: int) -> Iterator[list[Group]]:
    """
    Groups of layers of a block in the order of a forward pass. Those of one step need one capture: the layers that get
    one tensor, or the tensors of all experts.
    """
    seen: list[tuple[str, nn.Module, tuple]] = []

    def note(path):
        def hook(module, args):
            value = args[0]
            # The same memory may hold another tensor later on: what is kept cannot be freed.
            seen.append((path, module, value, entry.tokens(value) is not None))

        return hook

    handles = []
    for path, module in block.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) or is_experts(module):
            handles.append(module.register_forward_pre_hook(note(path)))
    try:
        entry.run(block, index)
    finally:
        for handle in handles:
            handle.remove()
    shared: list[tuple[torch.Tensor, Group]] = []
    for path, module, value, whole in seen:
        if is_experts(module):
            for parameter in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
                layers = [Layer(path, parameter, expert) for expert in range(module.num_experts)]
                shared.append((None, [Group(path, [layer]) for layer in layers]))
        elif whole:
            if shared and shared[-1][0] is value:
                shared[-1][1][0].layers.append(Layer(path))
            else:
                shared.append((value, [Group(path, [Layer(path)])]))
    for _, groups in shared:
        yield groups


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of all experts in tensors of three axes, as transformers builds them."""
    return hasattr(module, "is_transposed") and getattr(getattr(module, "down_proj", None), "ndim", 0) == 3
