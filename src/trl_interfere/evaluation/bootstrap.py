"""Bootstrap intervals over prompts."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


UNDEFINED = Interval(float("nan"), float("nan"), float("nan"), 0)


def bootstrap(
    statistic: Callable[..., np.ndarray], *samples: np.ndarray, resamples: int = 2000, seed: int = 0
) -> Interval:
    """
    Percentile bootstrap of a statistic of paired per-prompt values (Efron and Tibshirani, 1993, chapter 13).

    Prompts are resampled, and every sample keeps the same prompts: the interval of a difference between two models on
    one set of prompts is a paired one.

    Args:
        statistic (`Callable`):
            Function of the samples with an `axis` argument, e.g. `numpy.mean`.
        *samples (`numpy.ndarray` of shape `(n,)`):
            Values per prompt, in the same order of prompts.
        resamples (`int`, *optional*, defaults to `2000`):
            Number of resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.

    Returns:
        [`Interval`]: The statistic and its 95% interval, which is the value itself where nothing varies.

    Raises:
        `ValueError`: If the samples are empty or differ in length.
    """
    _check_paired(*samples)
    n = len(samples[0])
    value = float(statistic(*samples, axis=0))
    if n < 2 or all(np.ptp(sample) == 0 for sample in samples):
        return Interval(value, value, value, n)
    return _percentiles(value, _resampled(statistic, samples, resamples, np.random.default_rng(seed)), n)


def _check_paired(*samples: np.ndarray) -> None:
    lengths = [len(sample) for sample in samples]
    if not lengths[0] or len(set(lengths)) > 1:
        raise ValueError(f"expected the same prompts in every sample, found {lengths} values")


def _resampled(
    statistic: Callable[..., np.ndarray], samples: Sequence[np.ndarray], resamples: int, rng: np.random.Generator
) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # resamples without a value are left out below
        return stats.bootstrap(
            samples,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=200,
            method="percentile",
            rng=rng,
        ).bootstrap_distribution


def _percentiles(value: float, distribution: np.ndarray, n: int) -> Interval:
    finite = distribution[np.isfinite(distribution)]
    low, high = np.quantile(finite, [0.025, 0.975]) if len(finite) else (np.nan, np.nan)
    return Interval(value, float(low), float(high), n)


def score(values: np.ndarray, seed: int = 0) -> Interval:
    """
    Mean score, 0 to 100, of per-prompt values between 0 and 1.

    Args:
        values (`numpy.ndarray` of shape `(n,)`):
            Values per prompt.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.

    Returns:
        [`Interval`]: The score.
    """
    return bootstrap(np.mean, 100 * np.asarray(values, dtype=np.float64), seed=seed)


def average(samples: Sequence[np.ndarray], seed: int = 0) -> Interval:
    """
    Average over domains of their mean scores, 0 to 100, every domain with the same weight.

    ```
    average = 1/D sum_d 100/n_d sum_p v_dp
    ```

    The domains have prompts of their own, so that the prompts of each are resampled by themselves (Davison and
    Hinkley, 1997, section 3.2: several samples).

    Args:
        samples (`list[numpy.ndarray]`):
            Values per prompt of each domain; differences of paired values are values as well.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.

    Returns:
        [`Interval`]: The average, with `n` the number of all prompts; undefined (`nan`) without domains.
    """
    samples = [100 * np.asarray(sample, dtype=np.float64) for sample in samples]
    if not samples:
        return UNDEFINED
    n = sum(len(sample) for sample in samples)
    value = float(np.mean([sample.mean() for sample in samples]))
    varying = [sample for sample in samples if len(sample) > 1 and np.ptp(sample) > 0]
    if not varying:
        return Interval(value, value, value, n)
    rng = np.random.default_rng(seed)
    deviations = sum(_resampled(np.mean, [sample], 2000, rng) - sample.mean() for sample in varying)
    return _percentiles(value, value + deviations / len(samples), n)


def difference(after: np.ndarray, before: np.ndarray, seed: int = 0) -> Interval:
    """
    Change of the score, in points, on the same prompts.

    Args:
        after (`numpy.ndarray` of shape `(n,)`):
            Values per prompt, later.
        before (`numpy.ndarray` of shape `(n,)`):
            Values per prompt, earlier.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.

    Returns:
        [`Interval`]: Mean of `100 * (after - before)`.
    """
    _check_paired(after, before)
    return score(np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64), seed=seed)


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

    def ratio(repaired, damaged, peak, axis):
        lost = np.mean(peak, axis=axis) - np.mean(damaged, axis=axis)
        return np.divide(
            np.mean(repaired, axis=axis) - np.mean(damaged, axis=axis),
            lost,
            out=np.full_like(lost, np.nan),
            where=lost > 0,
        )

    if not np.mean(samples[2]) > np.mean(samples[1]):
        return Interval(np.nan, np.nan, np.nan, len(samples[0]))
    return bootstrap(ratio, *samples, seed=seed)
