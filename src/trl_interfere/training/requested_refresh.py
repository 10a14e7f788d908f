"""A refresh that is asked for by name, on a run that has finished."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from ..evaluation.score_matrix import ScoreMatrix
from ..run import Run, StageRecord, stage_name
from .callbacks import StageCallback
from .schedule import Stage


class RequestedRefresh(StageCallback):
    """
    Ask [`SequentialGRPOTrainer`] for one refresh, whether or not its domains were damaged.

    The refresh is added to a finished run as its next stage. Where an earlier process was stopped inside it, the same
    refresh goes on; where it has finished, another one is added.
    """

    def __init__(self, folder: str | Path, stage: Stage):
        run, steps = Run(folder), stage.overrides["max_steps"]
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, found {steps}")
        self.stage, self.label = stage, " and ".join(stage.domains)
        # One that is trained and not yet scored is the one that is asked for.
        self.wanted = 1 + sum(map(self._is_mine, run.stages))
        planned = self._stopped(run)
        if planned not in (None, steps):
            raise ValueError(
                f"steps: a refresh of {self.label} with {planned} steps was stopped in {folder}; expected {planned}, "
                f"to go on with it, found {steps}"
            )
        current = run.current
        if current is not None and self._is_mine(current):
            for name, value in stage.overrides.items():
                if current.overrides.get(name) != value:
                    raise ValueError(
                        f"{name}: a refresh of {self.label} with {name} {current.overrides.get(name, 'unset')} was "
                        f"stopped in {folder} before it was scored; expected that, to go on with it, found {value}"
                    )

    def _stopped(self, run: Run) -> int | None:
        """Steps of the refresh that an earlier process was stopped in, if there is one."""
        if run.current is not None:
            return run.current.overrides.get("max_steps") if self._is_mine(run.current) else None
        own = stage_name(len(run.stages), "refresh", self.stage.domain)
        prefix = stage_name(len(run.stages), "refresh", None)
        for path in sorted((run.folder / "checkpoints").glob(f"{prefix}*/checkpoint-*/{TRAINER_STATE_NAME}")):
            stage = path.parent.parent
            with suppress(json.JSONDecodeError):  # half-written: the trainer skips it with a warning
                steps = json.loads(path.read_text())["max_steps"]
                if stage.name == own:
                    return steps
                other = stage.name.removeprefix(prefix).removeprefix("-") or "several domains"
                raise ValueError(
                    f"domain: a refresh of {other} with {steps} steps was stopped in {run.folder}; expected {other}, "
                    f"to go on with it, found {self.label}. If the training asked for it, `train --resume` goes on; "
                    f"to give it up, remove {stage}"
                )
        return None

    def _is_mine(self, record: StageRecord) -> bool:
        return record.kind == "refresh" and record.domains == self.stage.domains

    def request_stage(
        self, stages: list[StageRecord], score_matrix: ScoreMatrix, schedule_finished: bool
    ) -> Stage | None:
        if not schedule_finished:
            raise ValueError("refresh: expected a finished run, found stages left; run `train --resume` first")
        done = sum(map(self._is_mine, stages))
        return None if done >= self.wanted else replace(self.stage, reason={"requested": done + 1})
