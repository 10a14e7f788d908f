import numpy as np
import pytest

from trl_interfere.evaluation.bootstrap import difference
from trl_interfere.evaluation.forgetting import forgetting
from trl_interfere.evaluation.score_matrix import ScoreMatrix


def lost(matrix, domain, final):
    """Highest earlier row minus the row asked for, by a plain loop."""
    peak = None
    for values in matrix.values[:final]:
        if domain in values and (peak is None or sum(values[domain]) > sum(peak)):
            peak = values[domain]
    return peak - matrix.values[final][domain]


@pytest.mark.parametrize("stage", [5, 6, 7])
@pytest.mark.parametrize("domain", ["math", "code", "poems"])
def test_one_domain(domain, stage, matrix, close_to_loops):
    close_to_loops(forgetting(matrix, domain, stage), [lost(matrix, domain, stage)])
    assert forgetting(matrix, domain, stage - 8) == forgetting(matrix, domain, stage)


@pytest.mark.parametrize(
    "stage, domains",
    [(2, ["math"]), (3, ["math"]), (4, ["math", "code"]), (5, ["math", "code"]), (7, ["math", "code", "law"])],
)
def test_average_over_the_domains_trained_before(stage, domains, matrix, close_to_loops):
    close_to_loops(forgetting(matrix, stage=stage), [lost(matrix, domain, stage) for domain in domains])


def test_undefined(matrix):
    undefined = [
        forgetting(matrix, "qa"),  # trained last, although a refresh came after it
        forgetting(matrix, "written"),  # never scored
        forgetting(matrix, "law", 4),  # no earlier score
        forgetting(matrix, "law", 2),  # no score
        forgetting(matrix, "math", 0),
        forgetting(matrix, stage=0),
        forgetting(matrix, stage=1),
    ]
    assert all(np.isnan(interval.value) and interval.n == 0 for interval in undefined)
    with pytest.raises(ValueError, match="stage: expected the position of one of 8 stages, found 8"):
        forgetting(matrix, stage=8)
    with pytest.raises(ValueError, match="stage: expected the position of one of 0 stages, found -1"):
        forgetting(ScoreMatrix(["math"]))


def test_paired_and_signed():
    rng = np.random.default_rng(0)
    before = rng.uniform(size=200)
    matrix = ScoreMatrix(["math"])
    matrix.append("0-base", {"math": before})
    matrix.append("1-code", {"math": before - 0.05 + 0.01 * rng.normal(size=200)})
    matrix.append("2-qa", {"math": before + 0.05})
    assert forgetting(matrix, "math", 1) == difference(before, matrix.values[1]["math"])
    assert 4.8 < forgetting(matrix, "math", 1).low < forgetting(matrix, "math", 1).high < 5.3
    assert forgetting(matrix, "math", 2).value == pytest.approx(-5)
