"""Flips: prompts kept, lost, regained and newly lost, beside what resampling alone would flip."""

from dataclasses import dataclass, field

import numpy as np
from scipy.stats import betabinom


@dataclass
class Flips:
    """
    Positions of the prompts that a change of the weights flipped.

    Args:
        kept (`numpy.ndarray`):
            Right before, right after.
        lost (`numpy.ndarray`):
            Right at the peak (without a peak: before), wrong after.
        regained (`numpy.ndarray`):
            Right at the peak, wrong before, right after. Without a peak: wrong before, right after.
        newly_lost (`numpy.ndarray`):
            Right before, wrong after.
        expected (`dict[str, float]`):
            By name of the field, how many prompts of that kind a second draw from the unchanged model would give.
            Empty where the scores do not tell it; all changes are 0 where completions are greedy.
    """

    kept: np.ndarray
    lost: np.ndarray
    regained: np.ndarray
    newly_lost: np.ndarray
    expected: dict[str, float] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """
        Number of prompts of each kind.

        Returns:
            `dict[str, int]`: By name of the field.
        """
        return {name: len(getattr(self, name)) for name in ("kept", "lost", "regained", "newly_lost")}


def flips(
    before: np.ndarray, after: np.ndarray, peak: np.ndarray | None = None, redraw: np.ndarray | None = None
) -> Flips:
    """
    Prompts kept, lost, regained and newly lost.

    A prompt is right where the mean of its samples is at least 0.5. Samples differ from draw to draw, so that some
    prompts flip although nothing has changed. How many is computed from the samples where there are several with
    values of 0 and 1. With `s` of `k` samples of a prompt right, its success rate has the posterior
    `Beta(a + s, b + k - s)`, and a second draw of `k` samples is wrong with probability

    ```
    P(wrong | s) = sum_(u < k/2) BetaBinomial(u; k, a + s, b + k - s)
    expected newly lost = sum over prompts right before of P(wrong | s)
    expected regained   = sum over prompts lost before of 1 - P(wrong | s)
    ```

    The prior is the beta distribution with the moments of the success rates over prompts (empirical Bayes; Kleinman,
    JASA 1973): `a = m c`, `b = (1 - m) c`, `c = f / (1 - f)`, with `m` the mean rate and `f` the mean of
    `s (k - s) / (k (k - 1))` over `m (1 - m)`; for `regained` over the prompts right at the peak. The samples are
    those of `before`, for `lost` those of the peak. With one sample per prompt, `redraw` is counted instead.

    Args:
        before (`numpy.ndarray` of shape `(n,)` or `(n, k)`):
            Scores of each prompt, 0 to 1: the mean of its samples, or one column a sample.
        after (`numpy.ndarray` of shape `(n,)` or `(n, k)`):
            Scores of the same prompts, later.
        peak (`numpy.ndarray` of shape `(n,)` or `(n, k)`, *optional*):
            Scores of the same prompts at the peak. Defaults to `before`.
        redraw (`numpy.ndarray` of shape `(n,)` or `(n, k)`, *optional*):
            Scores of the model of `before`, sampled with another seed.

    Returns:
        [`Flips`]: Positions of the prompts, and the numbers expected from resampling.

    Raises:
        `ValueError`: If the scores are not of the same prompts, or not finite numbers.
    """
    given = {"before": before, "after": after, "peak": peak, "redraw": redraw}
    scores = {name: np.asarray(values, dtype=np.float64) for name, values in given.items() if values is not None}
    for name, values in scores.items():
        if values.ndim not in (1, 2) or len(values) != len(scores["before"]) or not values.size:
            raise ValueError(
                f"{name}: expected one row for each of {len(scores['before'])} prompts, found the shape {values.shape}"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: expected finite scores, found {values[~np.isfinite(values)][0]}")
    right = {name: values.reshape(len(values), -1).mean(axis=1) >= 0.5 for name, values in scores.items()}
    everything = np.full(len(right["before"]), True)
    reference = right.get("peak", right["before"])
    among = everything if peak is None else reference  # the prompts that can be regained
    redrawn = right.get("redraw")
    expected = {
        "kept": _expected(scores["before"], redrawn, everything, True, True),
        "lost": _expected(
            scores.get("peak", scores["before"]), None if peak is not None else redrawn, everything, True, False
        ),
        "regained": _expected(scores["before"], redrawn, among, False, True),
        "newly_lost": _expected(scores["before"], redrawn, everything, True, False),
    }
    return Flips(
        kept=np.flatnonzero(right["before"] & right["after"]),
        lost=np.flatnonzero(reference & ~right["after"]),
        regained=np.flatnonzero(among & ~right["before"] & right["after"]),
        newly_lost=np.flatnonzero(right["before"] & ~right["after"]),
        expected={name: number for name, number in expected.items() if number is not None},
    )


def _expected(
    samples: np.ndarray, redrawn: np.ndarray | None, among: np.ndarray, first: bool, second: bool
) -> float | None:
    """Expected number of prompts that are right (or not) in the samples and right (or not) in a second draw."""
    samples = samples.reshape(len(samples), -1)[among]
    chosen = (samples.mean(axis=1) >= 0.5) == first
    if redrawn is not None:
        return float((chosen & (redrawn[among] == second)).sum())
    k, right = samples.shape[1], samples.sum(axis=1)
    if k == 1 or not np.isin(samples, (0, 1)).all():
        return None
    mean, within = samples.mean(), np.mean(right * (k - right)) / (k * (k - 1))
    if not within:  # the samples of a prompt always agree
        return float(chosen.sum() * (first == second))
    share = min(within / (mean * (1 - mean)), 1 - 1e-6)  # 1 where all prompts have one rate
    strength = share / (1 - share)
    fewest_right = (k + 1) // 2
    wrong = betabinom.cdf(fewest_right - 1, k, mean * strength + right, (1 - mean) * strength + k - right)
    return float((1 - wrong if second else wrong)[chosen].sum())
