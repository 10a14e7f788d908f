"""docs/repair.md and its data, from the rows of the repair study: three tables and three figures."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from trl_interfere.reporting.plots import plot_pareto
from trl_interfere.reporting.verdict import passes
from trl_interfere.tables import markdown_table


BEGIN, END = "<!-- begin: {} -->", "<!-- end: {} -->"
DEFAULT = "subspace rollback"
SETTINGS = ("rank", "references", "ridge", "modules", "answers", "searched weights", "embeddings too",
            "beyond the interval alone")  # fmt: skip
SHOWN = (DEFAULT, "one shot", "refresh by GRPO, 10 steps", "2% of mlp by damage, protected",
         "32% of joint by damage, protected", "interpolation", "task arithmetic", "TIES")  # fmt: skip
LOWEST = -20  # recovered, in percent, that the figure of training shows
COSTS = ("sequences_sampled", "sequences_forward", "sequences_backward", "seconds")
# What the arms of the table of training need besides the checkpoints, by the beginning of their names.
NEEDS = {
    "nothing": "",
    "subspace rollback": "prompts",
    "heal, rank 64": "prompts",
    "interpolation": "",
    "task arithmetic": "",
    "TIES": "",
    "Fisher merging": "prompts, gradients",
    "2% of mlp by damage, protected": "answers, gradients",
    "32% of joint by damage, protected": "answers, gradients",
    "refresh by GRPO": "prompts, rewards, gradients",
    "distillation": "prompts, gradients",
    "heal, then GRPO": "prompts, rewards, gradients",
    "heal, then distillation": "prompts, gradients",
    "rehearsal": "earlier prompts and rewards in training",
    "KL to": "a reference model in training",
    "projected": "earlier prompts in training",
    "LoRA": "an adapter in training",
    "mixed": "all domains at once",
}


def write_page(rows: list[dict[str, Any]], docs: Path) -> dict[str, float]:
    """Write data, figures, and the tables of the page between their marks. Returns the mean of every arm."""
    arms = defaultdict(list)
    for row in rows:
        arms[label(row)].append(row)
    found = {name: summary(name, of_arm) for name, of_arm in arms.items()}
    (docs / "data").mkdir(exist_ok=True)
    data = {
        "schema_version": 3,
        "command": "make repair-study",
        "unit": "recovered: shares; worst and changes: points of 100; intervals: 95% over runs",
        "arms": list(found.values()),
        "rows": [],
    }
    lines = ",\n".join(json.dumps({key: value for key, value in row.items() if key != "layers"}) for row in rows)
    text = json.dumps(data, indent=1).replace('"rows": []', f'"rows": [\n{lines}\n ]')
    (docs / "data" / "repair.json").write_text(f"{text}\n")
    figures = docs / "figures" / "repair"
    figures.mkdir(parents=True, exist_ok=True)
    plot_pareto([arm for name, arm in found.items() if name in SHOWN]).savefig(figures / "pareto.png", dpi=150)
    # A setting is compared with the default in the runs that have it.
    places = {(row["seed"], row["order"]) for row in rows if row["arm"] in SETTINGS and row["arm"] != "rank"}
    same = {name: [row for row in of_arm if (row["seed"], row["order"]) in places] for name, of_arm in arms.items()}
    default = {**summary(DEFAULT, same[DEFAULT]), "name": "the default, same runs"}
    of_settings = [summary(name, same[name]) for name, arm in found.items() if arm["settings"]]
    _settings_figure(of_settings, default).savefig(figures / "settings.png", dpi=150)
    trained = _of_training(arms)
    _cost_figure(trained).savefig(figures / "training.png", dpi=150)
    page = docs / "repair.md"
    text = page.read_text()
    others = sorted((arm for arm in found.values() if not arm["settings"]), key=lambda arm: -arm["recovered"])
    tables = {
        "arms": _table(others),
        "settings": _table([default, *of_settings]),
        "training": _training_table(trained),
    }
    for name, table in tables.items():
        begin, end = BEGIN.format(name), END.format(name)
        text = text[: text.index(begin) + len(begin)] + f"\n\n{table}\n\n" + text[text.index(end) :]
    page.write_text(text)
    return {name: arm["recovered"] for name, arm in found.items()}


def label(row: dict[str, Any]) -> str:
    """Name of an arm in tables."""
    name = {"subspace": DEFAULT, "task_arithmetic": "task arithmetic", "ties": "TIES"}.get(row["arm"], row["arm"])
    if name == "routes":
        name = f"{100 * row['budget']:g}% of {row['scope']} by {row['criterion']}"
        name += ", protected" if row["protection"] else ""
    for key in ("rank", "references", "ridge", "modules"):
        if name == key:
            name = f"{key} {row[key]}"
    if row.get("steps"):
        name = name.replace("heal, ", "heal, then ").replace("refresh", "GRPO").replace("distill", "distillation")
        name = f"{'refresh by ' if name == 'GRPO' else ''}{name.replace('distillation all', 'distillation of all')}"
        name += f", {row['steps']} step" + "s" * (row["steps"] > 1)
    details = {"share": "{:.0%}", "beta": "β {}", "rank": "rank {}"}
    if row["arm"] in ("rehearsal", "KL to the stage before", "LoRA", "heal"):
        name += "".join(f", {text.format(row[key])}" for key, text in details.items() if key in row)
    return name if row["rate"] == 1 else f"{name}, {row['rate']} times the learning rate"


def summary(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over runs, with 95% intervals by the t distribution."""
    recovered = [row["recovered_all"]["value"] for row in rows if row["recovered_all"]["value"] is not None]
    low, high = _interval(recovered)
    changes = defaultdict(list)
    for row in rows:
        for domain, found in row["domains"].items():
            changes[domain].append(found["change"]["value"])
    strict = [share for row in rows if (share := _beyond_interval(row)) is not None]
    cost = {key: float(np.mean([(row["cost"] or {}).get(key, 0) for row in rows])) for key in COSTS}
    # Those of a rollback of routes would leave out its analysis.
    if rows[0]["arm"] == "routes" or any("seconds" not in (row["cost"] or {}) for row in rows):
        cost["seconds"] = None
    return {
        "name": name,
        "settings": rows[0]["arm"] in SETTINGS and rows[0]["rate"] == 1,
        "runs": len(rows),
        "recovered": float(np.mean(recovered)),
        "low": low,
        "high": high,
        "recovered_beyond_interval": float(np.mean(strict)) if strict else None,
        "changes": {domain: float(np.mean(values)) for domain, values in changes.items()},
        "worst": min(float(np.mean(values)) for values in changes.values()),
        "worst_run": min(row["worst"] for row in rows),
        "sequences": passes(cost),
        "cost": cost,
    }


def _of_training(arms: dict[str, list[dict]]) -> list[dict[str, Any]]:
    """Arms of the table of training, all in the runs that the distillation has been through, the best first."""
    places = {(row["seed"], row["order"]) for row in arms.get("distillation, 10 steps", [])}
    same = {name: [row for row in rows if (row["seed"], row["order"]) in places] for name, rows in arms.items()}
    found = []
    for name, rows in same.items():
        needs = [text for start, text in NEEDS.items() if name.startswith(start)]
        if not rows or not needs or rows[0]["rate"] != 1:
            continue
        domains = [[(n, d, n in row["restored"]) for n, d in row["domains"].items()] for row in rows]
        others = [d["change"]["value"] for of_run in domains for _, d, restored in of_run if not restored]
        score = np.mean([d["healed"] for of_run in domains for _, d, _ in of_run])
        found.append({**summary(name, rows), "needs": needs[0], "score": score, "others": np.mean(others)})
    found.sort(key=lambda arm: -arm["recovered"])
    first = next(iter(arms.get("distillation, 10 steps", [])), None)
    if first is not None:
        scores = [d["final"] for row in same["distillation, 10 steps"] for d in row["domains"].values()]
        nothing = {"name": "nothing", "needs": "", "runs": len(places), "score": np.mean(scores), "others": 0.0}
        found.append({**nothing, **dict.fromkeys(("recovered", "low", "high", "worst", "worst_run"), 0.0)})
        found[-1] |= {"cost": dict.fromkeys(COSTS, 0.0), "sequences": 0.0}
    for arm in found:
        arm["front"] = not any(
            other["sequences"] <= arm["sequences"] and other["recovered"] > arm["recovered"] for other in found
        )
    return found


def _training_table(arms: list[dict[str, Any]]) -> str:
    header = ["arm", "runs", "recovered of all (%)", "lowest mean change", "worst of a run", "mean score",
              "domains that were not restored", "needs", "sampled", "forward", "backward", "seconds"]  # fmt: skip
    rows = [
        [
            f"**{arm['name']}**" if arm["front"] else arm["name"],
            str(arm["runs"]),
            _share(arm),
            f"{arm['worst']:+.2f}",
            f"{arm['worst_run']:+.1f}",
            f"{arm['score']:.1f}",
            f"{arm['others']:+.2f}",
            arm["needs"],
            *("" if arm["cost"][key] is None else f"{arm['cost'][key]:.0f}" for key in COSTS),
        ]
        for arm in arms
    ]
    return markdown_table(header, rows)


def _cost_figure(arms: list[dict[str, Any]]) -> Figure:
    """Recovered of all against cost, by the rows of the table; the line joins the arms that no cheaper one reaches."""
    figure = Figure(figsize=(9.6, 5), layout="constrained")
    axes = figure.subplots()
    for row, arm in enumerate(arms, 1):
        value = 100 * arm["recovered"]
        bars = np.abs(100 * np.array([arm["low"], arm["high"]]) - value)[:, None]
        color = "C1" if arm["front"] else "0.6"
        axes.errorbar(arm["sequences"], value, yerr=bars, marker="o", capsize=2, color=color, linestyle="")
        place = {"textcoords": "offset points", "fontsize": 7, "annotation_clip": True}
        axes.annotate(str(row), (arm["sequences"], value), (4, 3), **place)
        below = f" ({value:.0f}%, below)" if value < LOWEST else ""
        axes.plot([], [], linestyle="", label=f"{row}  {arm['name']}{below}")
    front = sorted((arm["sequences"], 100 * arm["recovered"]) for arm in arms if arm["front"])
    axes.step(*zip(*front, strict=True), where="post", color="C1", linewidth=1)
    axes.axhline(100, color="grey", linestyle=":")
    axes.set_xscale("symlog", linthresh=100)
    axes.set_xlim(-20, 2 * max(arm["sequences"] for arm in arms))
    axes.set_ylim(bottom=LOWEST)
    figure.legend(loc="outside right center", fontsize=7, handlelength=0, frameon=False)
    axes.set_xlabel("cost (passes of a sequence: sampled, forward, and backward twice)")
    axes.set_ylabel("recovered of all (%)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _beyond_interval(row: dict[str, Any]) -> float | None:
    """Recovered of the domains that lost more than the interval of their loss."""
    lost = [found for found in row["domains"].values() if found["damaged"]]
    if not lost:
        return None
    gained = sum(found["healed"] - found["final"] for found in lost)
    return gained / sum(found["peak"] - found["final"] for found in lost)


def _interval(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    return stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))


def _share(arm: dict[str, Any]) -> str:
    interval = f" [{100 * arm['low']:.1f}, {100 * arm['high']:.1f}]" if arm["runs"] > 1 else ""
    return f"{100 * arm['recovered']:.1f}{interval}"


def _table(arms) -> str:
    header = ["arm", "runs", "recovered of all (%)", "of what was lost beyond the interval (%)",
              "lowest mean change of a domain", "worst of a run", "passes"]  # fmt: skip
    rows = [
        [
            arm["name"],
            str(arm["runs"]),
            _share(arm),
            "" if arm["recovered_beyond_interval"] is None else f"{100 * arm['recovered_beyond_interval']:.1f}",
            f"{arm['worst']:+.2f}",
            f"{arm['worst_run']:+.1f}",
            f"{arm['sequences']:.0f}",
        ]
        for arm in arms
    ]
    return markdown_table(header, rows)


def _settings_figure(arms: list[dict[str, Any]], default: dict[str, Any]) -> Figure:
    """Recovered against rank, references and ridge, each beside the default in the same runs."""
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    for axes, key, usual in zip(
        figure.subplots(1, 3, sharey=True), ("rank", "references", "ridge"), (128, 64, 0.01), strict=True
    ):
        of_key = [arm for arm in arms if arm["name"].startswith(f"{key} ") and arm["runs"] == default["runs"]]
        found = {float(arm["name"].removeprefix(f"{key} ")): arm for arm in of_key} | {usual: default}
        places = sorted(found)
        values = np.array([[found[place][part] for part in ("recovered", "low", "high")] for place in places]) * 100
        axes.errorbar(places, values[:, 0], yerr=np.abs(values[:, 1:] - values[:, :1]).T, marker="o", capsize=2)
        axes.axhline(100, color="grey", linestyle=":")
        axes.set_xscale("log", base=10 if key == "ridge" else 2)
        if key != "ridge":
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel({"rank": "rank (128: full)", "references": "references of a domain"}.get(key, "ridge ρ"))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("recovered of all (%)")
    return figure
