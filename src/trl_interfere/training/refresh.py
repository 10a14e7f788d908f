"""The refresh: a short RL pass on a domain that a later stage has damaged."""

from ..evaluation.bootstrap import difference
from ..evaluation.score_matrix import ScoreMatrix
from .callbacks import StageCallback
from .manifest import StageRecord
from .schedule import Stage


class RefreshCallback(StageCallback):
    """
    Ask [`SequentialGRPOTrainer`] for a short RL pass on each domain that has dropped from its peak, worst first.

    A domain is refreshed when its score is more than `max_drop` points below its own highest score of the run and the
    95% interval of that drop (paired bootstrap over prompts) excludes zero.

    Args:
        max_steps (`int`, *optional*, defaults to `10`):
            Optimizer steps of one refresh.
        max_drop (`float`, *optional*, defaults to `2.0`):
            Drop, in points of 100, that is tolerated.
        domains (`list[str]`, *optional*):
            Domains to watch. Defaults to all domains that have been trained.
        at (`str`, *optional*, defaults to `"end"`):
            `"end"`: once all stages of the schedule have finished. `"stage"`: after each of them.
        overrides (`dict`, *optional*):
            Further settings of the refresh stage, e.g. `{"learning_rate": 1e-6}`.
    """

    def __init__(
        self,
        max_steps: int = 10,
        max_drop: float = 2.0,
        domains: list[str] | None = None,
        at: str = "end",
        overrides: dict | None = None,
    ):
        if at not in ("end", "stage"):
            raise ValueError(f"at: expected 'end' or 'stage', found {at!r}")
        if max_steps < 1:
            raise ValueError(f"max_steps: expected at least 1, found {max_steps}")
        self.max_steps = max_steps
        self.max_drop = max_drop
        self.domains = domains
        self.at = at
        self.overrides = overrides or {}

    def request_stage(
        self, stages: list[StageRecord], score_matrix: ScoreMatrix, schedule_finished: bool
    ) -> Stage | None:
        if self.at == "end" and not schedule_finished:
            return None
        refreshed = set()  # since the last stage of the schedule: one refresh per domain
        for record in reversed(stages):
            if record.kind != "refresh":
                break
            refreshed.add(record.domain)
        trained = [record.domain for record in stages if record.kind == "train"]
        drops = {}
        for domain in dict.fromkeys(trained):
            if domain in refreshed or domain not in score_matrix.domains:
                continue
            if self.domains is not None and domain not in self.domains:
                continue
            peak = score_matrix.values[score_matrix.peak(domain)][domain]
            drop = difference(peak, score_matrix.values[-1][domain])
            if drop.value > self.max_drop and drop.low > 0:
                drops[domain] = drop.value
        if not drops:
            return None
        worst = max(drops, key=drops.get)
        return Stage(domain=worst, kind="refresh", overrides={"max_steps": self.max_steps, **self.overrides})
