"""Forgetting, transfer, recovered and collateral against plain loops over resamples."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

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
    "statistic, domain, stage",
    [
        *((forgetting, domain, stage) for domain in ("math", "code", "poems") for stage in (5, 6, 7)),
        *((backward_transfer, *case) for case in (("math", 2), ("math", 7), ("code", 4), ("law", 6), ("law", 7))),
        *((forward_transfer, domain, 7) for domain in ("code", "qa")),
    ],
)
def test_statistics_of_one_domain(statistic, domain, stage, matrix, close_to_loops):
    close_to_loops(statistic(matrix, domain, stage), [change(statistic, matrix, domain, stage)])
    assert statistic(matrix, domain, stage - 8) == statistic(matrix, domain, stage)


@pytest.mark.parametrize(
    "statistic, stage, domains",
    [
        (forgetting, 2, ["math"]),
        (forgetting, 4, ["math", "code"]),
        (forgetting, 7, ["math", "code", "law"]),
        (backward_transfer, 2, ["math"]),
        (backward_transfer, 4, ["math", "code"]),
        (backward_transfer, 7, ["math", "code", "law"]),
        (forward_transfer, 5, ["code"]),
        (forward_transfer, 6, ["code", "qa"]),
        (forward_transfer, 7, ["code", "qa"]),
    ],
)
def test_averages(statistic, stage, domains, matrix, close_to_loops):
    close_to_loops(statistic(matrix, stage=stage), [change(statistic, matrix, domain, stage) for domain in domains])


def test_undefined_statistics(matrix):
    undefined = [
        forgetting(matrix, "qa"),  # trained last, although a refresh came after it
        forgetting(matrix, "written"),  # never scored
        forgetting(matrix, "law", 4),  # no earlier score
        forgetting(matrix, "law", 2),  # no score
        forgetting(matrix, "math", 0),
        forgetting(matrix, stage=0),
        forgetting(matrix, stage=1),
        backward_transfer(matrix, "qa"),  # trained last
        backward_transfer(matrix, "poems"),  # never trained
        backward_transfer(matrix, "written"),  # never scored
        backward_transfer(matrix, "math", 0),
        backward_transfer(matrix, stage=1),
        forward_transfer(matrix, "math"),  # trained first
        forward_transfer(matrix, "poems"),
        forward_transfer(matrix, "law"),  # not scored on the base model
        forward_transfer(matrix, "qa", 5),  # not trained yet
        forward_transfer(matrix, stage=1),
        forward_transfer(ScoreMatrix(["math"], ["1-code", "2-math"], [{"math": np.zeros(3)}] * 2), "math"),  # no base
    ]
    assert all(np.isnan(interval.value) and interval.n == 0 for interval in undefined)
    with pytest.raises(ValueError, match="stage: expected the position of one of 8 stages, found 8"):
        forgetting(matrix, stage=8)
    with pytest.raises(ValueError, match="stage: expected the position of one of 0 stages, found -1"):
        forgetting(ScoreMatrix(["math"]))


def test_forgetting_is_paired_and_signed():
    rng = np.random.default_rng(0)
    before = rng.uniform(size=200)
    matrix = ScoreMatrix(["math"])
    matrix.append("0-base", {"math": before})
    matrix.append("1-code", {"math": before - 0.05 + 0.01 * rng.normal(size=200)})
    matrix.append("2-qa", {"math": before + 0.05})
    assert forgetting(matrix, "math", 1) == difference(before, matrix.values[1]["math"])
    assert 4.8 < forgetting(matrix, "math", 1).low < forgetting(matrix, "math", 1).high < 5.3
    assert forgetting(matrix, "math", 2).value == pytest.approx(-5)


def test_a_domain_that_is_trained_twice():
    shares = {
        "0-base": (0.1, 0.2),
        "1-math": (0.5, 0.3),
        "2-code": (0.4, 0.9),
        "3-math": (0.8, 0.6),
        "4-qa": (0.5, 0.5),
    }
    matrix = ScoreMatrix(["math", "code"])
    for stage, (math, code) in shares.items():
        matrix.append(stage, {"math": np.full(4, math), "code": np.full(4, code)})
    assert backward_transfer(matrix, "math").value == pytest.approx(-30)
    assert backward_transfer(matrix, "math", 2).value == pytest.approx(-10)
    assert backward_transfer(matrix).value == pytest.approx((-30 - 40) / 2)
    assert backward_transfer(matrix, stage=3).value == pytest.approx(-30)  # math is the last one there
    assert forward_transfer(matrix, "code").value == pytest.approx(10)


def test_recovered_by_hand():
    peak = np.array([1.0, 1.0, 1.0, 0.0])
    damaged = np.array([0.0, 0.5, 0.0, 0.0])
    repaired = np.array([1.0, 0.5, 0.25, 0.0])
    assert recovered(repaired, damaged, peak).value == pytest.approx((1.75 - 0.5) / (3 - 0.5))
    assert recovered(damaged, damaged, peak).value == 0
    assert recovered(peak, damaged, peak) == Interval(1.0, 1.0, 1.0, 4)
    assert recovered(np.full(5, 0.5), np.zeros(5), np.ones(5)) == Interval(0.5, 0.5, 0.5, 5)
    assert recovered([1.0] * 4, damaged, peak).value == pytest.approx(3.5 / 2.5)
    assert recovered([0.0] * 4, damaged, peak).value == pytest.approx(-0.5 / 2.5)


def test_recovered_interval_against_loops():
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
    assert list(collateral(matrix, since=5, stage=2, repaired=["qa", "math"])) == ["code", "poems"]
    with pytest.raises(ValueError, match="stage: expected the position of one of 8 stages, found 9"):
        collateral(matrix, since=9)


def printed(table):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_summary_after_a_refresh(matrix):
    summary = ScoreSummary.from_matrix(matrix)
    assert summary.stage == "7-refresh-code"
    assert summary.score == {domain: matrix.interval(7, domain) for domain in matrix.domains}
    assert summary.forgetting == {domain: forgetting(matrix, domain) for domain in ("math", "code", "poems", "law")}
    assert summary.backward_transfer == {
        domain: backward_transfer(matrix, domain) for domain in ("math", "code", "law")
    }
    assert summary.forward_transfer == {domain: forward_transfer(matrix, domain) for domain in ("code", "qa")}
    peak = max(matrix.values[:7], key=lambda values: values["code"].mean())
    damaged, now = matrix.values[6], matrix.values[7]
    assert summary.recovered == {"code": recovered(now["code"], damaged["code"], peak["code"])}
    assert summary.collateral == {
        domain: difference(now[domain], damaged[domain]) for domain in ("math", "qa", "poems", "law")
    }
    assert summary.average == {
        "score": matrix.average_score(),
        "forgetting": forgetting(matrix),
        "backward_transfer": backward_transfer(matrix),
        "forward_transfer": forward_transfer(matrix),
    }


def test_summary_of_an_earlier_stage_without_refreshes(matrix):
    summary = ScoreSummary.from_matrix(matrix, 2)
    assert summary.stage == "2-code"
    assert "law" not in summary.score and summary.recovered == summary.collateral == {}
    assert list(summary.forgetting) == ["math", "qa", "poems"]
    base = ScoreSummary.from_matrix(matrix, 0)
    assert list(base.average) == ["score"] and base.forgetting == {}


def test_summary_is_json_without_nan(matrix):
    for stage in range(8):
        content = ScoreSummary.from_matrix(matrix, stage).to_dict()
        assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["stage"] == "7-refresh-code"
    assert content["score"]["qa"] == matrix.interval(7, "qa").to_dict()
    assert content["average"]["score"]["n"] == 205


def test_summary_as_a_table(matrix):
    summary = ScoreSummary.from_matrix(matrix)
    text = printed(summary.to_table())
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert list(lines) == ["math", "code", "qa", "poems", "law", "average"]
    assert f"{summary.forgetting['math']:.1f}" in lines["math"]
    assert f"{summary.average['backward_transfer']:.1f}" in lines["average"]
    assert "—" in lines["qa"]
    assert f"{summary.recovered['code']:.0%}" in lines["code"]
    assert "collateral" in text and "collateral" not in printed(ScoreSummary.from_matrix(matrix, 2).to_table())


def test_a_domain_named_average(matrix):
    matrix.domains = ["average" if domain == "qa" else domain for domain in matrix.domains]
    for values in matrix.values:
        values["average"] = values.pop("qa")
    summary = ScoreSummary.from_matrix(matrix)
    assert summary.score["average"] == matrix.interval(7, "average") and summary.average["score"] != summary.score
    assert printed(summary.to_table()).count("average") == 2


def test_a_heal_repairs_every_domain_that_lost_something():
    matrix = ScoreMatrix(["math", "qa", "code"])
    for stage, shares in {"1-math": (0.8, 0.5, 0.2), "2-qa": (0.4, 0.9, 0.2), "3-heal": (0.7, 0.8, 0.3)}.items():
        matrix.append(stage, {domain: np.full(4, share) for domain, share in zip(matrix.domains, shares, strict=True)})
    summary = ScoreSummary.from_matrix(matrix)
    assert {name: share.value for name, share in summary.recovered.items()} == pytest.approx({"math": 0.75})
    assert {name: change.value for name, change in summary.collateral.items()} == pytest.approx(
        {"qa": -10, "code": 10}
    )
