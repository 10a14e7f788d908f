"""The page and the data of the repair study, from the files of its runs. `repair_study.py` calls it."""

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from trl_interfere.evaluation.bootstrap import bootstrap
from trl_interfere.lab.pipeline import LEARNING_RATE
from trl_interfere.repair.sweep import PROTECTIONS
from trl_interfere.reporting.repair_plots import plot_contraction, plot_cost, plot_runs, plot_sweep
from trl_interfere.run import read_json, write_atomically


COMMAND = "make repair-study"
WIDE: dict[str, Any] = {"budgets": (0.32,), "scopes": ("joint",), "draws": 2}
WIDE |= {"steps": (0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5), "protections": (0.75, 1.0, 1.5)}
STEPS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
FREE_STEPS = (0.5, 0.75, 1.0, 1.5, 2.0)  # at 32%, where the other domains do not count
MAX_DROP = 1.0  # points that another domain may lose on the selection split
UNRELATED = "writing"  # by its task; code gives math back, and qa costs it most
CURVE_STEPS = (0.5, 1.0, 1.5, 2.0, 3.0)
SCHEMA_VERSION = 2
REFRESH_BATCH = 128  # sequences of one step of the lab
FEWEST = 5  # runs that an interval over runs is given for: the bootstrap of fewer ends near the lowest and the highest
FITTED_STEPS = 5  # of the refresh, that the rate of the contraction is fitted to
ROW_PARTS = (
    "sweep",
    "wide",
    "unconstrained",
    "per_route",
    "curve",
    "route_steps",
    "rounds",
    "baselines",
    "joint",
    "refresh",
    "cost",
    "rehearsal",
)

Rows = list[dict[str, Any]]
WHOLE = 15  # five seeds in three orders


class Kept:
    """
    A run, with the parts that are not in its folder as the data of the page has them.

    Args:
        run (`Run`):
            The run.
        content (`dict`):
            The data of the page.
    """

    def __init__(self, run: Any, content: dict[str, Any]):
        self.run, self.seed, self.order, self.labels = run, run.seed, run.order, run.labels
        self.parts: dict[str, Rows] = {}
        for row in content["rows"]:
            if _place(row) == _place(self.labels):
                self.parts.setdefault(row["part"], []).append({key: row[key] for key in row if key != "part"})
        self.points = {_place(entry): entry["points"] for entry in content.get("lost", [])}

    def done(self, part: str) -> bool:
        return self.run.done(part) or part in self.parts

    def rows(self, part: str) -> Rows:
        return self.run.rows(part) if self.run.done(part) else self.parts.get(part, [])

    def kept(self, part: str) -> bool:
        return part in self.parts and not self.run.done(part)

    @property
    def lost(self) -> float:
        return self.points[_place(self.labels)] if self.kept("sweep") else self.run.lost


def _place(labels: dict[str, Any]) -> tuple[int, str]:
    return labels["seed"], labels["order"]


def write_page(runs: list, docs: Path, keep: bool = False) -> dict[str, Any]:
    """
    Write `repair.md`, `data/repair.json` and the figures, and print the acceptance figures.

    Args:
        runs (`list[Run]`):
            Runs of the study; those without any part are left out.
        docs (`pathlib.Path`):
            Folder of the documentation.
        keep (`bool`, *optional*, defaults to `False`):
            Whether rows of the data that is there are kept where a run lacks the part.

    Returns:
        `dict`: Means of the acceptance figures.

    Raises:
        `ValueError`: If no run has its comparison of criteria.
    """
    path = docs / "data" / "repair.json"
    if keep:
        content = read_json(path, SCHEMA_VERSION)
        runs = [Kept(run, content) for run in runs]
    done = [run for run in runs if run.done("sweep")]
    if not done:
        raise ValueError("repair study: expected at least one run with its part 'sweep', found none")
    parts = {part: [row for run in done if run.done(part) for row in run.rows(part)] for part in ROW_PARTS}
    data = [{"part": part, **row} for part, rows in parts.items() for row in rows]
    lost = {_place(run.labels): run.lost for run in done}
    content = {"schema_version": SCHEMA_VERSION, "command": COMMAND, "rows": data}
    content["lost"] = [{**run.labels, "points": run.lost} for run in done]
    write_atomically(path, json.dumps(content) + "\n")
    figures = docs / "figures" / "repair"
    figures.mkdir(parents=True, exist_ok=True)
    scopes = ("joint", "mlp", "attention")
    budgets = sorted((*parts["wide"], *parts["curve"]), key=lambda row: (scopes.index(row["scope"]), row["budget"]))
    # Points of one line are of the same runs.
    whole = {_place(row) for row in parts["curve"]} or {_place(row) for row in parts["sweep"]}
    shown = [row for row in (*parts["sweep"], *budgets) if _place(row) in whole]
    plot_sweep(shown, f"{COMMAND}: {len(whole)} of {len(done)} runs").savefig(figures / "sweep.png", dpi=130)
    plot_runs([*parts["sweep"], *parts["per_route"]], COMMAND).savefig(figures / "runs-sweep.png", dpi=130)
    if parts["wide"]:
        plot_runs(parts["wide"], COMMAND).savefig(figures / "runs-wide.png", dpi=130)
    further = {name: sum(run.done(name) for run in done) for name in ROW_PARTS if name != "sweep"}
    if parts["cost"] and parts["refresh"]:
        plot_cost(_cost_rows(parts), COMMAND).savefig(figures / "cost.png", dpi=130)
    curves = _contractions(parts["refresh"])
    if curves:
        plot_contraction(curves, COMMAND).savefig(figures / "contraction.png", dpi=130)
    table, means = _acceptance(parts)
    print(table)
    lines = [
        "# The repair study",
        "",
        f"`{COMMAND}` runs the lab with {_listed({run.seed for run in done})} as seeds, in the orders "
        f"{_listed(dict.fromkeys(','.join(run.order) for run in done))}: {len(done)} of the {WHOLE} runs that the "
        "whole study is made of. It repairs math, which the stages after its own have damaged, writes this page, "
        "and keeps every figure as a row of [data/repair.json](data/repair.json). The criteria are compared in all of "
        f"these runs; what takes longer is done in fewer, and says in how many ({_counts(further)}; "
        f"{_further_text(done)}). The same seed on "
        "another kind of processor rounds otherwise and trains to other weights: these figures repeat on one kind, "
        "and their spread over seeds is what another one would show." + _kept_text(done, keep),
        "",
        "The orders are ones that end with a loss of math. In the order writing, math, qa, code the last stage gives "
        "most of it back (`python benchmarks/repair_study.py --seeds 3 --orders writing,math,qa,code --parts train`): "
        "a related domain is a refresh, and shares of the little that is left would be noise.",
        "",
        "Routes, steps and settings are chosen on the selection split (256 prompts of each domain), and figures "
        "are those of "
        "the test split (512). *Recovered* and *collateral* are defined on the page on [repair](science/repair.md). "
        "Every criterion, and every control, has its own best step: the one that recovers most on the selection split "
        "while no other domain loses more than one point there, or, where no step keeps to that, the one with the "
        "best mean score of all domains: *over the limit* says in how many runs. Where a figure is a mean over runs, "
        f"its interval is a 95% bootstrap interval over the runs (none with fewer than {FEWEST}), and the lowest and "
        "the highest run stand beside it. The intervals over prompts "
        "of each run are in the data, and those of the main comparison under [Each run](#each-run).",
        "",
        _seeds_text(parts["sweep"]),
        "",
        "## Targets",
        "",
        table,
        "",
        "## 2% of the MLP routes",
        "",
        _criteria_table(parts["sweep"], lost),
        "",
        "*Pooled* is the recovered share of all points that were lost in all runs: runs that have lost little, whose "
        "own shares are mostly noise, count little in it.",
        "",
        "`_protected` subtracts from the score of a route what the later domains owe it, with a weight that is "
        "chosen with "
        f"the step: {len(STEPS) * len(PROTECTIONS)} candidates where the others have {len(STEPS)}. Random controls "
        "are means over three draws, at other budgets over two; with steps of single routes it is one.",
        "",
        "![Recovered share against budget and collateral](figures/repair/sweep.png)",
        "",
        "## Each run",
        "",
        _runs_table([*parts["sweep"], *parts["per_route"]], lost),
        "",
        "![Recovered share and collateral of each run](figures/repair/runs-sweep.png)",
        "",
        "Which criterion is best depends on the order. Recovered at 2% of the MLP routes, each at its own best step:",
        "",
        _orders_table([*parts["sweep"], *parts["per_route"]]),
        "",
        "## What limits it",
        "",
        "The routes that carry the damage of math carry what the later domains have learnt as well. Steps that are "
        "chosen by math alone, whatever the other domains lose:",
        "",
        _summary(parts["unconstrained"], lost),
        "",
        "The column of the worst change is the lowest of three noisy figures: a repair that changes nothing but the "
        "dice of the sampled completions has a negative one too. The rows of random routes, which are means over "
        "draws, show the least of it. "
        f"The steps that are tried end at {STEPS[-1]:g}, at 32% of both at {max(FREE_STEPS):g}; where the best one "
        "is this, a larger one might do more.",
        "",
        "## Other budgets and scopes",
        "",
        f"Steps are from {CURVE_STEPS[0]:g} to {CURVE_STEPS[-1]:g} here, at 32% of both from {min(WIDE['steps']):g} "
        f"to {max(WIDE['steps']):g}. The figure under "
        "[2% of the MLP routes](#2-of-the-mlp-routes) has the runs in which all budgets were measured.",
        "",
        _summary([row for row in budgets if row["step_rule"] == "best"], lost),
        "",
        "At 32% of MLP and attention together with the step 1:",
        "",
        _summary([row for row in budgets if row["step_rule"] == "fixed"], lost),
        "",
        "![Recovered share and collateral of each run, 32% of both](figures/repair/runs-wide.png)"
        if parts["wide"]
        else "",
        "",
        "## Steps of single routes, and rounds",
        "",
        "`per_route_exact` minimises the loss of math and, with a weight, of the other domains in the steps of the "
        "chosen routes, on half of the selection split; weight and scale of the steps are chosen as any step is, on "
        "all of it. 31 numbers are fitted, whatever the routes: the same is done for every control. `per_route` "
        "solves the quadratic model instead; `rounds` attributes the damage anew after each quarter of the budget, "
        "*protected* with what the later domains owe the routes.",
        "",
        _summary([*parts["per_route"], *parts["route_steps"], *parts["rounds"]], lost),
        "",
        "## Baselines",
        "",
        "Interpolation of all weights toward the checkpoint after math (WiSE-FT), task arithmetic and TIES "
        "between the "
        "checkpoints of all stages and the base model, each with its best setting on the selection split (the column "
        "α). Rehearsal trains the later stages again, with 20% of their prompts from math.",
        "",
        _summary([*parts["baselines"], *parts["rehearsal"]]),
        "",
        "## All earlier domains at once",
        "",
        "One set of routes for all earlier domains that were damaged; each route goes back to the checkpoint of "
        "the domain "
        "that it harms most. Recovered is the share of all points that these domains have lost together. "
        "The step may "
        "cost no domain more than a point on the selection split, those that are repaired among them.",
        "",
        _joint_table(parts["joint"]),
        "",
        "## Refresh",
        "",
        _refresh_table(parts["refresh"]),
        "",
        *_saved(parts["refresh"]),
        "",
        "## At equal gradient passes",
        "",
        "The cost is the number of sequences that went through a backward pass: references times quadrature nodes for "
        f"a rollback, {REFRESH_BATCH} completions for a refresh step. Completions that a refresh samples, and forward "
        "passes of the "
        "search for the step, are not counted. Orders differ in the number of later domains, whose references count "
        "too; in the figure they stand at their mean.",
        "",
        _cost_table(parts["cost"]),
        "",
        "![Recovered share against sequences](figures/repair/cost.png)" if parts["cost"] else "",
        "",
        "## Contraction in the conflict subspace",
        "",
        *_contraction_text(curves),
        "",
    ]
    write_atomically(docs / "repair.md", "\n".join(_wrapped(lines)) + "\n")
    return means


def _kept_text(runs: list, keep: bool) -> str:
    new = sum(not run.kept("sweep") for run in runs) if keep else len(runs)
    if new in (0, len(runs)):
        return ""
    return (
        f" This page puts together what two machines have measured (`--keep`): {new} of the runs were trained again "
        "for what takes longer, and what these had measured before was measured anew or is kept."
    )


def _acceptance(parts: dict[str, Rows]) -> tuple[str, dict[str, Any]]:
    main = parts["sweep"]
    damage = {name: _values(main, name, "best") for name in ("damage", "damage_protected")}
    best = _chosen(main, damage)
    conflict = {rule: _values(main, "route_conflict", rule) for rule in ("fixed", "best")}
    fixed, matched = _values(main, "damage", "fixed"), _values(main, "random_matched", "best")
    worst = _values(main, best, "best", "worst")
    joint, joint_best = _joint_shares(parts["wide"])
    free, free_best = _joint_shares([row for row in parts["unconstrained"] if row["scope"] == "joint"])
    solved = {
        name: [row for row in parts["per_route"] if row["criterion"] == f"{name}_per_route_exact"]
        for name in ("damage_protected", "route_conflict", "random_matched")
    }
    shares = {
        name: [row["recovered"] for row in rows if row["recovered"] is not None] for name, rows in solved.items()
    }
    ratio = _ratio(damage[best], conflict["best"])
    fixed_ratio = _ratio(fixed, conflict["fixed"])
    plain_ratio = _ratio(damage["damage"], conflict["best"])
    over = {
        name: _over([row for row in parts["wide"] if row["criterion"] == name and row["step_rule"] == "best"])
        for name in damage
    }
    plain = [
        (
            "2% MLP, `damage` without protection at its best step: recovered",
            "at least 60%",
            _cell(damage["damage"]),
            _mean(damage["damage"]) >= 0.6,
        ),
        (
            "the same over `route_conflict` at its best step",
            "at least 1.5",
            _ratio_cell(damage["damage"], conflict["best"]),
            plain_ratio >= 1.5,
        ),
    ]
    rows = [
        (
            f"2% MLP, `{best}` at its best step: recovered",
            "at least 60%",
            _cell(damage[best])
            + _over([row for row in main if row["criterion"] == best and row["step_rule"] == "best"]),
            _mean(damage[best]) >= 0.6,
        ),
        (
            "the same over `route_conflict` at its best step",
            "at least 1.5",
            _ratio_cell(damage[best], conflict["best"]),
            ratio >= 1.5,
        ),
        *(plain if best != "damage" else []),
        ("`random_matched` at its best step: recovered", "at most 10%", _cell(matched), _mean(matched) <= 0.1),
        _change_row(f"`{best}`", [row for row in main if row["criterion"] == best and row["step_rule"] == "best"]),
        (
            "step 1, `damage` over `route_conflict`",
            "at least 2",
            _ratio_cell(fixed, conflict["fixed"]),
            fixed_ratio >= 2,
        ),
        (
            f"32% of MLP and attention, `{joint_best}` at its best step: recovered",
            "at least 95%",
            _cell(joint) + over[joint_best],
            _mean(joint) >= 0.95,
        ),
        (
            f"32% of both, `{free_best}`, with the step that math alone would take",
            "at least 95%",
            _cell(free),
            _mean(free) >= 0.95,
        ),
    ]
    if shares["damage_protected"]:
        solved_ratio = _ratio(shares["damage_protected"], shares["route_conflict"])
        rows += [
            (
                "2% MLP, `damage_protected`, a step for each route: recovered",
                "at least 60%",
                _cell(shares["damage_protected"]) + _over(solved["damage_protected"]),
                _mean(shares["damage_protected"]) >= 0.6,
            ),
            (
                "the same over `route_conflict` with such steps",
                "at least 1.5",
                _ratio_cell(shares["damage_protected"], shares["route_conflict"]),
                solved_ratio >= 1.5,
            ),
            (
                "`random_matched` with such steps",
                "at most 10%",
                _cell(shares["random_matched"]),
                _mean(shares["random_matched"]) <= 0.1,
            ),
            _change_row("`damage_protected` with such steps", solved["damage_protected"]),
        ]
    lines = [
        "| figure | target | found (mean, 95% interval over runs; lowest to highest) | met |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {name} | {target} | {found} | {'yes' if met else 'no'} |" for name, target, found, met in rows]
    means = {
        "runs": len({(row["seed"], row["order"]) for row in main}),
        "criterion": best,
        "recovered": _mean(damage[best]),
        "over_route_conflict": ratio,
        "random_matched": _mean(matched),
        "worst": _mean(worst),
        "over_route_conflict_at_step_1": fixed_ratio,
        "per_route": _mean(shares["damage_protected"]),
        "per_route_over_route_conflict": _ratio(shares["damage_protected"], shares["route_conflict"]),
        "per_route_random_matched": _mean(shares["random_matched"]),
        "joint_32": _mean(joint),
        "joint_32_by_math_alone": _mean(free),
    }
    return "\n".join(lines), {name: value if not _is_nan(value) else None for name, value in means.items()}


def _change_row(label: str, rows: Rows) -> tuple[str, str, str, bool]:
    """Mean change of each other domain, the runs in which one of them loses more than a point, and the lowest."""
    changes = {name: [row["collateral"][name] for row in rows] for name in rows[0]["collateral"]}
    found = []
    for name, values in changes.items():
        interval = bootstrap(np.mean, np.array(values))
        bounds = f" [{interval.low:+.2f}, {interval.high:+.2f}]" if len(values) >= FEWEST else ""
        found.append(f"{name} {interval.value:+.2f}{bounds}")
    below = sum(min(row["collateral"].values()) < -MAX_DROP for row in rows)
    lowest = min(min(values) for values in changes.values())
    met = min(_mean(values) for values in changes.values()) >= -MAX_DROP
    return (
        f"{label}: change of each other domain, mean over runs",
        f"at least {-MAX_DROP:g} point",
        f"{', '.join(found)}; one of them lower in {below} of {len(rows)} runs, lowest of all {lowest:+.2f}",
        met,
    )


def _over(rows: Rows) -> str:
    """In how many runs the taken step costs another domain more than it may on the selection split."""
    over = sum(row["step_rule"] == "best" and not row.get("within_max_drop", True) for row in rows)
    return f"; over the limit in {over} of {len(rows)}" if over else ""


def _seeds_text(rows: Rows) -> str:
    """How wide an interval over seeds is, whose runs have stages in common."""
    best = [row for row in rows if row["criterion"] == "damage_protected" and row["step_rule"] == "best"]
    shares: dict[int, list[float]] = {}
    for row in best:
        if row["recovered"] is not None:
            shares.setdefault(row["seed"], []).append(100 * row["recovered"])
    means = np.array([_mean(values) for values in shares.values()])
    text = "Runs of one seed are not independent: orders that begin alike share the stages that they begin with."
    if len(means) < FEWEST:
        return text
    interval = bootstrap(np.mean, means)
    return (
        f"{text} Over seeds instead of runs, with the orders as given, `damage_protected` at 2% of the MLP routes "
        f"recovers {interval.value:.1f}% [{interval.low:.1f}, {interval.high:.1f}]."
    )


def _joint_shares(rows: Rows) -> tuple[list[float], str]:
    """Recovered shares by the better of both kinds of `damage`, and its name."""
    name = _chosen(rows, ("damage", "damage_protected"))
    return _values(rows, name, "best"), name


def _chosen(rows: Rows, names: Any) -> str:
    """The criterion that repairs most on the selection split: the test split chooses nothing."""

    def repaired(name: str) -> float:
        same = [row for row in rows if row["criterion"] == name and row["step_rule"] == "best"]
        found = [row["selection"]["math"] for row in same]
        return _mean(found) if found else -np.inf

    return max(names, key=repaired)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not np.isfinite(value)


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _ratio(first: list[float], second: list[float]) -> float:
    return _mean(first) / _mean(second) if second and _mean(second) > 0 else float("nan")


def _ratio_cell(first: list[float], second: list[float]) -> str:
    """Ratio of two means over the same runs."""
    if len(first) < FEWEST or len(first) != len(second) or min(second) <= 0:
        return f"{_ratio(first, second):.2f}"

    def ratio(first, second, axis):
        return first.mean(axis=axis) / second.mean(axis=axis)

    interval = bootstrap(ratio, np.array(first), np.array(second))
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _values(rows: Rows, criterion: str, rule: str, field: str = "recovered") -> list[float]:
    found = [row[field] for row in rows if row["criterion"] == criterion and row["step_rule"] == rule]
    return [value for value in found if value is not None]


def _cell(values: list[float], factor: float = 100, unit: str = "%", sign: str = "") -> str:
    if not values:
        return "not measured"
    scaled = factor * np.array(values)
    if len(values) == 1:
        return f"{scaled[0]:{sign}.1f}{unit}"
    interval = bootstrap(np.mean, scaled)
    bounds = f" [{interval.low:{sign}.1f}, {interval.high:{sign}.1f}]" if len(values) >= FEWEST else ""
    return f"{interval.value:{sign}.1f}{unit}{bounds}; {scaled.min():{sign}.1f} to {scaled.max():{sign}.1f}"


def _pooled(rows: Rows, lost: dict[tuple, float]) -> str:
    """The recovered share of the points that were lost in all runs together."""
    known = [row for row in rows if row["recovered"] is not None]
    if not known:
        return "not measured"
    points = np.array([lost[row["seed"], row["order"]] for row in known])
    shares = 100 * np.array([row["recovered"] for row in known])
    if len(known) == 1:
        return f"{shares[0]:.1f}%"

    def share(back, whole, axis):
        return back.sum(axis=axis) / whole.sum(axis=axis)

    interval = bootstrap(share, shares * points, points)
    bounds = f" [{interval.low:.1f}, {interval.high:.1f}]" if len(known) >= FEWEST else ""
    return f"{interval.value:.1f}%{bounds}"


def _criteria_table(rows: Rows, lost: dict[tuple, float]) -> str:
    lines = [
        "| criterion | step 1: recovered | worst other | own best step: recovered | pooled | worst other | steps |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(row["criterion"] for row in rows):
        cells = []
        for rule in ("fixed", "best"):
            cells.append(_cell(_values(rows, name, rule)))
            if rule == "best":
                cells.append(
                    _pooled([row for row in rows if (row["criterion"], row["step_rule"]) == (name, rule)], lost)
                )
            cells.append(_cell(_values(rows, name, rule, "worst"), 1, "", "+"))
        steps = sorted(_values(rows, name, "best", "step"))
        best = [row for row in rows if (row["criterion"], row["step_rule"]) == (name, "best")]
        cells.append(f"{np.median(steps):g} ({steps[0]:g} to {steps[-1]:g}){_over(best)}" if steps else "")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _runs_table(rows: Rows, lost: dict[tuple, float]) -> str:
    names = ("damage", "damage_protected", "route_conflict", "random_matched", "damage_protected_per_route_exact")
    lines = [
        "| seed | order | lost, points | " + " | ".join(f"`{name}`" for name in names) + " |",
        "| ---: | --- | ---: |" + " --- |" * len(names),
    ]
    best = {(row["seed"], row["order"], row["criterion"]): row for row in rows if row["step_rule"] == "best"}
    for seed, order in dict.fromkeys((row["seed"], row["order"]) for row in rows):
        cells = []
        for name in names:
            row = best.get((seed, order, name))
            if row is None:
                cells.append("not measured")
                continue
            share = "nothing lost"
            if row["recovered"] is not None:
                share = f"{100 * row['recovered']:.1f}% [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
            step = "" if row["step"] is None else f"α {row['step']:g}, "
            cells.append(f"{share}, {step}worst {row['worst']:+.2f}")
        lines.append(f"| {seed} | {order} | {lost[seed, order]:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _orders_table(rows: Rows) -> str:
    best = [row for row in rows if row["step_rule"] == "best"]
    orders = list(dict.fromkeys(row["order"] for row in best))
    lines = ["| criterion | " + " | ".join(orders) + " |", "| --- |" + " --- |" * len(orders)]
    for name in dict.fromkeys(row["criterion"] for row in best):
        cells = [_cell(_values([row for row in best if row["order"] == order], name, "best")) for order in orders]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _summary(rows: Rows, lost: dict[tuple, float] | None = None) -> str:
    if not rows:
        return "Not measured yet."
    pooled = "" if lost is None else " pooled |"
    lines = [
        f"| method | scope | budget | α | recovered |{pooled} worst other | runs |",
        f"| --- | --- | ---: | --- | --- |{pooled and ' --- |'} --- | ---: |",
    ]
    groups: dict[tuple, Rows] = {}
    for row in rows:
        groups.setdefault((row["criterion"], row["scope"], row["budget"]), []).append(row)
    for (criterion, scope, budget), same in groups.items():
        steps = [row["step"] for row in same if row["step"] is not None]
        step = f"{np.median(steps):g}" if steps else "by route"
        shares = [row["recovered"] for row in same if row["recovered"] is not None]
        worst = [row["worst"] for row in same if row["worst"] is not None]
        runs = str(len(same)) if len(shares) in (0, len(same)) else f"{len(shares)} of {len(same)}"
        lines.append(
            f"| `{criterion}` | {scope} | {100 * budget:g}% | {step}{_over(same)} | {_cell(shares)} |"
            f"{'' if lost is None else f' {_pooled(same, lost)} |'} {_cell(worst, 1, '', '+')} | {runs} |"
        )
    return "\n".join(lines)


def _joint_table(rows: Rows) -> str:
    if not rows:
        return "Not measured yet."
    lines = [
        "| criterion | weights | budget | recovered of all | change of each, points | worst other | change of the "
        "mean score | runs |",
        "| --- | --- | ---: | --- | --- | --- | --- | ---: |",
    ]
    groups: dict[tuple, Rows] = {}
    for row in rows:
        groups.setdefault((row["criterion"], row["weights"], row["budget"]), []).append(row)
    for (criterion, weights, budget), same in groups.items():
        changes: dict[str, list[float]] = {}
        for row in same:
            for name, change in row["own_changes"].items():
                changes.setdefault(name, []).append(change["value"])
        by_domain = ", ".join(f"{name} {_mean(found):+.1f} (n={len(found)})" for name, found in changes.items())
        shares = [row["recovered"] for row in same if row["recovered"] is not None]
        worst = [row["worst"] for row in same if row["worst"] is not None]
        mean = [row["mean_score"] for row in same]
        lines.append(
            f"| `{criterion}` | {weights} | {100 * budget:g}% | {_cell(shares)}{_over(same)} | {by_domain} "
            f"| {_cell(worst, 1, '', '+')} | {_cell(mean, 1, '', '+')} | {len(same)} |"
        )
    return "\n".join(lines)


def _refresh_table(rows: Rows) -> str:
    if not rows:
        return "Not measured yet."
    labels = {
        "refresh": "refresh of math",
        "refresh_after_rollback": "the same after the rollback of 2%",
        "refresh_unrelated": f"refresh of {UNRELATED}",
    }
    lines = [
        "| steps | " + " | ".join(f"{title}: recovered | worst other" for title in labels.values()) + " |",
        "| ---: |" + " --- |" * (2 * len(labels)),
    ]
    for step in sorted({row["step"] for row in rows}):
        cells = []
        for label in labels:
            same = [row for row in rows if (row["criterion"], row["step"]) == (label, step)]
            shares, worst = (
                [row[field] for row in same if row[field] is not None] for field in ("recovered", "worst")
            )
            cells += [_cell(shares), _cell(worst, 1, "", "+")]
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _saved(rows: Rows) -> list[str]:
    """Refresh steps that a rollback before it saves: steps of the plain refresh to the same recovery."""
    saved: dict[int, list[tuple[float, bool]]] = {}
    for place in dict.fromkeys((row["seed"], row["order"]) for row in rows):
        curves = {
            label: [
                (row["step"], row["recovered"])
                for row in rows
                if (row["seed"], row["order"]) == place and row["criterion"] == label and row["recovered"] is not None
            ]
            for label in ("refresh", "refresh_after_rollback")
        }
        if not all(curves.values()):
            continue
        steps, plain = (np.array(values, dtype=float) for values in zip(*curves["refresh"], strict=True))
        best = np.maximum.accumulate(plain)
        for step, value in curves["refresh_after_rollback"]:
            if step == steps[-1]:  # the plain refresh ends there: it could not be seen to save any
                continue
            beyond = value > best[-1]
            reached = len(steps) - 1 if beyond else int(np.argmax(best >= value))
            at = steps[reached]
            if not beyond and reached and best[reached] > best[reached - 1]:
                part = (value - best[reached - 1]) / (best[reached] - best[reached - 1])
                at = steps[reached - 1] + part * (steps[reached] - steps[reached - 1])
            saved.setdefault(int(step), []).append((float(at - step), bool(beyond)))
    if not saved:
        return []
    text = "; ".join(
        f"after {step} {'step' if step == 1 else 'steps'} {_median_text(found)}"
        for step, found in sorted(saved.items())
    )
    return [
        "Steps that the rollback saves, counted as the steps of the plain refresh to the same recovery, less "
        f"its own, as medians over runs (of an even number the lower one): {text}. Where the plain refresh reaches "
        "that recovery at no step, its last one counts, and the true figure is higher; a median that is one of these "
        "is a lower bound (≥)."
    ]


def _median_text(found: list[tuple[float, bool]]) -> str:
    values = sorted(found)
    # Of an even number the lower one of the two in the middle: it is one of the runs, or a bound.
    value, beyond = values[(len(values) - 1) // 2]
    bounds = sum(entry[1] for entry in found)
    return f"{'≥ ' if beyond else ''}{value:+.1f} (n={len(found)}{f', bounds: {bounds}' if bounds else ''})"


def _cost_rows(parts: dict[str, Rows]) -> Rows:
    found = []
    for row in parts["cost"]:
        method = f"rollback, {100 * row['budget']:g}% of {row['scope']}"
        # Orders have other numbers of later domains: the same references are one point of the line.
        same = [other["sequences"] for other in parts["cost"] if other["references"] == row["references"]]
        found.append(
            {"method": method, **{name: row[name] for name in ("recovered", "worst")}, "sequences": _mean(same)}
        )
    for row in parts["refresh"]:
        if row["criterion"] != "refresh_after_rollback":
            method = {"refresh": "refresh", "refresh_unrelated": f"refresh of {UNRELATED}"}[row["criterion"]]
            found.append(
                {
                    "method": method,
                    "recovered": row["recovered"],
                    "worst": row["worst"],
                    "sequences": REFRESH_BATCH * row["step"],
                }
            )
    return found


def _cost_table(rows: Rows) -> str:
    if not rows:
        return "Not measured yet."
    lines = [
        "| references | nodes | sequences | 2% of MLP: recovered | worst other | 32% of both: recovered | worst "
        "other |",
        "| ---: | ---: | --- | --- | --- | --- | --- |",
    ]
    for references, nodes in dict.fromkeys((row["references"], row["nodes"]) for row in rows):
        same = [row for row in rows if (row["references"], row["nodes"]) == (references, nodes)]
        sequences = sorted({row["sequences"] for row in same})
        cells = []
        for scope in ("mlp", "joint"):
            shares = [row["recovered"] for row in same if row["scope"] == scope and row["recovered"] is not None]
            worst = [row["worst"] for row in same if row["scope"] == scope and row["worst"] is not None]
            over = _over([row for row in same if row["scope"] == scope])
            cells += [_cell(shares), _cell(worst, 1, "", "+") + over]
        lines.append(f"| {references} | {nodes} | {_listed(sequences)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _contractions(rows: Rows) -> Rows:
    curves = []
    for row in rows:
        if "distances" not in row:
            continue
        table = sorted((int(step), *pair) for step, pair in row["distances"].items())
        steps, inside, outside = (np.array(column, dtype=float) for column in zip(*table, strict=True))
        fitted = (steps >= 1) & (steps <= FITTED_STEPS)
        ratio = np.log(inside[fitted] / inside[0])
        rate = float(np.exp((steps[fitted] @ ratio) / (steps[fitted] @ steps[fitted])))
        above = steps[(inside > rate**steps * inside[0] * 1.001) & (steps > 0)]
        later = steps > 0
        curves.append(
            {
                "label": row["criterion"],
                "steps": steps.tolist(),
                "inside": inside.tolist(),
                "outside": outside.tolist(),
                "rate": rate,
                "bound": float(np.max((inside[later] / inside[0]) ** (1 / steps[later]))),
                "fails": len(above) / max(1, len(steps) - 1),
                "first": int(above[0]) if len(above) else None,
                "shares": row["spectrum"]["shares"],
                "positive": sum(value > 0 for value in row["spectrum"]["eigenvalues"]),
                "size": len(row["spectrum"]["eigenvalues"]),
            }
        )
    return curves


def _contraction_text(curves: Rows) -> list[str]:
    if not curves:
        return ["Not measured yet."]
    lines = [
        "S is spanned by the leading eigenvectors of the damage operator on route space, at the checkpoint "
        "after math. The "
        "coordinate of a route is 1 where the update stands in full and 0 where it is undone. The rate 1 - αμ "
        "is fitted to "
        f"the first {FITTED_STEPS} steps (least squares of the logarithm, through 1 at step 0), so that some of these "
        "lie above it; the bound of Theorem 1 with this rate fails at the other steps at which the distance in S is "
        "above it. The rate that bounds every step is the largest t-th root of the distance after t steps: with 1 or "
        "more there is no μ above 0 for which the theorem holds. The refresh is Adam on a policy-gradient loss and "
        f"not gradient descent on the token loss: μ is αμ over the learning rate α = {LEARNING_RATE:g}, an effective "
        "figure.",
        "",
        "| refresh | 1 - αμ, fitted | μ of it | rate that bounds every step | in S after the last step | outside S | "
        "steps at which the fitted bound fails | the first of them | positive eigenvalues | runs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | ---: |",
    ]
    for name in dict.fromkeys(curve["label"] for curve in curves):
        same = [curve for curve in curves if curve["label"] == name]
        ends = {key: [curve[key][-1] / curve[key][0] for curve in same] for key in ("inside", "outside")}
        rates, bounds = [curve["rate"] for curve in same], [curve["bound"] for curve in same]
        first = [curve["first"] for curve in same if curve["first"] is not None]
        lines.append(
            f"| `{name}` | {_mean(rates):.4f} ({min(rates):.4f} to {max(rates):.4f}) "
            f"| {_mean([(1 - rate) / LEARNING_RATE for rate in rates]):.3g} "
            f"| {_mean(bounds):.4f} ({min(bounds):.4f} to {max(bounds):.4f}) | {_cell(ends['inside'])} "
            f"| {_cell(ends['outside'])} | {100 * _mean([curve['fails'] for curve in same]):.0f}% "
            f"| {min(first) if first else 'none'} "
            f"| {_mean([curve['positive'] for curve in same]):.1f} of {same[0]['size']} | {len(same)} |"
        )
    shares = [100 * sum(curve["shares"]) for curve in curves if curve["shares"]]
    lines += [
        "",
        f"These directions carry {_mean(shares):.0f}% of the second-order damage by routes (mean over runs)."
        if shares
        else "",
        "",
        "Thin lines are runs, thick ones their mean:",
        "",
        "![Contraction](figures/repair/contraction.png)",
    ]
    return lines


def _counts(further: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} in {count}" for name, count in further.items())


def _further_text(runs: list) -> str:
    text = "the command goes on to seed 0 in each order, `--further-seeds` to more"
    seeds = [
        seed
        for seed in sorted({run.seed for run in runs})
        if all(run.done(part) for run in runs if run.seed == seed for part in ROW_PARTS)
    ]
    if not seeds or seeds == [0]:
        return text
    return f'{text}: here `{COMMAND} ARGS="--further-seeds {" ".join(map(str, seeds))}"`'


def _listed(values: Any) -> str:
    return ", ".join(str(value) for value in sorted(values)) if not isinstance(values, dict) else "; ".join(values)


def _wrapped(lines: list[str]) -> list[str]:
    """Paragraphs at the width of the other pages; tables and figures as they are."""
    result = []
    for line in lines:
        plain = line and line[0] not in "|#!" and "\n" not in line
        result += textwrap.wrap(line, 125, break_long_words=False, break_on_hyphens=False) if plain else [line]
    return result
