"""Bootstrap intervals over prompts."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """
    A figure with its 95% interval.

    Args:
        value (`float`):
            The figure.
        low (`float`):
            Lower end.
        high (`float`):
            Upper end.
        n (`int`):
            Number of prompts.
    """

    value: float
    low: float
    high: float
    n: int

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def bootstrap(
    statistic: Callable[..., np.ndarray], *samples: np.ndarray, resamples: int = 2000, seed: int = 0
) -> Interval:
    """
    Percentile bootstrap of a statistic of paired per-prompt values (Efron and Tibshirani, 1993, chapter 13). Where
    nothing varies the interval is the value itself.
    """
    n = len(samples[0])
    value = float(statistic(*samples, axis=0))
    if n < 2 or all(np.ptp(sample) == 0 for sample in samples):
        return Interval(value, value, value, n)
    return _percentiles(value, _resampled(statistic, samples, resamples, np.random.default_rng(seed)), n)


def _resampled(
    statistic: Callable[..., np.ndarray], samples: Sequence[np.ndarray], resamples: int, rng: np.random.Generator
) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # resamples without a value are left out below
        settings = {"paired": True, "vectorized": True, "n_resamples": resamples, "batch": 200, "rng": rng}
        return stats.bootstrap(samples, statistic, method="percentile", **settings).bootstrap_distribution


def _percentiles(value: float, distribution: np.ndarray, n: int) -> Interval:
    finite = distribution[np.isfinite(distribution)]
    low, high = np.quantile(finite, [0.025, 0.975]) if len(finite) else (np.nan, np.nan)
    return Interval(value, float(low), float(high), n)


def score(values: np.ndarray, seed: int = 0) -> Interval:
    """Mean score, 0 to 100, of per-prompt values between 0 and 1."""
    return bootstrap(np.mean, 100 * np.asarray(values, dtype=np.float64), seed=seed)


def difference(after: np.ndarray, before: np.ndarray, seed: int = 0) -> Interval:
    """Change of the score on the same prompts, in points of 100: mean of `100 * (after - before)`."""
    after, before = np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)
    if not len(after) == len(before) > 0:
        raise ValueError(f"expected the same prompts in every sample, found {[len(after), len(before)]} values")
    return score(after - before, seed=seed)


def average(samples: Sequence[np.ndarray], seed: int = 0) -> Interval:
    """
    Average over domains of their mean scores (or changes), 0 to 100, every domain with the same weight,
    `1/D sum_d 100/n_d sum_p v_dp`. The prompts of each domain are resampled by themselves (Davison and Hinkley, 1997,
    section 3.2: several samples). `n` is the number of all prompts. Undefined (`nan`) without domains.
    """
    samples = [100 * np.asarray(sample, dtype=np.float64) for sample in samples]
    if not samples:
        return Interval(np.nan, np.nan, np.nan, 0)
    n = sum(len(sample) for sample in samples)
    value = float(np.mean([sample.mean() for sample in samples]))
    varying = [sample for sample in samples if len(sample) > 1 and np.ptp(sample) > 0]
    if not varying:
        return Interval(value, value, value, n)
    rng = np.random.default_rng(seed)
    deviations = sum(_resampled(np.mean, [sample], 2000, rng) - sample.mean() for sample in varying)
    return _percentiles(value, value + deviations / len(samples), n)
