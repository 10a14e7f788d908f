import numpy as np
import pytest

from trl_interfere.analysis.plots import (
    plot_damage_concentration,
    plot_module_cosines,
    plot_rollback,
    plot_score_matrix,
)
from trl_interfere.evaluation.score_matrix import ScoreMatrix


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_score_matrix():
    matrix = ScoreMatrix(["math", "qa"])
    matrix.append("0-base", {"math": np.array([0.0, 1.0]), "qa": np.array([0.0, 0.0, 0.5])})
    matrix.append("1-math", {"math": np.array([1.0, 1.0]), "qa": np.array([0.0, 0.0, 0.0])})
    axes = plot_score_matrix(matrix).axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[50, 100 / 6], [100, 0]])
    assert texts(axes) == ["50.0", "16.7", "100.0", "0.0"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["math", "qa"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0-base", "1-math"]


def test_score_matrix_with_a_domain_that_came_later():
    matrix = ScoreMatrix(["math", "qa"])
    matrix.append("0-base", {"math": np.array([0.0, 1.0])})
    matrix.append("1-math", {"math": np.array([1.0, 1.0]), "qa": np.array([0.0, 0.5])})
    assert texts(plot_score_matrix(matrix).axes[0]) == ["50.0", "—", "100.0", "25.0"]


def test_module_cosines(make_report):
    report = make_report(5)
    left, right = plot_module_cosines(report).axes[:2]
    np.testing.assert_array_equal(
        np.ma.filled(left.images[0].get_array(), np.nan), [[0.75, -0.5, np.nan], [np.nan, np.nan, 0.1]]
    )
    assert [label.get_text() for label in left.get_xticklabels()] == ["attention", "mlp", "norm"]
    assert texts(left)[:2] == ["+0.75", "-0.50"]
    assert texts(right) == ["+0.00"] and [label.get_text() for label in right.get_yticklabels()] == ["norm"]
    low, high = left.images[0].get_clim()
    assert (low, high) == (-0.75, 0.75) == right.images[0].get_clim()


def test_module_without_a_cosine_is_left_blank(make_report):
    left = plot_module_cosines(make_report(5)).axes[0]
    assert not any("nan" in text for text in texts(left))


def test_cosine_that_is_undefined(make_report):
    report = make_report(5)
    assert plot_module_cosines(report).get_suptitle().endswith("whole model -0.125")
    report.cosines.update({"global": None, "modules": {}})
    figure = plot_module_cosines(report)
    assert figure.get_suptitle().endswith("whole model undefined")
    assert not any(texts(axes) for axes in figure.axes)
    figure.canvas.draw()


def test_damage_concentration(make_report):
    first, second = (make_report(4, damage=np.array(values)) for values in ([1.0, 6.0, -1.0, 2.0], [1.0] * 4))
    axes = plot_damage_concentration([first, second]).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [25, 50, 75, 100])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [75, 100, 112.5, 100])
    np.testing.assert_allclose(axes.lines[1].get_ydata(), [25, 50, 75, 100])


def test_rollback():
    rows = [
        {"criterion": criterion, "scope": scope, "budget": budget, "step_rule": rule, "step": 1.0}
        | {"recovered": recovered, "low": recovered - 0.125, "high": recovered + 0.25}
        for criterion, scope, budget, rule, recovered in [
            ("damage", "mlp", 0.32, "optimal", 0.75),
            ("damage", "mlp", 0.02, "fixed", 0.25),
            ("damage", "mlp", 0.02, "optimal", 0.5),
            ("damage", "joint", 0.02, "optimal", 0.9),
            ("random", "mlp", 0.02, "fixed", -0.25),
        ]
    ]
    rows.append({**rows[0], "criterion": "magnitude", "recovered": None, "low": None, "high": None})
    fixed, optimal = plot_rollback(rows, "math").axes
    assert [label.get_text() for label in fixed.get_yticklabels()] == ["random, 2%", "damage, 2%"]
    for container, (position, value) in zip(fixed.containers, [(0, -25), (1, 25)], strict=True):
        line, _, (bar,) = container
        assert (line.get_xdata()[0], line.get_ydata()[0]) == pytest.approx((value, position))
        np.testing.assert_allclose(bar.get_segments()[0][:, 0], [value - 12.5, value + 25])
    line, _, (bars,) = optimal.containers[0]
    assert [container.get_label() for container in optimal.containers] == ["damage", "random"]
    np.testing.assert_allclose(line.get_ydata(), [50, 75])
    assert line.get_xdata() == pytest.approx([2, 32], rel=0.1)
    np.testing.assert_allclose([segment[:, 1] for segment in bars.get_segments()], [[37.5, 75], [62.5, 100]])


def test_rollback_without_a_loss():
    fixed, optimal = plot_rollback([], "math").axes
    assert not fixed.containers and optimal.texts[0].get_text() == "no score was lost"
