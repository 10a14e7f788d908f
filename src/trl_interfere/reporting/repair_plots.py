"""Figures of repairs. Each function returns a matplotlib figure, which the caller saves."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..repair.sweep import CONTROLS, averaged, by_repair, pareto
from .plots import COLORS, budget_axis


_MARKERS = {"mlp": "o", "joint": "s", "attention": "^"}


def plot_sweep(rows: list[dict[str, Any]], title: str = "") -> Figure:
    """
    Recovered share against budget, and against what the worst-hit other domain paid.

    Rows of several seeds and orders are averaged, with a bar from the lowest to the highest of them; a single row has
    its 95% interval.

    Args:
        rows (`list[dict]`):
            Rows of a sweep.
        title (`str`, *optional*, defaults to `""`):
            Title, such as the command that made the rows.

    Returns:
        [`matplotlib.figure.Figure`]: The figure.
    """
    best = [row for row in rows if row["step_rule"] == "best" and row["recovered"] is not None]
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    groups = _grouped(best, ("criterion", "scope"))
    colors = dict(zip(dict.fromkeys(row["criterion"] for row in best), COLORS * 2, strict=False))
    for number, ((criterion, scope), members) in enumerate(groups.items()):
        color = colors[criterion]
        style = {"linestyle": ":" if criterion in CONTROLS else "-", "marker": _MARKERS[scope]}
        points = []
        for (budget,), same in sorted(_grouped(members, ("budget",)).items()):
            values = [100 * row["recovered"] for row in same]
            ends = (min(values), max(values))
            if len(same) == 1 and same[0]["low"] is not None:
                ends = (100 * same[0]["low"], 100 * same[0]["high"])
            worst = [row["worst"] for row in same if row["worst"] is not None]
            points.append((100 * budget, np.mean(values), *ends, np.mean(worst) if worst else np.nan))
        table = np.array(points)
        shifted = table[:, 0] * (1 + 0.03 * (number - len(groups) / 2))  # keep bars apart
        bars = np.abs(table[:, 2:4].T - table[:, 1])
        label = f"{criterion}, {scope}"
        left.errorbar(shifted, table[:, 1], yerr=bars, color=color, markersize=4, capsize=2, label=label, **style)
        right.plot(table[:, 4], table[:, 1], color=color, markersize=4, linestyle="", marker=style["marker"])
    if best:
        budget_axis(left, [row["budget"] for row in best])
        figure.legend(loc="outside right upper", fontsize=7)
    else:
        left.text(0.5, 0.5, "no score was lost", transform=left.transAxes, ha="center")
    means = [averaged(same) for same in by_repair(best).values()]
    front = pareto(means)
    right.plot([row["worst"] for row in front], [100 * row["recovered"] for row in front], color="grey", linewidth=1)
    for axes in (left, right):
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.axhline(100, color="grey", linewidth=0.8, linestyle=":")
        axes.set_ylabel("recovered share of the lost score (%)")
    right.axvline(0, color="grey", linewidth=0.8)
    left.set_xlabel("share of the routes of the scope that is rolled back (%)")
    right.set_xlabel("worst change of another domain (points); grey line: Pareto front")
    left.set_title("each at its own best step, chosen on the selection split", fontsize=9)
    figure.suptitle(title, fontsize=9)
    return figure


def plot_runs(rows: list[dict[str, Any]], title: str = "") -> Figure:
    """
    Recovered share and worst change of another domain, one point for each run: the distribution behind the means.

    Args:
        rows (`list[dict]`):
            Rows of sweeps over seeds and orders at one budget and in one scope; those at their own best step are
            drawn.
        title (`str`, *optional*, defaults to `""`):
            Title, such as the command that made the rows.

    Returns:
        [`matplotlib.figure.Figure`]: The figure.
    """
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    shown = [row for row in rows if row["step_rule"] == "best"]
    names = list(dict.fromkeys(row["criterion"] for row in shown))
    orders = list(dict.fromkeys(row["order"] for row in shown))
    axes_of = dict(zip((("recovered", 100), ("worst", 1)), figure.subplots(1, 2), strict=True))
    for (field, factor), axes in axes_of.items():
        for place, name in enumerate(names):
            known = [row for row in shown if row["criterion"] == name and row[field] is not None]
            for number, order in enumerate(orders):
                values = [factor * row[field] for row in known if row["order"] == order]
                shift = 0.2 * (number - (len(orders) - 1) / 2)
                axes.plot(
                    [place + shift] * len(values),
                    values,
                    color=COLORS[number % len(COLORS)],
                    marker="o",
                    markersize=4,
                    alpha=0.7,
                    linestyle="",
                    label=order if axes is axes_of["recovered", 100] and not place else None,
                )
            if known:
                mean = np.mean([factor * row[field] for row in known])
                axes.plot([place - 0.35, place + 0.35], [mean, mean], color="black", linewidth=1.5)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
    axes_of["recovered", 100].set_ylabel("recovered share of the lost score (%)")
    axes_of["worst", 1].set_ylabel("worst change of another domain (points)")
    figure.suptitle(f"{title}: each run at its own best step; lines are means".lstrip(": "), fontsize=9)
    if shown:
        figure.legend(loc="outside right upper", fontsize=7)
    return figure


def plot_cost(rows: list[dict[str, Any]], title: str = "") -> Figure:
    """
    Recovered share against gradient passes: training-free repairs and refreshes in one figure.

    Args:
        rows (`list[dict]`):
            `method`, `sequences` (sequences that went through a backward pass), `recovered` and `worst`; rows of one
            method form a line; those of several seeds and orders are averaged, with a bar from the lowest to the
            highest.
        title (`str`, *optional*, defaults to `""`):
            Title, such as the command that made the rows.

    Returns:
        [`matplotlib.figure.Figure`]: The figure.
    """
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = [row for row in rows if row["recovered"] is not None]
    for number, ((method,), members) in enumerate(_grouped(shown, ("method",)).items()):
        color = COLORS[number % len(COLORS)]
        for axes, field, factor in ((left, "recovered", 100), (right, "worst", 1)):
            points = []
            for (sequences,), same in sorted(_grouped(members, ("sequences",)).items()):
                values = [factor * row[field] for row in same]
                points.append((sequences, np.mean(values), min(values), max(values)))
            table = np.array(points)
            bars = np.abs(table[:, 2:4].T - table[:, 1])
            label = method if axes is left else None
            axes.errorbar(
                table[:, 0], table[:, 1], yerr=bars, color=color, marker="o", markersize=4, capsize=2, label=label
            )
    left.set_ylabel("recovered share of the lost score (%)")
    right.set_ylabel("worst change of another domain (points)")
    for axes in (left, right):
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_xlabel("sequences through a backward pass")
    figure.suptitle(title, fontsize=9)
    if shown:
        figure.legend(loc="outside right upper", fontsize=7)
    return figure


def plot_contraction(curves: list[dict[str, Any]], title: str = "") -> Figure:
    """
    Contraction of the part of the update in the conflict subspace during a refresh, beside Theorem 1.

    Curves of one label share a panel: a thin line for each, and a thick one for their mean over the steps that all of
    them have.

    Args:
        curves (`list[dict]`):
            `label`, `steps`, `inside` (‖P_S(θ_t - θ_A*)‖ by step), `outside` (‖(I - P_S)(θ_t - θ_A*)‖, on routes)
            and `rate` (the fitted 1 - αμ_A).
        title (`str`, *optional*, defaults to `""`):
            Title, such as the command that made the rows.

    Returns:
        [`matplotlib.figure.Figure`]: The figure.
    """
    panels = _grouped(curves, ("label",))
    width = max(1, len(panels))
    figure = Figure(figsize=(1.5 + 4.2 * width, 4.2), layout="constrained")
    kinds = {"inside": ("inside S", "-"), "outside": ("outside S", ":"), "fitted": ("(1 - αμ)^t, fitted", "--")}
    columns = figure.subplots(1, width, sharey=True, squeeze=False)[0]
    for axes, ((label,), same) in zip(columns, panels.items(), strict=False):
        for color, (kind, (name, style)) in zip(COLORS, kinds.items(), strict=False):
            lines = [dict(zip(curve["steps"], _distances(curve, kind), strict=True)) for curve in same]
            for line in lines:
                axes.plot(list(line), list(line.values()), color=color, linestyle=style, linewidth=0.6, alpha=0.5)
            steps = sorted(set.intersection(*(set(line) for line in lines)))
            means = [np.mean([line[step] for line in lines]) for step in steps]
            axes.plot(steps, means, color=color, linestyle=style, linewidth=2.2, label=name)
        axes.set_xlabel("refresh steps")
        axes.locator_params(axis="x", integer=True)
        axes.set_title(f"{label} ({len(same)} run{'s' if len(same) > 1 else ''})", fontsize=9)
    figure.axes[0].set_ylabel("distance from the peak checkpoint, relative to step 0")
    if curves:
        figure.axes[0].legend(loc="lower left", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def _distances(curve: dict[str, Any], kind: str) -> np.ndarray:
    if kind == "fitted":
        return curve["rate"] ** np.array(curve["steps"])
    values = np.array(curve[kind], dtype=float)
    return values / values[0]


def _grouped(rows: list[dict[str, Any]], names: tuple[str, ...]) -> dict[tuple, list[dict[str, Any]]]:
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups
