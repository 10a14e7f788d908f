import pytest

from trl_interfere.evaluation.collateral import collateral


def test_every_domain_that_was_not_repaired(matrix, close_to_loops):
    changes = collateral(matrix, since=6, repaired=["code"])
    assert list(changes) == ["math", "qa", "poems", "law"]
    for domain, interval in changes.items():
        close_to_loops(interval, [matrix.values[7][domain] - matrix.values[6][domain]])


def test_domains_without_a_score_at_either_stage(matrix):
    assert list(collateral(matrix, since=2, stage=5)) == ["math", "code", "qa", "poems"]
    assert list(collateral(matrix, since=5, stage=2, repaired=["qa", "math"])) == ["code", "poems"]


def test_unknown_stages(matrix):
    with pytest.raises(ValueError, match="stage: expected the position of one of 8 stages, found 9"):
        collateral(matrix, since=9)
