"""docs/study-smollm2.md and its data, from the rows of the study of SmolLM2."""

import json
from pathlib import Path
from typing import Any

from trl_interfere.tables import markdown_table


BEGIN, END = "<!-- begin: {} -->", "<!-- end: {} -->"
Row = dict[str, Any]


def write_page(rows: list[Row], docs: Path) -> dict[str, Any]:
    """Write the data, and the tables of the page between their marks. Returns the first table by run."""
    data = {
        "schema_version": 2,
        "command": "make study-smollm2",
        "unit": "scores and changes: points of 100 with 95% intervals over prompts; recovered: shares; losses: nats",
        "rows": rows,
    }
    (docs / "data" / "study-smollm2.json").write_text(json.dumps(data, indent=1) + "\n")
    runs = {run: [row for row in rows if row["run"] == run] for run in sorted({row["run"] for row in rows})}
    found = {run: scores(of_run) for run, of_run in runs.items()}
    page = docs / "study-smollm2.md"
    text = page.read_text()
    header = ["run, domain", "n", "base", "peak", "final", "healed", "refreshed"]
    table = markdown_table(header, [row for lines in found.values() for row in lines])
    for name, made in (
        ("scores", table),
        ("arms", _arms(runs)),
        ("outside", _outside(runs)),
        ("analysis", _analysis(runs)),
    ):
        begin, end = BEGIN.format(name), END.format(name)
        text = text[: text.index(begin) + len(begin)] + f"\n\n{made}\n\n" + text[text.index(end) :]
    page.write_text(text)
    return found


def _of(rows: list[Row], arm: str) -> Row | None:
    return next((row for row in rows if row["arm"] == arm), None)


def scores(rows: list[Row]) -> list[list[str]]:
    """A line of each domain."""
    stages = {row["stage"]: row["domains"] for row in rows if row["arm"] == "stage"}
    if not stages:
        return []
    healed, refreshed = _of(rows, "heal"), _of(rows, "refresh")
    final = list(stages)[-1]
    lines = []
    for domain, base in stages["base"].items():
        places = [base, stages[domain][domain], stages[final][domain]]
        cells = [_interval(place["value"], place["low"], place["high"]) for place in places]
        for row in (healed, refreshed):
            entry = None if row is None else row["domains"][domain]
            cells.append("" if entry is None else _interval(entry["healed"], *entry["intervals"]["healed"]))
        mark = " (refreshed)" if refreshed is not None and refreshed["domain"] == domain else ""
        lines.append([f"{rows[0]['run']}, {domain}{mark}", str(base["n"]), *cells])
    return lines


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _arms(runs: dict[str, list[Row]]) -> str:
    """Every repair: recovered of all that was lost, and the lowest change of a domain, by run."""
    found = {_name(row): row for rows in runs.values() for row in rows if "recovered_all" in row}
    names = sorted(found, key=lambda name: (not name.startswith("heal"), name))
    lines = []
    for name in names:
        cells = []
        for rows in runs.values():
            row = next((row for row in rows if "recovered_all" in row and _name(row) == name), None)
            cells.append("" if row is None else _share(row))
        lines.append([name, *cells])
    return markdown_table(["repair", *runs], lines)


def _name(row: Row) -> str:
    if row["arm"] == "stage":
        return "base" if row["stage"] == "base" else "final"
    if row["arm"] == "routes":
        return f"routes, {100 * row['budget']:g}% of {row['scope']}, protected"
    kind = {"refresh": "GRPO", "distill": "distillation"}.get(row["arm"])
    return row["arm"] if kind is None else f"refresh by {kind}, {row['steps']} steps"


def _share(row: Row) -> str:
    share = row["recovered_all"]
    recovered = "" if share["value"] is None else "{value:.0%} [{low:.0%}, {high:.0%}]".format(**share)
    return f"{recovered}; {row['worst']:+.1f}"


def _outside(runs: dict[str, list[Row]]) -> str:
    """Loss on general text and divergence on chat prompts, of every model that was asked."""
    lines = []
    for run, rows in runs.items():
        found = {_name(row): row for row in rows if row.get("general_loss") is not None}
        for name in sorted(found, key=lambda name: (name not in ("base", "final"), not name.startswith("heal"), name)):
            lines.append([f"{run}, {name}", *(f"{found[name][key]:.4f}" for key in ("general_loss", "chat_kl"))])
    return markdown_table(["run, model", "loss on general text", "KL from the final model, chat"], lines)


def _analysis(runs: dict[str, list[Row]]) -> str:
    lines = []
    for run, rows in runs.items():
        row = _of(rows, "analysis")
        for claim in row["claims"] if row else []:
            lines.append([run, claim["figure"], claim["value"], claim["control"]])
    return markdown_table(["run", "figure", "here", "control"], lines)
