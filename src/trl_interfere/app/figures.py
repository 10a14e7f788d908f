"""Figures that put several runs or reports side by side. Each function returns a matplotlib figure."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ..analysis.report import InterferenceReport
from .stored_run import MAX_LAYERS, StoredRun


# Those of analysis.plots, which loads torch and so would keep a page waiting. Black takes the colour of the text.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#010203", "#999999")
MARKERS = "osD^vPX*"  # a second sign beside the colour
INK = "#010203"  # becomes the colour of the page's text
MAX_POINTS = 400
PARTS = ("attention", "mlp", "norm")
KINDS = {"mlp": "MLP channels", "query": "query heads", "key_value": "key/value heads"}

Named = Sequence[tuple[str, InterferenceReport]]

_STYLE = {
    **{
        name: INK
        for name in (
            "text.color",
            "axes.edgecolor",
            "axes.labelcolor",
            "axes.titlecolor",
            "xtick.color",
            "ytick.color",
        )
    },
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.facecolor": "none",
    "legend.edgecolor": "none",
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "font.size": 9,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "trl-interfere",
    "text.parse_math": False,  # names are text, whatever they hold
}


def to_svg(figure: Figure) -> str:
    """
    A figure as an element of a page, with the page's colour of text, so that it fits a light and a dark one.

    Args:
        figure ([`matplotlib.figure.Figure`]):
            The figure.

    Returns:
        `str`: The `<svg>` element.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    width = float(re.search(r'width="([\d.]+)pt"', svg)[1])
    style = f"min-width:{0.9 * width:.0f}px;max-width:{1.6 * width:.0f}px"  # readable on a phone, not huge on a wall
    svg = re.sub(r'<svg (.*?)width="[\d.]+pt"', rf'<svg role="img" style="{style}" \1', svg, count=1)
    svg = re.sub(r'height="[\d.]+pt" ', "", svg, count=1)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def to_png(figure: Figure) -> bytes:
    """
    A figure as a file for a document, black on white.

    Args:
        figure ([`matplotlib.figure.Figure`]):
            The figure.

    Returns:
        `bytes`: PNG.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _styled(function):
    def drawn(*args, **kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return function(*args, **kwargs)

    drawn.__doc__, drawn.__name__ = function.__doc__, function.__name__
    return drawn


def _short(text: str, length: int = 40) -> str:
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _grid(figure: Figure, count: int, columns: int):
    rows = -(-count // columns)
    return figure.subplots(rows, min(count, columns), squeeze=False).ravel()


def _nothing(text: str) -> Figure:
    figure = _figure(6, 1)
    figure.text(0.5, 0.5, text, ha="center", va="center")
    return figure


@_styled
def score_maps(runs: Sequence[StoredRun]) -> Figure:
    """
    Scores of every domain after every stage, with their 95% intervals, a panel for each run.

    Args:
        runs (`Sequence[StoredRun]`):
            The runs.

    Returns:
        [`matplotlib.figure.Figure`]: The figure.
    """
    runs = [run for run in runs if run.stages]
    if not runs:
        return _nothing("no scores: none of these is a run")
    columns = min(2, len(runs))
    rows = -(-len(runs) // columns)
    height = 0.9 + 0.5 * max(len(run.stages) for run in runs)
    figure = _figure(5.2 * columns, rows * height)
    panels = _grid(figure, len(runs), columns)
    for axes in panels[len(runs) :]:
        axes.set_axis_off()
    for axes, run in zip(panels, runs, strict=False):
        cells = [[stage["scores"].get(domain) for domain in run.domains] for stage in run.stages]
        values = np.array([[np.nan if cell is None else cell["value"] for cell in row] for row in cells], dtype=float)
        axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        axes.set_xticks(range(len(run.domains)), [_short(name, 14) for name in run.domains])
        axes.set_yticks(range(len(run.stages)), [_short(name, 20) for name in run.stage_names])
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for row, column in np.ndindex(values.shape):
            cell = cells[row][column]
            label = "—" if cell is None else f"{cell['value']:.1f}\n{cell['low']:.0f} to {cell['high']:.0f}"
            color = "white" if values[row, column] < 55 else "black"
            axes.text(column, row, label, ha="center", va="center", color=color, fontsize=8)
        n = next((int(entry["n"]) for stage in run.stages for entry in stage["scores"].values()), 0)
        axes.set_title(f"{_short(run.name)} (0 to 100, 95% interval, {n} prompts)")
    return figure


@_styled
def domain_lines(runs: Sequence[StoredRun]) -> Figure:
    """
    Score of every domain over the stages, with 95% intervals, a panel for each run.

    Args:
        runs (`Sequence[StoredRun]`):
            The runs.

    Returns:
        [`matplotlib.figure.Figure`]: The figure.
    """
    runs = [run for run in runs if run.stages]
    if not runs:
        return _nothing("no scores: none of these is a run")
    columns = min(2, len(runs))
    figure = _figure(max(6.4, 4.6 * columns), 3.4 * -(-len(runs) // columns))
    panels = _grid(figure, len(runs), columns)
    for axes in panels[len(runs) :]:
        axes.set_axis_off()
    domains = list(dict.fromkeys(name for run in runs for name in run.domains))
    for axes, run in zip(panels, runs, strict=False):
        for number, domain in enumerate(domains):
            points = [
                (position, stage["scores"][domain])
                for position, stage in enumerate(run.stages)
                if domain in stage["scores"]
            ]
            if not points:
                continue
            positions = np.array([position for position, _ in points])
            values = np.array([[entry["value"], entry["low"], entry["high"]] for _, entry in points])
            axes.errorbar(
                positions,
                values[:, 0],
                yerr=np.abs(values[:, 1:] - values[:, :1]).T,
                color=COLORS[number % len(COLORS)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
                capsize=2,
                linewidth=1.6,
                label=_short(domain, 20),
            )
        axes.set_xticks(range(len(run.stages)), [_stage_label(stage) for stage in run.stages])
        axes.set_ylim(-3, 103)
        axes.set_ylabel("score (0 to 100)")
        if len(runs) > 1:
            axes.set_title(_short(run.name))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, max(1, len(labels))))
    return figure


def _stage_label(stage: dict[str, Any]) -> str:
    if stage["kind"] == "base":
        return "start"
    name = _short(str(stage["domain"]), 12)
    return name if stage["kind"] == "train" else f"refresh\n{name}"


@_styled
def cosine_maps(reports: Named) -> Figure:
    """
    Gradient cosines by layer and module, a panel for each report, on one scale.

    Args:
        reports (`Sequence[tuple[str, InterferenceReport]]`):
            Names and reports.

    Returns:
        [`matplotlib.figure.Figure`]: The figure.
    """
    if not reports:
        return _nothing("no report was chosen")
    tables = [_cosine_table(report) for _, report in reports]
    bound = max([0.05, *(float(np.nanmax(np.abs(table))) for table in tables if np.isfinite(table).any())])
    layers = max(len(table) for table in tables)
    columns = min(4, len(reports))
    figure = _figure(max(4.2, 2.5 * columns + 0.8), (0.9 + min(0.32 * layers, 6)) * -(-len(reports) // columns))
    panels = _grid(figure, len(reports), columns)
    for axes in panels[len(reports) :]:
        axes.set_axis_off()
    image = None
    for axes, (name, report), table in zip(panels, reports, tables, strict=False):
        image = axes.imshow(table, cmap="PuOr", vmin=-bound, vmax=bound, aspect="auto", origin="lower")
        axes.set_xticks(range(len(PARTS)), PARTS)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("layer")
        if len(table) <= 12:
            for row, column in zip(*np.nonzero(np.isfinite(table)), strict=True):
                color = "white" if abs(table[row, column]) > 0.7 * bound else "black"
                label = f"{table[row, column]:+.2f}"
                axes.text(column, row, label, ha="center", va="center", color=color, fontsize=8)
        whole = report.cosines["global"]
        whole = "undefined" if whole is None else f"{whole:+.3f}"
        axes.set_title(f"{_short(name, 26)}\nwhole model {whole}", fontsize=9)
    figure.colorbar(image, ax=panels[: len(reports)].tolist(), shrink=0.8, label="cosine")
    return figure


def _cosine_table(report: InterferenceReport) -> np.ndarray:
    cells = {}
    for name, value in report.cosines["modules"].items():
        match = re.fullmatch(r"layers\.(\d{1,4})\.(\w+)", name)
        if match and match[2] in PARTS and int(match[1]) < MAX_LAYERS and value is not None:
            cells[int(match[1]), PARTS.index(match[2])] = value
    table = np.full((1 + max((layer for layer, _ in cells), default=0), len(PARTS)), np.nan)
    for place, value in cells.items():
        table[place] = value
    return table


@_styled
def damage_figure(reports: Named) -> Figure:
    """
    Damage by layer, over all kinds of routes, and how few routes carry it, a line for each report.

    Args:
        reports (`Sequence[tuple[str, InterferenceReport]]`):
            Names and reports.

    Returns:
        [`matplotlib.figure.Figure`]: The figure.

    Raises:
        `ValueError`: If a report lacks its measures of routes, or they do not fit its counts.
    """
    if not reports:
        return _nothing("no report was chosen")
    figure = _figure(9.6, 3.6)
    left, right = figure.subplots(1, 2)
    for number, (name, report) in enumerate(reports):
        style = {"color": COLORS[number % len(COLORS)], "label": _short(name), "linewidth": 1.6}
        try:
            damage = report.routes["damage"]
        except KeyError as error:
            raise ValueError(f"{name}: expected the measure 'damage' of the routes, found none") from error
        if len(damage) != sum(map(sum, report.route_counts.values())):
            counted = sum(map(sum, report.route_counts.values()))
            raise ValueError(f"{name}: expected {counted:,} routes by route_counts, found {len(damage):,}")
        sums = [values for values in report.by_layer("damage").values() if values.size]
        layers = max(map(len, sums))
        total = sum(np.pad(values, (0, layers - len(values))) for values in sums)
        left.plot(range(layers), total, marker=MARKERS[number % len(MARKERS)], markersize=4, **style)
        shares, curve = concentration_curve(damage)
        if curve is not None:
            right.plot(100 * shares, 100 * curve, **style)
    left.axhline(0, color="grey", linewidth=0.8)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_xlabel("layer")
    left.set_ylabel("damage by routes (nats per token)")
    left.set_title("Damage by layer")
    even = np.geomspace(0.01, 100, 50)
    right.plot(even, even, color="grey", linestyle=":", label="evenly spread")
    right.set_xscale("log")
    right.xaxis.set_major_formatter("{x:g}")
    right.axvline(2, color="grey", linewidth=0.8)
    right.set_xlabel("share of routes, most damaged first (%)")
    right.set_ylabel("share of the damage (%)")
    right.set_title("Concentration; above 100%: other routes were improved")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def concentration_curve(damage: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """
    Share of the damage in the most damaged routes, at a few hundred shares of the routes.

    Args:
        damage (`numpy.ndarray` of shape `(num_routes,)`):
            Damage of each route.

    Returns:
        `tuple`: Shares of the routes, and of the damage; `None` where the routes were not damaged.
    """
    total = damage.sum()
    counts = np.unique(np.geomspace(1, len(damage), MAX_POINTS).round().astype(int))
    if not total > 0:
        return counts / len(damage), None
    curve = np.cumsum(np.sort(damage)[::-1], dtype=float)
    return counts / len(damage), curve[counts - 1] / total


@_styled
def overlap_maps(entries: Sequence[tuple[str, dict[str, Any]]]) -> Figure:
    """
    Overlap of top MLP channels: measured below the diagonal, by chance (shuffles within layers) above it.

    Args:
        entries (`Sequence[tuple[str, dict]]`):
            Titles, and fields of [`~analysis.overlap.Overlap`] by first domain, second domain and kind of route.

    Returns:
        [`matplotlib.figure.Figure`]: The figure.
    """
    if not entries:
        return _nothing("no overlaps: they need two domains or two stages")
    columns = min(2, len(entries))
    figure = _figure(4.6 * columns, 3.6 * -(-len(entries) // columns))
    panels = _grid(figure, len(entries), columns)
    for axes in panels[len(entries) :]:
        axes.set_axis_off()
    image = None
    for axes, (title, overlaps) in zip(panels, entries, strict=False):
        pairs = {(first, second): kinds["mlp"] for first, row in overlaps.items() for second, kinds in row.items()}
        names = list(dict.fromkeys(name for pair in pairs for name in pair))
        values = np.full((len(names), len(names)), np.nan)
        for (first, second), entry in pairs.items():
            for place, key in (((second, first), "value"), ((first, second), "shuffled")):
                number = entry[key]
                values[names.index(place[0]), names.index(place[1])] = np.nan if number is None else number
        image = axes.imshow(values, cmap="cividis", vmin=0, vmax=1)
        axes.set_xticks(range(len(names)), [_short(name, 12) for name in names])
        axes.set_yticks(range(len(names)), [_short(name, 12) for name in names])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
            entry = pairs.get((names[column], names[row]))
            label = f"{values[row, column]:.2f}"
            if entry is not None and row > column and entry["low"] is not None and entry["high"] is not None:
                label += f"\n{entry['low']:.2f} to {entry['high']:.2f}"
            color = "white" if values[row, column] < 0.55 else "black"
            axes.text(column, row, label, ha="center", va="center", color=color, fontsize=8)
        axes.set_title(_short(title, 60), fontsize=9)
    figure.colorbar(image, ax=panels[: len(entries)].tolist(), shrink=0.8, label="Jaccard index of the top 10%")
    return figure


@_styled
def repair_figure(runs: Sequence[StoredRun]) -> Figure:
    """
    What each repair recovered, beside its controls, and over the budget: two panels for each run.

    Args:
        runs (`Sequence[StoredRun]`):
            The runs.

    Returns:
        [`matplotlib.figure.Figure`]: The figure.
    """
    runs = [run for run in runs if _measured(run)]
    if not runs:
        return _nothing("no repair was measured, or no score was lost")
    lists = [repair_rows(run) for run in runs]
    figure = _figure(9.6, sum(1.1 + 0.24 * len(rows) for rows in lists))
    grid = figure.subplots(len(runs), 2, squeeze=False, height_ratios=[1.1 + 0.24 * len(rows) for rows in lists])
    criteria = list(dict.fromkeys(row["criterion"] for run in runs for row in _measured(run)))
    colors = {name: COLORS[number % len(COLORS)] for number, name in enumerate(criteria)}
    for (left, right), run, rows in zip(grid, runs, lists, strict=True):
        for position, row in enumerate(rows):
            left.errorbar(
                100 * row["recovered"],
                position,
                xerr=_bars(row),
                color=colors.get(row["criterion"], INK),
                marker="o" if row["step_rule"] == "fixed" else "s",
                markersize=4,
                capsize=2,
            )
        left.set_yticks(range(len(rows)), [row["label"] for row in rows])
        left.invert_yaxis()
        left.axvline(0, color="grey", linewidth=0.8)
        left.set_xlabel("recovered share of the lost score (%)")
        left.set_title(f"{_short(run.name)}: one budget, and what needs no routes")
        for criterion in criteria:
            points = [
                row
                for row in _measured(run)
                if row["criterion"] == criterion and row["scope"] == "mlp" and row["step_rule"] == "optimal"
            ]
            points.sort(key=lambda row: row["budget"])
            if len(points) < 2:
                continue
            budgets = np.array([100 * row["budget"] for row in points])
            bars = np.hstack([_bars(row) for row in points])
            right.errorbar(
                budgets,
                [100 * row["recovered"] for row in points],
                yerr=bars,
                color=colors[criterion],
                marker="o",
                markersize=4,
                capsize=2,
                label=_short(criterion, 24),
            )
        for level in (0, 100):
            right.axhline(level, color="grey", linewidth=0.8, linestyle=":" if level else "-")
        right.set_xscale("log")
        right.xaxis.set_major_formatter("{x:g}")
        right.set_xlabel("share of MLP routes rolled back (%)")
        right.set_title("step chosen on the selection split")
        if right.get_legend_handles_labels()[0]:
            right.legend()
    return figure


def _measured(run: StoredRun) -> list[dict[str, Any]]:
    rows = run.results.get("rollback") or []
    return [row for row in rows if row["pair"] == 0 and None not in (row["recovered"], row["low"], row["high"])]


def repair_rows(run: StoredRun) -> list[dict[str, Any]]:
    """
    Repairs of the most common budget of routes, interpolation and the refresh, with a label each.

    Args:
        run ([`StoredRun`]):
            The run.

    Returns:
        `list[dict]`: Rows of the run with a `label`.
    """
    rows = [row for row in _measured(run) if row["scope"] == "mlp"]
    budgets = [row["budget"] for row in rows]
    budget = max(sorted(set(budgets)), key=budgets.count, default=None)
    shown = []
    for row in rows:
        if row["budget"] == budget:
            best = f", best step {row['step']:.2g}" if row["step_rule"] == "optimal" else ""
            shown.append({**row, "label": f"{_short(row['criterion'], 24)}, {100 * budget:g}%{best}"})
    for row in _measured(run):
        if row["criterion"] == "interpolation":
            shown.append({**row, "label": f"all weights, {100 * row['step']:.0f}% back"})
    refresh = run.results.get("refresh")
    if refresh and None not in (refresh["recovered"], refresh["low"], refresh["high"]):
        label = f"refresh, {refresh['steps']} steps of training"
        shown.append({**refresh, "criterion": "refresh", "step_rule": "fixed", "label": label})
    return shown


def _bars(row: dict[str, Any]) -> np.ndarray:
    value = row["recovered"]
    return 100 * np.abs([[value - row["low"]], [row["high"] - value]])


@_styled
def live_figure(result: Any, earlier: str) -> Figure:
    """
    A rollback as predicted and as measured, beside random routes.

    Args:
        result ([`~lab.live.LiveResult`]):
            The measurement.
        earlier (`str`):
            Name of the repaired domain.

    Returns:
        [`matplotlib.figure.Figure`]: The figure.
    """
    figure = _figure(9.6, 3.0)
    left, right = figure.subplots(1, 2)
    measured, control = result.measured, result.control
    bars = [
        ("loss, predicted", result.predicted_loss, None, COLORS[5]),
        ("loss, measured", measured.loss, None, COLORS[0]),
        ("loss, random routes", control.loss, None, COLORS[7]),
        ("score, measured", measured.recovered.value, measured.recovered, COLORS[0]),
        ("score, random routes", control.recovered.value, control.recovered, COLORS[7]),
    ]
    for position, (_, value, interval, color) in enumerate(bars):
        left.barh(position, 100 * value, color=color, height=0.66)
        if interval is not None and np.isfinite(interval.low):
            error = 100 * np.abs([[value - interval.low], [interval.high - value]])
            left.errorbar(100 * value, position, xerr=error, color=INK, capsize=3, linewidth=1)
    left.set_yticks(range(len(bars)), [label for label, *_ in bars])
    left.invert_yaxis()
    left.axvline(0, color=INK, linewidth=0.8)
    left.axvline(100, color="grey", linewidth=0.8, linestyle=":")
    left.set_xlabel("given back (% of what was lost)")
    left.set_title(f"{_short(earlier)}: what comes back")
    for number, (effect, color, label) in enumerate(
        ((measured, COLORS[0], "these routes"), (control, COLORS[7], "random routes"))
    ):
        for position, change in enumerate(effect.collateral.values()):
            place = position + 0.36 * (number - 0.5)
            right.barh(place, change.value, color=color, height=0.32, label=label if position == 0 else None)
            error = np.abs([[change.value - change.low], [change.high - change.value]])
            right.errorbar(change.value, place, xerr=error, color=INK, capsize=3, linewidth=1)
    right.set_yticks(range(len(measured.collateral)), [_short(name, 16) for name in measured.collateral])
    right.invert_yaxis()
    right.axvline(0, color=INK, linewidth=0.8)
    low, high = right.get_xlim()
    right.set_xlim(min(low, -5), max(high, 5))
    right.set_xlabel("change of the score (points)")
    right.set_title("What the others pay")
    right.legend(loc="best")
    return figure
