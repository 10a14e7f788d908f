from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import colormaps

from trl_interfere.app.html import svg
from trl_interfere.evaluation.score_matrix import ScoreMatrix
from trl_interfere.reporting.plots import (
    AMOUNT,
    PLOTS,
    REFERENCE,
    SIGNED,
    _ink,
    plot_damage_concentration,
    plot_layer_maps,
    plot_module_cosines,
    plot_pareto,
    plot_score_matrix,
    plot_scores,
    save_figures,
)


def texts(axes):
    return [text.get_text() for text in axes.texts]


def labels(axes, which):
    return [label.get_text() for label in getattr(axes, f"get_{which}ticklabels")()]


def test_score_matrix_with_a_domain_that_came_later():
    matrix = ScoreMatrix(["math", "qa"])
    matrix.append("0-base", {"math": np.array([0.0, 1.0])})
    matrix.append("1-math", {"math": np.array([1.0, 1.0]), "qa": np.array([0.0, 0.0, 0.5])})
    axes = plot_score_matrix(matrix).axes[0]
    assert axes.images[0].get_array().tolist() == [[50, None], [100, pytest.approx(100 / 6)]]
    assert texts(axes) == ["50.0", "—", "100.0", "16.7"]
    assert labels(axes, "x") == ["math", "qa"] and labels(axes, "y") == ["0-base", "1-math"]


def test_module_cosines(make_report):
    report = make_report(5)
    left, right = plot_module_cosines(report).axes[:2]
    values = np.ma.filled(left.images[0].get_array(), np.nan)
    np.testing.assert_array_equal(values, [[0.75, -0.5, np.nan], [np.nan, np.nan, 0.1]])
    assert labels(left, "x") == ["attention", "mlp", "norm"] and texts(left)[:2] == ["+0.75", "-0.50"]
    assert texts(right) == ["+0.00"] and labels(right, "y") == ["norm"]
    assert left.images[0].get_clim() == (-0.75, 0.75) == right.images[0].get_clim()
    assert left.figure.get_suptitle().endswith("whole model -0.125")
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


def references(figure):
    """Every line that is no data, by its axes: what it stands at, or "curve"."""
    found = []
    for number, axes in enumerate(figure.axes):
        for line in axes.lines:
            assert (line.get_gid() == "reference") == (line.get_color() == REFERENCE)
            if line.get_gid() == "reference":
                points = {name: np.asarray(line.get_data()[at], dtype=float) for at, name in enumerate("xy")}
                same = [f"{name} = {values[0]:g}" for name, values in points.items() if np.ptp(values) == 0]
                found.append((number, same[0] if same else "curve"))
    return found


ARMS = [
    {"name": "subspace <b>", "recovered": 0.95, "low": 0.9, "high": 1.05, "worst": -0.5, "sequences": 512},
    {"name": "routes", "recovered": 0.5, "low": None, "high": None, "worst": None, "sequences": None},
    {"name": "nothing", "recovered": None, "low": None, "high": None, "worst": -1.0, "sequences": 8},
]


def test_every_reference_line_stands_at_its_value(make_report):
    report = figures_of(make_report(100, damage=np.linspace(3, -1, 100)))
    report.route_counts = {"mlp": [50, 50]}
    expected = {
        "module_cosines": [],
        "sparsity": [(0, "y = 50"), (1, "x = 50")],
        "overlaps": [(1, "y = 0"), (1, "y = 1")],  # the intervals of chance of two pairs, see below
        "damage_concentration": [(0, "curve"), (0, "x = 2")],
        "damage_by_layer": [(0, "y = 0")],
        "eigenvalues": [(1, "y = 100")],
    }
    assert {kind: references(plot(report)) for kind, plot in PLOTS.items()} == expected
    pareto = [(0, "y = 0"), (0, "y = 100"), (0, "x = 0"), (1, "y = 0"), (1, "y = 100")]
    assert references(plot_pareto(ARMS)) == pareto


def test_scores():
    matrix = ScoreMatrix(["math", "$qa$"])
    matrix.append("0-base", {"math": np.array([0.0, 1.0])})
    matrix.append("1-refresh-math", {"math": np.array([1.0, 1.0]), "$qa$": np.array([0.0, 0.5])})
    axes = plot_scores(matrix).axes[0]
    math, qa = axes.containers
    assert list(math.lines[0].get_ydata()) == [50, 100] and list(qa.lines[0].get_xdata()) == [1]
    assert labels(axes, "x") == ["base", "refresh\nmath"]
    assert qa.get_label() == r"\$qa\$"  # no formula


def test_pareto():
    figure = plot_pareto(ARMS)
    left, right = figure.axes
    points = [
        [tuple(float(v[0]) for v in bar.lines[0].get_data()) for bar in axes.containers] for axes in (left, right)
    ]
    assert points == [[(-0.5, 95.0)], [(512.0, 95.0)]]
    bars = left.containers[0].lines[2][0].get_segments()[0]
    np.testing.assert_allclose(bars[:, 1], [90, 105])
    tree = ElementTree.fromstring(svg(figure, 'with "quotes" <i>'))
    titles = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}title")]
    assert titles == ["subspace <b>: 95% recovered"] * 2
    assert tree.get("aria-label") == 'with "quotes" <i>' and "width" not in tree.attrib


def test_layer_maps():
    maps = {"cosine": (["q", "k"], np.array([[0.5, -1.0]])), "share (%)": (["q"], np.array([[3.0], [np.nan]]))}
    signed, share = [axes for axes in plot_layer_maps(maps).axes if axes.get_title()]
    assert signed.images[0].get_clim() == (-1, 1) and share.images[0].get_clim() == (0, 3)
    assert texts(signed) == ["0.5", "-1"] and texts(share) == ["3"]
    assert not texts(plot_layer_maps({"x": (["q"], np.ones((100, 1)))}).axes[0])


def test_text_on_coloured_cells_has_a_contrast_of_four_and_a_half():
    def luminance(color):
        channels = np.array(color[:3])
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722)

    for name in (AMOUNT, SIGNED):
        for value in np.linspace(0, 1, 101):
            color = colormaps[name](value)
            ink = {"black": 0.0, "white": 1.0}[_ink(color)]
            low, high = sorted((luminance(color), ink))
            assert (high + 0.05) / (low + 0.05) >= 4.5


def test_save_figures(make_report, tmp_path):
    report = figures_of(make_report(4, damage=np.ones(4)))
    assert [path.stem for path in save_figures(report, tmp_path)] == list(PLOTS)
    report.subspace, report.overlaps = None, {}
    assert {path.stem for path in save_figures(report, tmp_path)} == {*PLOTS} - {"eigenvalues", "overlaps"}


def figures_of(report):
    share = {"below_absolute": 0.5, "below_relative": 0.25, "identical": 0.125, "elements": 8, "dtype": "bfloat16"}
    low = {**share, "below_absolute": 0.75}
    report.updates = {
        "update": {
            "thresholds": {"absolute": 1e-7, "relative": 1e-3},
            "whole": share,
            "by_kind": {"mlp.up_proj.weight": share, "norm.weight": {**low, "elements": 2}},
            "by_layer": {"0": share, "1": low, "outside": share},
        }
    }
    report.identical_in_bfloat16 = 0.5
    overlap = {"value": 0.25, "low": 0.125, "high": 0.5, "over": "layers"}
    overlap |= {"shuffled": 0.0625, "shuffled_low": 0.0, "shuffled_high": 0.125}
    report.overlaps = {"active": {"math": {"qa": {"mlp": overlap}, "code": {"mlp": {**overlap, "value": 0.75}}}}}
    spectrum = {"eigenvalues": [4.0, -1.0], "shares": [0.5, 0.25]}
    report.subspace = {"update": spectrum, "random": {"eigenvalues": [1.0, 0.5], "shares": []}}
    report.route_counts = {"mlp": [2, 2], "query": [0, 0], "key_value": [0, 0]}
    return report


def test_sparsity(make_report):
    left, right = PLOTS["sparsity"](figures_of(make_report(4))).axes
    lines = {line.get_label(): line.get_ydata() for line in left.lines}
    assert list(lines["|δ| < 1e-07"]) == [50, 75] and list(lines["identical to the bit"]) == [12.5, 12.5]
    assert list(lines["identical if stored in bfloat16"]) == [50, 50]
    assert labels(right, "y") == ["mlp.up_proj.weight", "norm.weight"]
    assert list(right.lines[0].get_xdata()) == [50, 75]


def test_overlaps_and_eigenvalues(make_report):
    figure = PLOTS["overlaps"](figures_of(make_report(4)))
    left, right = figure.axes[:2]
    values = np.ma.filled(left.images[0].get_array(), np.nan)
    np.testing.assert_array_equal(values, [[np.nan, 0.0625, 0.0625], [0.25, np.nan, np.nan], [0.75, np.nan, np.nan]])
    assert labels(right, "y") == ["math, qa", "math, code"]
    points = [line for line in right.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in points] == [0.25, 0.75]
    chance = [list(line.get_xdata()) for line in right.lines if line.get_gid() == "reference"]
    assert chance == [[0, 0.125]] * 2
    left, right = PLOTS["eigenvalues"](figures_of(make_report(4))).axes
    assert [list(line.get_ydata()) for line in left.lines] == [[4, 1], [1, 0.5]]
    assert list(right.lines[0].get_ydata()) == [50, 75]  # a random update without damage has no shares


@pytest.mark.parametrize("kind", ["sparsity", "overlaps", "eigenvalues"])
def test_what_a_report_lacks_cannot_be_drawn(make_report, kind):
    with pytest.raises(ValueError, match=f"{kind}: expected a report"):
        PLOTS[kind](make_report(4))
