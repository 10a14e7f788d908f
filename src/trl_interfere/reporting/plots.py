"""Figures. Each function returns a matplotlib figure, which the caller saves."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ..analysis.report import InterferenceReport
from ..analysis.stage_edits import StageEdits
from ..evaluation.score_matrix import ScoreMatrix


# Okabe and Ito's colours, which people with any colour vision can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def plot_score_matrix(matrix: ScoreMatrix) -> Figure:
    """
    Scores of every domain after every stage, as an annotated map.

    Args:
        matrix ([`ScoreMatrix`]):
            The scores.

    Returns:
        [`matplotlib.figure.Figure`]: The figure.
    """
    values = np.array(
        [
            [100 * stage[domain].mean() if domain in stage else np.nan for domain in matrix.domains]
            for stage in matrix.values
        ],
        dtype=float,
    )
    figure = Figure(figsize=(1.6 + 1.2 * len(matrix.domains), 1.2 + 0.5 * len(matrix.stages)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(matrix.domains)), matrix.domains)
    axes.set_yticks(range(len(matrix.stages)), matrix.stages)
    for row, column in np.ndindex(values.shape):
        color = "white" if values[row, column] < 55 else "black"
        label = "—" if np.isnan(values[row, column]) else f"{values[row, column]:.1f}"
        axes.text(column, row, label, ha="center", va="center", color=color)
    axes.set_title("Score (0 to 100) of each domain after each stage", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def plot_module_cosines(report: InterferenceReport) -> Figure:
    """
    Gradient cosines, layer by module.

    Args:
        report ([`InterferenceReport`]):
            The analysis.

    Returns:
        [`matplotlib.figure.Figure`]: The figure.
    """
    modules = report.cosines["modules"]
    parts = ("attention", "mlp", "norm")
    matches = (re.match(r"layers\.(\d+)\.", name) for name in modules)
    layers = 1 + max((int(match[1]) for match in matches if match), default=0)
    values = np.array([[modules.get(f"layers.{layer}.{part}", np.nan) for part in parts] for layer in range(layers)])
    outside = {name: value for name, value in modules.items() if not name.startswith("layers.")}
    bound = max([0.05, *map(abs, modules.values())])

    figure = Figure(figsize=(6.5, 1.5 + 0.35 * layers), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1.4))
    image = left.imshow(values, cmap="PuOr", vmin=-bound, vmax=bound, aspect="auto", origin="lower")
    left.set_xticks(range(len(parts)), parts)
    left.set_yticks(range(layers), [str(layer) for layer in range(layers)])
    left.set_ylabel("layer")
    outside_values = np.array(list(outside.values()) or [np.nan])[:, None]
    right.imshow(outside_values, cmap="PuOr", vmin=-bound, vmax=bound, aspect="auto")
    right.set_xticks([])
    right.set_yticks(range(len(outside)), list(outside))
    for axes, table in ((left, values), (right, outside_values)):
        if len(table) <= 48:
            for row, column in zip(*np.nonzero(np.isfinite(table)), strict=True):
                color = "white" if abs(table[row, column]) > 0.7 * bound else "black"
                axes.text(column, row, f"{table[row, column]:+.2f}", ha="center", va="center", color=color, fontsize=8)
    figure.suptitle(
        f"Gradient cosine of {report.earlier} and {', '.join(report.later)}; whole model "
        + ("undefined" if report.cosines["global"] is None else f"{report.cosines['global']:+.3f}"),
        fontsize=10,
    )
    figure.colorbar(image, ax=[left, right], shrink=0.8, label="cosine")
    return figure


def plot_damage_concentration(reports: list[InterferenceReport]) -> Figure:
    """
    Share of the attributed damage that lies in the most damaged routes.

    Args:
        reports (`list[InterferenceReport]`):
            The analyses, one line each.

    Returns:
        [`matplotlib.figure.Figure`]: The figure.
    """
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for report, color in zip(reports, COLORS, strict=False):
        damage = np.sort(report.routes["damage"])[::-1]
        shares = 100 * np.arange(1, len(damage) + 1) / len(damage)
        label = f"{report.earlier}, after {', '.join(report.later)}"
        if damage.sum() > 0:  # where there is no damage there is nothing to concentrate
            axes.plot(shares, 100 * np.cumsum(damage) / damage.sum(), color=color, label=label)
    axes.plot([0.01, 100], [0.01, 100], color="grey", linestyle=":", label="evenly spread")
    axes.set_xscale("log")
    axes.axvline(2, color="grey", linewidth=0.8)
    axes.set_xlabel("share of routes, most damaged first (%)")
    axes.set_ylabel("share of the attributed damage (%)")
    axes.set_title("Damage concentration; above 100%: other routes were improved", fontsize=10)
    axes.legend(fontsize=8)
    return figure


def plot_sparsity(report: InterferenceReport) -> Figure:
    """
    Share of the parameters that the update left as they were, by layer and by kind of tensor.

    Args:
        report ([`InterferenceReport`]):
            The analysis.

    Returns:
        [`matplotlib.figure.Figure`]: The figure.

    Raises:
        `ValueError`: If the report holds no statistics of files.
    """
    if report.updates is None:
        raise ValueError("sparsity: expected a report on checkpoints in files, found one on models in memory")
    update = report.updates["update"]
    definitions = {
        "below_absolute": f"|δ| < {update['thresholds']['absolute']:g}",
        "below_relative": f"|δ| ≤ {update['thresholds']['relative']:g} |θ|",
        "identical": "identical to the bit",
    }
    kinds = dict(sorted(update["by_kind"].items(), key=lambda item: -item[1]["elements"])[:14])
    layers = update["by_layer"]
    figure = Figure(figsize=(10, 1.6 + 0.3 * max(len(kinds), 8)), layout="constrained")
    left, right = figure.subplots(1, 2)
    positions = [name for name in layers if name != "outside"]
    for (definition, label), color, marker in zip(definitions.items(), COLORS, "osx", strict=False):
        style = {"color": color, "marker": marker, "markersize": 4, "label": label}
        left.plot(range(len(positions)), [100 * layers[name][definition] for name in positions], **style)
        shares = [100 * entry[definition] for entry in kinds.values()]
        right.plot(shares, range(len(kinds)), linestyle="", **style)
    if report.identical_in_bfloat16 is not None:
        for draw in (left.axhline, right.axvline):
            draw(
                100 * report.identical_in_bfloat16,
                color="grey",
                linestyle=":",
                label="identical if stored in bfloat16",
            )
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_xlabel("layer")
    left.set_ylabel("share of the parameters (%)")
    right.set_yticks(range(len(kinds)), list(kinds))
    right.invert_yaxis()
    right.set_xlabel("share of the parameters (%)")
    left.set_ylim(-3, 103)
    right.set_xlim(-3, 103)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    dtype = update["whole"]["dtype"]
    figure.suptitle(f"What the update left as it was; stored as {dtype}", fontsize=10)
    return figure


def plot_overlaps(report: InterferenceReport) -> Figure:
    """
    Overlap of the most active MLP channels of each pair of domains, beside what shuffles within layers would give.

    Args:
        report ([`InterferenceReport`]):
            The analysis.

    Returns:
        [`matplotlib.figure.Figure`]: The figure.

    Raises:
        `ValueError`: If the report holds no overlaps.
    """
    if not report.overlaps.get("active"):
        raise ValueError("overlaps: expected a report with overlaps of two domains or more, found none")
    return _overlap_map(report.overlaps["active"], "active")


def plot_changed_overlaps(edits: StageEdits) -> Figure:
    """
    Overlap of the MLP channels that each two stages of a run changed most, beside shuffles within layers.

    Args:
        edits ([`StageEdits`]):
            What each stage changed.

    Returns:
        [`matplotlib.figure.Figure`]: The figure.
    """
    return _overlap_map(edits.to_dict()["changed"], "changed")


def _overlap_map(overlaps: dict[str, dict[str, dict[str, dict[str, Any]]]], word: str) -> Figure:
    entries = {(first, second): kinds["mlp"] for first, row in overlaps.items() for second, kinds in row.items()}
    names = list(dict.fromkeys(name for pair in entries for name in pair))
    values = np.full((len(names), len(names)), np.nan)
    for (first, second), entry in entries.items():
        values[names.index(second), names.index(first)] = entry["value"]
        values[names.index(first), names.index(second)] = entry["shuffled"]
    figure = Figure(figsize=(10, 2.0 + 0.3 * max(len(entries), 6)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    image = left.imshow(values, cmap="cividis", vmin=0, vmax=1)
    left.set_xticks(range(len(names)), names)
    left.set_yticks(range(len(names)), names)
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
        color = "white" if values[row, column] < 0.55 else "black"
        left.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", color=color)
    left.set_title(f"{word} MLP channels: measured (below),\nby chance (above the diagonal)", fontsize=9)
    figure.colorbar(image, ax=left, shrink=0.8, label="Jaccard index")
    for position, entry in enumerate(entries.values()):
        labels = ("chance, 95%", f"measured, 95% over {entry['over']}") if position == 0 else (None, None)
        chance = {"color": "#999999", "linewidth": 6, "alpha": 0.6, "solid_capstyle": "butt", "label": labels[0]}
        right.plot([entry["shuffled_low"], entry["shuffled_high"]], [position] * 2, **chance)
        # The interval is a percentile bootstrap, which need not hold the value.
        right.plot([entry["low"], entry["high"]], [position] * 2, color=COLORS[0], linewidth=1.2)
        right.plot([entry["value"]], [position], "o", color=COLORS[0], markersize=5, label=labels[1])
    right.set_yticks(range(len(entries)), [f"{first}, {second}" for first, second in entries], fontsize=8)
    right.invert_yaxis()
    right.set_xlim(-0.02, 1.02)
    right.set_xlabel("Jaccard index of the top 10%")
    right.legend(fontsize=8)
    return figure


def plot_damage_by_layer(report: InterferenceReport) -> Figure:
    """
    Damage attributed to the routes of each layer.

    Args:
        report ([`InterferenceReport`]):
            The analysis.

    Returns:
        [`matplotlib.figure.Figure`]: The figure.
    """
    sums = {kind: values for kind, values in report.by_layer("damage").items() if values.size}
    labels = {"mlp": "MLP channels", "query": "query heads", "key_value": "key/value heads"}
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(sums)
    for index, ((kind, values), color) in enumerate(zip(sums.items(), COLORS, strict=False)):
        offset = (index - (len(sums) - 1) / 2) * width
        axes.bar(np.arange(len(values)) + offset, values, width, color=color, label=labels[kind])
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer")
    axes.set_ylabel("damage (nats per token)")
    axes.set_title(
        f"Damage of {report.earlier} by {', '.join(report.later)}: {report.attributed:+.4f} by routes, "
        f"{report.outside_routes:+.4f} outside",
        fontsize=10,
    )
    axes.legend(fontsize=8)
    return figure


def plot_eigenvalues(report: InterferenceReport) -> Figure:
    """
    Decay of the eigenvalues of the damage on route space, beside those of a random update of equal norm.

    Args:
        report ([`InterferenceReport`]):
            The analysis.

    Returns:
        [`matplotlib.figure.Figure`]: The figure.

    Raises:
        `ValueError`: If the conflict subspace was not asked for.
    """
    if report.subspace is None:
        raise ValueError("eigenvalues: expected a report with a conflict subspace (subspace_size > 0), found none")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, label), color, marker in zip(
        {"update": "the update", "random": "random update of equal norm"}.items(), COLORS, "os", strict=False
    ):
        entry = report.subspace[name]
        style = {"color": color, "marker": marker, "markersize": 4, "label": label}
        numbers = np.arange(1, len(entry["eigenvalues"]) + 1)
        left.plot(numbers, np.abs(entry["eigenvalues"]), **style)
        if entry["shares"]:
            right.plot(numbers, 100 * np.cumsum(entry["shares"]), **style)
    left.set_yscale("log")
    left.set_ylabel("|eigenvalue| (nats per token)")
    right.set_ylabel("share of the second-order damage (%)")
    right.axhline(100, color="grey", linestyle=":", linewidth=0.8)
    for axes in (left, right):
        axes.set_xlabel("eigenvectors of route space, largest first")
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize=8)
    figure.suptitle("Above 100%: eigenvectors that were left out have negative shares", fontsize=9)
    return figure


def plot_rollback(rows: list[dict[str, Any]], earlier: str) -> Figure:
    """
    Recovered share against the budget of the rollback, with its controls.

    Args:
        rows (`list[dict]`):
            Rows of `results.json`: `criterion`, `scope`, `budget`, `step`, `step_rule`, `recovered`, `low`, `high`.
        earlier (`str`):
            Name of the repaired domain.

    Returns:
        [`matplotlib.figure.Figure`]: The figure.
    """
    shown = [row for row in rows if row["scope"] == "mlp" and row["recovered"] is not None]
    criteria = list(dict.fromkeys(row["criterion"] for row in shown))
    colors = dict(zip(criteria, COLORS * 2, strict=False))
    fixed = [row for row in shown if row["step_rule"] == "fixed"]
    figure = Figure(figsize=(9.5, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for position, row in enumerate(reversed(fixed)):
        left.errorbar(
            100 * row["recovered"],
            position,
            xerr=[[100 * (row["recovered"] - row["low"])], [100 * (row["high"] - row["recovered"])]],
            color=colors[row["criterion"]],
            marker="o",
            markersize=4,
            capsize=2,
        )
    left.set_yticks(range(len(fixed)), [f"{row['criterion']}, {100 * row['budget']:g}%" for row in reversed(fixed)])
    left.axvline(0, color="grey", linewidth=0.8)
    left.set_xlabel(f"recovered share of the lost {earlier} score (%)")
    left.set_title("step α = 1", fontsize=10)
    for number, criterion in enumerate(criteria):
        points = [row for row in shown if row["criterion"] == criterion and row["step_rule"] == "optimal"]
        points.sort(key=lambda row: row["budget"])
        budgets = np.array([100 * row["budget"] for row in points])
        values = 100 * np.array([[row["recovered"], row["low"], row["high"]] for row in points]).reshape(-1, 3)
        right.errorbar(
            budgets * (1 + 0.06 * (number - len(criteria) / 2)),  # keep intervals apart
            values[:, 0],
            yerr=np.abs(values[:, 1:] - values[:, :1]).T,
            color=colors[criterion],
            marker="o",
            markersize=4,
            capsize=2,
            linewidth=1.2,
            label=criterion,
        )
    right.axhline(0, color="grey", linewidth=0.8)
    right.axhline(100, color="grey", linewidth=0.8, linestyle=":")
    if shown:
        budget_axis(right, [row["budget"] for row in shown])
        figure.legend(loc="outside right upper", fontsize=8)
    else:
        right.text(0.5, 0.5, "no score was lost", transform=right.transAxes, ha="center")
    right.set_xlabel("share of MLP routes rolled back (%)")
    right.set_title("step chosen on the selection split", fontsize=10)
    return figure


def budget_axis(axes: Axes, budgets: list[float]) -> None:
    """
    A logarithmic axis of budgets in percent, with a tick at each of them and nowhere else.

    Args:
        axes ([`matplotlib.axes.Axes`]):
            Where the budgets are drawn from left to right.
        budgets (`list[float]`):
            Shares.
    """
    axes.set_xscale("log")
    axes.set_xticks(sorted({100 * budget for budget in budgets}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize=8)


# Figures of one report, by the name of their file.
PLOTS: dict[str, Callable[[InterferenceReport], Figure]] = {
    "module_cosines": plot_module_cosines,
    "sparsity": plot_sparsity,
    "overlaps": plot_overlaps,
    "damage_concentration": lambda report: plot_damage_concentration([report]),
    "damage_by_layer": plot_damage_by_layer,
    "eigenvalues": plot_eigenvalues,
}
