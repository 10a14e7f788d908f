import json

import numpy as np
import pytest

from trl_interfere.evaluation.bootstrap import score
from trl_interfere.evaluation.score_matrix import ScoreMatrix


def filled():
    matrix = ScoreMatrix(["math", "qa"])
    matrix.append("0-base", {"math": np.array([0.0, 0.5, 0.0, 0.0]), "qa": np.array([1.0, 0.0])})
    matrix.append("1-math", {"math": np.array([1.0, 1.0, 1.0, 0.0]), "qa": np.array([0.0, 0.0])})
    matrix.append("2-qa", {"math": np.array([1.0, 1.0, 0.0, 1.0]), "qa": np.array([1.0, 1.0])})
    return matrix


def test_intervals():
    matrix = filled()
    assert matrix.interval(0, "math").value == 12.5
    assert matrix.interval(-1, "qa").value == 100
    assert matrix.interval(1, "math") == score(np.array([1.0, 1.0, 1.0, 0.0]))
    assert matrix.peak("math") == 1 and matrix.peak("qa") == 2  # the first highest stage


def test_table(printed):
    text = printed(filled().to_table())
    assert "math (n=4)" in text and "qa (n=2)" in text
    rows = [line for line in text.splitlines() if "0-base" in line or "2-qa" in line]
    assert "12.5 [0.0, 37.5]" in rows[0] and "50.0 [0.0, 100.0]" in rows[0]
    assert "100.0 [100.0, 100.0]" in rows[1]
    assert [column.header for column in ScoreMatrix(["math"]).to_table().columns] == ["stage", "math (n=0)"]
    lines = repr(filled()).splitlines()
    assert lines[0].split("  ")[0] == "stage" and "math (n=4)" in lines[0]
    assert lines[1].startswith("0-base") and "12.5 [0.0, 37.5]" in lines[1] and len(lines) == 4


def test_rows_without_a_value(matrix, printed):
    text = printed(matrix.to_table())
    assert "law (n=50)" in text
    assert ["—" in line for line in text.splitlines() if line.startswith("│")] == [True] * 4 + [False] * 4
    means = [values["law"].mean() for values in matrix.values[4:]]
    assert matrix.peak("law") == 4 + int(np.argmax(means))
    assert matrix.peak("law", last=4) == 4
    with pytest.raises(ValueError, match=r"domain 'law': expected a score after one of \['0-base', '1-math'\], found"):
        matrix.peak("law", last=1)
    with pytest.raises(ValueError, match="stage '3-refresh-math': expected a score of domain 'law', found scores of"):
        matrix.interval(3, "law")


def test_peak_up_to_a_stage(matrix):
    for domain in ("math", "poems"):
        means = [values[domain].mean() for values in matrix.values]
        assert [matrix.peak(domain, last) for last in range(8)] == [int(np.argmax(means[: n + 1])) for n in range(8)]


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
