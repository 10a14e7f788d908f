"""Callbacks that are told about stages and may ask for more of them."""

from transformers import TrainerCallback

from ..evaluation.score_matrix import ScoreMatrix
from ..run import Run, StageRecord
from .config import SequentialGRPOConfig
from .schedule import Stage


class StageCallback(TrainerCallback):
    """
    A [`~transformers.TrainerCallback`] that also sees stages.

    `train()` must not be called from a callback. A callback that wants more training asks for it in
    [`~StageCallback.request_stage`], and the stage loop of [`SequentialGRPOTrainer`] runs it.
    """

    def on_run_begin(self, args: SequentialGRPOConfig, run: Run) -> None:
        """
        `train()` has opened the folder of the run, which may hold stages already.

        Args:
            args ([`SequentialGRPOConfig`]):
                Settings of the run.
            run ([`Run`]):
                The run.
        """

    def on_run_end(self, args: SequentialGRPOConfig, run: Run) -> None:
        """
        Nothing is left to do.

        Args:
            args ([`SequentialGRPOConfig`]):
                Settings of the run.
            run ([`Run`]):
                The run.
        """

    def on_stage_begin(self, index: int, stage: Stage) -> None:
        """
        A stage is about to begin or to be continued.

        Args:
            index (`int`):
                Position in the run.
            stage ([`Stage`]):
                The stage.
        """

    def on_stage_end(self, record: StageRecord, score_matrix: ScoreMatrix) -> None:
        """
        A stage, or the scoring of the base model, has finished and stands in the manifest.

        Args:
            record ([`StageRecord`]):
                The stage.
            score_matrix ([`ScoreMatrix`]):
                Scores of all finished stages.
        """

    def request_stage(
        self, stages: list[StageRecord], score_matrix: ScoreMatrix, schedule_finished: bool
    ) -> Stage | None:
        """
        Ask for a stage. It must follow from the arguments alone, so that a resumed run takes the same way.

        Args:
            stages (`list[StageRecord]`):
                Finished stages, the base model first.
            score_matrix ([`ScoreMatrix`]):
                Scores of the finished stages.
            schedule_finished (`bool`):
                Whether all stages of the schedule have finished.

        Returns:
            [`Stage`] or `None`: The stage to run next, or `None` to go on with the schedule.
        """
        return None
