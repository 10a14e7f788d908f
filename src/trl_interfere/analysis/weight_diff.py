"""What an update changed: its sparsity, and the size of its edit on each route."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..checkpoint import BITS, Checkpoint, Index, check_comparable
from .overlap import pairwise_overlaps
from .routes import RouteMap


ABSOLUTE = 1e-7
RELATIVE = 1e-3
_COUNTS = ["below_absolute", "below_relative", "identical"]
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass
class UpdateStatistics:
    """
    What changed from one checkpoint to the next.

    Sparsity depends on the storage data type: between two bfloat16 checkpoints a change of less than 1e-7 is nearly
    always none at all ([arXiv 2511.08567](https://huggingface.co/papers/2511.08567)).

    Args:
        before (`str`):
            Name of the checkpoint before the update.
        after (`str`):
            Name of the checkpoint after it.
        tensors (`pandas.DataFrame`):
            One row by tensor: `dtype`, the storage data type (`"bfloat16 -> float32"` where it differs between the
            checkpoints, `"bfloat16 + adapter"` where an adapter is not merged), the number of `elements`, how many are
            `below_absolute` (|δ| < 1e-7), `below_relative` (|δ| <= 1e-3 |θ|, θ the value before; 0 that stays 0
            counts) and `identical` (to the bit; in mixed data types, by value), and `squared_norm`, the sum of δ².
        edit_size (`numpy.ndarray` of shape `(num_routes,)`, *optional*):
            Norm ‖δ_r‖ of the update over the slices of each route. `None` without a route map.
        outside (`float`, *optional*):
            Norm of the update over all elements that no route owns.
    """

    before: str
    after: str
    tensors: pd.DataFrame = field(repr=False)
    edit_size: np.ndarray | None = field(default=None, repr=False)
    outside: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """
        Every figure but those of single routes: shares of the `whole` model, `by_kind` of tensor, e.g.
        `"mlp.down_proj.weight"`, and `by_layer`, `"0"` and up, and `"outside"` for what lies in none.
        """
        layers, kinds = map(list, zip(*map(_place, self.tensors.index), strict=True))
        by_layer = {name: _shares(part) for name, part in self.tensors.groupby(layers, sort=False)}
        return {
            "before": self.before,
            "after": self.after,
            "dtypes": sorted({*self.tensors["dtype"]}),
            "thresholds": {"absolute": ABSOLUTE, "relative": RELATIVE},
            "whole": _shares(self.tensors),
            "by_kind": {name: _shares(part) for name, part in self.tensors.groupby(kinds, sort=False)},
            "by_layer": dict(sorted(by_layer.items(), key=lambda item: (item[0] == "outside", item[0].zfill(6)))),
            "norm_outside_routes": self.outside,
        }


def update_statistics(
    checkpoints: Sequence[Checkpoint],
    route_map: RouteMap | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[UpdateStatistics]:
    """
    Compare checkpoints as streams, a few rows of each at a time.

    Differences are computed in float32 (float64 where a checkpoint stores it), and their squares are summed in
    float64. Memory does not grow with the checkpoints.

    Args:
        checkpoints (`list[Checkpoint]`):
            Before and after the update; or base, before and after, in which case the second is read only once.
        route_map ([`RouteMap`], *optional*):
            Routes to take edit sizes of.
        progress (`Callable[[int, int], None]`, *optional*):
            Called after each tensor with the number of bytes that are done and the number of all.

    Returns:
        `list[UpdateStatistics]`: One per pair of neighbours: `[update]`, or `[earlier update, update]`.

    Raises:
        `ValueError`: If the checkpoints do not hold the same tensors, hold NaN or infinity, or are identical.

    Example:

    ```python
    >>> from trl_interfere.checkpoint import Checkpoint
    >>> from trl_interfere.analysis.weight_diff import update_statistics

    >>> checkpoints = [Checkpoint("out/stages/1-math"), Checkpoint("out/stages/2-qa")]
    >>> (update,) = update_statistics(checkpoints)
    >>> update.to_dict()["whole"], update.tensors.loc["model.embed_tokens.weight"]
    ```
    """
    if len(checkpoints) not in (2, 3):
        raise ValueError(f"checkpoints: expected two or three, found {len(checkpoints)}")
    for checkpoint in checkpoints:
        names = check_comparable(checkpoints[-2], checkpoint)
    sizes = [sum(checkpoint[name].nbytes for checkpoint in checkpoints) for name in names]
    pairs, routes = list(itertools.pairwise(checkpoints)), 0 if route_map is None else route_map.num_routes
    rows: list[list[tuple]] = []
    squares = torch.zeros(len(pairs), routes + 1, dtype=torch.float64)  # of each route, and outside
    for name, done in zip(names, itertools.accumulate(sizes), strict=True):
        rows.append(_compare(checkpoints, name, route_map, squares))
        progress(done, sum(sizes))
    statistics = []
    for (first, second), found, total in zip(pairs, zip(*rows, strict=True), squares.sqrt().numpy(), strict=True):
        edits = (None, None) if route_map is None else (total[:-1], float(total[-1]))
        tensors = pd.DataFrame(found, names, ["dtype", "elements", *_COUNTS, "squared_norm"])
        if (tensors["identical"] == tensors["elements"]).all():
            raise ValueError(
                f"{second.name}: expected an update from {first.name}, found identical checkpoints: "
                f"all {len(names)} tensors, {names[0]} to {names[-1]}, are the same to the bit"
            )
        statistics.append(UpdateStatistics(first.name, second.name, tensors, *edits))
    return statistics


def stage_edits(
    checkpoints: Sequence[Checkpoint], domains: Sequence[str], route_map: RouteMap
) -> dict[str, dict[str, Any]]:
    """
    What each stage of a run changed, from the base on: `updates` by domain, and under `changed` the overlap of the
    routes that two stages changed most, as `{first: {second: {kind: figures}}}`.
    """
    pairs = zip(domains, itertools.pairwise(checkpoints), strict=True)
    updates = {domain: update_statistics(pair, route_map)[0] for domain, pair in pairs}
    return {
        "updates": {domain: update.to_dict() for domain, update in updates.items()},
        "changed": pairwise_overlaps({domain: update.edit_size for domain, update in updates.items()}, route_map),
    }


def identical_when_stored(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> float:
    """Share of the parameters that rounding to a data type would make the same: the control of every sparsity."""
    same = sum(int((before[name].to(dtype) == after[name].to(before[name].device, dtype)).sum()) for name in before)
    return same / sum(before[name].numel() for name in before)


def _compare(
    checkpoints: Sequence[Checkpoint], name: str, route_map: RouteMap | None, squares: torch.Tensor
) -> list[tuple]:
    """Rows of one tensor in two or three checkpoints; `squares` gets its sums by route and, last, of those outside."""
    stored = [checkpoint[name] for checkpoint in checkpoints]
    dtype = torch.float64 if any(entry.dtype == "float64" for entry in stored) else torch.float32
    factors = [checkpoint.factors(name) for checkpoint in checkpoints]
    factors = [pair and [torch.from_numpy(part).to(dtype) for part in pair] for pair in factors]
    width = max(getattr(torch, entry.dtype).itemsize for entry in stored)
    owner = None
    if route_map is not None:
        like = torch.zeros((), dtype=torch.float64).expand(stored[0].shape)
        owner = route_map.spread(name, np.arange(float(route_map.num_routes)), like)
    counts, norms = np.zeros((len(stored) - 1, 3), dtype=np.int64), np.zeros(len(stored) - 1)
    for together in zip(*(entry.parts(width) for entry in stored), strict=True):
        index, read = together[0][0], [part for _, part in together]
        added = [pair and pair[0][index[0]] @ pair[1] for pair in factors]
        for pair, (before, after) in enumerate(itertools.pairwise(read)):
            start = before.to(dtype)
            delta = after.to(dtype) - start
            if added[pair + 1] is not None:
                delta += added[pair + 1]
            if added[pair] is not None:
                delta -= added[pair]
                start = start + added[pair]
            bits = BITS[before.element_size()]
            comparable = before.dtype == after.dtype and added[pair] is added[pair + 1] is None
            identical = before.view(bits) == after.view(bits) if comparable else delta == 0
            norms[pair] += _add_squares(squares[pair], owner, index, delta)
            size = delta.abs_()
            masks = (size < ABSOLUTE, size <= start.abs().mul_(RELATIVE), identical)
            counts[pair] += [int(torch.count_nonzero(mask)) for mask in masks]
    for entry in stored if not np.isfinite(norms).all() else []:
        count = sum(int((~torch.isfinite(part)).sum()) for _, part in entry.parts())
        if count:
            raise ValueError(f"{entry.file}: tensor {name}: expected finite values, found {count} NaN or infinity")
    rows = []
    for pair, (before, after) in enumerate(itertools.pairwise(entry.dtype for entry in stored)):
        label = before if before == after else f"{before} -> {after}"
        label += "" if factors[pair] is factors[pair + 1] is None else " + adapter"
        rows.append((label, math.prod(stored[0].shape), *counts[pair], norms[pair]))
    return rows


def _add_squares(sums: torch.Tensor, owner: torch.Tensor | None, index: Index, delta: torch.Tensor) -> float:
    """Add δ² to the sums of the routes that own it, or to the last one; and their total."""
    squares = delta.square()
    if owner is None:
        total = squares.sum(dtype=torch.float64)
        sums[-1] += total
        return float(total)
    owner = owner[tuple(slice(None) if size == 1 else part for part, size in zip(index, owner.shape, strict=False))]
    shared = [axis for axis, size in enumerate(owner.shape) if size == 1]
    squares = squares.sum(dim=shared, keepdim=True, dtype=torch.float64) if shared else squares.double()
    sums.index_add_(0, owner.flatten().long(), squares.flatten())
    return float(squares.sum())


def _shares(tensors: pd.DataFrame) -> dict[str, Any]:
    """Shares, 0 to 1, beside their data type and number of elements, and the norm of the update."""
    types, elements = tensors["dtype"].unique(), int(tensors["elements"].sum())
    shares = {name: int(tensors[name].sum()) / elements for name in _COUNTS}
    norm = math.sqrt(sum(tensors["squared_norm"]))
    return {"dtype": types[0] if len(types) == 1 else "mixed", "elements": elements, **shares, "norm": norm}


def _place(name: str) -> tuple[str, str]:
    """Layer, and kind of tensor. The first number of a name is the layer; a further one is an expert."""
    match = _NUMBER.search(name)
    if match is None:
        return "outside", name.removeprefix("model.")
    return match[0], _NUMBER.sub("*", name[match.end() + 1 :])
