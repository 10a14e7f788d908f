"""Routing of tokens to experts, held fixed while the weights move, so that the loss is smooth along an update."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from .gradients import Batches


_TOPK = (torch.topk, torch.Tensor.topk)


class HeldRouting:
    """
    The experts that the routers of a model choose, recorded batch by batch and put in place of later choices.

    A router takes the top k of its scores, so that the loss jumps where two scores cross: neither a central difference
    nor a quadrature holds across a jump. With the choice held, the scores of the chosen experts still follow the
    weights, and the derivatives at the recorded point are the exact ones. Routers are found by the calls of
    `torch.topk` in a forward pass; a model that makes none has no routers.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        batch (`dict[str, torch.Tensor]`):
            A batch that the routers are looked for with.
    """

    def __init__(self, model: PreTrainedModel, batch: dict[str, torch.Tensor]):
        self.model = model
        self.routers = _find_routers(model, batch)
        self._recorded: dict[tuple[int, str], list[torch.Tensor]] = {}
        self._batch = 0
        self._switched: torch.Tensor | None = None

    def record(self, batches: Batches) -> None:
        """Record what the routers choose now on batches that were not recorded yet."""
        with self._patched(_Record), torch.no_grad():
            for batch in batches:
                if self.routers and (_key(batch["input_ids"]), self.routers[0]) not in self._recorded:
                    _run(self.model, batch)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context in which the recorded choices stand."""
        with self._patched(_Replay):
            yield

    def switched(self, batches: Batches) -> int:
        """Tokens of the completions for which any router now chooses other experts than the recorded ones."""
        count = 0
        with self._patched(_Compare), torch.no_grad():
            for batch in batches if self.routers else []:
                self._switched = torch.zeros(batch["input_ids"].numel(), dtype=torch.bool)
                _run(self.model, batch)
                chosen = torch.zeros_like(batch["labels"], dtype=torch.bool)
                chosen[:, :-1] = batch["labels"][:, 1:] != -100
                count += int(self._switched[chosen.flatten().cpu()].sum())
        return count

    @contextmanager
    def _patched(self, mode: type["_Mode"]) -> Iterator[None]:
        if not self.routers:
            yield
            return

        def observe(model, args, kwargs) -> None:
            self._batch = _key(kwargs["input_ids"])

        handle = self.model.register_forward_pre_hook(observe, with_kwargs=True)
        modules = {name: self.model.get_submodule(name) for name in self.routers}
        forwards = {name: module.forward for name, module in modules.items()}
        own = {name for name, module in modules.items() if "forward" in vars(module)}  # of accelerate, say
        for name, module in modules.items():
            module.forward = partial(self._run_router, forwards[name], name, mode)
        try:
            yield
        finally:
            handle.remove()
            for name, module in modules.items():
                if name in own:
                    module.forward = forwards[name]
                else:
                    del module.forward

    def _run_router(self, forward, name: str, mode: type["_Mode"], *args, **kwargs) -> Any:
        with mode(self, (self._batch, name)):
            return forward(*args, **kwargs)


class _Mode(TorchFunctionMode):
    """Sees the calls of `torch.topk` within one router."""

    def __init__(self, routing: HeldRouting, key: tuple[int, str]):
        super().__init__()
        self.routing, self.key, self.calls = routing, key, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in _TOPK:
            return function(*args, **kwargs)
        self.calls += 1
        return self.choose(function, args, kwargs, self.calls - 1)

    def choose(self, function, args, kwargs, call: int):
        raise NotImplementedError


class _Record(_Mode):
    def choose(self, function, args, kwargs, call):
        found = function(*args, **kwargs)
        self.routing._recorded.setdefault(self.key, [])[call:] = [found.indices.to(torch.int16)]
        return found


class _Replay(_Mode):
    def choose(self, function, args, kwargs, call):
        indices = self.routing._recorded[self.key][call].long()
        scores = args[0] if args else kwargs["input"]
        dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
        return torch.return_types.topk((scores.gather(dim, indices), indices))


class _Compare(_Mode):
    def choose(self, function, args, kwargs, call):
        found = function(*args, **kwargs)
        recorded = self.routing._recorded[self.key][call].long()
        differ = (found.indices.sort(dim=-1).values != recorded.sort(dim=-1).values).flatten(0, -2).any(dim=-1)
        if len(differ) == len(self.routing._switched):
            self.routing._switched |= differ.cpu()
        return found


def _find_routers(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> list[str]:
    """Innermost modules that call `torch.topk` in a forward pass of one sequence."""
    stack: list[str] = []
    found: dict[str, None] = {}

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in _TOPK and stack:
                found[stack[-1]] = None
            return function(*args, **(kwargs or {}))

    def enter(module, args, name: str) -> None:
        stack.append(name)

    def leave(module, args, output) -> None:
        stack.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(enter, name=name)))
        handles.append(module.register_forward_hook(leave))
    try:
        with Watch(), torch.no_grad():
            _run(model, {key: value[:1] for key, value in batch.items()})
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in found if name]


def _run(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)


def _key(input_ids: torch.Tensor) -> int:
    return hash((tuple(input_ids.shape), input_ids.cpu().numpy().tobytes()))
