"""The page and the data of the study of SmolLM2, from the files of its seeds. `study_smollm2.py` calls it."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from trl_interfere.analysis.report import InterferenceReport
from trl_interfere.analysis.stage_edits import StageEdits
from trl_interfere.evaluation.score_matrix import ScoreMatrix
from trl_interfere.reporting.claims import (
    claims_table,
    edit_claims,
    forgetting_claims,
    refresh_claims,
    report_claims,
    rollback_claims,
)
from trl_interfere.reporting.plots import COLORS, plot_damage_concentration, plot_module_cosines, plot_score_matrix
from trl_interfere.run import write_atomically


COMMAND = "make study-smollm2"
SCHEMA_VERSION = 1

Rows = list[dict[str, Any]]


def write_page(found: Rows, repaired: str, docs: Path) -> None:
    """
    Write `study-smollm2.md`, `data/study-smollm2.json` and the figures.

    Args:
        found (`list[dict]`):
            For each seed `seed`, `order`, `matrix` ([`ScoreMatrix`]), `unchanged` (stages that left the weights as
            they were), `edits` of the others ([`StageEdits`]), `reports` (by domain; the reason as text where there is
            none), `rollback` (rows), `lost` (nats of a right answer, as an interval) and `refreshes` (by refreshed
            domain), as far as they are there.
        repaired (`str`):
            Domain that the repairs are for.
        docs (`pathlib.Path`):
            Folder of the documentation.
    """
    figures = docs / "figures" / "study-smollm2"
    figures.mkdir(parents=True, exist_ok=True)
    seeds = ", ".join(str(entry["seed"]) for entry in found)
    lines = [
        "# The study of a real model",
        "",
        f"`{COMMAND}` trains SmolLM2-135M-Instruct through {', '.join(found[0]['order'])} (seeds {seeds}), "
        "analyses what "
        f"the stages after {repaired} did to {repaired}, repairs it beside controls and by a refresh, and writes this "
        "page and [data/study-smollm2.json](data/study-smollm2.json). It is a check of the tools and of the "
        "claims at a "
        "size that a CPU can train: a few dozen steps, and test sets so small that an interval is ten points or more "
        "wide. The recipe is `recipes/study-smollm2.yaml`; the weights are those of a 4-bit file, see "
        "`recipes/prepare_smollm2.py`.",
        "",
        "Before the first stage one supervised epoch on answers of training prompts teaches the formats that the "
        "rewards read (code, math, qa). Scores are greedy on the test split, with 95% bootstrap intervals over "
        "prompts: code is the share of HumanEval problems whose tests pass, math and qa the share of right answers "
        "(qa has four options: chance is 25), writing the share of a rubric that is met.",
        "",
        "## In brief",
        "",
        *[f"- {sentence}" for sentence in brief(found, repaired)],
        "",
    ]
    for entry in found:
        lines += _of_seed(entry, repaired, figures)
    text = "\n".join(lines).rstrip() + "\n"
    write_atomically(docs / "study-smollm2.md", text)
    content = {"schema_version": SCHEMA_VERSION, "command": COMMAND, "repaired": repaired, "seeds": []}
    for entry in found:
        content["seeds"].append(
            {
                "seed": entry["seed"],
                "order": entry["order"],
                "scores": _scores(entry["matrix"]),
                "reports": {
                    name: report if isinstance(report, str) else report.to_dict()
                    for name, report in entry["reports"].items()
                },
                "rollback": entry.get("rollback", []),
                "refreshes": entry.get("refreshes", {}),
                "claims": [claim.to_dict() for claim in claims(entry, repaired)],
            }
        )
    write_atomically(docs / "data" / "study-smollm2.json", json.dumps(content) + "\n")


def claims(entry: dict[str, Any], repaired: str) -> list:
    """The claims of the paper that a seed speaks to."""
    report, edits = entry["reports"].get(repaired), entry.get("edits")
    rollback, refresh = entry.get("rollback", []), entry.get("refreshes", {}).get(repaired)
    return [
        *(report_claims(report) if isinstance(report, InterferenceReport) else []),
        *(edit_claims(edits) if isinstance(edits, StageEdits) else []),
        *forgetting_claims(entry["matrix"]),
        *refresh_claims(refresh, rollback),
        *rollback_claims(rollback),
    ]


def brief(found: Rows, repaired: str) -> list[str]:
    """
    What came out, sentence by sentence, from the figures.

    Args:
        found (`list[dict]`):
            See [`write_page`].
        repaired (`str`):
            Domain that the repairs are for.

    Returns:
        `list[str]`: Sentences in Markdown.
    """
    sentences = []
    for entry in found:
        matrix, seed = entry["matrix"], entry["seed"]
        last = matrix.last_training(-1)
        gained, lost = [], []
        for name in entry["order"]:
            own = matrix.stages.index(f"{entry['order'].index(name) + 1}-{name}")
            start, peak, end = (matrix.interval(row, name).value for row in (own - 1, own, last))
            gained.append(f"{name} {start:.1f} to {peak:.1f}")
            if own != last:
                lost.append(f"{name} {peak:.1f} to {end:.1f}")
        sentences.append(
            f"Seed {seed}: by their own stages, {', '.join(gained)}; from there to the end of the sequence, "
            f"{', '.join(lost)}."
        )
        sentences += [
            f"Seed {seed}: the stage of {name} changed no weight: in none of its steps did two completions of a "
            "prompt differ in their reward."
            for name in entry["unchanged"]
        ]
        report = entry["reports"].get(repaired)
        if isinstance(report, InterferenceReport):
            sentences.append(
                f"Seed {seed}: the later stages raised the loss of {repaired} on its references by "
                f"{report.damage:+.4f} "
                f"nats per token, {report.first_order:+.4f} of first and {report.second_order:+.4f} of second "
                "order; the "
                f"gradients of the whole model have a cosine of {report.cosines['global']:+.3f}."
            )
        rows = {
            (row["criterion"], row["scope"], row["step_rule"]): row
            for row in entry.get("rollback", [])
            if row.get("nats", {}).get("recovered") is not None
        }
        parts = [
            f"{label} {_share(rows[key]['nats'])}"
            for key, label in (
                (("damage", "mlp", "optimal"), "`damage` at 2% of MLP routes"),
                (("route_conflict", "mlp", "optimal"), "`route_conflict`"),
                (("random", "mlp", "optimal"), "random routes"),
                (("random_matched", "mlp", "optimal"), "matched ones"),
                (("damage", "joint", "optimal"), "`damage` at 32% of MLP and attention"),
                (("damage_protected", "joint", "optimal"), "`damage_protected` at 32% of MLP and attention"),
                (("random", "joint", "optimal"), "random ones"),
                (("interpolation", "all", "optimal"), "interpolation of all weights"),
            )
            if key in rows
        ]
        if parts:
            damage = entry["lost"]
            sentences.append(
                f"Seed {seed}: of the {damage['value']:+.3f} [{damage['low']:+.3f}, {damage['high']:+.3f}] nats "
                "that a "
                f"right answer of {repaired} has lost on the test split, repairs without training bring back: "
                f"{', '.join(parts)}."
            )
        elif "lost" in entry:
            damage = entry["lost"]
            sentences.append(
                f"Seed {seed}: a right answer of {repaired} has lost {damage['value']:+.3f} [{damage['low']:+.3f}, "
                f"{damage['high']:+.3f}] nats on the test split: there is nothing to repair, and no rollback was made."
            )
        for name, refresh in entry.get("refreshes", {}).items():
            change, nats = refresh["changes"][repaired], refresh["nats"]["change"]
            sentences.append(
                f"Seed {seed}: {refresh['steps']} steps of refresh on {name}"
                f"{'' if name == repaired else ' (control)'} change {repaired} by {_change(change)} points, and the "
                f"loss of a right answer by {nats['value']:+.3f} [{nats['low']:+.3f}, {nats['high']:+.3f}] nats."
            )
    return sentences


def _of_seed(entry: dict[str, Any], repaired: str, figures: Path) -> list[str]:
    seed, matrix, lines = entry["seed"], entry["matrix"], []
    plot_score_matrix(matrix).savefig(figures / f"scores-{seed}.png", dpi=110)
    lines += [f"## Seed {seed}", "", "### Scores", "", _score_table(matrix), ""]
    lines += [f"![Scores after each stage](figures/study-smollm2/scores-{seed}.png)", ""]
    lines += ["### Claims of the paper", "", claims_table(claims(entry, repaired)), ""]
    reports = {name: report for name, report in entry["reports"].items() if isinstance(report, InterferenceReport)}
    if repaired in reports:
        plot_module_cosines(reports[repaired]).savefig(figures / f"cosines-{seed}.png", dpi=110)
        plot_damage_concentration([reports[repaired]]).savefig(figures / f"concentration-{seed}.png", dpi=110)
        lines += [
            f"![Cosines of gradients by module](figures/study-smollm2/cosines-{seed}.png)",
            f"![Concentration of the damage](figures/study-smollm2/concentration-{seed}.png)",
            "",
        ]
    lines += ["### What the later stages did to each domain", "", _damage_table(entry["reports"]), ""]
    rollback, refreshes = entry.get("rollback", []), entry.get("refreshes", {})
    if rollback or refreshes:
        lines += [
            f"### Repairs of {repaired}",
            "",
            "*Score*: share of the lost score that came back, on the test split; where less was lost than the "
            "interval is wide it says nothing (resamples in which nothing was lost are left out). Changes of the "
            "domains are in points.",
        ]
        if rollback:
            lines.append(
                "*Nats*: share of the loss of the right answers on the same prompts, in float32, which moves where a "
                "greedy answer does not. Steps and protections were chosen on the selection split. Random controls "
                f"are {_draws(rollback)}. Repairs without training were tested on the first prompts of the other "
                f"domains ({_sizes(rollback)}), refreshes on all."
            )
        lines += ["", _repair_table(rollback, refreshes, entry["order"], repaired), ""]
        shown = {_label(row): row["nats"] for row in rollback}
        shown |= {_refresh_label(name, entry, repaired): entry["nats"] for name, entry in refreshes.items()}
        shown = {label: share for label, share in shown.items() if share["recovered"] is not None}
        if shown:
            plot_shares(shown, repaired).savefig(figures / f"rollback-{seed}.png", dpi=110)
            lines += [f"![Recovered nats](figures/study-smollm2/rollback-{seed}.png)", ""]
    return lines


def _scores(matrix: ScoreMatrix) -> dict[str, dict[str, dict[str, float]]]:
    return {
        stage: {name: matrix.interval(row, name).to_dict() for name in matrix.domains}
        for row, stage in enumerate(matrix.stages)
    }


def _score_table(matrix: ScoreMatrix) -> str:
    first = [matrix.interval(0, name) for name in matrix.domains]
    heads = [f"{name} (n={entry.n})" for name, entry in zip(matrix.domains, first, strict=True)]
    lines = ["| stage | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for row, stage in enumerate(matrix.stages):
        cells = [matrix.interval(row, name) for name in matrix.domains]
        cells = [f"{cell.value:.1f} [{cell.low:.1f}, {cell.high:.1f}]" for cell in cells]
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _damage_table(reports: dict[str, InterferenceReport | str]) -> str:
    lines = [
        "| domain | after | references | damage, nats per token | first order | second order | cosine of gradients |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, report in reports.items():
        if isinstance(report, str):
            lines.append(f"| {name} | | | no analysis: {report.splitlines()[0]} | | | |")
            continue
        cosine = report.cosines["global"]
        lines.append(
            f"| {name} | {', '.join(report.later)} | {report.references[name]['n']} | {report.damage:+.4f} | "
            f"{report.first_order:+.4f} | {report.second_order:+.4f} | "
            f"{'undefined' if cosine is None else f'{cosine:+.3f}'} |"
        )
    return "\n".join(lines)


def _repair_table(rollback: Rows, refreshes: dict[str, Any], order: list[str], repaired: str) -> str:
    others = [repaired, *(name for name in order if name != repaired)]
    lines = [
        "| repair | routes | α | score | nats | " + " | ".join(others) + " |",
        "| --- | --- | ---: | --- | --- |" + " --- |" * len(others),
    ]
    for row in rollback:
        protection = f", protection {row['protection']:g}" if row["protection"] else ""
        best = " (best)" if row["step_rule"] == "optimal" else ""
        changes = {**row["changes"], **row["own_changes"]}
        cells = [_change(changes[name]) for name in others]
        lines.append(
            f"| `{row['criterion']}`{protection} | {_routes(row)} | {row['step']:g}{best} | {_share(row)} | "
            f"{_share(row['nats'])} | " + " | ".join(cells) + " |"
        )
    for name, entry in refreshes.items():
        cells = [_change(entry["changes"][other]) for other in others]
        label = _refresh_label(name, entry, repaired)
        lines.append(
            f"| {label} | all weights | | {_share(entry)} | {_share(entry['nats'])} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def _routes(row: dict[str, Any]) -> str:
    return "all weights" if row["scope"] == "all" else f"{100 * row['budget']:g}% of {row['scope']}"


def _label(row: dict[str, Any]) -> str:
    return f"{row['criterion']}, {_routes(row)}, α = {row['step']:g}"


def _refresh_label(name: str, entry: dict[str, Any], repaired: str) -> str:
    return f"refresh of {name}, {entry['steps']} steps" + ("" if name == repaired else " (control)")


def plot_shares(shares: dict[str, dict[str, float]], repaired: str) -> Figure:
    """
    Recovered shares of the nats that a right answer has lost, each with its 95% interval.

    Args:
        shares (`dict[str, dict]`):
            `recovered`, `low` and `high` of each repair.
        repaired (`str`):
            Name of the repaired domain.

    Returns:
        [`matplotlib.figure.Figure`]: The figure.
    """
    figure = Figure(figsize=(7.5, 1.2 + 0.28 * len(shares)), layout="constrained")
    axes = figure.subplots()
    for position, share in enumerate(reversed(shares.values())):
        value, low, high = (100 * share[name] for name in ("recovered", "low", "high"))
        axes.errorbar(
            value, position, xerr=[[value - low], [high - value]], color=COLORS[0], marker="o", markersize=4, capsize=2
        )
    axes.set_yticks(range(len(shares)), list(reversed(shares)), fontsize=8)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_xlabel(f"recovered share of the nats that a right answer of {repaired} has lost (%)")
    return figure


def _draws(rollback: Rows) -> str:
    count = max(row.get("draws", 1) for row in rollback)
    return f"means over {count} draws" if count > 1 else "one draw in each seed"


def _sizes(rollback: Rows) -> str:
    return ", ".join(f"{name} {change['n']}" for name, change in rollback[0]["changes"].items())


def _share(row: dict[str, Any]) -> str:
    if row["recovered"] is None:
        return "nothing was lost"
    if row["low"] is None:
        return f"{100 * row['recovered']:.0f}% (no interval)"
    return f"{100 * row['recovered']:.0f}% [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"


def _change(change: dict[str, float]) -> str:
    return f"{change['value']:+.1f} [{change['low']:+.1f}, {change['high']:+.1f}]"
