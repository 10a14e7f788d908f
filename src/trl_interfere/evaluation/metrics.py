"""Forgetting, transfer, recovered and collateral: what a score matrix says, by the formulas of the literature."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from rich.table import Table

from ..tables import console_table
from .bootstrap import Interval, average, bootstrap, difference
from .score_matrix import ScoreMatrix


def forgetting(matrix: ScoreMatrix, domain: str | None = None, stage: int = -1) -> Interval:
    """
    Forgetting of one domain, or the average over the domains that were trained before the last one,
    `f_j = max_(l < k) R_(l,j) - R_(k,j)` and `F_k = 1/(k-1) sum_(j < k) f_j` (Chaudhry et al., Riemannian Walk for
    Incremental Learning, ECCV 2018), with `R_(l,j)` the score of domain j after stage l, 0 for the base model, and k
    the stage asked for. A negative value is a gain. Undefined (`nan`) for the domain trained last, and where a score
    is missing.
    """
    final, latest = matrix.position(stage), matrix.last_training(stage)
    losses = []
    for name in matrix.domains if domain is None else [domain]:
        trained = any(matrix.stage_kind(row) == ("train", name) for row in range(final))
        newest = latest is not None and matrix.stage_kind(latest) == ("train", name)
        scored = name in matrix.values[final] and any(name in values for values in matrix.values[:final])
        if scored and not newest and (trained or domain is not None):
            losses.append(matrix.values[matrix.peak(name, final - 1)][name] - matrix.values[final][name])
    return average(losses)


def backward_transfer(matrix: ScoreMatrix, domain: str | None = None, stage: int = -1) -> Interval:
    """
    Backward transfer to one domain, or the average over the domains that were trained before the last one,
    `BWT = 1/(T-1) sum_(i < T) R_(T,i) - R_(i,i)` (Lopez-Paz and Ranzato, Gradient Episodic Memory, NeurIPS 2017,
    equation 3), with `R_(i,i)` the score of domain i after its last own training (a refresh is none), and T the stage
    asked for. A negative value is damage. Undefined as [`forgetting`] is, and for a domain that was not trained.
    """
    final, latest = matrix.position(stage), matrix.last_training(stage)
    changes = []
    for name in matrix.domains if domain is None else [domain]:
        own = [row for row in range(final + 1) if matrix.stage_kind(row) == ("train", name)]
        if own and own[-1] != latest and name in matrix.values[own[-1]] and name in matrix.values[final]:
            changes.append(matrix.values[final][name] - matrix.values[own[-1]][name])
    return average(changes)


def forward_transfer(matrix: ScoreMatrix, domain: str | None = None, stage: int = -1) -> Interval:
    """
    Forward transfer to one domain, or the average over the domains that were trained after the first one,
    `FWT = 1/(T-1) sum_(i > 1) R_(i-1,i) - b_i` (Gradient Episodic Memory, equation 4), with `R_(i-1,i)` the score of
    domain i right before its first training and `b_i` that of the base model, instead of a random one. Undefined for
    the domain trained first, for one that was not trained, and where a score is missing.
    """
    final = matrix.position(stage)
    based = matrix.stage_kind(0)[0] == "base"
    changes = []
    for name in matrix.domains if domain is None else [domain]:
        before = next((row - 1 for row in range(final + 1) if matrix.stage_kind(row) == ("train", name)), 0)
        if based and before > 0 and name in matrix.values[before] and name in matrix.values[0]:
            changes.append(matrix.values[before][name] - matrix.values[0][name])
    return average(changes)


def recovered(repaired: np.ndarray, damaged: np.ndarray, peak: np.ndarray, seed: int = 0) -> Interval:
    """
    Share of a lost score that a repair brings back.

    ```
    recovered = (score(repaired) - score(damaged)) / (score(peak) - score(damaged))
    ```

    as in the paper's recovery rates (arXiv 2606.02398). It is undefined (`nan`) where nothing was lost.

    Args:
        repaired (`numpy.ndarray` of shape `(n,)`):
            Values per prompt after the repair.
        damaged (`numpy.ndarray` of shape `(n,)`):
            Values per prompt before the repair.
        peak (`numpy.ndarray` of shape `(n,)`):
            Values per prompt at the peak.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.

    Returns:
        [`Interval`]: Recovered share; 1 is all of the loss.
    """
    samples = [np.asarray(sample, dtype=np.float64) for sample in (repaired, damaged, peak)]

    def ratio(*samples, axis):
        repaired, damaged, peak = (np.mean(sample, axis=axis) for sample in samples)
        return (repaired - damaged) / np.where(peak > damaged, peak - damaged, np.nan)

    if not np.mean(samples[2]) > np.mean(samples[1]):
        return Interval(np.nan, np.nan, np.nan, len(samples[0]))
    return bootstrap(ratio, *samples, seed=seed)


def recovered_all(
    repaired: dict[str, np.ndarray], damaged: dict[str, np.ndarray], peak: dict[str, np.ndarray], seed: int = 0
) -> Interval:
    """
    Share of what several domains have lost that a repair brings back, from values per prompt by domain:
    `Σ_d (score_d(repaired) - score_d(damaged)) / Σ_d (score_d(peak) - score_d(damaged))`. The prompts of each domain
    are resampled by themselves. Undefined (`nan`) where nothing was lost.
    """
    gains = {name: repaired[name] - damaged[name] for name in damaged}
    losses = {name: peak[name] - damaged[name] for name in damaged}
    gain, loss = (sum(values.mean() for values in parts.values()) for parts in (gains, losses))
    if not loss > 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    rng = np.random.default_rng(seed)
    gained, lost = np.zeros(2000), np.zeros(2000)
    for name in damaged:
        rows = rng.integers(len(gains[name]), size=(len(gained), len(gains[name])))
        gained += gains[name][rows].mean(axis=1)
        lost += losses[name][rows].mean(axis=1)
    low, high = np.quantile(gained[lost > 0] / lost[lost > 0], [0.025, 0.975])
    return Interval(float(gain / loss), float(low), float(high), sum(len(values) for values in damaged.values()))


def collateral(matrix: ScoreMatrix, since: int, repaired: Iterable[str] = (), stage: int = -1) -> dict[str, Interval]:
    """Change of every domain that was not repaired, between the damaged and the repaired model: the repair's price."""
    before, after = matrix.values[matrix.position(since)], matrix.values[matrix.position(stage)]
    others = [name for name in matrix.domains if name not in {*repaired} and name in before and name in after]
    return {name: difference(after[name], before[name]) for name in others}


@dataclass
class ScoreSummary:
    """
    Average score, forgetting and transfer after one stage, and what the repairs before it did.

    A figure that is undefined, e.g. the forgetting of the domain trained last, is left out.

    Args:
        stage (`str`):
            Name of the stage.
        score (`dict[str, Interval]`):
            Scores of the domains, 0 to 100.
        forgetting (`dict[str, Interval]`):
            Peak minus score, see [`~evaluation.metrics.forgetting`].
        backward_transfer (`dict[str, Interval]`):
            Change since the domain's own training, see [`~evaluation.metrics.backward_transfer`].
        forward_transfer (`dict[str, Interval]`):
            Change before the domain's own training, see [`~evaluation.metrics.forward_transfer`].
        recovered (`dict[str, Interval]`):
            Share of the loss that came back, see [`~evaluation.metrics.recovered`], of the domains that were refreshed
            or healed since the last training.
        collateral (`dict[str, Interval]`):
            Change since the last training, see [`~evaluation.metrics.collateral`], of the other domains; empty
            without a repair.
        average (`dict[str, Interval]`):
            Averages over the domains of `"score"`, `"forgetting"`, `"backward_transfer"` and `"forward_transfer"`.
    """

    stage: str
    score: dict[str, Interval]
    forgetting: dict[str, Interval]
    backward_transfer: dict[str, Interval]
    forward_transfer: dict[str, Interval]
    recovered: dict[str, Interval]
    collateral: dict[str, Interval]
    average: dict[str, Interval]

    @classmethod
    def from_matrix(cls, matrix: ScoreMatrix, stage: int = -1) -> "ScoreSummary":
        """The figures after one stage; negative positions count from the end."""
        final = matrix.position(stage)
        scored = [domain for domain in matrix.domains if domain in matrix.values[final]]
        figures = {"score": {domain: matrix.interval(final, domain) for domain in scored}}
        figures["average"] = {"score": matrix.average_score(final)}
        for statistic in (forgetting, backward_transfer, forward_transfer):
            figures[statistic.__name__] = {domain: statistic(matrix, domain, final) for domain in scored}
            figures["average"][statistic.__name__] = statistic(matrix, stage=final)
        since, repaired = matrix.last_training(final), _repaired(matrix, final)
        figures["recovered"] = {
            domain: recovered(*(matrix.values[row][domain] for row in (final, since, matrix.peak(domain, since))))
            for domain in repaired
            if domain in scored
        }
        figures["collateral"] = collateral(matrix, since, repaired, final) if repaired else {}
        for name, by_key in figures.items():
            figures[name] = {key: interval for key, interval in by_key.items() if np.isfinite(interval.value)}
        return cls(stage=matrix.stages[final], **figures)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: `stage`, and the intervals of each statistic by domain (of `average`: by statistic)."""
        return asdict(self)

    def to_table(self) -> Table:
        """One row per domain and one of averages, a dash where a figure is undefined."""
        names = [field.name for field in fields(self)[1:-1] if getattr(self, field.name)]
        rows = [(domain, {name: getattr(self, name).get(domain) for name in names}) for domain in self.score]
        specs = {name: ".0%" if name == "recovered" else ".1f" for name in names}
        return console_table(
            f"Forgetting and transfer after {self.stage} (points of 100, 95% interval)",
            ["domain", *(name.replace("_", " ") for name in names)],
            [
                [label, *(f"{found[name]:{specs[name]}}" if found.get(name) else "—" for name in names)]
                for label, found in [*rows, ("average", self.average)]
            ],
        )


def _repaired(matrix: ScoreMatrix, final: int) -> list[str]:
    """Domains that were refreshed or healed since the last training: a heal repairs all that had lost something."""
    since = matrix.last_training(final)
    if since is None:
        return []
    refreshed, before = {matrix.stage_kind(row)[1] for row in range(since + 1, final + 1)}, matrix.values[since]
    lost = [name for name in before if matrix.values[matrix.peak(name, since)][name].mean() > before[name].mean()]
    repaired = {*refreshed, *(lost if None in refreshed else ())}
    return [name for name in matrix.domains if name in before and name in repaired]
