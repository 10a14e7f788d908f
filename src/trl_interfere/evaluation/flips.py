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
        if values.ndim not in (1, 2) or len(values) != len(scores["before"]) or not np.isfinite(values).all():
            raise ValueError(
                f"{name}: expected finite scores of each of {len(scores['before'])} prompts, found {values} of shape "
                f"{values.shape}"
            )
    scores = {name: values.reshape(len(values), -1) for name, values in scores.items()}
    right = {name: values.mean(axis=1) >= 0.5 for name, values in scores.items()}
    first, last = right["before"], right["after"]
    reference = right.get("peak", first)
    could = np.full(len(first), True) if peak is None else reference  # be regained
    redrawn = right.get("redraw")
    wrong = _wrong_again(scores["before"], redrawn)
    wrong_at_peak = wrong if peak is None else _wrong_again(scores["peak"])
    wrong_of_lost = _wrong_again(scores["before"][could], None if redrawn is None else redrawn[could])
    kinds = first & last, reference & ~last, could & ~first & last, first & ~last
    found = Flips(*map(np.flatnonzero, kinds))
    for name, chance, among in (
        ("kept", wrong, first),
        ("lost", wrong_at_peak, reference),
        ("regained", wrong_of_lost, ~first[could]),
        ("newly_lost", wrong, first),
    ):
        if chance is not None:
            found.expected[name] = float((chance if name in ("lost", "newly_lost") else 1 - chance)[among].sum())
    return found


def most_by_chance(scores: np.ndarray) -> float:
    """
    The most prompts that a second sample from the unchanged model is expected to turn from right to wrong, or from
    wrong to right, by one score of each prompt alone: with rates `q_p` of being right, and `m` their mean,
    `sum_p q_p (1 - q_p) <= n m (1 - m)` (Jensen's inequality), equal where all prompts have one rate.
    """
    right = np.asarray(scores) >= 0.5
    return len(right) * right.mean() * (1 - right.mean())


def _wrong_again(samples: np.ndarray, redrawn: np.ndarray | None = None) -> np.ndarray | None:
    """Probability of each prompt to be wrong in a second draw; `None` where its samples do not tell it."""
    if redrawn is not None:
        return 1.0 - redrawn
    k, right = samples.shape[1], samples.sum(axis=1)
    if k == 1 or not np.isin(samples, (0, 1)).all():
        return None
    mean, within = samples.mean(), np.mean(right * (k - right)) / (k * (k - 1))
    if not within:  # the samples of a prompt always agree
        return 1.0 * (right == 0)
    share = min(within / (mean * (1 - mean)), 1 - 1e-6)  # 1 where all prompts have one rate
    strength = share / (1 - share)
    fewest_right = (k + 1) // 2
    return betabinom.cdf(fewest_right - 1, k, mean * strength + right, (1 - mean) * strength + k - right)
