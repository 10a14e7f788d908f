import numpy as np
import pytest

from trl_interfere.evaluation.bootstrap import Interval, average, bootstrap, difference, score


def close_to_normal(interval, mean, error):
    """95% of a normal distribution, up to the noise of 2000 resamples."""
    assert interval.value == pytest.approx(mean, rel=1e-12)
    assert interval.low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)


def test_means_and_other_statistics_against_the_normal_approximation():
    for n, seed in ((100, 0), (400, 1)):
        interval = score((np.arange(n) % 10 < 7).astype(float), seed=seed)
        close_to_normal(interval, 70.0, 100 * np.sqrt(0.7 * 0.3 / n))
        assert interval.n == n
    values = np.random.default_rng(0).normal(size=300)
    interval = bootstrap(lambda sample, axis: np.mean(sample**3, axis=axis), values)
    close_to_normal(interval, np.mean(values**3), np.std(values**3) / np.sqrt(300))


def test_difference_is_paired():
    rng = np.random.default_rng(0)
    before = rng.uniform(size=200)
    after = before + 0.05 + 0.01 * rng.normal(size=200)  # unpaired, its error would be 40 times as large
    change = 100 * (after - before)
    close_to_normal(difference(after, before), change.mean(), change.std() / np.sqrt(200))
    with pytest.raises(ValueError, match="expected the same prompts in every sample"):
        difference([0.0, 1.0], [1.0])


def test_seeds():
    values, state = np.random.default_rng(0).uniform(size=50), np.random.get_state()[1].tolist()
    assert score(values, seed=3) == score(values, seed=3)
    assert np.random.get_state()[1].tolist() == state
    first, second = score(values, seed=3), score(values, seed=4)
    assert first.value == second.value and first != second


@pytest.mark.parametrize("value, n", [(0.25, 8), (1.0, 2), (0.5, 1)])
def test_what_does_not_vary_has_no_width(value, n):
    assert score(np.full(n, value)) == Interval(100 * value, 100 * value, 100 * value, n)
    assert difference(np.full(n, value), np.full(n, 0.25)) == Interval(*[100 * (value - 0.25)] * 3, n)


def test_average_of_domains(close_to_loops):
    rng = np.random.default_rng(1)
    samples = [rng.uniform(size=30), rng.uniform(size=300) - 0.5, np.full(7, 0.25)]
    close_to_loops(average(samples), samples)
    assert average(samples, seed=1) != average(samples, seed=2)
    assert average(samples[:1]) == score(samples[0])
    assert average([[1.0, 1.0], [0.5]]) == Interval(75.0, 75.0, 75.0, 3)
    nothing = average([])
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all() and nothing.n == 0


def test_format():
    assert f"{Interval(1.25, 0.5, 2.0, 7):.1f}" == "1.2 [0.5, 2.0]"
    assert f"{Interval(0.5, 0.25, 1.0, 7):.0%}" == "50% [25%, 100%]"
    assert Interval(1.0, 0.5, 2.0, 7).to_dict() == {"value": 1.0, "low": 0.5, "high": 2.0, "n": 7}
