"""Scores of every domain after every stage."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

from ..run import Run
from ..tables import console_table
from .bootstrap import Interval, average, score


@dataclass(repr=False)
class ScoreMatrix:
    """
    Stages x domains.

    A run that was extended with another domain has no scores of it in its earlier rows; they are left out wherever
    stages are compared.

    Args:
        domains (`list[str]`):
            Names of the domains: the columns.
        stages (`list[str]`, *optional*):
            Names of the stages, `"0-base"`, `"<index>-<domain>"`, `"<index>-refresh-<domain>"` or `"<index>-heal"`:
            the rows, in order.
        values (`list[dict[str, numpy.ndarray]]`, *optional*):
            For each stage, the per-prompt scores (0 to 1) of each domain.
    """

    domains: list[str]
    stages: list[str] = field(default_factory=list)
    values: list[dict[str, np.ndarray]] = field(default_factory=list)

    @classmethod
    def from_run(cls, run: Run, domains: list[str] | None = None) -> "ScoreMatrix":
        """
        Scores of all finished stages of a run.

        Args:
            run ([`Run`]):
                The run.
            domains (`list[str]`, *optional*):
                Names of the domains. Defaults to all that were scored.
        """
        matrix = cls(run.domains if domains is None else domains)
        for record in run.stages:
            matrix.append(record.name, {domain: run.scores(record, domain) for domain in record.scores})
        return matrix

    def append(self, stage: str, values: dict[str, np.ndarray]) -> None:
        self.stages.append(stage)
        self.values.append(values)

    def position(self, stage: int) -> int:
        """Position of a stage from the first one; negative positions count from the end."""
        if not -len(self.stages) <= stage < len(self.stages):
            raise ValueError(f"stage: expected the position of one of {len(self.stages)} stages, found {stage}")
        return stage % len(self.stages)

    def interval(self, stage: int, domain: str) -> Interval:
        """Score of one domain after one stage, 0 to 100, with its 95% interval over prompts."""
        values = self.values[self.position(stage)]
        if domain not in values:
            raise ValueError(
                f"stage {self.stages[stage]!r}: expected a score of domain {domain!r}, found scores of {list(values)}"
            )
        return score(values[domain])

    def average_score(self, stage: int = -1) -> Interval:
        """Average score after one stage, 0 to 100 (Gradient Episodic Memory, equation 2: ACC = 1/D sum_i R_i)."""
        values = self.values[self.position(stage)]
        return average([values[domain] for domain in self.domains if domain in values])

    def peak(self, domain: str, last: int = -1) -> int:
        """Position of the stage with the highest score of a domain up to `last`, the first one among equals."""
        rows = [row for row in range(self.position(last) + 1) if domain in self.values[row]]
        if not rows:
            stages = self.stages[: self.position(last) + 1]
            raise ValueError(f"domain {domain!r}: expected a score after one of {stages}, found none")
        return max(rows, key=lambda row: self.values[row][domain].mean())

    def stage_kind(self, stage: int) -> tuple[str, str | None]:
        """Kind of a stage (`base`, `train`, `refresh` or `heal`) and its domain, by its name."""
        if self.stages[stage] == "0-base":
            return "base", None
        name = self.stages[stage].partition("-")[2]
        kind, _, domain = name.partition("-")
        if kind in ("refresh", "heal") and name not in self.domains:
            return kind, domain or None
        return "train", name

    def last_training(self, stage: int = -1) -> int | None:
        """Position of the last stage of kind `train` up to a stage: what comes after it are repairs."""
        rows = range(self.position(stage), -1, -1)
        return next((row for row in rows if self.stage_kind(row)[0] == "train"), None)

    def to_dict(self) -> dict[str, Any]:
        """The matrix as JSON values, without the per-prompt scores."""
        stages = []
        for row, (stage, values) in enumerate(zip(self.stages, self.values, strict=True)):
            scores = {domain: self.interval(row, domain).to_dict() for domain in self.domains if domain in values}
            stages.append({"stage": stage, "scores": scores})
        return {"domains": list(self.domains), "stages": stages}

    def rows(self) -> list[list[str]]:
        """Cells of a table, the header first: scores with their 95% intervals, a dash where there is none."""
        count = {domain: len(values[domain]) for values in self.values for domain in values}
        rows = [["stage", *(f"{domain} (n={count.get(domain, 0)})" for domain in self.domains)]]
        for stage, values in zip(self.stages, self.values, strict=True):
            cells = (f"{score(values[domain]):.1f}" if domain in values else "—" for domain in self.domains)
            rows.append([stage, *cells])
        return rows

    def to_table(self) -> Table:
        """The matrix for the terminal."""
        header, *rows = self.rows()
        return console_table("Score after each stage (0 to 100, 95% interval)", header, rows)

    def __repr__(self) -> str:
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
