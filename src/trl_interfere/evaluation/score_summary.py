"""What a score matrix says, in the figures of the continual-learning literature."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from rich.table import Table

from .bootstrap import Interval, recovered
from .collateral import collateral
from .forgetting import forgetting
from .score_matrix import ScoreMatrix
from .transfer import backward_transfer, forward_transfer


@dataclass
class ScoreSummary:
    """
    Average score, forgetting and transfer after one stage, and what the refreshes before it did.

    A figure that is undefined, e.g. the forgetting of the domain trained last, is left out.

    Args:
        stage (`str`):
            Name of the stage.
        score (`dict[str, Interval]`):
            Scores of the domains, 0 to 100.
        forgetting (`dict[str, Interval]`):
            Peak minus score, see [`~evaluation.forgetting.forgetting`].
        backward_transfer (`dict[str, Interval]`):
            Change since the domain's own training, see [`~evaluation.transfer.backward_transfer`].
        forward_transfer (`dict[str, Interval]`):
            Change before the domain's own training, see [`~evaluation.transfer.forward_transfer`].
        recovered (`dict[str, Interval]`):
            Share of the loss that came back, see [`~evaluation.bootstrap.recovered`], of the domains refreshed since
            the last training.
        collateral (`dict[str, Interval]`):
            Change since the last training, see [`~evaluation.collateral.collateral`], of the other domains; empty
            without a refresh.
        average (`dict[str, Interval]`):
            Averages over the domains of `"score"`, `"forgetting"`, `"backward_transfer"` and `"forward_transfer"`.
    """

    stage: str
    score: dict[str, Interval]
    forgetting: dict[str, Interval]
    backward_transfer: dict[str, Interval]
    forward_transfer: dict[str, Interval]
    recovered: dict[str, Interval]
    collateral: dict[str, Interval]
    average: dict[str, Interval]

    @classmethod
    def from_matrix(cls, matrix: ScoreMatrix, stage: int = -1) -> "ScoreSummary":
        """
        Summarise a score matrix.

        Args:
            matrix ([`ScoreMatrix`]):
                The scores.
            stage (`int`, *optional*, defaults to `-1`):
                Position of the stage; negative positions count from the end.

        Returns:
            [`ScoreSummary`]: The figures after that stage.

        Raises:
            `ValueError`: If there is no such stage.
        """
        final, since = matrix.position(stage), matrix.last_training(stage)
        values = matrix.values[final]
        scored = [domain for domain in matrix.domains if domain in values]
        refreshed = [] if since is None else [matrix.stage_kind(row)[1] for row in range(since + 1, final + 1)]
        figures = {"score": {domain: matrix.interval(final, domain) for domain in scored}}
        figures["average"] = {"score": matrix.average_score(final)}
        for statistic in (forgetting, backward_transfer, forward_transfer):
            figures[statistic.__name__] = {domain: statistic(matrix, domain, final) for domain in scored}
            figures["average"][statistic.__name__] = statistic(matrix, stage=final)
        figures["recovered"] = {
            domain: recovered(
                values[domain], matrix.values[since][domain], matrix.values[matrix.peak(domain, since)][domain]
            )
            for domain in scored
            if domain in refreshed and domain in matrix.values[since]
        }
        figures["collateral"] = collateral(matrix, since, refreshed, final) if refreshed else {}
        return cls(
            stage=matrix.stages[final],
            **{
                name: {key: interval for key, interval in by_key.items() if np.isfinite(interval.value)}
                for name, by_key in figures.items()
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """
        The summary as JSON values.

        Returns:
            `dict`: `stage`, and the intervals of each statistic by domain (of `average`: by statistic).
        """
        return {
            "stage": self.stage,
            **{
                name: {key: interval.to_dict() for key, interval in getattr(self, name).items()}
                for name in (field.name for field in fields(self)[1:])
            },
        }

    def to_table(self) -> Table:
        """
        The summary as a table for the terminal.

        Returns:
            [`rich.table.Table`]: One row per domain and one of averages, a dash where a figure is undefined.
        """
        names = [field.name for field in fields(self)[1:-1] if getattr(self, field.name)]
        rows = {domain: {name: getattr(self, name).get(domain) for name in names} for domain in self.score}
        table = Table(title=f"Forgetting and transfer after {self.stage} (points of 100, 95% interval)")
        table.add_column("domain")
        for name in names:
            table.add_column(name.replace("_", " "), justify="right")
        for label, intervals in [*rows.items(), ("average", self.average)]:
            if intervals is self.average:
                table.add_section()
            cells = ((intervals.get(name), ".0%" if name == "recovered" else ".1f") for name in names)
            table.add_row(label, *("—" if interval is None else f"{interval:{spec}}" for interval, spec in cells))
        return table
