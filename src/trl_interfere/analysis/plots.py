"""Figures. Each function returns a matplotlib figure, which the caller saves."""

import re
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..evaluation.score_matrix import ScoreMatrix
from .report import InterferenceReport


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
        axes.plot(shares, 100 * np.cumsum(damage) / damage.sum(), color=color, label=label)
    axes.plot(shares, shares, color="grey", linestyle=":", label="evenly spread")
    axes.set_xscale("log")
    axes.axvline(2, color="grey", linewidth=0.8)
    axes.set_xlabel("share of routes, most damaged first (%)")
    axes.set_ylabel("share of the attributed damage (%)")
    axes.set_title("Damage concentration; above 100%: other routes were improved", fontsize=10)
    axes.legend(fontsize=8)
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
        right.set_xscale("log")
        right.xaxis.set_major_formatter("{x:g}")
        figure.legend(loc="outside right upper", fontsize=8)
    else:
        right.text(0.5, 0.5, "no score was lost", transform=right.transAxes, ha="center")
    right.set_xlabel("share of MLP routes rolled back (%)")
    right.set_title("step chosen on the selection split", fontsize=10)
    return figure
