from dataclasses import replace

import numpy as np
import pytest

from trl_interfere.evaluation.score_matrix import ScoreMatrix
from trl_interfere.reporting.claims import forgetting_claims, refresh_claims, report_claims, rollback_claims


OVERLAP = {"value": 0.25, "low": 0.1, "high": 0.375, "units": 4, "chance": 0.053, "shuffled": 0.06,
           "shuffled_low": 0.01, "shuffled_high": 0.125}  # fmt: skip
SPECTRUM = {"eigenvalues": [2.0, 1.0], "shares": [0.5, 0.25], "effective_dimension": 1.8, "second_order": 0.02,
            "top_routes": {"0.02": 0.625}}  # fmt: skip


@pytest.fixture
def report(make_report):
    report = make_report(100, damage=np.array([4.0, 2.0] + [0.0] * 98))
    whole = {"dtype": "float32", "elements": 10, "below_absolute": 0.75, "below_relative": 0.5, "identical": 0.125}
    report.cosines["by_domain"] = {
        "qa": {
            "global": 0.01,
            "interval": [-0.02, 0.04],
            "ceiling": 0.9,
            "most_conflicting": {"module": "layers.1.mlp", "cosine": -0.5, "interval": [-0.75, -0.25], "of": 14},
            "most_synergistic": {"module": "norm", "cosine": 0.5, "interval": None, "of": 14},
        },
        "writing": {"global": None},
    }
    return replace(
        report,
        updates={"update": {"whole": whole}},
        identical_in_bfloat16=0.375,
        overlaps={"changed": {"mlp": OVERLAP}, "active": {"math": {"qa": {"mlp": OVERLAP}}}},
        subspace={"update": SPECTRUM, "random": {**SPECTRUM, "second_order": 0.001}, "references": 8, "seed": 0},
        second_order_error=0.001,
    )


def test_every_claim_has_its_figure_and_its_control(report):
    rows = {(row.claim, row.figure): row for row in report_claims(report)}
    cells = {key: (row.value, row.control) for key, row in rows.items()}
    stored = "stored as float32: 12.5% identical to the bit; had both been stored in bfloat16: 37.5% identical"
    overlap = ("0.250 [0.100, 0.375] over 4 layers", "chance 0.053; shuffled within layers 0.060 [0.010, 0.125]")
    paradox, low = "orthogonal-gradient paradox", "damage is low-dimensional"
    jaccard, extreme = "Jaccard of the top 10% MLP channels by", "chosen as the extreme of 14 modules"
    second, random = "second-order damage in the top 2", "random update of equal norm"
    assert cells == {
        ("edits are sparse and tiny", "parameters with |δ| < 1e-7"): ("75.0%", stored),
        ("edits are sparse and tiny", "parameters with |δ| ≤ 1e-3 |θ|"): ("50.0%", stored),
        ("changed neurons barely overlap", f"{jaccard} edit: math's own training and the update"): overlap,
        ("active neurons overlap", f"{jaccard} activity: math and qa"): overlap,
        (paradox, "gradient cosine of the whole model: math and qa"): (
            "+0.010 [-0.020, +0.040]",
            "noise of the gradients allows ±0.900",
        ),
        (paradox, "most conflicting module of math and qa: layers.1.mlp"): ("-0.500 [-0.750, -0.250]", extreme),
        (paradox, "most synergistic module of math and qa: norm"): ("+0.500", extreme),
        ("damage is second order", "damage of math in nats per token: first order + second order"): (
            "+0.6000 = +0.3000 + +0.2500 ± 1.0e-03 + higher order",
            "second order by routes of a random update of equal norm in every tensor +0.0010, of this one +0.0200 "
            "(on 8 references)",
        ),
        (low, "attributed damage in the most damaged routes"): (
            "66.7% in 1%, 100.0% in 2%, 100.0% in 5%, 100.0% in 10%, 100.0% in 32%",
            "evenly spread: each share equals the share of routes; above 100% other routes were improved",
        ),
        (low, f"{second} eigenvectors of route space"): ("75.0% of +2.0e-02", f"{random} 75.0% of +1.0e-03"),
        (low, f"{second}% of routes"): ("62.5% of +2.0e-02", f"{random} 62.5% of +1.0e-03"),
        (low, "effective dimension of the 2 leading eigenvalues"): ("1.80", f"{random} 1.80"),
    }


def test_what_a_report_lacks_is_left_out(make_report):
    (row,) = report_claims(replace(make_report(10), attributed=-0.1, cosines={}))
    assert row.claim == "damage is second order" and row.control == "no random update was taken (subspace_size=0)"


def row(arm, share=0.5, **labels):
    low, high = (None, None) if share is None else (share - 0.125, share + 0.25)
    math = {"recovered": share, "low": low, "high": high, "n": 512, "change": {"value": 12.5}}
    return {"arm": arm, "domains": {"math": math, "qa": {"change": {"value": -0.25}}}, **labels}


def test_rollback_stands_beside_its_controls():
    place = {"budget": 0.02, "scope": "mlp", "chosen": 1.5}
    shares = {"damage": 0.5, "random": 0.01, "route_conflict": -0.02}
    rivals = [row("routes", share, criterion=name, **place) for name, share in shares.items()]
    rivals += [row("routes", None, criterion="damage", **{**place, "budget": 0.32}), row("refresh", steps=10)]
    first, second = rollback_claims(rivals, "math")
    assert first.value == "50% [38, 75]; math +12.5, qa -0.2"
    assert first.control.startswith("random 1% [-12, 26]") and "route_conflict -2% [-14, 23]" in first.control
    assert first.paper == "20.4% of the loss; QA -0.06" and "damage, 2% of mlp, best step 1.5" in first.figure
    assert second.control == "none at this budget" and second.value.startswith("nothing was lost")


def test_refresh_stands_beside_interpolation_and_random_directions():
    assert refresh_claims([], "math") == []
    refresh = row("refresh", 0.75, steps=10)
    (only,) = refresh_claims([refresh], "math")
    assert only.control == "no interpolation was measured" and "after 10 steps (n=512)" in only.figure
    refresh["contraction"] = {"directions": 6, "subspace": 0.5, "random": 0.98, "routes": 0.99}
    heals, contracts = refresh_claims([refresh, row("interpolation")], "math")
    assert heals.value == "75% [62, 100]; math +12.5, qa -0.2"
    assert heals.control == "interpolation of all weights, no training: 50% [38, 75]; math +12.5, qa -0.2"
    control = "6 random directions of route space 0.980; all routes 0.990"
    assert (contracts.value, contracts.control) == ("0.500", control)


def test_forgetting_is_taken_before_the_refresh():
    matrix = ScoreMatrix(["math", "qa"])
    stages = {"0-base": (0.25, 0.0), "1-math": (1.0, 0.0), "2-qa": (0.5, 1.0), "3-refresh-math": (1.0, 1.0)}
    for name, (math, qa) in stages.items():
        matrix.append(name, {"math": np.full(8, math), "qa": np.full(8, qa)})
    only, last = forgetting_claims(matrix)
    assert last.figure.startswith("qa, trained last") and last.value == "0.0 [0.0, 0.0] to 100.0 [100.0, 100.0]"
    assert only.figure == "math: points lost from the peak to the end of the sequence (n=8)"
    assert only.value == "50.0 [50.0, 50.0], from 100.0 to 50.0" and only.control == "base 25.0 [25.0, 25.0]"
