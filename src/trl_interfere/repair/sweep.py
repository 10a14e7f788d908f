"""Recovery against budget: every criterion and control, each at its own best step."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.report import InterferenceReport
from ..run import read_json, write_atomically
from .bench import RepairBench
from .criteria import CRITERIA, IN_NATS
from .rollback import STEPS, RouteRollback


SCHEMA_VERSION = 1
CONTROLS = ("random", "random_matched")
PROTECTIONS = (0.5, 0.75, 1.0, 1.5)
PROTECTED = tuple(f"{criterion}_protected" for criterion in IN_NATS)


@dataclass
class Sweep:
    """
    Rows of a sweep.

    Args:
        rows (`list[dict]`):
            For each repair `seed`, `order`, `criterion`, `scope`, `budget`, `step_rule` (`"fixed"` or `"best"`),
            `step`, `protection` and the fields of [`RepairBench.figures`], among them `recovered`, `low`, `high`,
            `collateral` and `split`. Where a step was chosen, `within_max_drop` says whether one kept to the limit.
        settings (`dict`, *optional*):
            What the rows were measured on and with: rows of another sweep are not continued.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] | None = None

    def save(self, path: str | Path) -> None:
        """Write the rows as JSON."""
        content = {"schema_version": SCHEMA_VERSION, "settings": self.settings, "rows": self.rows}
        write_atomically(Path(path), json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Sweep":
        """Read rows that [`~Sweep.save`] wrote."""
        content = read_json(Path(path), SCHEMA_VERSION)
        if not isinstance(content.get("rows"), list):
            raise ValueError(f"{path}: expected a list of rows, found {type(content.get('rows')).__name__}")
        return cls(content["rows"], content.get("settings"))

    def pareto(self) -> list[dict[str, Any]]:
        """
        Rows that no other row beats: nothing recovers more and costs the worst-hit other domain less.

        Returns:
            `list[dict]`: The front, highest recovery first.
        """
        return pareto(self.rows)

    def to_table(self) -> str:
        """
        The rows as a Markdown table. Those on the [`pareto`] front are marked.

        Rows of several runs (`seed`, `order`) are averaged, with the lowest and the highest of them in brackets; a
        single row has its 95% interval there.
        """
        groups = list(by_repair(self.rows).values())
        means = [averaged(rows) for rows in groups]
        front = [id(row) for row in pareto(means)]
        lines = [
            "| criterion | scope | budget | α | recovered | worst change of another domain | runs | draws | front |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        for rows, mean in zip(groups, means, strict=True):
            row = rows[0]
            share = "nothing was lost"
            if mean["recovered"] is not None:
                share = f"{100 * mean['recovered']:.1f}%"
                if mean["low"] is not None:
                    share += f" [{100 * mean['low']:.1f}, {100 * mean['high']:.1f}]"
            worst = "none" if mean["worst"] is None else f"{mean['worst']:+.2f}"
            rule = "fixed" if row["step_rule"] == "fixed" else "best"
            over = sum(not entry.get("within_max_drop", True) for entry in rows)
            if over:
                # No step keeps to the limit: it is the one with the best mean of all domains.
                rule += ", over max_drop" + (f" in {over} of {len(rows)}" if len(rows) > 1 else "")
            protections = sorted({entry["protection"] for entry in rows})
            protection = f", protection {_listed(protections)}" if any(protections) else ""
            steps = ["by route" if entry["step"] is None else entry["step"] for entry in rows]
            budget = f"{100 * row['budget']:g}%"
            if any(entry["routes"] < entry.get("asked", 0) for entry in rows):
                found = sum(entry["routes"] for entry in rows) / sum(entry["asked"] for entry in rows)
                budget += f", {100 * found:.0f}% of it found"
            mark = "Pareto" if id(mean) in front else ""
            # The means are of the runs in which something was lost.
            known = sum(entry["recovered"] is not None for entry in rows)
            runs = str(len(rows)) if known in (0, len(rows)) else f"{known} of {len(rows)}"
            lines.append(
                f"| {row['criterion']}{protection} | {row['scope']} | {budget} | {_listed(steps)} ({rule}) "
                f"| {share} | {worst} | {runs} | {row['draws']} | {mark} |"
            )
        return "\n".join(lines) + "\n"


def _listed(values: list[Any]) -> str:
    return ", ".join(dict.fromkeys(value if isinstance(value, str) else f"{value:g}" for value in values))


def by_repair(rows: list[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    """
    Rows of several runs, those of the same repair together.

    Args:
        rows (`list[dict]`):
            Rows of sweeps.

    Returns:
        `dict[tuple, list[dict]]`: Rows by `criterion`, `scope`, `budget` and `step_rule`.
    """
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in ("criterion", "scope", "budget", "step_rule")), []).append(row)
    return groups


def averaged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Mean of what one repair recovered in several runs, and of what it cost.

    Args:
        rows (`list[dict]`):
            Its rows, one for each run.

    Returns:
        `dict`: `recovered` and `worst`, means over the runs in which something was lost, `None` without one, and `low`
        and `high`: the lowest and highest run, or the 95% interval of a single one.
    """
    known = [row for row in rows if row["recovered"] is not None]
    worst = [row["worst"] for row in known or rows if row["worst"] is not None]
    found = {"recovered": None, "low": None, "high": None, "worst": float(np.mean(worst)) if worst else None}
    if not known:
        return found
    shares = [row["recovered"] for row in known]
    ends = (min(shares), max(shares)) if len(known) > 1 else (known[0]["low"], known[0]["high"])
    return {**found, "recovered": float(np.mean(shares)), "low": ends[0], "high": ends[1]}


def pareto(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Rows that no other row beats in `recovered` and in `worst`.

    Args:
        rows (`list[dict]`):
            Rows of a sweep.

    Returns:
        `list[dict]`: The front, highest recovery first.
    """
    known = [row for row in rows if row["recovered"] is not None and row["worst"] is not None]
    front: list[dict[str, Any]] = []
    for row in sorted(known, key=lambda row: (-row["recovered"], -row["worst"])):
        if not front or row["worst"] > front[-1]["worst"]:
            front.append(row)
    return front


def sweep(
    bench: RepairBench,
    criteria: list[str] | tuple[str, ...] = tuple(CRITERIA),
    budgets: list[float] | tuple[float, ...] = (0.02,),
    scopes: list[str] | tuple[str, ...] = ("mlp",),
    steps: tuple[float, ...] = STEPS,
    protections: tuple[float, ...] = PROTECTIONS,
    draws: int = 5,
    max_drop: float = 1.0,
    fixed: bool = True,
    labels: dict[str, Any] | None = None,
    path: str | Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Sweep:
    """
    Roll back by every criterion, at every budget and in every scope, and measure what comes back and what it costs.

    Each criterion, controls as well, gets its own best step, chosen by [`RepairBench.choose`] on the selection split
    and reported on the test split. `"<criterion>_protected"` is a criterion in nats whose protection is chosen with
    the step.

    Args:
        bench ([`RepairBench`]):
            Measures repairs.
        criteria (`list[str]`, *optional*):
            Some of `CRITERIA`, and of these in nats with `_protected`. Defaults to `CRITERIA`.
        budgets (`list[float]`, *optional*, defaults to `(0.02,)`):
            Shares of the routes of the scope.
        scopes (`list[str]`, *optional*, defaults to `("mlp",)`):
            Scopes.
        steps (`tuple[float, ...]`, *optional*, defaults to `STEPS`):
            Steps that the best one is chosen from.
        protections (`tuple[float, ...]`, *optional*, defaults to `PROTECTIONS`):
            Weights that the best protection is chosen from.
        draws (`int`, *optional*, defaults to `5`):
            Draws of each random control. Their step is chosen by the mean of the measure over the draws.
        max_drop (`float`, *optional*, defaults to `1.0`):
            Points that no domain may lose on the selection split. Where no step keeps to that, the one with the best
            mean score is taken.
        fixed (`bool`, *optional*, defaults to `True`):
            Whether to measure the step 1 as well.
        labels (`dict`, *optional*):
            Fields of every row, such as `seed` and `order`. Defaults to these two as `None`.
        path (`str` or `pathlib.Path`, *optional*):
            File that the rows are kept in after each of them; those that it holds are not measured again.
        progress (`Callable[[str], None]`, *optional*):
            Called before each criterion, with what is measured.

    Returns:
        [`Sweep`]: The rows.

    Raises:
        `ValueError`: If a setting is out of range.
    """
    check_settings(criteria, budgets, scopes, draws, max_drop, steps, protections, bench.report)
    labels = {"seed": None, "order": None} if labels is None else labels
    settings = {
        "report": hashlib.sha256(bench.report.routes["damage"].tobytes()).hexdigest(),
        "weights": _weights(bench),
        "data": bench.data,
        "earlier": bench.report.earlier,
        "later": bench.report.later,
        "draws": draws,
        "max_drop": max_drop,
        "steps": list(steps),
        "protections": list(protections),
    }
    result = Sweep(settings=settings)
    if path is not None and Path(path).exists():
        result = Sweep.load(path)
        found = result.settings or settings
        differing = [name for name in settings if found.get(name) != settings[name]]
        if differing:
            raise ValueError(
                f"{path}: holds another sweep; "
                + "; ".join(f"{name}: expected {settings[name]!r}, found {found.get(name)!r}" for name in differing)
            )
        result.settings = settings
    done = {_key(row) for row in result.rows}
    for scope in scopes:
        for budget in budgets:
            for criterion in criteria:
                for rule in ("fixed", "best") if fixed else ("best",):
                    place = {"criterion": criterion, "scope": scope, "budget": budget, "step_rule": rule}
                    if _key({**labels, **place}) in done:
                        continue
                    progress(f"{criterion}, {100 * budget:g}% of {scope}, {rule} step")
                    tried = (1.0,) if rule == "fixed" else steps
                    found = _best(bench, criterion, budget, scope, tried, protections, draws, max_drop)
                    result.rows.append({**labels, **place, **found})
                    if path is not None:
                        result.save(path)
    return result


def check_settings(
    criteria: list[str] | tuple[str, ...],
    budgets: list[float] | tuple[float, ...],
    scopes: list[str] | tuple[str, ...],
    draws: int,
    max_drop: float = 1.0,
    steps: tuple[float, ...] = STEPS,
    protections: tuple[float, ...] = PROTECTIONS,
    report: InterferenceReport | None = None,
) -> None:
    """
    Refuse what [`sweep`] cannot measure, before anything is loaded.

    Args:
        criteria (`list[str]`):
            Criteria.
        budgets (`list[float]`):
            Budgets.
        scopes (`list[str]`):
            Scopes.
        draws (`int`):
            Draws of each control.
        max_drop (`float`, *optional*, defaults to `1.0`):
            Points that no domain may lose.
        steps (`tuple[float, ...]`, *optional*):
            Steps.
        protections (`tuple[float, ...]`, *optional*):
            Weights of the protection.
        report ([`InterferenceReport`], *optional*):
            The analysis, which must be able to rank routes by each criterion.

    Raises:
        `ValueError`: If one of them is out of range.
    """
    lists = {"criteria": criteria, "budgets": budgets, "scopes": scopes, "steps": steps, "protections": protections}
    for name, values in lists.items():
        if not len(values):
            raise ValueError(f"{name}: expected at least one, found none")
    if not max_drop >= 0:
        raise ValueError(f"max_drop: expected 0 or more points, found {max_drop}")
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, found {draws}")
    for criterion in criteria:
        if criterion not in CRITERIA and criterion not in PROTECTED:
            raise ValueError(f"criteria: expected some of {[*CRITERIA, *PROTECTED]}, found {criterion!r}")
    for budget in budgets:
        for scope in scopes:
            RouteRollback(budget=budget, scope=scope)
    for step in steps:
        if not 0 < step < np.inf:
            raise ValueError(f"steps: expected numbers above 0, found {step}")
    for protection in protections:
        RouteRollback(protection=protection)
    for criterion in criteria:
        if report is not None and criterion not in rankable(report):
            raise ValueError(
                f"criteria: {criterion!r} needs a report that was made with --base, the checkpoint that "
                f"{report.earlier}'s own training started from, found one without"
            )


def rankable(report: InterferenceReport) -> list[str]:
    """
    Criteria that a report can rank routes by.

    Args:
        report ([`InterferenceReport`]):
            The analysis.

    Returns:
        `list[str]`: All of `CRITERIA` and `PROTECTED`; without a base in the analysis all but `"route_conflict"`.
    """
    lacking = () if "opposed" in report.routes else ("route_conflict",)
    return [name for name in (*CRITERIA, *PROTECTED) if name not in lacking]


def _weights(bench: RepairBench) -> str:
    """What tells two pairs of checkpoints apart: their last tensor that has routes."""
    name = [name for name, _ in bench.model.named_parameters() if bench.route_map.cut(name) is not None][-1]
    digest = hashlib.sha256()
    for tensor in (bench.before[name], bench.model.get_parameter(name)):
        digest.update(tensor.detach().double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _key(row: dict[str, Any]) -> tuple:
    return tuple(json.dumps(row.get(name)) for name in ("seed", "order", "criterion", "scope", "budget", "step_rule"))


def _best(
    bench: RepairBench,
    criterion: str,
    budget: float,
    scope: str,
    steps: tuple[float, ...],
    protections: tuple[float, ...],
    draws: int,
    max_drop: float,
) -> dict[str, Any]:
    name = criterion.removesuffix("_protected")
    weights = protections if criterion in PROTECTED else (0.0,)
    candidates = []
    for weight in weights:
        selections = [
            RouteRollback(criterion=name, budget=budget, scope=scope, protection=weight, seed=draw).select(
                bench.report, bench.route_map, bench.parameters
            )
            for draw in range(draws if criterion in CONTROLS else 1)
        ]
        candidates += [(weight, step, selections) for step in steps]
    measures = [{}]
    chosen = 0
    if len(candidates) > 1:
        measures = [
            _mean([bench.measured(routes, step) for routes in selections]) for _, step, selections in candidates
        ]
        chosen = bench.choose(measures, max_drop)
    weight, step, selections = candidates[chosen]
    within = {"within_max_drop": bench.spares(measures[chosen], max_drop)} if len(candidates) > 1 else {}
    return {
        **within,
        "step": float(step),
        "protection": float(weight),
        **bench.figures([bench.scores(routes, step) for routes in selections]),
        "routes": len(selections[0]),
        "asked": max(1, round(budget * int(bench.route_map.scope(scope).sum()))),
        "selection": measures[chosen],
    }


def _mean(measures: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([entry[name] for entry in measures])) for name in measures[0]}
