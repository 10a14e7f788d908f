import io

import numpy as np
from rich.console import Console

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


def test_peak_is_the_first_highest_stage():
    assert filled().peak("math") == 1
    assert filled().peak("qa") == 2


def test_table():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(filled().to_table())
    text = console.export_text()
    assert "math (n=4)" in text and "qa (n=2)" in text
    rows = [line for line in text.splitlines() if "0-base" in line or "2-qa" in line]
    assert "12.5 [0.0, 37.5]" in rows[0] and "50.0 [0.0, 100.0]" in rows[0]
    assert "100.0 [100.0, 100.0]" in rows[1]


def test_empty_table():
    assert [column.header for column in ScoreMatrix(["math"]).to_table().columns] == ["stage", "math (n=0)"]
