"""A refresh that is asked for by name, on a run that has finished."""

from pathlib import Path
from typing import Any

from ..evaluation.score_matrix import ScoreMatrix
from .callbacks import StageCallback
from .manifest import MANIFEST_NAME, SCHEMA_VERSION, StageRecord, read_json
from .schedule import Stage


class RequestedRefresh(StageCallback):
    """
    Ask [`SequentialGRPOTrainer`] for one refresh of a domain, whether or not it was damaged.

    The refresh is added to a finished run as its next stage. Where an earlier process was stopped inside it, the same
    refresh goes on; where it has finished, another one is added.

    Args:
        folder (`str` or `pathlib.Path`):
            Folder of the run.
        domain (`str`):
            Name of the domain.
        steps (`int`):
            Optimizer steps.
        overrides (`dict`, *optional*):
            Further settings of the stage, e.g. `{"learning_rate": 1e-6}`.

    Raises:
        `ValueError`: If the folder holds no run, or the steps are out of range.
    """

    def __init__(self, folder: str | Path, domain: str, steps: int, overrides: dict[str, Any] | None = None):
        path = Path(folder) / MANIFEST_NAME
        if not path.exists():
            raise ValueError(f"{folder}: expected the folder of a training run with {MANIFEST_NAME}, found none")
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, found {steps}")
        content = read_json(path, SCHEMA_VERSION)
        self.domain, self.steps, self.overrides = domain, steps, dict(overrides or {})
        # One that is trained and not yet scored is the one that is asked for.
        self.wanted = 1 + sum(self._is_mine(record["kind"], record["domain"]) for record in content["stages"])

    def _is_mine(self, kind: str, domain: str | None) -> bool:
        return kind == "refresh" and domain == self.domain

    def request_stage(
        self, stages: list[StageRecord], score_matrix: ScoreMatrix, schedule_finished: bool
    ) -> Stage | None:
        if not schedule_finished:
            raise ValueError("refresh: expected a finished run, found stages left; run `train --resume` first")
        done = sum(self._is_mine(record.kind, record.domain) for record in stages)
        if done >= self.wanted:
            return None
        return Stage(self.domain, "refresh", {**self.overrides, "max_steps": self.steps}, {"requested": done + 1})
