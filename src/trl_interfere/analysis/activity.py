"""Activity of routes on a domain."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .gradients import Batches
from .routes import Cut, RouteMap


def route_activity(model: PreTrainedModel, batches: Batches, route_map: RouteMap) -> np.ndarray:
    """
    Mean size of what each route writes into the residual stream, over completion tokens.

    For an MLP channel |h_r| times the norm of its column of down, for one of an expert also times the weight that the
    router gives the expert, which is 0 on tokens that are not routed to it; for a query head the norm of its
    contribution after o; for a key/value head the mean over the query heads that read it.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        batches (`list[dict[str, torch.Tensor]]`):
            References of the domain.
        route_map ([`RouteMap`]):
            The routes.

    Returns:
        `numpy.ndarray` of shape `(num_routes,)`: Activity.

    Raises:
        `ValueError`: If the model has no module through which the routes of a layer write.
    """
    meter = _Meter()
    tokens = 0
    # Nobody reads the logits, which cost as much as several layers where the vocabulary is large.
    options = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    with torch.no_grad(), _hooked(model, route_map, meter):
        for batch in batches:
            # The state at a token predicts the next one: a completion is computed where its labels are shifted to.
            chosen = torch.zeros_like(batch["labels"], dtype=torch.bool)
            chosen[:, :-1] = batch["labels"][:, 1:] != -100
            meter.chosen = chosen.flatten()
            tokens += int(chosen.sum())
            model(**{name: batch[name] for name in ("input_ids", "attention_mask")}, use_cache=False, **options)
    activity = np.zeros(route_map.num_routes)
    for name, sums in meter.sums.items():
        activity[route_map.cut(name).owners] = sums.cpu().numpy() / max(tokens, 1)
    for layer in range(route_map.num_layers):
        queries, keys = route_map.of_layer("query", layer), route_map.of_layer("key_value", layer)
        if keys.any():
            activity[keys] = activity[queries].reshape(keys.sum(), -1).mean(axis=1)
    return activity


class _Meter:
    """Sums over the chosen tokens, on the device of each module until the end."""

    def __init__(self):
        self.chosen = torch.zeros(0, dtype=torch.bool)
        self.sums: dict[str, torch.Tensor] = {}

    def of_projection(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], name: str, cut: Cut) -> None:
        weight = _widened(module.weight).movedim(cut.axes[0], -1)
        hidden = self._chosen(inputs[0])
        if cut.block_sizes(name, module.weight) == [1]:
            size = hidden.abs() * weight.norm(dim=0)
        else:  # heads: the norm of W_h x_h is the root of x_hᵀ (W_hᵀ W_h) x_h
            hidden = hidden.unflatten(-1, (cut.owners.size, -1))
            columns = weight.unflatten(-1, (cut.owners.size, -1))
            grams = torch.einsum("oha,ohb->hab", columns, columns)
            size = torch.einsum("tha,hab,thb->th", hidden, grams, hidden).clamp(min=0).sqrt()
        self._add(name, size.sum(dim=0, dtype=torch.float64))

    def of_experts(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], name: str, cut: Cut) -> None:
        # The states inside the experts pass through no module: they are computed once more, for the chosen tokens.
        hidden, experts, weights = map(self._chosen, inputs)
        sums = torch.zeros(cut.owners.shape, dtype=torch.float64, device=hidden.device)
        for expert in experts.unique().long().tolist():
            token, slot = torch.where(experts == expert)
            inner = module._apply_gate(F.linear(hidden[token], _widened(module.gate_up_proj[expert])))
            column = _widened(module.down_proj[expert]).movedim(cut.axes[1] - 1, -1).norm(dim=0)
            size = inner.abs() * column * weights[token, slot, None].abs()
            sums[expert] += size.sum(dim=0, dtype=torch.float64)
        self._add(name, sums)

    def _chosen(self, tensor: torch.Tensor) -> torch.Tensor:
        return _widened(tensor.reshape(len(self.chosen), -1)[self.chosen.to(tensor.device)])

    def _add(self, name: str, sums: torch.Tensor) -> None:
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    # Squares of half precision overflow or round away.
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


@contextmanager
def _hooked(model: PreTrainedModel, route_map: RouteMap, meter: _Meter) -> Iterator[None]:
    writers = {name: cut for name, _ in model.named_parameters() if (cut := route_map.cut(name)) and cut.writes}
    silent = np.ones(route_map.num_routes, dtype=bool)
    silent[route_map.of_kind("key_value")] = False
    for cut in writers.values():
        silent[cut.owners] = False
    if silent.any():
        kind, layer, _ = route_map.locate(int(silent.argmax()))
        raise ValueError(
            f"{type(model).__name__}: expected a module through which the {kind} routes of layer {layer} write, "
            f"one of {sorted(name for name, slices in route_map.description.tensors.items() if slices.writes)}, "
            "found none"
        )
    handles = []
    try:
        for name, cut in writers.items():
            module = model.get_submodule(name.rpartition(".")[0])
            measure = meter.of_projection if len(cut.axes) == 1 else meter.of_experts
            handles.append(module.register_forward_pre_hook(partial(measure, name=name, cut=cut)))
        yield
    finally:
        for handle in handles:
            handle.remove()
