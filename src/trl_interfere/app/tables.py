"""Tables that put several runs or reports side by side."""

from collections.abc import Sequence

import pandas as pd

from ..analysis.report import InterferenceReport
from .stored_run import StoredRun


SCORE_COLUMNS = ["run", "stage", "domain", "score", "low", "high", "prompts"]
DAMAGE_COLUMNS = [
    "report",
    "earlier",
    "later",
    "damage",
    "first order",
    "second order",
    "by routes",
    "outside",
    "cosine",
    "lowest module",
    "lowest cosine",
    "highest module",
    "highest cosine",
]
REPAIR_COLUMNS = [
    "run",
    "repair",
    "scope",
    "budget %",
    "step",
    "recovered %",
    "low",
    "high",
    "worst collateral",
    "prompts",
    "draws",
]


def score_table(runs: Sequence[StoredRun]) -> pd.DataFrame:
    """
    Score of every domain after every stage of every run.

    Args:
        runs (`Sequence[StoredRun]`):
            The runs.

    Returns:
        [`pandas.DataFrame`]: One row for each score, 0 to 100, with its 95% interval.
    """
    rows = [
        [run.name, name, domain, *(round(entry[key], 2) for key in ("value", "low", "high")), int(entry["n"])]
        for run in runs
        for name, stage in zip(run.stage_names, run.stages, strict=True)
        for domain, entry in stage["scores"].items()
    ]
    return pd.DataFrame(rows, columns=SCORE_COLUMNS)


def damage_table(reports: Sequence[tuple[str, InterferenceReport]]) -> pd.DataFrame:
    """
    Figures of reports.

    Args:
        reports (`Sequence[tuple[str, InterferenceReport]]`):
            Names and reports.

    Returns:
        [`pandas.DataFrame`]: One row for each report; damage in nats per token.
    """
    rows = []
    for name, report in reports:
        modules = {key: value for key, value in report.cosines["modules"].items() if value is not None}
        lowest, highest = (choose(modules, key=modules.get, default=None) for choose in (min, max))
        figures = (report.damage, report.first_order, report.second_order, report.attributed, report.outside_routes)
        rows.append(
            [name, report.earlier, ", ".join(report.later)]
            + [round(value, 4) for value in figures]
            + [_rounded(report.cosines["global"])]
            + [lowest, _rounded(modules.get(lowest)), highest, _rounded(modules.get(highest))]
        )
    return pd.DataFrame(rows, columns=DAMAGE_COLUMNS)


def repair_table(runs: Sequence[StoredRun]) -> pd.DataFrame:
    """
    Repairs of runs, with their controls.

    Args:
        runs (`Sequence[StoredRun]`):
            The runs.

    Returns:
        [`pandas.DataFrame`]: One row for each repair; recovered share in percent with its 95% interval, and the worst
        change of another domain in points.
    """
    rows = []
    for run in runs:
        repairs = [(row["criterion"], row) for row in run.results["rollback"] if row["pair"] == 0]
        refresh = run.results["refresh"]
        if refresh is not None:
            fields = {"scope": "all", "budget": float("nan"), "step": float("nan")}
            repairs.append((f"refresh, {refresh['steps']} steps", {**fields, **refresh}))
        for name, row in repairs:
            shares = (None if row[key] is None else round(100 * row[key], 1) for key in ("recovered", "low", "high"))
            worst = min(row["collateral"].values(), default=None)
            rows.append(
                [run.name, name, row["scope"], round(100 * row["budget"], 2), round(row["step"], 3), *shares]
                + [_rounded(worst, 2), row.get("n"), row.get("draws", 1)]
            )
    return pd.DataFrame(rows, columns=REPAIR_COLUMNS)


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)
