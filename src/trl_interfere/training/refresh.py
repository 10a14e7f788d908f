"""The refresh: a short training pass on domains that a later stage has damaged."""

import copy
import logging
import math

from ..evaluation.bootstrap import difference
from ..evaluation.metrics import collateral, recovered
from ..evaluation.score_matrix import ScoreMatrix
from ..recipe import check_names
from ..run import StageRecord
from .callbacks import StageCallback, check_domains, check_policy
from .config import STAGE_OPTIONS, check_range
from .schedule import Stage


logger = logging.getLogger(__name__)


class RefreshCallback(StageCallback):
    """
    Ask [`SequentialGRPOTrainer`] for short training passes on the domains that the stages of others have damaged.

    A domain is damaged when its score after the last stage of the schedule, or the heal after it, is more than
    `max_drop` points below its highest score so far, and the 95% interval of that drop (paired bootstrap over prompts)
    excludes zero. Only domains that have been trained are refreshed.

    With `method="grpo"` their rewards train them, in turns: the next refresh goes to the domain with the fewest
    refreshes in this round, among those to the one furthest below its peak. With `method="distill"` one refresh takes
    all of them: the model answers their prompts, and the checkpoint of each domain's peak corrects every token
    (on-policy distillation by the reverse KL divergence, arXiv 2606.30406), without a reward. `kl/<domain>` is logged.

    A domain is finished when its recovered share, `(now - damaged) / (peak - damaged)`, has reached
    `until_recovered`, the interval of what is missing includes zero, its refreshes have used up `max_steps`, or the
    last `patience` of them brought no score above its best one of this round. The round ends when all are finished, or
    when any other domain, trained or not, is more than `max_drop` points below its score at the beginning of the
    round, with an interval that excludes zero. The next stage of the schedule, or a heal, begins a new round.

    The manifest keeps the `reason` of each refresh, with `method="distill"` by domain: `drop` (what is missing to the
    peak), `recovered`, `steps` and `refreshes` of the domain in this round, `without_improvement`, and the names of
    the stages `peak` and `damaged`.

    Args:
        domains (`list[str]`, *optional*):
            Domains to watch. Defaults to all domains that have been trained.
        max_drop (`float`, *optional*, defaults to `2.0`):
            Drop, in points of 100, that is tolerated, of the domain and of the others.
        at (`str`, *optional*, defaults to `"end"`):
            `"end"`: once all stages of the schedule have finished. `"stage"`: after each of them.
        max_steps (`int`, *optional*, defaults to `10`):
            Optimizer steps that a domain gets in one round. A refresh counts as one step at least.
        until_recovered (`float`, *optional*, defaults to `0.95`):
            Recovered share, up to 1, at which a domain is finished.
        patience (`int`, *optional*, defaults to `2`):
            Refreshes without improvement, one after the other, after which a domain is given up.
        steps_per_check (`int`, *optional*):
            Optimizer steps of one refresh, after which all domains are scored. Defaults to `max_steps`.
        overrides (`dict`, *optional*):
            Further settings of the refresh stages, e.g. `{"learning_rate": 1e-6}`.
        method (`str`, *optional*, defaults to `"grpo"`):
            `"grpo"` or `"distill"`.
        reward_weight (`float`, *optional*, defaults to `0.0`):
            With `method="distill"`, weight of the loss of GRPO that is added. With 0 no reward is called.

    Raises:
        `ValueError`: If an argument is out of range.
    """

    def __init__(
        self,
        domains: list[str] | None = None,
        max_drop: float = 2.0,
        at: str = "end",
        max_steps: int = 10,
        until_recovered: float = 0.95,
        patience: int = 2,
        steps_per_check: int | None = None,
        overrides: dict | None = None,
        method: str = "grpo",
        reward_weight: float = 0.0,
    ):
        steps_per_check = max_steps if steps_per_check is None else steps_per_check
        overrides = {} if overrides is None else overrides
        check_policy(at, max_drop, domains)
        if method not in ("grpo", "distill"):
            raise ValueError(f"method: expected 'grpo' or 'distill', found {method!r}")
        check_range("max_steps", max_steps, 1, whole=True)
        check_range("patience", patience, 1, whole=True)
        check_range("until_recovered", until_recovered, 1e-6, 1)
        check_range("steps_per_check", steps_per_check, 1, max_steps, whole=True)
        check_range("reward_weight", reward_weight, 0)
        if method == "grpo" and reward_weight:
            raise ValueError("reward_weight: expected method='distill', to which rewards are added")
        if not isinstance(overrides, dict) or {"max_steps", "num_train_epochs"} & overrides.keys():
            raise ValueError(f"overrides: expected settings by name, the length is steps_per_check, found {overrides}")
        check_names(overrides, STAGE_OPTIONS, "overrides")
        self.domains, self.max_drop, self.at = domains, max_drop, at
        self.max_steps, self.until_recovered, self.patience = max_steps, until_recovered, patience
        self.steps_per_check, self.overrides = steps_per_check, overrides
        self.method, self.reward_weight = method, reward_weight

    def on_stage_end(self, record: StageRecord, score_matrix: ScoreMatrix) -> None:
        for domain in record.domains if record.kind == "refresh" else []:
            if domain not in score_matrix.values[-1]:
                continue
            change = difference(*(row[domain] for row in score_matrix.values[:-3:-1]))
            if change.value <= 0:
                logger.warning(
                    f"{record.name}: the refresh made domain {domain!r} no better ({change:.1f} points); the "
                    f"stage before it, {score_matrix.stages[-2]}, is kept"
                )

    def request_stage(
        self, stages: list[StageRecord], score_matrix: ScoreMatrix, schedule_finished: bool
    ) -> Stage | None:
        check_domains("RefreshCallback, domains", self.domains, score_matrix)
        trained = [row for row, record in enumerate(stages) if record.kind == "train"]
        if not trained or (self.at == "end" and not schedule_finished):
            return None
        since = max(row for row, record in enumerate(stages) if record.kind in ("train", "heal"))
        if len(stages) > since + 1:
            last = stages[-1]
            for domain, change in collateral(score_matrix, since, last.domains).items():
                if change.value < -self.max_drop and change.high < 0:
                    logger.warning(
                        f"{last.name}: domain {domain!r} is {change:.1f} points from its score after "
                        f"{stages[since].name}, more than max_drop={self.max_drop}; no further refresh"
                    )
                    return None
        # Fewest refreshes, then the largest drop, then the order of the domains.
        turns = []
        for domain in dict.fromkeys(stages[row].domain for row in trained):
            if self.domains is None or domain in self.domains:
                reason = self._reason(domain, stages, score_matrix, since)
                if reason is not None:
                    turns.append((reason["refreshes"], -reason["drop"]["value"], len(turns), domain, reason))
        if not turns:
            return None
        if self.method == "grpo":
            *_, domain, reason = min(turns)
            steps = min(self.steps_per_check, self.max_steps - reason["steps"])
            return Stage(domain, "refresh", {**copy.deepcopy(self.overrides), "max_steps": steps}, reason)
        reasons = {domain: reason for *_, domain, reason in sorted(turns)}
        steps = min(self.steps_per_check, *(self.max_steps - reason["steps"] for reason in reasons.values()))
        teachers = {domain: reason["peak"] for domain, reason in reasons.items()}
        return distillation(
            teachers, {**copy.deepcopy(self.overrides), "max_steps": steps}, self.reward_weight, reasons
        )

    def _reason(self, domain: str, stages: list[StageRecord], score_matrix: ScoreMatrix, since: int) -> dict | None:
        """Why the domain should be refreshed, or `None` where it should not."""
        rows = score_matrix.values
        if domain not in rows[since] or domain not in rows[-1]:
            return None
        position = score_matrix.peak(domain, since)
        peak, damaged, now = (row[domain] for row in (rows[position], rows[since], rows[-1]))
        damage, drop = difference(peak, damaged), difference(peak, now)
        if damage.value <= self.max_drop or damage.low <= 0 or drop.low <= 0:
            return None
        own = [row for row in range(since + 1, len(stages)) if domain in stages[row].domains]
        steps = sum(max(stages[row].steps, 1) for row in own)
        best, without_improvement = damaged.mean(), 0
        for row in own:
            score = rows[row][domain].mean() if domain in rows[row] else -math.inf
            without_improvement = 0 if score > best else without_improvement + 1
            best = max(best, score)
        share = recovered(now, damaged, peak)
        if share.value >= self.until_recovered or steps >= self.max_steps or without_improvement >= self.patience:
            return None
        return {
            "drop": drop.to_dict(),
            "recovered": share.to_dict(),
            "steps": steps,
            "refreshes": len(own),
            "without_improvement": without_improvement,
            "peak": score_matrix.stages[position],
            "damaged": score_matrix.stages[since],
        }


def distillation(
    teachers: dict[str, str], overrides: dict, reward_weight: float = 0.0, reason: dict | None = None
) -> Stage:
    """
    A refresh by distillation; `teachers` are stages by domain. Groups say nothing to a teacher: without rewards each
    prompt gets as few completions as TRL takes, and a step as many prompts.
    """
    only = next(iter(teachers)) if len(teachers) == 1 else None
    settings = {**({} if reward_weight else {"num_generations": 2}), **overrides}
    settings |= {"teachers": teachers, "reward_weight": reward_weight}
    return Stage(only, "refresh", settings, reason or {})
