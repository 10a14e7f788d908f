"""Bootstrap intervals over prompts."""

from collections.abc import Callable
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

    def to_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


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
    """
    n = len(samples[0])
    value = float(statistic(*samples, axis=0))
    if n < 2 or all(np.ptp(sample) == 0 for sample in samples):
        return Interval(value, value, value, n)
    with np.errstate(divide="ignore", invalid="ignore"):
        result = stats.bootstrap(
            samples,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=200,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
        distribution = result.bootstrap_distribution
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
