"""Linear layers of a block: `nn.Linear`, GPT-2's `Conv1D`, and experts whose weights are one tensor."""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .block_stream import Captured, Entry


@dataclass(frozen=True)
class Layer:
    """One matrix of a block: the module and parameter that hold it, and its position in a tensor of experts."""

    path: str
    parameter: str = "weight"
    expert: int | None = None

    @property
    def tensor(self) -> str:
        return f"{self.path}.{self.parameter}"

    @property
    def name(self) -> str:
        """Path of the module, or of the tensor of experts."""
        return self.path if self.expert is None else self.tensor

    def weight(self, block: nn.Module) -> torch.Tensor:
        """The matrix as a view of shape `(outputs, inputs)`."""
        module = block.get_submodule(self.path)
        weight = getattr(module, self.parameter).detach()
        if self.expert is not None:
            weight = weight[self.expert]
        return weight.T if is_transposed(module) else weight

    def bias(self, block: nn.Module) -> torch.Tensor | None:
        module = block.get_submodule(self.path)
        if self.expert is None:
            return module.bias
        bias = getattr(module, f"{self.parameter}_bias", None)
        return None if bias is None else bias[self.expert]


Group = list[Layer]  # that get the same input
Step = list[Group]  # that get what one module gets: layers of one tensor, or a matrix of every expert


class Call(NamedTuple):
    """What a module of a block got in a forward pass, and what it gave."""

    path: str
    module: nn.Module
    arguments: tuple[torch.Tensor, ...]
    output: torch.Tensor


class Pass:
    """
    A batch of references of one domain on its way through the blocks of its peak, and of the healed model unless that
    is to get what the peak gets.
    """

    def __init__(self, peak: Entry, healed: Entry | None):
        self.peak, self.healed = peak, healed
        self.kept: list[list[torch.Tensor]] = []
        self.now: list[torch.Tensor] = []
        self.switched = self.routed = 0
        self._outputs: dict[str, object] = {}

    def run_peak(self, block: nn.Module, index: int, chosen: Callable[[str], bool]) -> list[Step]:
        """
        Run a block of the peak, keep what the layers got there, or gave where that is narrower, and return the steps
        to solve for.
        """

        def note(path, module, args, kwargs, output):
            calls.append(Call(path, module, (*args, *kwargs.values()), output))

        calls: list[Call] = []
        with ExitStack() as hooks:
            for path, module in block.named_modules():
                if isinstance(module, (nn.Linear, Conv1D)) or is_experts(module):
                    hooks.enter_context(module.register_forward_hook(partial(note, path), with_kwargs=True))
            hidden = self.peak.run(block, index)
        steps = _steps([call for call in calls if chosen(call.path)], self.peak.mask.numel())
        by_path = {call.path: call for call in calls}
        self.kept = []
        for group, *_ in steps:
            call = by_path[group[0].path]
            values = call.arguments[: 2 if is_experts(call.module) else 1]
            if narrow(group, block) and self.healed is not None and not is_experts(call.module):
                values = [torch.cat([by_path[layer.path].output for layer in group], -1)]
            self.kept.append([self.peak.tokens(value).cpu() for value in values])
        self.peak.hidden = hidden.cpu()
        return steps

    def capture(self, block: nn.Module, index: int, step: int, layer: Layer, done: list[str]) -> None:
        """Find what a layer gets in the healed model; the outputs of modules that are done are kept."""

        def stop(module, args, kwargs):
            found.extend((*args, *kwargs.values()))
            raise Captured

        found: list[torch.Tensor] = []
        module = block.get_submodule(layer.path)
        with suppress(Captured), module.register_forward_pre_hook(stop, with_kwargs=True):
            self._run(block, index, done)
        self.now = [self.healed.tokens(value) for value in found[: len(self.kept[step])]]
        if layer.expert is not None and layer.parameter != "down_proj":
            before, now = self.kept[step][1], self.now[1].cpu()
            same = (before[:, :, None] == now[:, None, :]).any(-1)
            self.switched, self.routed = self.switched + int((~same).sum()), self.routed + same.numel()

    def tokens(self, group: Group, step: int, peak: nn.Module, healed: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """For each token what the layers get in the healed model, and what they got, or gave, in the peak."""
        layer = group[0]
        kept = [value.to(layer.weight(healed).device) for value in self.kept[step]]
        if layer.expert is None:
            return (kept if self.healed is None else self.now)[0], kept[0]
        routed = (kept[1] == layer.expert).any(-1)
        before = expert_inputs(layer, peak, kept[0][routed])
        if self.healed is None:
            return before, before
        if narrow(group, peak):
            before = nn.functional.linear(before, layer.weight(peak), layer.bias(peak))
        return expert_inputs(layer, healed, self.now[0][routed]), before

    def run_healed(self, block: nn.Module, index: int, done: list[str]) -> None:
        self.healed.hidden = self._run(block, index, done).cpu()
        self._outputs = {}

    def _run(self, block: nn.Module, index: int, done: list[str]) -> torch.Tensor:
        paths = {*done, *self._outputs}
        for path in paths:
            module = block.get_submodule(path)
            module.forward = _remembering(module.forward, path, self._outputs)
        try:
            return self.healed.run(block, index)
        finally:
            for path in paths:
                del block.get_submodule(path).forward
            size = self.healed.hidden.numel()
            self._outputs = {  # wide ones are computed again, to save their memory
                path: output
                for path, output in self._outputs.items()
                if path in done and not (isinstance(output, torch.Tensor) and output.numel() > size)
            }


def narrow(group: Group, block: nn.Module) -> bool:
    """Whether layers have fewer outputs than inputs together."""
    shapes = [layer.weight(block).shape for layer in group]
    return sum(outputs for outputs, _ in shapes) < shapes[0][1]


def is_transposed(module: nn.Module) -> bool:
    """Whether a module stores its weights with inputs as rows."""
    return isinstance(module, Conv1D) or getattr(module, "is_transposed", False)


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of all experts in tensors of three axes, as transformers builds them."""
    return hasattr(module, "is_transposed") and getattr(getattr(module, "down_proj", None), "ndim", 0) == 3


def expert_inputs(layer: Layer, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What a matrix of an expert gets for the hidden states that are routed to it."""
    experts = block.get_submodule(layer.path)
    if layer.parameter != "down_proj":
        return hidden
    up = Layer(layer.path, "gate_up_proj" if experts.has_gate else "up_proj", layer.expert)
    hidden = nn.functional.linear(hidden, up.weight(block), up.bias(block))
    return experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)


def finished(block: nn.Module, solved: list[str], ahead: list[str]) -> list[str]:
    """The outermost modules of a block with layers that are solved for, and none that is still to be."""
    found: list[str] = []
    for path, _ in block.named_modules():  # a module comes before those inside it
        inside = f"{path}."
        if (
            path
            and not any(path.startswith(f"{other}.") for other in found)
            and any(other == path or other.startswith(inside) for other in solved)
            and not any(other == path or other.startswith(inside) for other in ahead)
        ):
            found.append(path)
    return found


def _steps(calls: list[Call], tokens: int) -> list[Step]:
    times, steps, value = Counter(call.path for call in calls), [], None
    for call in calls:
        if times[call.path] > 1 or call.arguments[0].shape[:-1].numel() != tokens:
            continue
        if is_experts(call.module):
            for parameter in ("gate_up_proj" if call.module.has_gate else "up_proj", "down_proj"):
                steps.append([[Layer(call.path, parameter, expert)] for expert in range(call.module.num_experts)])
        elif call.arguments[0] is value:
            steps[-1][0].append(Layer(call.path))
        else:
            steps.append([[Layer(call.path)]])
        value = call.arguments[0]
    return steps


def _remembering(forward: Callable, path: str, outputs: dict[str, object]) -> Callable:
    def call(*args, **kwargs):
        if path not in outputs:
            outputs[path] = forward(*args, **kwargs)
        return outputs[path]

    return call
