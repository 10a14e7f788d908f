"""Transformer blocks of a checkpoint, one at a time, on cached hidden states."""

import copy
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint import Checkpoint
from ..models import load_model, model_class


class Captured(Exception):
    """Ends a forward pass where what it was run for has been seen."""


def skeleton(checkpoint: Checkpoint) -> nn.Module:
    """The model of a checkpoint without its weights; buffers, such as those of rotary embeddings, are real."""
    cls, config = model_class(checkpoint.config), checkpoint.config
    with init_empty_weights(include_buffers=False):
        model = cls(config) if issubclass(cls, PreTrainedModel) else cls.from_config(config)
    return model.eval()


def block_names(model: nn.Module) -> list[str]:
    """Full names of the blocks of a model: the items of the `ModuleList` with the most parameters."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        raise ValueError(f"{type(model).__name__}: expected a model with a list of blocks, found none")
    name = max(lists, key=lambda name: sum(parameter.numel() for parameter in lists[name].parameters()))
    return [f"{name}.{index}" for index in range(len(lists[name]))]


class BlockStream:
    """
    Blocks of one checkpoint, read from its files when they are asked for, with what an adapter adds or without.
    A checkpoint with tensors that transformers converts on loading, such as those of single experts, is loaded whole
    into host memory. `model` is its [`skeleton`].
    """

    def __init__(
        self, checkpoint: Checkpoint, model: nn.Module, dtype: torch.dtype, device: torch.device, adapted: bool = True
    ):
        self.checkpoint, self.model, self.dtype, self.device = checkpoint, model, dtype, device
        self.adapted = adapted
        self.names = block_names(model)
        inside = tuple(f"{name}." for name in self.names)
        self.outside = [name for name, _ in model.named_parameters() if not name.startswith(inside)]
        self._whole = None
        if any(name not in checkpoint for name, _ in model.named_parameters()):
            place, options = checkpoint.folder, {"dtype": "auto"}
            if adapted:
                place, options = checkpoint.name, {"base": checkpoint.folder}
            self._whole = load_model(place, **options).state_dict()

    def tensor(self, name: str, rows: Any = ...) -> torch.Tensor:
        """A tensor of the checkpoint, or some of its rows."""
        if self._whole is None:
            stored = self.checkpoint[name]
            with safe_open(stored.file, framework="pt", backend="pread") as file:
                value = file.get_slice(stored.name)[rows]
            if self.adapted and (factors := self.checkpoint.factors(name)) is not None:
                left, right = map(torch.from_numpy, factors)
                value = torch.addmm(value.float(), left[rows], right)
        else:
            value = self._whole[name][rows]
        return value.to(device=self.device, dtype=self.dtype if value.is_floating_point() else None)

    def block(self, index: int) -> nn.Module:
        """A block with its weights."""
        block = copy.deepcopy(self.model.get_submodule(self.names[index]))
        state = {name: self.tensor(f"{self.names[index]}.{name}") for name in block.state_dict()}
        block.load_state_dict(state, assign=True)
        return block.requires_grad_(False).to(self.device)

    @torch.no_grad()
    def entries(self, batches: list[dict[str, torch.Tensor]]) -> Iterator["Entry"]:
        """What the first block gets, and the further arguments of every block, for each batch."""
        model, head = self.model, self.model.get_output_embeddings()
        unused = set() if head is None else set(head.parameters()) - set(model.get_input_embeddings().parameters())
        empty = {name: model.get_parameter(name) for name in self.outside}
        caught: list[tuple[tuple, dict]] = []
        try:
            for name, parameter in empty.items():
                if parameter not in unused:
                    _set(model, name, nn.Parameter(self.tensor(name), requires_grad=False))
            for name, buffer in list(model.named_buffers()):
                _set(model, name, buffer.to(self.device))
            for index, name in enumerate(self.names):
                model.get_submodule(name).forward = _catcher(caught, index == len(self.names) - 1)
            for batch in batches:
                caught.clear()
                inputs = {key: batch[key].to(self.device) for key in ("input_ids", "attention_mask")}
                with suppress(Captured):
                    model(**inputs, use_cache=False)
                yield Entry(caught[0][0][0], batch["attention_mask"].bool(), [(a[1:], k) for a, k in caught])
        finally:
            for name in self.names:
                model.get_submodule(name).__dict__.pop("forward", None)
            for name, parameter in empty.items():
                _set(model, name, parameter)


class Entry:
    """A batch of references before the next block: its hidden states, a mask of tokens, what else each block gets."""

    def __init__(self, hidden: torch.Tensor, mask: torch.Tensor, arguments: list[tuple[tuple, dict[str, Any]]]):
        self.hidden, self.mask, self.arguments = hidden.cpu(), mask, arguments

    def run(self, block: nn.Module, index: int) -> torch.Tensor:
        """Hidden states after a block."""
        args, kwargs = self.arguments[index]
        output = block(self.hidden.to(next(block.parameters()).device), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Rows of the positions that hold tokens."""
        return values.flatten(0, -2)[self.mask.flatten().to(values.device)]


def _set(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, value)


def _catcher(caught: list, last: bool):
    def forward(*args, **kwargs):
        if not args:
            args = (kwargs.pop("hidden_states"),)
        caught.append((args, kwargs))
        if last:
            raise Captured
        # Some models take the first item of what a block returns, others hand on what it is.
        return args[0] if isinstance(args[0], tuple) else (args[0],)

    return forward
