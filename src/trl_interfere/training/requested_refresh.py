"""A refresh that is asked for by name, on a run that has finished."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from ..evaluation.score_matrix import ScoreMatrix
from ..run import SCHEMA_VERSION, STAGES_NAME, StageRecord, read_json, stage_name
from .callbacks import StageCallback
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
        `ValueError`: If the folder holds no run, the steps are out of range, a refresh of this domain was stopped
            that is of another number of steps or, where it is not yet scored, has other settings, or a refresh of
            another domain was stopped after its first checkpoint.
    """

    def __init__(self, folder: str | Path, domain: str, steps: int, overrides: dict[str, Any] | None = None):
        path = Path(folder) / STAGES_NAME
        if not path.exists():
            raise ValueError(f"{folder}: expected the folder of a training run with {STAGES_NAME}, found none")
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, found {steps}")
        content = read_json(path, SCHEMA_VERSION)
        self.domain, self.steps, self.overrides = domain, steps, dict(overrides or {})
        # One that is trained and not yet scored is the one that is asked for.
        self.wanted = 1 + sum(self._is_mine(record["kind"], record["domain"]) for record in content["stages"])
        planned = self._stopped(Path(folder), content)
        current = content.get("current")
        if current is not None and self._is_mine(current["kind"], current["domain"]):
            for name, value in self.overrides.items():
                if current["overrides"].get(name) != value:
                    raise ValueError(
                        f"{name}: a refresh of {domain} with {name} {current['overrides'].get(name, 'unset')} was "
                        f"stopped in {folder} before it was scored; expected that, to go on with it, found {value}"
                    )
        if planned not in (None, steps):
            raise ValueError(
                f"steps: a refresh of {domain} with {planned} steps was stopped in {folder}; expected {planned}, to "
                f"go on with it, found {steps}"
            )

    def _stopped(self, folder: Path, content: dict[str, Any]) -> int | None:
        """Steps of the refresh that an earlier process was stopped in, if there is one."""
        current = content.get("current")
        if current is not None:
            return current["overrides"].get("max_steps") if self._is_mine(current["kind"], current["domain"]) else None
        prefix = stage_name(len(content["stages"]), "refresh", "")
        for path in sorted((folder / "checkpoints").glob(f"{prefix}*/checkpoint-*/{TRAINER_STATE_NAME}")):
            stage = path.parent.parent
            with suppress(json.JSONDecodeError):  # half-written: the trainer skips it with a warning
                steps = json.loads(path.read_text())["max_steps"]
                if stage.name == f"{prefix}{self.domain}":
                    return steps
                other = stage.name.removeprefix(prefix)
                raise ValueError(
                    f"domain: a refresh of {other} with {steps} steps was stopped in {folder}; expected {other}, to "
                    f"go on with it, found {self.domain}. If the training asked for it, `train --resume` goes on; "
                    f"to give it up, remove {stage}"
                )
        return None

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
