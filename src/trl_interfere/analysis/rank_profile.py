"""How many directions the update of each matrix has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..checkpoint import Checkpoint, check_comparable, to_values


@dataclass(frozen=True)
class RankProfile:
    r"""
    Spectrum of the update δ of one matrix, with singular values `σ_1 ≥ σ_2 ≥ ...`.

    Args:
        shape (`tuple[int, int]`):
            Shape of the matrix.
        effective_rank (`float`):
            `exp(-Σ p_i log p_i)` with `p_i = σ_i / Σ σ_j` (Roy and Vetterli, 2007): 1 for one direction, the smaller
            side of the matrix for equal ones; 0 without an update.
        energy (`dict[int, float]`):
            Share of `Σ σ_i²` in the first k singular values, by k.
    """

    shape: tuple[int, int]
    effective_rank: float
    energy: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, as they stand in a report."""
        energy = {str(count): share for count, share in self.energy.items()}
        return {"shape": list(self.shape), "effective_rank": self.effective_rank, "energy": energy}


def rank_profiles(
    before: Checkpoint,
    after: Checkpoint,
    select: Callable[[str], bool] = lambda name: True,
    counts: Sequence[int] = (1, 8, 64),
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, RankProfile]:
    """
    Rank profiles of the update, matrix by matrix.

    It costs a singular value decomposition of each, in float32: seconds for a side of 4,096 on a processor, so that it
    is not part of the update statistics. Rounding to a storage data type adds noise of full rank to an update.

    Args:
        before ([`~trl_interfere.checkpoint.Checkpoint`]):
            Checkpoint before the update.
        after ([`~trl_interfere.checkpoint.Checkpoint`]):
            Checkpoint after it.
        select (`Callable[[str], bool]`, *optional*):
            Which tensors to take, by name. Defaults to all that have two axes or more.
        counts (`list[int]`, *optional*, defaults to `(1, 8, 64)`):
            Numbers of singular values whose share of the energy is given.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Where to compute.
        progress (`Callable[[int, int], None]`, *optional*):
            Called after each tensor with the number of those that are done and the number of all.

    Returns:
        `dict[str, RankProfile]`: By name of the tensor, with the index of the matrix behind it (`name[3]`) where a
        tensor holds several.

    Raises:
        `ValueError`: If the checkpoints do not hold the same tensors, or hold NaN or infinity.
    """
    names = [name for name in check_comparable(before, after) if len(before[name].shape) > 1 and select(name)]
    profiles = {}
    for done, name in enumerate(names, start=1):
        *stack, rows, columns = before[name].shape
        for index in range(before[name].rows // rows):
            label = f"{name}[{index}]" if stack else name
            start = index * rows
            delta = _update(before, after, name, start, start + rows)
            if not np.isfinite(delta).all():
                raise ValueError(
                    f"{after[name].file}: tensor {name}: expected finite values as in {before[name].file}, found NaN "
                    "or infinity in one of them"
                )
            values = torch.linalg.svdvals(torch.from_numpy(delta).to(device)).double().cpu().numpy()
            profiles[label] = _profile(values, (rows, columns), counts)
        progress(done, len(names))
    return profiles


def _update(before: Checkpoint, after: Checkpoint, name: str, start: int, stop: int) -> np.ndarray:
    first, second = before[name], after[name]
    shape = (stop - start, first.columns)
    delta = np.zeros(shape, np.float32)
    if (first.file.resolve(), first.offset) != (second.file.resolve(), second.offset):
        work = np.empty(shape, np.float32)
        for combine, stored in ((np.add, second), (np.subtract, first)):
            bits = stored.read(start, stop, bytearray(shape[0] * shape[1] * stored.bits.itemsize))
            values = to_values(bits, stored.dtype, work)
            combine(delta, values, out=delta)
    for sign, factors in ((1, after.factors(name)), (-1, before.factors(name))):
        if factors is not None:
            delta += sign * (factors[0][start:stop] @ factors[1])
    return delta


def _profile(values: np.ndarray, shape: tuple[int, int], counts: Sequence[int]) -> RankProfile:
    total = values.sum()
    if total == 0:
        return RankProfile(shape, 0.0, {count: float("nan") for count in counts})
    shares = values[values > 0] / total
    energy = np.cumsum(values**2) / (values**2).sum()
    return RankProfile(
        shape,
        float(np.exp(-(shares * np.log(shares)).sum())),
        {count: float(energy[min(count, len(energy)) - 1]) for count in counts},
    )
