"""Scores of every domain after every stage."""

from dataclasses import dataclass, field

import numpy as np
from rich.table import Table

from .bootstrap import Interval, score


@dataclass
class ScoreMatrix:
    """
    Stages x domains.

    Args:
        domains (`list[str]`):
            Names of the domains: the columns.
        stages (`list[str]`, *optional*):
            Names of the stages, `"<index>-<domain>"`: the rows, in order.
        values (`list[dict[str, numpy.ndarray]]`, *optional*):
            For each stage, the per-prompt scores (0 to 1) of each domain.
    """

    domains: list[str]
    stages: list[str] = field(default_factory=list)
    values: list[dict[str, np.ndarray]] = field(default_factory=list)

    def append(self, stage: str, values: dict[str, np.ndarray]) -> None:
        self.stages.append(stage)
        self.values.append(values)

    def interval(self, stage: int, domain: str) -> Interval:
        """
        Score of one domain after one stage.

        Args:
            stage (`int`):
                Position of the stage; negative positions count from the end.
            domain (`str`):
                Name of the domain.

        Returns:
            [`Interval`]: Score, 0 to 100, with its 95% interval over prompts.
        """
        return score(self.values[stage][domain])

    def peak(self, domain: str) -> int:
        """
        Position of the stage with the highest score of a domain, the first one among equals.

        Args:
            domain (`str`):
                Name of the domain.

        Returns:
            `int`: Position of the stage.
        """
        return int(np.argmax([values[domain].mean() for values in self.values]))

    def to_table(self) -> Table:
        """
        The matrix as a table for the terminal.

        Returns:
            [`rich.table.Table`]: One row per stage, scores with their 95% intervals.
        """
        counts = {domain: len(self.values[0][domain]) for domain in self.domains} if self.values else {}
        table = Table(title="Score after each stage (0 to 100, 95% interval)")
        table.add_column("stage")
        for domain in self.domains:
            table.add_column(f"{domain} (n={counts.get(domain, 0)})", justify="right")
        for position, stage in enumerate(self.stages):
            cells = [self.interval(position, domain) for domain in self.domains]
            table.add_row(stage, *(f"{cell.value:.1f} [{cell.low:.1f}, {cell.high:.1f}]" for cell in cells))
        return table
