"""Tables and figures that the page and the saved page share."""

from collections.abc import Sequence
from typing import Any

from ..evaluation.bootstrap import difference
from ..reporting import layer_maps, plots
from . import html
from .scored import KINDS, Scored


MAPS = "layers and modules"
FLIP_HEADER = ["domain", *(kind.replace("_", " ") for kind in KINDS), "change (points) [95%]"]
FLIP_NOTE = (
    "Lost: right at the peak, wrong after. Regained: right at the peak, wrong before, right after. Newly lost: right "
    "before, wrong after. In brackets: how many a second sample from the unchanged model would flip. One sample of "
    "each prompt tells only the most (≤) or the least (≥) of it; greedy answers flip by no chance."
)
ARM_HEADER = ["repair", "recovered", "95% interval", "worst change (points)", "cost (passes)"]


def scores_of(one: Scored) -> str:
    """Figures of the scores of all stages."""
    lines = html.figure(plots.plot_scores(one.matrix), "Score of every domain over the stages")
    return lines + html.figure(plots.plot_score_matrix(one.matrix), "Scores of all stages")


def flips_table(one: Scored, before: str, after: str, mark: str = "") -> str:
    """A row for each domain: prompts of each kind, in brackets those that flip by chance, and the change in points."""
    rows = []
    for domain in one.matrix.domains:
        counts, chance = one.flips(domain, before, after).counts(), one.by_chance(domain, before, after)
        cells = [f"{counts[kind]} ({chance[kind]})" for kind in KINDS]
        scores = (one.scores(model, domain) for model in (after, before))
        rows.append([domain, *cells, html.interval(difference(*scores).to_dict())])
    return html.table(FLIP_HEADER, rows, f"Prompts from {before} to {after}. {FLIP_NOTE}", mark)


def arms_of(found: Sequence[Scored]) -> list[dict[str, Any]]:
    """The repairs of several runs, by name of the run where there is more than one."""
    if len(found) == 1:
        return found[0].arms()
    return [arm | {"name": f"{one.name}: {arm['name']}"} for one in found for arm in one.arms()]


def repairs_of(arms: Sequence[dict[str, Any]], caption: str = "", mark: str = "") -> str:
    """The same as a figure and a table."""

    def cell(value: float | None, spec: str, factor: float = 1) -> str:
        return "—" if value is None else f"{factor * value:{spec}}"

    rows = [
        [arm["name"], cell(arm["recovered"], ".0%")]
        + [" to ".join(cell(arm.get(end), ".0f", 100) for end in ("low", "high"))]
        + [cell(arm.get("worst"), "+.1f"), cell(arm.get("sequences"), ",.0f")]
        for arm in arms
    ]
    figure = html.figure(plots.plot_pareto(arms), "Recovered share of each repair, against its price and its cost")
    return figure + html.table(ARM_HEADER, rows, caption, mark)


def where_figure(scored: Scored, report: str | None, view: str = MAPS) -> Any:
    """Maps of layers x modules of what was measured, or one of the figures of a report; `None` without either."""
    if view in plots.PLOTS:
        return plots.PLOTS[view](scored.report(str(report)))
    maps = {}
    if report:
        found = scored.report(report)
        maps["gradient cosine (-1 to 1)"] = (list(layer_maps.PARTS), layer_maps.cosine_map(found))
        if found.route_counts:
            maps["damage (nats per token)"] = layer_maps.damage_map(found)
    maps |= layer_maps.repair_maps(scored.repair or {})
    return plots.plot_layer_maps(maps) if maps else None
