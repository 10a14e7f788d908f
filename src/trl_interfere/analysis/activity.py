"""Activity of routes on a domain."""

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
    Mean size of what each route writes into the residual stream, over completion tokens: |h_r| times the norm of the
    column of an MLP channel in down, times the weight of its expert; the norm of the contribution of a query head
    after o; for a key/value head the mean over its query heads.
    """
    # Nobody reads the logits, which cost as much as several layers where the vocabulary is large.
    options = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    with ActivityMeter(model, route_map) as meter, torch.no_grad():
        for batch in batches:
            meter.observe(batch)
            model(**{name: batch[name] for name in ("input_ids", "attention_mask")}, use_cache=False, **options)
    return meter.activity()


class ActivityMeter:
    """Context that measures activity while a model computes for another purpose, such as a gradient."""

    def __init__(self, model: PreTrainedModel, route_map: RouteMap):
        self.route_map = route_map
        cuts = {name: route_map.cut(name) for name, _ in model.named_parameters()}
        self._writers = {name: cut for name, cut in cuts.items() if cut is not None and cut.writes}
        self._modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in self._writers}
        self._chosen_tokens = torch.zeros(0, dtype=torch.bool)
        self._sums: dict[str, torch.Tensor] = {}  # over the chosen tokens, on the device of each module until the end
        self._tokens, self._handles = 0, []

    def __enter__(self) -> "ActivityMeter":
        for name, cut in self._writers.items():
            measure = self._of_projection if len(cut.axes) == 1 else self._of_experts
            hook = partial(measure, name=name, cut=cut)
            self._handles.append(self._modules[name].register_forward_pre_hook(hook))
        return self

    def __exit__(self, *exception) -> None:
        while self._handles:
            self._handles.pop().remove()

    def observe(self, batch: dict[str, torch.Tensor]) -> None:
        """Say what the model computes next."""
        # The state at a token predicts the next one: a completion is computed where its labels are shifted to.
        chosen = torch.zeros_like(batch["labels"], dtype=torch.bool)
        chosen[:, :-1] = batch["labels"][:, 1:] != -100
        self._chosen_tokens = chosen.flatten()
        self._tokens += int(chosen.sum())

    def activity(self) -> np.ndarray:
        route_map = self.route_map
        activity = np.zeros(route_map.num_routes)
        for name, sums in self._sums.items():
            activity[self._writers[name].owners] = sums.cpu().numpy() / max(self._tokens, 1)
        for layer in range(route_map.num_layers):
            queries, keys = route_map.of_layer("query", layer), route_map.of_layer("key_value", layer)
            if keys.any():
                activity[keys] = activity[queries].reshape(keys.sum(), -1).mean(axis=1)
        return activity

    @torch.no_grad()
    def _of_projection(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], name: str, cut: Cut) -> None:
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

    @torch.no_grad()
    def _of_experts(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], name: str, cut: Cut) -> None:
        # The states inside the experts pass through no module: they are computed once more, for the chosen tokens.
        sums = torch.zeros(cut.owners.shape, dtype=torch.float64, device=inputs[0].device)
        if len(inputs) == 1:  # each expert gets all tokens, times the weights that the router gives it
            every = inputs[0].reshape(len(sums), -1, inputs[0].shape[-1])
        else:
            hidden, experts, weights = map(self._chosen, inputs)
        for expert in range(len(sums)):
            if len(inputs) == 1:
                states, weight = self._chosen(every[expert]), 1
            else:
                token, slot = torch.where(experts == expert)
                states, weight = hidden[token], weights[token, slot, None].abs()
            column = _widened(module.down_proj[expert]).movedim(cut.axes[1] - 1, -1).norm(dim=0)
            size = _expert_states(module, expert, states).abs() * column * weight
            sums[expert] = size.sum(dim=0, dtype=torch.float64)
        self._add(name, sums)

    def _chosen(self, tensor: torch.Tensor) -> torch.Tensor:
        chosen = self._chosen_tokens
        return _widened(tensor.reshape(len(chosen), -1)[chosen.to(tensor.device)])

    def _add(self, name: str, sums: torch.Tensor) -> None:
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums


def _expert_states(module: nn.Module, expert: int, states: torch.Tensor) -> torch.Tensor:
    """What an expert writes from, as `transformers.integrations.moe` computes it."""
    weight = _widened(module.gate_up_proj[expert])
    # Whether inputs are rows; those of Llama 4 are and do not say so.
    transposed = getattr(module, "is_transposed", not hasattr(module, "_apply_gate"))
    both = F.linear(states, weight.T if transposed else weight)
    if getattr(module, "has_bias", False):
        both = both + _widened(module.gate_up_proj_bias[expert])
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(both)
    gate, up = both.chunk(2, dim=-1)
    return module.act_fn(gate) * up


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    # Squares of half precision overflow or round away.
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor
