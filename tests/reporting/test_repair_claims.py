import numpy as np

from trl_interfere.evaluation.score_matrix import ScoreMatrix
from trl_interfere.reporting.repair_claims import forgetting_claims, refresh_claims, rollback_claims


def row(criterion, budget=0.02, scope="mlp", rule="fixed", share=0.5):
    fields = {"criterion": criterion, "budget": budget, "scope": scope, "step_rule": rule, "step": 1.0}
    low, high = (None, None) if share is None else (share - 0.125, share + 0.25)
    return {**fields, "recovered": share, "low": low, "high": high, "collateral": {"qa": -0.25, "code": 1.0}}


def test_rollback_stands_beside_its_controls():
    rows = [
        row("damage"),
        row("random", share=0.01),
        row("random_matched", share=-0.02),
        row("random", rule="optimal", share=0.9),
        row("damage", 0.32, "joint", "optimal", 0.75),
        row("damage", 0.08, rule="optimal", share=None),
    ]
    first, second = rollback_claims(rows)
    assert first.value == "50% [38, 75]; qa -0.2, code +1.0"
    assert first.control == "random 1% [-12, 26]; random_matched -2% [-14, 23]"
    assert first.paper == "20.4% of the loss; QA -0.06" and first.figure.startswith(
        "share of the lost score: damage, 2%"
    )
    assert second.control == "none at this budget" and second.paper == "73.6% of the loss"
    assert "(best)" in second.figure and "(best)" not in first.figure


def test_refresh_stands_beside_interpolation_and_random_directions():
    assert refresh_claims(None, []) == []
    refresh = {**row("refresh", share=0.75), "domain": "math", "steps": 10, "n": 512}
    (only,) = refresh_claims(refresh, [])
    assert only.control == "no interpolation was measured" and "after 10 steps (n=512)" in only.figure
    refresh["contraction"] = {"directions": 6, "subspace": 0.5, "random": 0.98, "routes": 0.99}
    heals, contracts = refresh_claims(refresh, [row("interpolation", 1.0, "all", "optimal", 0.5)])
    assert heals.value == "75% [62, 100]; qa -0.2, code +1.0"
    assert heals.control == "interpolation of all weights, no training: 50% [38, 75]; qa -0.2, code +1.0"
    assert (contracts.value, contracts.control) == (
        "0.500",
        "6 random directions of route space 0.980; all routes 0.990",
    )


def test_forgetting_is_taken_before_the_refresh():
    matrix = ScoreMatrix(["math", "qa"])
    for name, math, qa in (
        ("0-base", 0.25, 0.0),
        ("1-math", 1.0, 0.0),
        ("2-qa", 0.5, 1.0),
        ("3-refresh-math", 1.0, 1.0),
    ):
        matrix.append(name, {"math": np.full(8, math), "qa": np.full(8, qa)})
    only, last = forgetting_claims(matrix)
    assert last.figure.startswith("qa, trained last") and last.value == "0.0 [0.0, 0.0] to 100.0 [100.0, 100.0]"
    assert only.figure == "math: points lost from the peak to the end of the sequence (n=8)"
    assert only.value == "50.0 [50.0, 50.0], from 100.0 to 50.0" and only.control == "base 25.0 [25.0, 25.0]"
