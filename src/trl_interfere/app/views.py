"""Tables and figures that the page and the saved page share."""

from collections.abc import Sequence
from typing import Any

from ..reporting import plots
from . import html
from .scored import KINDS, Scored


MAPS = "layers and modules"
FLIP_HEADER = ["domain", "kept", "lost", "regained", "newly lost"]
ARM_HEADER = ["repair", "recovered", "95% interval", "worst change (points)", "cost (passes)"]


def flip_rows(scored: Scored, before: str, after: str) -> list[list[str]]:
    """A row for each domain: counts, and in brackets what resampling alone would give where the samples tell it."""
    rows = []
    for domain in scored.matrix.domains:
        found = scored.flips(domain, before, after)
        cells = [found.counts()[kind] for kind in KINDS]
        chance = [f" ({found.expected[kind]:.0f})" if kind in found.expected else "" for kind in KINDS]
        rows.append([domain, *(f"{count}{note}" for count, note in zip(cells, chance, strict=True))])
    return rows


FLIP_NOTE = (
    "Lost: right at the peak, wrong after. Regained: right at the peak, wrong before, right after. Newly lost: right "
    "before, wrong after. In brackets: how many a second sample from the unchanged model would flip; one sample a "
    "prompt does not tell it."
)


def arms_of(found: Sequence[Scored]) -> list[dict[str, Any]]:
    """The repairs of several runs, by name of the run where there is more than one."""
    several = len(found) > 1
    return [
        {**arm, "name": f"{one.name}: {arm['name']}" if several else arm["name"]}
        for one in found
        for arm in one.arms()
    ]


def repairs_of(arms: Sequence[dict[str, Any]], caption: str = "", mark: str = "") -> str:
    """The same as a figure and a table."""

    def cell(value: float | None, spec: str, factor: float = 1) -> str:
        return "—" if value is None else f"{factor * value:{spec}}"

    rows = [
        [arm["name"], cell(arm["recovered"], ".0f", 100) + ("%" if arm["recovered"] is not None else "")]
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
        maps["gradient cosine (-1 to 1)"] = (list(plots.PARTS), plots.cosine_map(found))
        if found.route_counts:
            maps["damage (nats per token)"] = plots.damage_map(found)
    if scored.repair is not None and scored.repair.get("layers"):
        maps |= plots.correction_maps(scored.repair["layers"])
    return plots.plot_layer_maps(maps) if maps else None
