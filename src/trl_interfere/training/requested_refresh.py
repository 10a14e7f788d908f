"""A refresh that is asked for by name, on a run that has finished."""

from dataclasses import replace
from pathlib import Path

from ..evaluation.score_matrix import ScoreMatrix
from ..run import Run, StageRecord
from ..stage_record import stage_name
from .callbacks import StageCallback
from .schedule import Stage


class RequestedRefresh(StageCallback):
    """
    Ask [`SequentialGRPOTrainer`] for one refresh as the next stage of a finished run, whether or not its domains were
    damaged. Where an earlier process was stopped inside it, the same refresh goes on.

    Args:
        folder (`str` or `pathlib.Path`):
            Folder of the run.
        stage ([`Stage`]):
            The refresh.

    Raises:
        `ValueError`: If another refresh was stopped, or the same one with other settings.
    """

    def __init__(self, folder: str | Path, stage: Stage):
        run, self.stage = Run(folder), stage
        # One that is trained and not yet scored is the one that is asked for.
        self.wanted = 1 + sum(map(self._is_mine, run.stages))
        current = run.current
        if current is not None and self._is_mine(current):
            for name, value in stage.overrides.items():
                found = current.overrides.get(name, "unset")
                if found != value:
                    raise ValueError(
                        f"{name}: a refresh of {' and '.join(stage.domains)} with {name} {found} was stopped in "
                        f"{folder} before it was scored; expected that, to go on with it, found {value}"
                    )
        own, prefix = (stage_name(len(run.stages), "refresh", name) for name in (stage.domain, None))
        for checkpoint in (run.folder / "checkpoints").glob(f"{prefix}*/checkpoint-*"):
            other = checkpoint.parent
            if other.name != own:
                raise ValueError(
                    f"domain: the refresh {other.name} was stopped; expected its domains, to go on with it, found "
                    f"{' and '.join(stage.domains)}. `train --resume` goes on; to give it up, remove {other}"
                )

    def _is_mine(self, record: StageRecord) -> bool:
        return record.kind == "refresh" and record.domains == self.stage.domains

    def request_stage(
        self, stages: list[StageRecord], score_matrix: ScoreMatrix, schedule_finished: bool
    ) -> Stage | None:
        if not schedule_finished:
            raise ValueError("refresh: expected a finished run, found stages left; run `train --resume` first")
        done = sum(map(self._is_mine, stages))
        return None if done >= self.wanted else replace(self.stage, reason={"requested": done + 1})
