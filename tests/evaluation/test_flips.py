"""Prompts kept, lost, regained and newly lost, and what resampling alone flips."""

import numpy as np
import pytest

from trl_interfere.evaluation.flips import flips


PEAK = np.array([1, 1, 1, 1, 0, 0, 0, 0])
BEFORE = np.array([1, 1, 0, 0, 1, 1, 0, 0])
AFTER = np.array([1, 0, 1, 0, 1, 0, 1, 0])


def test_a_repair_beside_the_peak():
    found = flips(BEFORE, AFTER, PEAK)
    assert {name: list(getattr(found, name)) for name in found.counts()} == {
        "kept": [0, 4],
        "lost": [1, 3],
        "regained": [2],
        "newly_lost": [1, 5],
    }
    assert found.expected == {}


def test_without_a_peak_before_is_the_reference_and_samples_count_by_their_mean():
    found = flips(BEFORE, AFTER)
    assert list(found.lost) == list(found.newly_lost) == [1, 5]
    assert list(found.regained) == [2, 6]
    before = np.array([[1, 1, 0, 0], [1, 0, 0, 0]])
    assert flips(before, np.array([0.4, 0.5])).counts() == {"kept": 0, "lost": 1, "regained": 1, "newly_lost": 1}


@pytest.mark.parametrize("k", [2, 5, 8])
@pytest.mark.parametrize("a, b", [(0.3, 0.4), (2.0, 1.0)])
def test_expected_flips_are_those_of_second_draws(k, a, b):
    rng = np.random.default_rng(0)
    rates = rng.beta(a, b, size=20000)
    first, second, peak = (rng.binomial(1, rates[:, None], size=(len(rates), k)) for _ in range(3))
    for found in (flips(first, second), flips(first, second, peak)):
        assert found.expected == pytest.approx(found.counts(), rel=0.1)


def test_expected_flips_by_hand():
    assert flips(BEFORE, AFTER, redraw=1 - BEFORE).expected == {"kept": 0, "regained": 4, "newly_lost": 4, "lost": 4}
    agreed = np.repeat(BEFORE[:, None], 4, axis=1)
    assert flips(agreed, AFTER).expected == {"kept": 4, "regained": 0, "newly_lost": 0, "lost": 0}
    before = np.tile([1, 0], (6, 1))  # one rate for all prompts
    assert flips(before, before).expected["lost"] == pytest.approx(6 * 0.25, rel=1e-4)
    assert flips(np.full((8, 2), 0.7), AFTER).expected == {}  # the scores do not tell


@pytest.mark.parametrize("name, values", [("after", np.ones(3)), ("peak", np.full(8, np.nan)), ("redraw", np.ones(0))])
def test_other_prompts_are_refused(name, values):
    with pytest.raises(ValueError, match=name):
        flips(**{"before": BEFORE, "after": AFTER, name: values})
