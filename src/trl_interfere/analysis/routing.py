"""Routing of tokens to experts, held fixed while the weights move, so that the loss is smooth along an update."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from .gradients import Batches


_TOP_K, _MAXIMA = (torch.topk, torch.Tensor.topk), (torch.max, torch.Tensor.max)


class HeldRouting:
    """
    The experts that the routers of a model choose, recorded batch by batch and put in place of later choices.

    A router takes the top k of its scores, so that the loss jumps where two scores cross. With the choice held, the
    weights of the chosen experts still follow the scores, and derivatives at the recorded point are the exact ones.
    Routers are the innermost modules that call `torch.topk` in a forward pass, or a maximum without gradient, which
    with a threshold is the choice of Phi-MoE.
    """

    def __init__(self, model: PreTrainedModel, batch: dict[str, torch.Tensor]):
        self.model = model
        self.routers = _find_routers(model, batch)
        # Choices by batch and router: the indices, or the mask of a threshold, of each call that makes one.
        self._recorded: dict[tuple[int, str], list[torch.Tensor]] = {}
        self._batch = 0
        self._switched = torch.zeros(0, dtype=torch.bool)

    def record(self, batches: Batches) -> None:
        """Record what the routers choose now on batches that were not recorded yet."""
        with self._patched(self._record), torch.no_grad():
            for batch in batches if self.routers else []:
                if (_key(batch["input_ids"]), self.routers[0]) not in self._recorded:
                    _run(self.model, batch)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context in which the recorded choices stand."""
        with self._patched(self._replay):
            yield

    def switched(self, batches: Batches) -> int:
        """Tokens of the completions for which any router now chooses other experts than the recorded ones."""
        total = 0
        with self._patched(self._compare), torch.no_grad():
            for batch in batches if self.routers else []:
                self._switched = torch.zeros(batch["input_ids"].numel(), dtype=torch.bool)
                _run(self.model, batch)
                chosen = torch.zeros_like(batch["labels"], dtype=torch.bool)
                chosen[:, :-1] = batch["labels"][:, 1:] != -100
                total += int(self._switched[chosen.flatten().cpu()].sum())
        return total

    @contextmanager
    def _patched(self, choose: Callable) -> Iterator[None]:
        """Context in which `choose` stands for every choice within the routers."""

        modes: list[_Choices] = []

        def observe(model, args, kwargs) -> None:
            self._batch = _key(kwargs["input_ids"])

        def enter(module, args, name: str) -> None:
            modes.append(_Choices(partial(choose, (self._batch, name), count())))
            modes[-1].__enter__()

        def leave(*_) -> None:
            modes.pop().__exit__(None, None, None)

        handles = [self.model.register_forward_pre_hook(observe, with_kwargs=True)]
        for name in self.routers:
            router = self.model.get_submodule(name)
            handles.append(router.register_forward_pre_hook(partial(enter, name=name)))
            handles.append(router.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, key: tuple[int, str], calls: Iterator[int], function, *args, **kwargs):
        found = function(*args, **kwargs)
        chosen = found if isinstance(found, torch.Tensor) else found.indices.to(torch.int16)
        self._recorded.setdefault(key, [])[next(calls) :] = [chosen]
        return found

    def _replay(self, key: tuple[int, str], calls: Iterator[int], function, input, k=None, dim: int = -1, **kwargs):
        chosen = self._recorded[key][next(calls)]
        if chosen.dtype == torch.bool:
            return chosen
        return torch.return_types.topk((input.gather(dim, chosen.long()), chosen.long()))

    def _compare(self, key: tuple[int, str], calls: Iterator[int], function, *args, **kwargs):
        found, recorded = function(*args, **kwargs), self._recorded[key][next(calls)]
        if recorded.dtype == torch.bool:
            differ = found != recorded
        else:
            differ = found.indices.sort(dim=-1).values != recorded.long().sort(dim=-1).values
        differ = differ.flatten(0, -2).any(dim=-1)
        if len(differ) == len(self._switched):
            self._switched |= differ.cpu()
        return found


class _Choices(TorchFunctionMode):
    """Context in which another function gets every `torch.topk`, `>`, or maximum that keeps its axis."""

    def __init__(self, instead: Callable):
        super().__init__()
        self.instead = instead

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (*_TOP_K, torch.Tensor.gt) or (function in _MAXIMA and kwargs.get("keepdim")):
            return self.instead(function, *args, **kwargs)
        return function(*args, **kwargs)


def _find_routers(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> list[str]:
    stack: list[str] = []
    found: dict[str, None] = {}

    def note(function, *args, **kwargs):
        if function in _TOP_K or (function in _MAXIMA and not torch.is_grad_enabled()):
            found.update(dict.fromkeys(stack[-1:]))
        return function(*args, **kwargs)

    def leave(*_) -> None:
        stack.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        with _Choices(note), torch.enable_grad():
            _run(model, {key: value[:1] for key, value in batch.items()})
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in found if name]


def _run(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)


def _key(input_ids: torch.Tensor) -> int:
    return hash((tuple(input_ids.shape), input_ids.cpu().numpy().tobytes()))
