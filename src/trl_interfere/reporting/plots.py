"""Figures: each function takes data and returns a matplotlib figure, which the caller saves or shows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from ..analysis.report import InterferenceReport
from ..evaluation.score_matrix import ScoreMatrix
from .layer_maps import PARTS, Maps, cosine_map, damage_map


# Okabe and Ito's colours, which people with any colour vision can tell apart, and a second sign beside each.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*"
REFERENCE = "#767676"
AMOUNT, SIGNED = "cividis", "PuOr"  # colour maps of shares and scores, and of signed values
MAX_POINTS = 400  # of a curve
MAX_LABELLED = 48  # layers of a map that has its values in its cells


def plot_score_matrix(matrix: ScoreMatrix) -> Figure:
    """Scores of every domain after every stage, as an annotated map."""
    values = [[100 * np.mean(stage.get(domain, np.nan)) for domain in matrix.domains] for stage in matrix.values]
    figure, axes = _figure(1.6 + 1.2 * len(matrix.domains), 1.2 + 0.5 * len(matrix.stages))
    image = _map(axes, np.array(values), matrix.domains, matrix.stages, (0, 100), ".1f", missing="—")
    axes.set_title("Score (0 to 100) of each domain after each stage", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def plot_scores(matrix: ScoreMatrix) -> Figure:
    """Score of every domain over the stages, with 95% intervals over prompts."""
    figure, axes = _figure(7, 3.8)
    for number, domain in enumerate(matrix.domains):
        rows = [row for row, values in enumerate(matrix.values) if domain in values]
        found = [matrix.interval(row, domain) for row in rows]
        ends = np.abs([[one.value - one.low, one.high - one.value] for one in found]).reshape(-1, 2).T
        values, style = [one.value for one in found], _style(number, 5)
        axes.errorbar(rows, values, yerr=ends, capsize=2, label=_name(domain), **style)
    labels = [_name(stage.partition("-")[2], 14).replace("-", "\n", 1) for stage in matrix.stages]
    axes.set_xticks(range(len(labels)), labels, fontsize=9)
    axes.set(ylim=(-3, 103), ylabel="score (0 to 100)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=max(1, min(6, len(matrix.domains))), fontsize=9)
    return figure


def plot_module_cosines(report: InterferenceReport) -> Figure:
    """Gradient cosines, layer by module."""
    modules = {name: value for name, value in report.cosines["modules"].items() if value is not None}
    outside = {name: value for name, value in modules.items() if not name.startswith("layers.")}
    values, bound = cosine_map(report), max([0.05, *map(abs, modules.values())])
    height = 1.5 + 0.35 * min(len(values), MAX_LABELLED)
    figure, (left, right) = _figure(6.5, height, ncols=2, width_ratios=(3, 1.4))
    image = _map(left, values, PARTS, range(len(values)), (-bound, bound), "+.2f", origin="lower")
    left.set_ylabel("layer")
    table = np.array(list(outside.values()) or [np.nan])[:, None]
    _map(right, table, [""], list(outside) or [""], (-bound, bound), "+.2f")
    figure.suptitle(
        f"Gradient cosine of {_name(report.earlier)} and {_name(', '.join(report.later))}; whole model "
        + ("undefined" if report.cosines["global"] is None else f"{report.cosines['global']:+.3f}"),
        fontsize=10,
    )
    figure.colorbar(image, ax=[left, right], shrink=0.8, label="cosine")
    return figure


def plot_layer_maps(maps: Maps) -> Figure:
    """Measures side by side: by title, the names of modules, and values of shape `(layers, modules)`."""
    layers = max((len(values) for _, values in maps.values()), default=1)
    columns = min(2, max(1, len(maps)))
    rows = -(-len(maps) // columns) or 1
    height = 1.3 + 0.32 * min(layers, MAX_LABELLED)
    figure, panels = _figure(4.9 * columns, height * rows, nrows=rows, ncols=columns, squeeze=False)
    for axes in panels.ravel()[len(maps) :]:
        axes.set_axis_off()
    for axes, (title, (modules, values)) in zip(panels.ravel(), maps.items(), strict=False):
        largest = max(float(np.nanmax(np.abs(values), initial=0)), 1e-9)
        limits = (-largest if np.nanmin(values, initial=0) < 0 else 0, largest)
        spec = ".2g" if largest < 100 else ".0f"
        image = _map(axes, values, modules, range(len(values)), limits, spec, origin="lower", fontsize=7)
        axes.set_title(_name(title, 60), fontsize=9)
        axes.set_ylabel("layer")
        figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def plot_damage_concentration(reports: Sequence[InterferenceReport]) -> Figure:
    """Share of the attributed damage that lies in the most damaged routes."""
    figure, axes = _figure(5.5, 3.8)
    fewest = 100.0
    for report, color in zip(reports, COLORS, strict=False):
        damage = np.sort(report.routes["damage"])[::-1]
        if not damage.sum() > 0:  # where there is no damage there is nothing to concentrate
            continue
        places = np.unique(np.geomspace(1, len(damage), MAX_POINTS).round().astype(int)) - 1
        label = f"{report.earlier}, after {', '.join(report.later)}"
        shares = 100 * (places + 1) / len(damage)
        axes.plot(shares, 100 * np.cumsum(damage)[places] / damage.sum(), color=color, label=_name(label))
        fewest = min(fewest, shares[0])
    axes.set_xscale("log")
    axes.set(xlabel="share of routes, most damaged first (%)", ylabel="share of the attributed damage (%)")
    even = np.geomspace(min(fewest, 1), 100, 200)  # on the logarithmic axis equal shares are a curve, not a line
    _reference(axes.plot(even, even, linestyle=":", label="evenly spread")[0])
    _reference(axes.axvline(2))
    axes.set_title("Damage concentration; above 100%: other routes were improved", fontsize=10)
    axes.legend(fontsize=8)
    return figure


def plot_damage_by_layer(report: InterferenceReport) -> Figure:
    """Damage attributed to the routes of each layer."""
    kinds, values = damage_map(report)
    figure, axes = _figure(7, 3.8)
    width = 0.8 / max(1, len(kinds))
    for index, (kind, color) in enumerate(zip(kinds, COLORS, strict=False)):
        offset = (index - (len(kinds) - 1) / 2) * width
        axes.bar(np.arange(len(values)) + offset, values[:, index], width, color=color, label=kind)
    _reference(axes.axhline(0))
    _whole_numbers(axes)
    axes.set(xlabel="layer", ylabel="damage (nats per token)")
    axes.set_title(
        f"Damage of {_name(report.earlier)} by {_name(', '.join(report.later))}: {report.attributed:+.4f} by routes, "
        f"{report.outside_routes:+.4f} outside",
        fontsize=10,
    )
    axes.legend(fontsize=8)
    return figure


def plot_sparsity(report: InterferenceReport) -> Figure:
    """Share of the parameters that the update left as they were, by layer and by kind of tensor."""
    if report.updates is None:
        raise ValueError("sparsity: expected a report on checkpoints in files, found one on models in memory")
    update = report.updates["update"]
    definitions = {
        "below_absolute": f"|δ| < {update['thresholds']['absolute']:g}",
        "below_relative": f"|δ| ≤ {update['thresholds']['relative']:g} |θ|",
        "identical": "identical to the bit",
    }
    kinds = dict(sorted(update["by_kind"].items(), key=lambda item: -item[1]["elements"])[:14])
    layers = [entry for name, entry in update["by_layer"].items() if name != "outside"]
    figure, (left, right) = _figure(10, 1.6 + 0.3 * max(len(kinds), 8), ncols=2)
    for number, (definition, label) in enumerate(definitions.items()):
        style = {**_style(number, 4), "label": label}
        left.plot(range(len(layers)), [100 * entry[definition] for entry in layers], **style)
        right.plot([100 * entry[definition] for entry in kinds.values()], range(len(kinds)), linestyle="", **style)
    if report.identical_in_bfloat16 is not None:
        same = 100 * report.identical_in_bfloat16
        _reference(left.axhline(same, linestyle=":", label="identical if stored in bfloat16"))
        _reference(right.axvline(same, linestyle=":"))
    _whole_numbers(left)
    left.set(xlabel="layer", ylabel="share of the parameters (%)", ylim=(-3, 103))
    right.set_yticks(range(len(kinds)), [_name(kind) for kind in kinds])
    right.invert_yaxis()
    right.set(xlabel="share of the parameters (%)", xlim=(-3, 103))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"What the update left as it was; stored as {update['whole']['dtype']}", fontsize=10)
    return figure


def plot_overlaps(overlaps: dict[str, dict[str, dict[str, dict[str, Any]]]] | None, word: str) -> Figure:
    """
    Overlap of the MLP channels of each two domains that are most active, or that stages changed most, beside what
    shuffles within layers would give.
    """
    if not overlaps:
        raise ValueError("overlaps: expected a report with overlaps of two domains or more, found none")
    entries = {(first, second): kinds["mlp"] for first, row in overlaps.items() for second, kinds in row.items()}
    names = list(dict.fromkeys(name for pair in entries for name in pair))
    values = np.full((len(names), len(names)), np.nan)
    for (first, second), entry in entries.items():
        values[names.index(second), names.index(first)] = entry["value"]
        values[names.index(first), names.index(second)] = entry["shuffled"]
    figure, (left, right) = _figure(10, 2.0 + 0.3 * max(len(entries), 6), ncols=2, width_ratios=(1, 1.5))
    image = _map(left, values, names, names, (0, 1), ".2f")
    left.set_title(f"{word} MLP channels: measured (below),\nby chance (above the diagonal)", fontsize=9)
    figure.colorbar(image, ax=left, shrink=0.8, label="Jaccard index")
    for position, entry in enumerate(entries.values()):
        ends = [entry["shuffled_low"], entry["shuffled_high"]]
        chance = right.plot(ends, [position] * 2, alpha=0.6, solid_capstyle="butt")[0]
        _reference(chance, width=6)
        # The interval is a percentile bootstrap, which need not hold the value.
        right.plot([entry["low"], entry["high"]], [position] * 2, color=COLORS[0], linewidth=1.2)
        point = right.plot([entry["value"]], [position], "o", color=COLORS[0], markersize=5)[0]
    right.set_yticks(range(len(entries)), [_name(f"{first}, {second}") for first, second in entries], fontsize=8)
    right.invert_yaxis()
    right.set(xlim=(-0.02, 1.02), xlabel="Jaccard index of the top 10%")
    right.legend([chance, point], ["chance, 95%", f"measured, 95% over {entry['over']}"], fontsize=8)
    return figure


def plot_eigenvalues(report: InterferenceReport) -> Figure:
    """Decay of the eigenvalues of the damage on route space, beside those of a random update of equal norm."""
    if report.subspace is None:
        raise ValueError("eigenvalues: expected a report with a conflict subspace (subspace_size > 0), found none")
    figure, (left, right) = _figure(9, 3.6, ncols=2)
    for number, (name, label) in enumerate((("update", "the update"), ("random", "random update of equal norm"))):
        entry, style = report.subspace[name], {**_style(number, 4), "label": label}
        numbers = np.arange(1, len(entry["eigenvalues"]) + 1)
        left.plot(numbers, np.abs(entry["eigenvalues"]), **style)
        if entry["shares"]:
            right.plot(numbers, 100 * np.cumsum(entry["shares"]), **style)
    left.set(yscale="log", ylabel="|eigenvalue| (nats per token)")
    right.set_ylabel("share of the second-order damage (%)")
    _reference(right.axhline(100, linestyle=":"))
    for axes in (left, right):
        axes.set_xlabel("eigenvectors of route space, largest first")
        _whole_numbers(axes)
    left.legend(fontsize=8)
    figure.suptitle("Above 100%: eigenvectors that were left out have negative shares", fontsize=9)
    return figure


def plot_pareto(arms: Sequence[dict[str, Any]]) -> Figure:
    """
    What each repair brought back, against what the worst-hit other domain paid and against what it cost.

    An arm has `name`, `recovered` (share) with `low` and `high`, `worst` (points) and `sequences` (see
    [`~reporting.verdict.passes`]); each may be `None`.
    """
    figure, (left, right) = _figure(9.6, 4.2, ncols=2, sharey=True)
    figure.hover = {}  # names of the points, by the id of their group in an SVG
    for number, arm in enumerate(arms):
        if arm["recovered"] is None:
            continue
        value = 100 * arm["recovered"]
        ends = [100 * arm[key] if arm.get(key) is not None else value for key in ("low", "high")]
        style = _style(number, 6)
        bars = np.abs(np.array(ends) - value)[:, None]
        for axes, place in ((left, arm.get("worst")), (right, arm.get("sequences"))):
            if place is not None:
                drawn = axes.errorbar(place, value, yerr=bars, capsize=2, linestyle="", **style)
                drawn.lines[0].set_gid(f"hover-{number}")
                figure.hover[f"hover-{number}"] = f"{arm['name']}: {arm['recovered']:.0%} recovered"
        left.plot([], [], linestyle="", label=_name(arm["name"], 44), **style)
    for axes in (left, right):
        _reference(axes.axhline(0))
        _reference(axes.axhline(100, linestyle=":"))
    _reference(left.axvline(0))
    left.set(xlabel="worst change of another domain (points)", ylabel="recovered share of all that was lost (%)")
    right.set_xscale("symlog", linthresh=10)
    right.set_xlim(-2, 3 * max([10, *(arm["sequences"] for arm in arms if arm.get("sequences"))]))
    right.set_xlabel("cost (passes of a sequence: sampled, forward, backward twice)")
    if arms:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _figure(width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**options)


def _style(number: int, size: int) -> dict[str, Any]:
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "markersize": size}


def _map(
    axes: Axes,
    values: np.ndarray,
    columns: Sequence[Any],
    rows: Sequence[Any],
    limits: tuple[float, float],
    spec: str,
    missing: str = "",
    origin: str = "upper",
    fontsize: int = 8,
) -> Any:
    """Draw a table as a map of colours, with its values in the cells while there is room for them."""
    values = np.reshape(values, (len(rows), len(columns)))
    colors = matplotlib.colormaps[SIGNED if limits[0] < 0 else AMOUNT]
    image = axes.imshow(values, cmap=colors, vmin=limits[0], vmax=limits[1], aspect="auto", origin=origin)
    axes.set_xticks(range(len(columns)), [_name(str(name), 14) for name in columns])
    if len(rows) > MAX_LABELLED:
        _whole_numbers(axes, "y")
        return image
    axes.set_yticks(range(len(rows)), [_name(str(name), 24) for name in rows])
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        text, ink = (missing, "black") if np.isnan(value) else (f"{value:{spec}}", _ink(image.to_rgba(value)))
        if text:
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=fontsize)
    return image


def _ink(color: Any) -> str:
    """Black or white, whichever stands out more: one of them always has a contrast of 4.5 (WCAG 2.2)."""
    channels = np.array(to_rgb(color))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return "black" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "white"


def _reference(line: Any, width: float = 0.9) -> None:
    """A line that figures are compared with, and that is no data."""
    line.set(color=REFERENCE, linewidth=width, gid="reference")


def _whole_numbers(axes: Axes, which: str = "x") -> None:
    getattr(axes, f"{which}axis").get_major_locator().set_params(integer=True)


def _name(text: str, length: int = 40) -> str:
    """A name from a run as plain text of a figure, where two dollars would begin a formula."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    return (text if len(text) <= length else text[: length - 1] + "…").replace("$", "\\$")


# Figures of one report, by the name of their file, and the field that each needs.
PLOTS: dict[str, Callable[[InterferenceReport], Figure]] = {
    "module_cosines": plot_module_cosines,
    "sparsity": plot_sparsity,
    "overlaps": lambda report: plot_overlaps(report.overlaps.get("active"), "active"),
    "damage_concentration": lambda report: plot_damage_concentration([report]),
    "damage_by_layer": plot_damage_by_layer,
    "eigenvalues": plot_eigenvalues,
}


def save_figures(report: InterferenceReport, folder: str | Path) -> list[Path]:
    """Write every figure that a report has the measures for, as PNG."""
    needed = {"sparsity": report.updates, "eigenvalues": report.subspace, "damage_by_layer": report.route_counts}
    needed["overlaps"] = report.overlaps.get("active")
    files = {kind: Path(folder) / f"{kind}.png" for kind in PLOTS if needed.get(kind, True)}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for kind, file in files.items():
        PLOTS[kind](report).savefig(file, dpi=150)
    return list(files.values())
