"""What an update changed: its sparsity, and the size of its edit on each route."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import local
from typing import Any

import numpy as np
import torch

from ..checkpoint import Checkpoint, check_comparable, to_values
from .routes import RouteMap


ABSOLUTE = 1e-7
RELATIVE = 1e-3
# Bytes that are read at once, and elements that are computed on at once: the latter keeps every pass over a block but
# the first one in the cache of a core.
READ_BYTES = 2**20
BLOCK = 2**17
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
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[UpdateStatistics]:
    """
    Compare checkpoints as streams, a few rows of each at a time.

    Differences are computed in float32 (float64 where a checkpoint stores it); squares are summed in that type over
    the elements of a row or column of a block, and in float64 beyond. Memory does not grow with the checkpoints. The
    result does not depend on the number of workers.

    Args:
        checkpoints (`list[Checkpoint]`):
            Before and after the update; or base, before and after, in which case the second is read only once.
        route_map ([`RouteMap`], *optional*):
            Routes to take edit sizes of.
        workers (`int`, *optional*, defaults to `1`):
            Number of threads. Each reads and computes tensors of its own, in about 10 MiB of memory.
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
    total = sum(checkpoint[name].nbytes for checkpoint in checkpoints for name in names)
    done, memory = 0, local()

    def run(name: str):
        if not hasattr(memory, "scratch"):
            memory.scratch = _Scratch()
        return _Tensor(checkpoints, name, route_map).run(memory.scratch)

    pairs = range(len(checkpoints) - 1)
    tensors: list[dict[str, Sparsity]] = [{} for _ in pairs]
    squares, outside = np.zeros((len(pairs), route_map.num_routes if route_map else 0)), np.zeros(len(pairs))
    with ThreadPoolExecutor(max_workers=workers) as pool:
        try:
            for name, parts in zip(names, pool.map(run, names), strict=True):
                for pair, part in enumerate(parts):
                    tensors[pair][name] = part.sparsity
                    squares[pair, part.start : part.start + len(part.squares)] += part.squares
                    outside[pair] += part.outside
                done += sum(checkpoint[name].nbytes for checkpoint in checkpoints)
                progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    statistics = []
    for pair, (first, second) in enumerate(zip(checkpoints, checkpoints[1:], strict=False)):
        sizes = (np.sqrt(squares[pair]), math.sqrt(outside[pair])) if route_map else (None, None)
        statistics.append(UpdateStatistics(first.name, second.name, tensors[pair], *sizes))
        whole = statistics[-1].whole
        if whole.identical == whole.elements:
            raise ValueError(
                f"{second.name}: expected an update from {first.name}, found identical checkpoints: "
                f"all {len(names)} tensors, {names[0]} to {names[-1]}, are the same to the bit"
            )
    return statistics


def identical_when_stored(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> float:
    """
    Share of the parameters that would be the same if both checkpoints were stored in another data type.

    The control of every sparsity: what rounding alone would hide of this update.

    Args:
        before (`Mapping[str, torch.Tensor]`):
            Parameters before the update.
        after (`Mapping[str, torch.Tensor]`):
            Parameters after it, by the same names.
        dtype (`torch.dtype`):
            The data type.

    Returns:
        `float`: The share, 0 to 1.
    """
    same = sum(int((before[name].to(dtype) == after[name].to(before[name].device, dtype)).sum()) for name in before)
    return same / sum(before[name].numel() for name in before)


@dataclass
class _Part:
    # What one tensor contributes to the statistics of one update. Sums of squares are of the routes from `start` on.
    sparsity: Sparsity
    outside: float
    start: int = 0
    squares: np.ndarray = field(default_factory=lambda: np.zeros(0))


class _Scratch:
    """Memory of one worker that is used again and again."""

    def __init__(self):
        self._arrays: dict[Any, Any] = {}

    def raw(self, key: int, size: int) -> bytearray:
        if len(self._arrays.get(("raw", key), b"")) < size:
            self._arrays["raw", key] = bytearray(size)
        return self._arrays["raw", key]

    def array(self, key: str, shape: tuple[int, int], dtype: type) -> np.ndarray:
        size = math.prod(shape)
        if (key, dtype) not in self._arrays or self._arrays[key, dtype].size < size:
            self._arrays[key, dtype] = np.empty(size, dtype)
        return self._arrays[key, dtype][:size].reshape(shape)


class _Tensor:
    """One tensor in two or three checkpoints."""

    def __init__(self, checkpoints: Sequence[Checkpoint], name: str, route_map: RouteMap | None):
        self.name = name
        self.stored = [checkpoint[name] for checkpoint in checkpoints]
        self.factors = [checkpoint.factors(name) for checkpoint in checkpoints]
        first = self.stored[0]
        self.rows, self.columns = first.rows, first.columns
        # Checkpoints that share a file, such as adapters of one model, share what is read from it.
        places = [(stored.file.resolve(), stored.offset) for stored in self.stored]
        self.source = [places.index(place) for place in places]
        self.dtype = np.float64 if any(stored.dtype == "float64" for stored in self.stored) else np.float32
        self.owner, self.segment = _owner(route_map, name, first.shape)

    def run(self, scratch: _Scratch) -> list[_Part]:
        pairs = len(self.stored) - 1
        self.counts = np.zeros((pairs, 3), dtype=np.int64)
        groups = self.rows // self.segment
        by_column = self.owner is not None and self.owner.shape[1] > 1
        self.squares = np.zeros((pairs, groups, self.columns if by_column else 1))
        row_bytes = self.columns * max(stored.bits.itemsize for stored in self.stored)
        step = max(1, READ_BYTES // max(row_bytes, 1))
        block = max(1, BLOCK // max(self.columns, 1))
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            bits = [
                stored.read(start, stop, scratch.raw(index, (stop - start) * row_bytes))
                if self.source[index] == index
                else None
                for index, stored in enumerate(self.stored)
            ]
            bits = [bits[source] for source in self.source]
            low = start
            while low < stop:
                high = min(low + block, stop)
                if by_column:  # a block sums into one group
                    high = min(high, (low // self.segment + 1) * self.segment)
                self._block(low, high, [part[low - start : high - start] for part in bits], scratch)
                low = high
        return [self._part(pair) for pair in range(pairs)]

    def _block(self, low: int, high: int, bits: list[np.ndarray], scratch: _Scratch) -> None:
        shape = bits[0].shape
        same = scratch.array("same", shape, np.bool_)
        values: list[np.ndarray] = []
        for index, (stored, part) in enumerate(zip(self.stored, bits, strict=True)):
            if self.source[index] != index:
                values.append(values[self.source[index]])
            else:
                values.append(to_values(part, stored.dtype, scratch.array(f"values {index}", shape, self.dtype)))
        products = [
            None if factors is None else np.matmul(factors[0][low:high], factors[1], dtype=self.dtype)
            for factors in self.factors
        ]
        delta, work = (scratch.array(key, shape, self.dtype) for key in ("delta", "work"))
        for pair in range(len(self.stored) - 1):
            before, after = self.stored[pair : pair + 2]
            adapted = products[pair] is not None or products[pair + 1] is not None
            identical = None
            if not adapted and before.dtype == after.dtype:
                np.equal(bits[pair], bits[pair + 1], out=same)
                identical = np.count_nonzero(same)
            if identical == same.size:
                self.counts[pair] += identical
                self._check_finite(pair, math.fsum(np.vecdot(values[pair], values[pair])))
                continue
            start = values[pair]
            if self.source[pair] == self.source[pair + 1]:
                delta.fill(0)
            else:
                np.subtract(values[pair + 1], start, out=delta)
            if products[pair + 1] is not None:
                delta += products[pair + 1]
            if products[pair] is not None:
                delta -= products[pair]
                start = start + products[pair]
            self._check_finite(pair, self._add_squares(pair, low, delta, work))
            np.abs(delta, out=delta)
            if identical is None:
                identical = delta.size - np.count_nonzero(delta)
            np.less(delta, self.dtype(ABSOLUTE), out=same)
            below_absolute = np.count_nonzero(same)
            if not adapted and before.dtype == after.dtype == "bfloat16":
                # Two bfloat16 values that differ do so by at least 2^-8 of each: only equal ones are closer than 1e-3.
                np.equal(delta, self.dtype(0), out=same)
            else:
                np.abs(start, out=work)
                np.multiply(work, self.dtype(RELATIVE), out=work)
                np.less_equal(delta, work, out=same)
            self.counts[pair] += (below_absolute, np.count_nonzero(same), identical)

    def _add_squares(self, pair: int, low: int, delta: np.ndarray, work: np.ndarray) -> float:
        if self.squares.shape[2] > 1:
            np.multiply(delta, delta, out=work)
            sums = np.add.reduce(work, axis=0)
            self.squares[pair, low // self.segment] += sums
        else:
            sums = np.vecdot(delta, delta)
            if self.segment == 1:
                self.squares[pair, low : low + len(sums), 0] += sums
            else:
                np.add.at(self.squares[pair, :, 0], np.arange(low, low + len(sums)) // self.segment, sums)
        return float(sums.sum())

    def _check_finite(self, pair: int, total: float) -> None:
        # Squares of NaN and infinity make a sum that is neither: one look per block finds them.
        if math.isfinite(total):
            return
        for stored in self.stored[pair : pair + 2]:
            values = stored.read(0, stored.rows, bytearray(stored.nbytes))
            values = to_values(values, stored.dtype, np.empty(values.shape, self.dtype))
            if not np.isfinite(values).all():
                count = values.size - np.count_nonzero(np.isfinite(values))
                raise ValueError(
                    f"{stored.file}: tensor {self.name}: expected finite values, found {count} NaN or infinity"
                )

    def _part(self, pair: int) -> _Part:
        before, after = self.stored[pair : pair + 2]
        dtype = before.dtype if before.dtype == after.dtype else f"{before.dtype} -> {after.dtype}"
        if self.factors[pair] is not None or self.factors[pair + 1] is not None:
            dtype += " + adapter"
        squares = self.squares[pair]
        counts = (int(count) for count in self.counts[pair])
        sparsity = Sparsity(dtype, self.rows * self.columns, *counts, float(squares.sum()))
        owned = None if self.owner is None else self.owner >= 0
        if owned is None or not owned.any():
            return _Part(sparsity, sparsity.squared_norm)
        start = int(self.owner[owned].min())
        sums = np.bincount(self.owner[owned] - start, squares[owned])
        return _Part(sparsity, float(squares[~owned].sum()), start, sums)


def _owner(route_map: RouteMap | None, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray | None, int]:
    """
    Owners of a tensor's elements, in the form that sums of squares are kept in.

    The rows are cut into groups of `segment` rows with the same owners.

    Returns:
        `tuple`: Indices of routes, -1 for none, of shape `(groups, columns)`, or `(groups, 1)` if all elements of a
        row have one owner, or `None` if no element has any; and the number of rows in a group.
    """
    rows = math.prod(shape[:-1])
    elements = torch.zeros((), dtype=torch.float64).expand(shape)
    spread = None if route_map is None else route_map.spread(name, np.arange(1.0, route_map.num_routes + 1), elements)
    if spread is None:
        return None, max(rows, 1)
    owner = spread.numpy().astype(np.int64) - 1
    leading = list(owner.shape[:-1])
    segment = 1
    while leading and leading[-1] == 1:
        segment *= shape[len(leading) - 1]
        leading.pop()
    owner = owner.reshape(*leading, owner.shape[-1])
    return np.broadcast_to(owner, (*shape[: len(leading)], owner.shape[-1])).reshape(-1, owner.shape[-1]), segment


def _total(entries) -> Sparsity:
    first, *others = entries
    return sum(others, start=first)


def _place(name: str) -> tuple[str, str]:
    # Layer, and kind of tensor. The first number of a name is the layer; a further one is an expert.
    match = _NUMBER.search(name)
    if match is None:
        return "outside", name.removeprefix("model.")
    return match[0], _NUMBER.sub("*", name[match.end() + 1 :])
