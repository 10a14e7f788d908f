import numpy as np
import pytest

from trl_interfere.evaluation.score_matrix import ScoreMatrix
from trl_interfere.evaluation.transfer import backward_transfer, forward_transfer


OWN = {"math": 1, "code": 2, "law": 5, "qa": 6}  # the stages of the fixture, by hand


def row(matrix, stage, domain):
    return matrix.values[stage][domain]


@pytest.mark.parametrize("domain, stage", [("math", 2), ("math", 7), ("code", 4), ("law", 6), ("law", 7)])
def test_backward_transfer_to_one_domain(domain, stage, matrix, close_to_loops):
    change = row(matrix, stage, domain) - row(matrix, OWN[domain], domain)
    close_to_loops(backward_transfer(matrix, domain, stage), [change])


@pytest.mark.parametrize("stage, domains", [(2, ["math"]), (4, ["math", "code"]), (7, ["math", "code", "law"])])
def test_average_backward_transfer(stage, domains, matrix, close_to_loops):
    changes = [row(matrix, stage, domain) - row(matrix, OWN[domain], domain) for domain in domains]
    close_to_loops(backward_transfer(matrix, stage=stage), changes)


@pytest.mark.parametrize("domain", ["code", "qa"])
def test_forward_transfer_to_one_domain(domain, matrix, close_to_loops):
    change = row(matrix, OWN[domain] - 1, domain) - row(matrix, 0, domain)
    close_to_loops(forward_transfer(matrix, domain), [change])


@pytest.mark.parametrize("stage, domains", [(2, ["code"]), (5, ["code"]), (6, ["code", "qa"]), (7, ["code", "qa"])])
def test_average_forward_transfer(stage, domains, matrix, close_to_loops):
    changes = [row(matrix, OWN[domain] - 1, domain) - row(matrix, 0, domain) for domain in domains]
    close_to_loops(forward_transfer(matrix, stage=stage), changes)


def test_undefined(matrix):
    undefined = [
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
    ]
    assert all(np.isnan(interval.value) and interval.n == 0 for interval in undefined)


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


def test_without_a_base_row():
    matrix = ScoreMatrix(["math"], ["1-code", "2-math"], [{"math": np.zeros(3)}, {"math": np.ones(3)}])
    assert np.isnan(forward_transfer(matrix, "math").value)
