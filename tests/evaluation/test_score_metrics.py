"""Forgetting, transfer, recovered and collateral against plain loops over resamples."""

import json

import numpy as np
import pytest

from trl_interfere.evaluation.bootstrap import Interval, difference
from trl_interfere.evaluation.metrics import (
    ScoreSummary,
    backward_transfer,
    collateral,
    forgetting,
    forward_transfer,
    recovered,
)
from trl_interfere.evaluation.score_matrix import ScoreMatrix


OWN = {"math": 1, "code": 2, "law": 5, "qa": 6}  # the stages of the fixture, by hand


def change(statistic, matrix, domain, stage):
    """What a statistic is the mean of, by plain loops."""
    now = matrix.values[stage]
    if statistic is backward_transfer:
        return now[domain] - matrix.values[OWN[domain]][domain]
    if statistic is forward_transfer:
        return matrix.values[OWN[domain] - 1][domain] - matrix.values[0][domain]
    peak = None
    for values in matrix.values[:stage]:
        if domain in values and (peak is None or sum(values[domain]) > sum(peak)):
            peak = values[domain]
    return peak - now[domain]


@pytest.mark.parametrize(
    "statistic, stage, domains",
    [
        (forgetting, 2, ["math"]),
        (forgetting, 7, ["math", "code", "law"]),
        (backward_transfer, 4, ["math", "code"]),
        (backward_transfer, 7, ["math", "code", "law"]),
        (forward_transfer, 5, ["code"]),
        (forward_transfer, 7, ["code", "qa"]),
    ],
)
def test_statistics_of_domains_and_their_average(statistic, stage, domains, matrix, close_to_loops):
    close_to_loops(statistic(matrix, stage=stage), [change(statistic, matrix, domain, stage) for domain in domains])
    for domain in [*domains, *(["poems"] if statistic is forgetting else [])]:
        close_to_loops(statistic(matrix, domain, stage), [change(statistic, matrix, domain, stage)])
        assert statistic(matrix, domain, stage - 8) == statistic(matrix, domain, stage)


def test_undefined_statistics(matrix):
    undefined = [
        forgetting(matrix, "qa"),  # trained last, although a refresh came after it
        forgetting(matrix, "law", 4),  # no earlier score
        forgetting(matrix, "law", 2),  # no score
        forgetting(matrix, stage=0),
        backward_transfer(matrix, "qa"),  # trained last
        backward_transfer(matrix, "poems"),  # never trained
        backward_transfer(matrix, "written"),  # never scored
        backward_transfer(matrix, stage=1),
        forward_transfer(matrix, "math"),  # trained first
        forward_transfer(matrix, "law"),  # not scored on the base model
        forward_transfer(matrix, "qa", 5),  # not trained yet
        forward_transfer(ScoreMatrix(["math"], ["1-code", "2-math"], [{"math": np.zeros(3)}] * 2), "math"),  # no base
    ]
    assert all(np.isnan(interval.value) and interval.n == 0 for interval in undefined)
    with pytest.raises(ValueError, match="stage: expected the position of one of 8 stages, found 8"):
        forgetting(matrix, stage=8)


def of_shares(domains, **stages):
    """A matrix in which all prompts of a domain have one score."""
    matrix = ScoreMatrix(domains)
    for stage, shares in stages.items():
        matrix.append(stage, {name: np.full(4, share) for name, share in zip(domains, shares, strict=True)})
    return matrix


def test_a_domain_that_is_trained_twice():
    earlier = {"0-base": (0.1, 0.2), "1-math": (0.5, 0.3), "2-code": (0.4, 0.9)}
    matrix = of_shares(["math", "code"], **earlier, **{"3-math": (0.8, 0.6), "4-qa": (0.5, 0.5)})
    assert backward_transfer(matrix, "math").value == pytest.approx(-30)
    assert backward_transfer(matrix, "math", 2).value == pytest.approx(-10)
    assert backward_transfer(matrix).value == pytest.approx((-30 - 40) / 2)
    assert backward_transfer(matrix, stage=3).value == pytest.approx(-30)  # math is the last one there
    assert forward_transfer(matrix, "code").value == pytest.approx(10)


def test_recovered_against_loops():
    rng = np.random.default_rng(0)
    peak = (rng.uniform(size=60) < 0.8).astype(float)
    damaged = peak * (rng.uniform(size=60) < 0.5)
    repaired = np.maximum(damaged, peak * (rng.uniform(size=60) < 0.6))
    interval = recovered(repaired, damaged, peak)
    ratios = []
    for _ in range(4000):
        chosen = rng.integers(0, 60, size=60)
        lost = peak[chosen].mean() - damaged[chosen].mean()
        ratios.append((repaired[chosen].mean() - damaged[chosen].mean()) / lost)
    low, high = np.percentile(ratios, [2.5, 97.5])
    assert interval.value == pytest.approx((repaired.mean() - damaged.mean()) / (peak.mean() - damaged.mean()))
    assert interval.low == pytest.approx(low, abs=0.1 * (high - low))
    assert interval.high == pytest.approx(high, abs=0.1 * (high - low))
    assert interval.n == 60
    assert recovered(damaged, damaged, peak).value == 0
    assert recovered(peak, damaged, peak) == Interval(1.0, 1.0, 1.0, 60)
    assert recovered(damaged - 0.1, damaged, peak).value < 0


def test_where_nothing_was_lost():
    for damaged, peak in (([0.5, 0.5], [0.5, 0.5]), ([1.0, 0.5], [0.5, 1.0]), ([1.0, 1.0], [0.0, 1.0])):
        interval = recovered([1.0, 1.0], damaged, peak)
        assert np.isnan([interval.value, interval.low, interval.high]).all() and interval.n == 2
    # One prompt of three was lost: without it, which happens in 8 of 27 resamples, there is nothing to recover.
    interval = recovered([0.5, 1.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.5, 0.5, 0.5))


def test_every_domain_that_was_not_repaired(matrix, close_to_loops):
    changes = collateral(matrix, since=6, repaired=["code"])
    assert list(changes) == ["math", "qa", "poems", "law"]
    for domain, interval in changes.items():
        close_to_loops(interval, [matrix.values[7][domain] - matrix.values[6][domain]])
    # Domains without a score at either stage are left out.
    assert list(collateral(matrix, since=2, stage=5)) == ["math", "code", "qa", "poems"]


def test_summary_after_a_refresh(matrix):
    summary = ScoreSummary.from_matrix(matrix)
    assert summary.stage == "7-refresh-code"
    assert summary.score == {domain: matrix.interval(7, domain) for domain in matrix.domains}
    assert summary.average.pop("score") == matrix.average_score()
    for statistic, domains in (
        (forgetting, ("math", "code", "poems", "law")),
        (backward_transfer, ("math", "code", "law")),
        (forward_transfer, ("code", "qa")),
    ):
        assert getattr(summary, statistic.__name__) == {domain: statistic(matrix, domain) for domain in domains}
        assert summary.average.pop(statistic.__name__) == statistic(matrix)
    assert summary.average == {}
    peak = max(matrix.values[:7], key=lambda values: values["code"].mean())
    damaged, now = matrix.values[6], matrix.values[7]
    assert summary.recovered == {"code": recovered(now["code"], damaged["code"], peak["code"])}
    others = ("math", "qa", "poems", "law")
    assert summary.collateral == {domain: difference(now[domain], damaged[domain]) for domain in others}


def test_summaries_of_earlier_stages_and_as_json(matrix):
    summary, base = (ScoreSummary.from_matrix(matrix, stage) for stage in (2, 0))
    assert summary.stage == "2-code" and list(summary.forgetting) == ["math", "qa", "poems"]
    assert "law" not in summary.score and summary.recovered == summary.collateral == {}
    assert list(base.average) == ["score"] and base.forgetting == {}
    for stage in range(8):
        content = ScoreSummary.from_matrix(matrix, stage).to_dict()
        assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["score"]["qa"] == matrix.interval(7, "qa").to_dict()


def test_summary_as_a_table(matrix, printed):
    summary = ScoreSummary.from_matrix(matrix)
    text = printed(summary.to_table())
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert list(lines) == ["math", "code", "qa", "poems", "law", "average"]
    assert f"{summary.forgetting['math']:.1f}" in lines["math"]
    assert f"{summary.average['backward_transfer']:.1f}" in lines["average"]
    assert "—" in lines["qa"]
    assert f"{summary.recovered['code']:.0%}" in lines["code"]
    assert "collateral" in text and "collateral" not in printed(ScoreSummary.from_matrix(matrix, 2).to_table())


def test_a_heal_repairs_every_domain_that_lost_something():
    shares = {"1-math": (0.8, 0.5, 0.2), "2-qa": (0.4, 0.9, 0.2), "3-heal": (0.7, 0.8, 0.3)}
    matrix = of_shares(["math", "qa", "code"], **shares)
    summary = ScoreSummary.from_matrix(matrix)
    assert {name: share.value for name, share in summary.recovered.items()} == pytest.approx({"math": 0.75})
    changes = {name: change.value for name, change in summary.collateral.items()}
    assert changes == pytest.approx({"qa": -10, "code": 10})
