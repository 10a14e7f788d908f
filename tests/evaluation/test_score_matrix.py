import json

import numpy as np
import pytest

from trl_interfere.evaluation.bootstrap import score
from trl_interfere.evaluation.score_matrix import ScoreMatrix


def test_intervals_and_peaks(matrix):
    assert matrix.interval(1, "math") == score(matrix.values[1]["math"])
    assert matrix.interval(-1, "qa") == score(matrix.values[7]["qa"])
    matrix.values[7]["poems"] = matrix.values[matrix.peak("poems")]["poems"]  # the first of the highest counts
    for domain in ("math", "poems"):
        means = [values[domain].mean() for values in matrix.values]
        assert [matrix.peak(domain, last) for last in range(8)] == [int(np.argmax(means[: n + 1])) for n in range(8)]
    means = [values["law"].mean() for values in matrix.values[4:]]
    assert matrix.peak("law") == 4 + int(np.argmax(means)) and matrix.peak("law", last=4) == 4
    with pytest.raises(ValueError, match=r"domain 'law': expected a score after one of \['0-base', '1-math'\], found"):
        matrix.peak("law", last=1)
    with pytest.raises(ValueError, match="stage '3-refresh-math': expected a score of domain 'law', found scores of"):
        matrix.interval(3, "law")


def test_table(matrix, printed):
    text = printed(matrix.to_table())
    assert "math (n=40)" in text and "law (n=50)" in text
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert ["—" in row for row in rows] == [True] * 4 + [False] * 4
    assert "0-base" in rows[0] and f"{matrix.interval(0, 'math'):.1f}" in rows[0]
    assert [column.header for column in ScoreMatrix(["math"]).to_table().columns] == ["stage", "math (n=0)"]
    lines = repr(matrix).splitlines()
    assert lines[0].startswith("stage") and "math (n=40)" in lines[0] and len(lines) == 9
    assert lines[1].startswith("0-base") and f"{matrix.interval(0, 'math'):.1f}" in lines[1]


def test_average_score(matrix, close_to_loops):
    close_to_loops(matrix.average_score(), list(matrix.values[-1].values()))
    close_to_loops(matrix.average_score(3), [matrix.values[3][domain] for domain in ("math", "code", "qa", "poems")])


def test_kinds_of_stages(matrix):
    kinds = ("base", None), ("train", "math"), ("refresh", "math"), ("refresh", "code")
    assert tuple(matrix.stage_kind(position) for position in (0, 1, 3, -1)) == kinds
    assert [matrix.last_training(position) for position in range(8)] == [None, 1, 2, 2, 4, 5, 6, 6]
    stages = ["0-base", "1-base", "2-refresh-math", "3-refresh-a-b"]
    other = ScoreMatrix(["base", "refresh-math", "a-b"], stages)
    kinds = ("base", None), ("train", "base"), ("train", "refresh-math"), ("refresh", "a-b")
    assert tuple(map(other.stage_kind, range(4))) == kinds


def test_to_dict(matrix):
    content = matrix.to_dict()
    assert json.loads(json.dumps(content)) == content
    assert content["domains"] == matrix.domains
    assert [entry["stage"] for entry in content["stages"]] == matrix.stages
    assert content["stages"][0]["scores"]["math"] == matrix.interval(0, "math").to_dict()
    assert "law" not in content["stages"][3]["scores"] and "law" in content["stages"][4]["scores"]
