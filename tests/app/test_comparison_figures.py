import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from trl_interfere.analysis.report import top_share
from trl_interfere.app import figures
from trl_interfere.app.stored_run import StoredRun, read_report
from trl_interfere.reporting import plots


HOSTILE = "<script>alert(1)</script> $\\frac{$ ${alert(2)}\x07"


@pytest.fixture
def run(save_run, tmp_path):
    return StoredRun.read(save_run(tmp_path / "run"), "mine")


def texts(figure):
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_colours_are_those_of_the_other_figures():
    assert [color for color in figures.COLORS if color != figures.INK] == [
        color for color in plots.COLORS if color != "#000000"
    ]


def test_score_map(run):
    axes = figures.score_maps([run]).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[30, 20], [80, 25], [55, 90]])
    assert "80.0\n78 to 83" in [text.get_text() for text in axes.texts]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0-base", "1-math", "2-qa"]
    assert "50 prompts" in axes.get_title()


def test_lines_keep_their_colour_in_every_panel(run, save_run, tmp_path):
    other = StoredRun.read(save_run(tmp_path / "other"), "other")
    figure = figures.domain_lines([run, other])
    first, second = figure.axes
    for axes in (first, second):
        math, qa = axes.containers
        np.testing.assert_array_equal(math.lines[0].get_ydata(), [30, 80, 55])
        assert [line.lines[0].get_color() for line in (math, qa)] == list(figures.COLORS[:2])
    assert [label.get_text() for label in first.get_xticklabels()] == ["start", "math", "qa"]


def test_cosine_maps_share_one_scale(make_report):
    reports = [("a", make_report(5)), ("b", make_report(5))]
    reports[1][1].cosines["modules"] = {"layers.1.mlp": 0.9, "layers.99999.mlp": 1.0, "layers.0.norm": None}
    first, second = figures.cosine_maps(reports).axes[:2]
    assert first.images[0].get_clim() == second.images[0].get_clim() == (-0.9, 0.9)
    table = np.ma.filled(second.images[0].get_array(), np.nan)
    np.testing.assert_array_equal(table, [[np.nan] * 3, [np.nan, 0.9, np.nan]])


def test_damage(save_report, tmp_path):
    report = read_report(save_report(tmp_path / "a"))
    damage = report.routes["damage"]
    by_layer = [damage[[*range(0, 10), 20, 21, 24]].sum(), damage[[*range(10, 20), 22, 23, 25]].sum()]
    left, right = figures.damage_figure([("a", report)]).axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), by_layer)
    expected = 100 * np.cumsum(np.sort(damage)[::-1]) / damage.sum()
    np.testing.assert_allclose(right.lines[0].get_ydata(), expected)


def test_damage_of_other_routes_than_counted(save_report, tmp_path):
    report = read_report(save_report(tmp_path, route_counts={"mlp": [10]}))
    with pytest.raises(ValueError, match="a: expected 10 routes by route_counts, found 26"):
        figures.damage_figure([("a", report)])


def test_concentration_curve_of_many_routes():
    damage = np.random.default_rng(0).lognormal(sigma=2, size=350_000)
    shares, curve = figures.concentration_curve(damage)
    assert len(shares) <= figures.MAX_POINTS and shares[-1] == 1 and curve[-1] == pytest.approx(1)
    for share, value in zip(shares[::50], curve[::50], strict=True):
        assert value == pytest.approx(top_share(damage, share))
    assert figures.concentration_curve(-damage)[1] is None


def test_overlaps():
    entry = {"value": 0.6, "low": 0.5, "high": 0.7, "chance": 0.05, "shuffled": 0.1}
    axes = figures.overlap_maps([("x", {"math": {"qa": {"mlp": entry}}})]).axes[0]
    np.testing.assert_array_equal(np.ma.filled(axes.images[0].get_array(), np.nan), [[np.nan, 0.1], [0.6, np.nan]])
    assert sorted(text.get_text() for text in axes.texts) == ["0.10", "0.60\n0.50 to 0.70"]


def test_repairs(run):
    rows = figures.repair_rows(run)
    assert [row["label"] for row in rows] == [
        "damage, 2%",
        "random, 2%",
        "damage, 2%, best step 1.5",
        "all weights, 30% back",
        "refresh, 2 steps of training",
    ]
    left, right = figures.repair_figure([run]).axes
    np.testing.assert_allclose([bar.lines[0].get_xdata()[0] for bar in left.containers], [60, 5, 70, 50, 80])
    np.testing.assert_allclose(right.containers[0].lines[0].get_xydata(), [[2, 70], [8, 90]])


def test_nothing_to_show(save_report, tmp_path):
    empty = StoredRun.read(save_report(tmp_path), "a report")
    for figure in (
        figures.score_maps([empty]),
        figures.domain_lines([]),
        figures.cosine_maps([]),
        figures.damage_figure([]),
        figures.overlap_maps([]),
        figures.repair_figure([empty]),
    ):
        assert len(texts(figure)) == 1


def test_hostile_names_stay_text(make_report, save_run, tmp_path):
    run = StoredRun.read(save_run(tmp_path), HOSTILE)
    run.stages[1]["domain"] = HOSTILE
    report = make_report(5)
    report.cosines["modules"][f"layers.0.{HOSTILE}"] = 0.5
    entry = {"value": 0.6, "low": 0.5, "high": 0.7, "chance": 0.05, "shuffled": 0.1}
    for figure in (
        figures.score_maps([run]),
        figures.domain_lines([run, run]),
        figures.repair_figure([run]),
        figures.cosine_maps([(HOSTILE, report)]),
        figures.overlap_maps([(HOSTILE, {HOSTILE: {"qa": {"mlp": entry}}})]),
    ):
        svg = figures.to_svg(figure)
        ElementTree.fromstring(svg)
        assert "<script" not in svg and "&lt;script" in svg
        assert figures.to_png(figure).startswith(b"\x89PNG")


def test_svg_takes_the_colour_of_the_page(run):
    svg = figures.to_svg(figures.domain_lines([run]))
    assert "currentColor" in svg and figures.INK not in svg and "#000000" not in svg
    assert not re.search(r'<svg[^>]* (width|height)="', svg) and "viewBox" in svg
    assert ">math</text>" in svg  # text, and not outlines
