"""Transformer blocks of a checkpoint, one at a time, on cached hidden states."""

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint import Checkpoint
from ..models import load_model, model_class


class _Captured(Exception):
    """Ends a forward pass where the arguments of all blocks have been seen."""


def skeleton(checkpoint: Checkpoint) -> nn.Module:
    """The model of a checkpoint without its weights; buffers, such as those of rotary embeddings, are real."""
    cls, config = model_class(checkpoint.config), checkpoint.config
    with init_empty_weights(include_buffers=False):
        model = cls(config) if issubclass(cls, PreTrainedModel) else cls.from_config(config)
    return model.eval()


def block_names(model: nn.Module) -> list[str]:
    """
    Full names of the blocks of a model: the items of the `ModuleList` with the most parameters.

    Raises:
        `ValueError`: If the model has no list of blocks.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        raise ValueError(f"{type(model).__name__}: expected a model with a list of blocks, found none")
    name = max(lists, key=lambda name: sum(parameter.numel() for parameter in lists[name].parameters()))
    return [f"{name}.{index}" for index in range(len(lists[name]))]


def read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor of a checkpoint, with what an adapter adds to it."""
    stored = checkpoint[name]
    with safe_open(stored.file, framework="pt") as file:
        value = file.get_tensor(stored.name)
    factors = checkpoint.factors(name)
    if factors is None:
        return value
    left, right = (torch.from_numpy(factor) for factor in factors)
    return value.float() + left @ right


class BlockStream:
    """
    Blocks of one checkpoint, read from its files when they are asked for.

    A checkpoint with tensors that transformers converts on loading, such as those of single experts, is loaded whole
    into host memory.

    Args:
        checkpoint ([`~trl_interfere.checkpoint.Checkpoint`]):
            The checkpoint, whole weights or a LoRA adapter on its base.
        model (`torch.nn.Module`):
            Its [`skeleton`].
        dtype (`torch.dtype`):
            Data type to compute in.
        device (`torch.device`):
            Device to compute on.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, dtype: torch.dtype, device: torch.device):
        self.checkpoint, self.model, self.dtype, self.device = checkpoint, model, dtype, device
        self.names = block_names(model)
        head = model.get_output_embeddings()
        tied = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
        unused = set() if head is None else {id(parameter) for parameter in head.parameters()} - tied
        inside = tuple(f"{name}." for name in self.names)
        self.outside = [name for name, _ in model.named_parameters() if not name.startswith(inside)]
        self._entry = [name for name in self.outside if id(model.get_parameter(name)) not in unused]
        self._whole = None
        if any(name not in checkpoint for name, _ in model.named_parameters()):
            self._whole = load_model(checkpoint.name, dtype=dtype).state_dict()

    def tensor(self, name: str) -> torch.Tensor:
        value = read_tensor(self.checkpoint, name) if self._whole is None else self._whole[name]
        return value.to(device=self.device, dtype=self.dtype if value.is_floating_point() else None)

    def block(self, index: int) -> nn.Module:
        """A block with its weights."""
        block = copy.deepcopy(self.model.get_submodule(self.names[index]))
        state = {name: self.tensor(f"{self.names[index]}.{name}") for name in block.state_dict()}
        block.load_state_dict(state, assign=True)
        return block.requires_grad_(False).to(self.device)

    @torch.no_grad()
    def entries(self, batches: list[dict[str, torch.Tensor]]) -> list["Entry"]:
        """What the first block gets, and the further arguments of every block, for each batch."""
        model = copy.deepcopy(self.model)
        for name in self._entry:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.Parameter(self.tensor(name), requires_grad=False))
        for name, buffer in list(model.named_buffers()):
            owner, _, attribute = name.rpartition(".")
            model.get_submodule(owner)._buffers[attribute] = buffer.to(self.device)
        caught: dict[int, tuple[tuple, dict]] = {}
        for index, name in enumerate(self.names):
            model.get_submodule(name).forward = _catcher(caught, index, len(self.names))
        entries = []
        for batch in batches:
            caught.clear()
            try:
                model(
                    input_ids=batch["input_ids"].to(self.device),
                    attention_mask=batch["attention_mask"].to(self.device),
                    use_cache=False,
                )
            except _Captured:
                pass
            hidden = caught[0][0][0]
            arguments = [(args[1:], kwargs) for args, kwargs in (caught[i] for i in range(len(self.names)))]
            entries.append(Entry(hidden, batch["attention_mask"].bool(), arguments))
        return entries


class Entry:
    """
    A batch of references on its way through the blocks.

    Args:
        hidden (`torch.Tensor` of shape `(batch, length, width)`):
            Hidden states before the next block.
        mask (`torch.Tensor` of shape `(batch, length)`):
            Which positions hold tokens.
        arguments (`list[tuple[tuple, dict]]`):
            What each block gets besides.
    """

    def __init__(self, hidden: torch.Tensor, mask: torch.Tensor, arguments: list[tuple[tuple, dict[str, Any]]]):
        self.hidden, self.mask, self.arguments = hidden.cpu(), mask, arguments

    def run(self, block: nn.Module, index: int) -> torch.Tensor:
        """Hidden states after a block."""
        args, kwargs = self.arguments[index]
        output = block(self.hidden.to(next(block.parameters()).device), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def tokens(self, values: torch.Tensor) -> torch.Tensor | None:
        """Rows of the positions that hold tokens; `None` where a module does not get one row for each position."""
        rows = values.flatten(0, -2)
        return rows[self.mask.flatten().to(rows.device)] if len(rows) == self.mask.numel() else None


def _catcher(caught: dict, index: int, count: int):
    def forward(*args, **kwargs):
        if not args:
            args = (kwargs.pop("hidden_states"),)
        caught[index] = (args, kwargs)
        if index == count - 1:
            raise _Captured
        return args[0]

    return forward
