"""What an update changed: its sparsity, and the size of its edit on each route."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..checkpoint import BITS, Checkpoint, Index, check_comparable
from .routes import RouteMap


ABSOLUTE = 1e-7
RELATIVE = 1e-3
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Sparsity:
    """
    How many elements an update left as they were, by three definitions, and its size.

    The figures depend on the storage data type: between two bfloat16 checkpoints a change of less than 1e-7 is nearly
    always none at all ([arXiv 2511.08567](https://huggingface.co/papers/2511.08567)).

    Args:
        dtype (`str`):
            Storage data type: `"bfloat16"`, `"bfloat16 -> float32"` where it differs between the checkpoints,
            `"bfloat16 + adapter"` where an adapter is not merged; `"mixed"` for several of them.
        elements (`int`):
            Number of elements.
        below_absolute (`int`):
            Number with |δ| < 1e-7.
        below_relative (`int`):
            Number with |δ| <= 1e-3 |θ|, θ the value before; 0 that stays 0 counts.
        identical (`int`):
            Number whose bits did not change; in mixed data types, whose value did not.
        squared_norm (`float`):
            Sum of δ².
    """

    dtype: str
    elements: int = 0
    below_absolute: int = 0
    below_relative: int = 0
    identical: int = 0
    squared_norm: float = 0.0

    def __add__(self, other: "Sparsity") -> "Sparsity":
        return Sparsity(
            self.dtype if self.dtype == other.dtype else "mixed",
            self.elements + other.elements,
            self.below_absolute + other.below_absolute,
            self.below_relative + other.below_relative,
            self.identical + other.identical,
            self.squared_norm + other.squared_norm,
        )

    def to_dict(self) -> dict[str, Any]:
        """Shares, 0 to 1, beside their data type and number of elements, and the norm of the update."""
        shares = {
            name: getattr(self, name) / self.elements for name in ("below_absolute", "below_relative", "identical")
        }
        return {"dtype": self.dtype, "elements": self.elements, **shares, "norm": math.sqrt(self.squared_norm)}


@dataclass
class UpdateStatistics:
    """
    What changed from one checkpoint to the next.

    Args:
        before (`str`):
            Name of the checkpoint before the update.
        after (`str`):
            Name of the checkpoint after it.
        tensors (`dict[str, Sparsity]`):
            Sparsity by tensor.
        edit_size (`numpy.ndarray` of shape `(num_routes,)`, *optional*):
            Norm ‖δ_r‖ of the update over the slices of each route. `None` without a route map.
        outside (`float`, *optional*):
            Norm of the update over all elements that no route owns.
    """

    before: str
    after: str
    tensors: dict[str, Sparsity] = field(repr=False)
    edit_size: np.ndarray | None = field(default=None, repr=False)
    outside: float | None = None

    @property
    def whole(self) -> Sparsity:
        """Sparsity of the whole model."""
        return _total(self.tensors.values())

    @property
    def by_kind(self) -> dict[str, Sparsity]:
        """Sparsity by kind of tensor, e.g. `"mlp.down_proj.weight"` or `"embed_tokens.weight"`."""
        return self._grouped(lambda name: _place(name)[1])

    @property
    def by_layer(self) -> dict[str, Sparsity]:
        """Sparsity by layer, `"0"` and up, and `"outside"` for what lies in none."""
        layers = self._grouped(lambda name: _place(name)[0])
        return dict(sorted(layers.items(), key=lambda item: (item[0] == "outside", item[0].zfill(6))))

    def to_dict(self) -> dict[str, Any]:
        """Every figure but those of single routes, as it stands in a report."""
        return {
            "before": self.before,
            "after": self.after,
            "dtypes": sorted({entry.dtype for entry in self.tensors.values()}),
            "thresholds": {"absolute": ABSOLUTE, "relative": RELATIVE},
            "whole": self.whole.to_dict(),
            "by_kind": {name: entry.to_dict() for name, entry in self.by_kind.items()},
            "by_layer": {name: entry.to_dict() for name, entry in self.by_layer.items()},
            "norm_outside_routes": self.outside,
        }

    def _grouped(self, key: Callable[[str], str]) -> dict[str, Sparsity]:
        groups: dict[str, list[Sparsity]] = {}
        for name, entry in self.tensors.items():
            groups.setdefault(key(name), []).append(entry)
        return {name: _total(entries) for name, entries in groups.items()}


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
    >>> update.whole.to_dict(), update.by_layer["0"].to_dict()
    ```
    """
    if len(checkpoints) not in (2, 3):
        raise ValueError(f"checkpoints: expected two or three, found {len(checkpoints)}")
    before = checkpoints[-2]
    names = check_comparable(before, checkpoints[-1])
    for checkpoint in checkpoints[:-2]:
        check_comparable(before, checkpoint)
    total, done = sum(checkpoint[name].nbytes for checkpoint in checkpoints for name in names), 0
    pairs, routes = list(itertools.pairwise(checkpoints)), 0 if route_map is None else route_map.num_routes
    tensors: list[dict[str, Sparsity]] = [{} for _ in pairs]
    squares = torch.zeros(len(pairs), routes + 1, dtype=torch.float64)  # of each route, and outside
    for name in names:
        for found, entry in zip(tensors, _compare(checkpoints, name, route_map, squares), strict=True):
            found[name] = entry
        done += sum(checkpoint[name].nbytes for checkpoint in checkpoints)
        progress(done, total)
    statistics = []
    for pair, (first, second) in enumerate(pairs):
        sizes = squares[pair].sqrt().numpy()
        edits = (None, None) if route_map is None else (sizes[:-1], float(sizes[-1]))
        entry = UpdateStatistics(first.name, second.name, tensors[pair], *edits)
        if entry.whole.identical == entry.whole.elements:
            raise ValueError(
                f"{second.name}: expected an update from {first.name}, found identical checkpoints: "
                f"all {len(names)} tensors, {names[0]} to {names[-1]}, are the same to the bit"
            )
        statistics.append(entry)
    return statistics


def figures_of_files(checkpoints: Sequence[Checkpoint]) -> tuple[dict[str, dict], dict[str, str]]:
    """What a report holds of before and after, or of base, before and after: the updates, and digests of the files."""
    found, places = update_statistics(checkpoints), ("base", "before", "after")[-len(checkpoints) :]
    updates = zip(("earlier", "update")[-len(found) :], found, strict=True)
    digests = {place: checkpoint.digest() for place, checkpoint in zip(places, checkpoints, strict=True)}
    return {name: entry.to_dict() for name, entry in updates}, digests


def identical_when_stored(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> float:
    """
    Share of the parameters that would be the same if both checkpoints were stored in another data type: the control of
    every sparsity, what rounding alone would hide of this update.
    """
    same = sum(int((before[name].to(dtype) == after[name].to(before[name].device, dtype)).sum()) for name in before)
    return same / sum(before[name].numel() for name in before)


def _compare(
    checkpoints: Sequence[Checkpoint], name: str, route_map: RouteMap | None, squares: torch.Tensor
) -> list[Sparsity]:
    """One tensor in two or three checkpoints; `squares` gets its sums by route and, last, of what lies outside."""
    stored = [checkpoint[name] for checkpoint in checkpoints]
    factors = [checkpoint.factors(name) for checkpoint in checkpoints]
    dtype = torch.float64 if any(entry.dtype == "float64" for entry in stored) else torch.float32
    width = max(getattr(torch, entry.dtype).itemsize for entry in stored)
    owner = None
    if route_map is not None:
        like = torch.zeros((), dtype=torch.float64).expand(stored[0].shape)
        owner = route_map.spread(name, np.arange(float(route_map.num_routes)), like)
    counts, norms = np.zeros((len(stored) - 1, 3), dtype=np.int64), np.zeros(len(stored) - 1)
    for together in zip(*(entry.parts(width) for entry in stored), strict=True):
        index, read = together[0][0], [part for _, part in together]
        added = [None if pair is None else _product(*pair, index, dtype) for pair in factors]
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
    types = [entry.dtype for entry in stored]
    sparsities = []
    for pair, (before, after) in enumerate(itertools.pairwise(types)):
        label = before if before == after else f"{before} -> {after}"
        label += "" if factors[pair] is factors[pair + 1] is None else " + adapter"
        found = (int(count) for count in counts[pair])
        sparsities.append(Sparsity(label, math.prod(stored[0].shape), *found, float(norms[pair])))
    return sparsities


def _product(left: np.ndarray, right: np.ndarray, index: Index, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(left).to(dtype)[index[0]] @ torch.from_numpy(right).to(dtype)


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


def _total(entries) -> Sparsity:
    first, *others = entries
    return sum(others, start=first)


def _place(name: str) -> tuple[str, str]:
    """Layer, and kind of tensor. The first number of a name is the layer; a further one is an expert."""
    match = _NUMBER.search(name)
    if match is None:
        return "outside", name.removeprefix("model.")
    return match[0], _NUMBER.sub("*", name[match.end() + 1 :])
