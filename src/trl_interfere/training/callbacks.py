"""Callbacks that are told about stages and may ask for more of them."""

from transformers import TrainerCallback

from ..evaluation.score_matrix import ScoreMatrix
from ..repair.heal import lost_beyond_interval
from ..run import Run, StageRecord
from .config import SequentialGRPOConfig, check_range
from .schedule import Stage


class StageCallback(TrainerCallback):
    """
    A [`~transformers.TrainerCallback`] that also sees stages. It must not call `train()`: it asks for a stage in
    [`~StageCallback.request_stage`], and [`SequentialGRPOTrainer`] runs it.
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


class HealCallback(StageCallback):
    """
    Ask [`SequentialGRPOTrainer`] to heal the model where stages have damaged domains: a repair in closed form, without
    training. It becomes a stage of the run, and training goes on from the healed weights. A domain is damaged when it
    is below its score after its own training by more than the 95% interval of the difference. With LoRA,
    `at="stage"` is refused: the repair of an adapter has another rank than the adapter.

    Example:

    ```python
    >>> from trl_interfere import HealCallback, SequentialGRPOTrainer

    >>> trainer = SequentialGRPOTrainer("model", args, domains, callbacks=[HealCallback(max_drop=1.0)])
    ```

    Args:
        at (`str`, *optional*, defaults to `"end"`):
            `"end"`: once all stages of the schedule have finished. `"stage"`: after each of them.
        max_drop (`float`, *optional*, defaults to `1.0`):
            Points of 100 on the selection split that a domain may lose to the repair.
        rank (`int`, *optional*, defaults to `64`):
            Rank of the change of each layer; `None` keeps all of it.
        domains (`list[str]`, *optional*):
            Domains to heal. Defaults to all that are damaged.

    Raises:
        `ValueError`: If an argument is out of range.
    """

    def __init__(
        self, at: str = "end", max_drop: float = 1.0, rank: int | None = 64, domains: list[str] | None = None
    ):
        check_policy(at, max_drop, domains)
        if rank is not None:
            check_range("rank", rank, 1, whole=True)
        self.at, self.max_drop, self.rank, self.domains = at, max_drop, rank, domains

    def request_stage(
        self, stages: list[StageRecord], score_matrix: ScoreMatrix, schedule_finished: bool
    ) -> Stage | None:
        check_domains("HealCallback, domains", self.domains, score_matrix)
        # Once after a stage of training: refreshes may follow the heal.
        last = next((record.kind for record in reversed(stages) if record.kind != "refresh"), None)
        if last != "train" or (self.at == "end" and not schedule_finished):
            return None
        rows = score_matrix.values
        own = {record.domain: rows[row] for row, record in enumerate(stages) if record.kind == "train"}
        lost = lost_beyond_interval({name: row[name] for name, row in own.items() if name in row}, rows[-1])
        names = [name for name in lost if self.domains is None or name in self.domains]
        if not names:
            return None
        names = None if self.domains is None else names
        return Stage(None, "heal", {"rank": self.rank, "max_drop": self.max_drop, "names": names})


def check_policy(at: str, max_drop: float, domains: list[str] | None) -> None:
    """Refuse what no policy of heals or refreshes can be."""
    if at not in ("end", "stage"):
        raise ValueError(f"at: expected 'end' or 'stage', found {at!r}")
    check_range("max_drop", max_drop, 0)
    if isinstance(domains, str):
        raise ValueError(f"domains: expected a list of names, found {domains!r}")


def check_domains(where: str, names: list[str] | None, score_matrix: ScoreMatrix) -> None:
    """Refuse domains that are not scored."""
    for name in names or []:
        if name not in score_matrix.domains:
            raise ValueError(f"{where}: expected some of {score_matrix.domains}, found {name!r}")
