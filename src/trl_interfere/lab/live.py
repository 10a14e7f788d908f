"""Roll back routes of a packed run of the lab and measure what that does, in seconds."""

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer

from ..analysis.config import InterferenceConfig
from ..analysis.gradients import mean_loss
from ..analysis.references import collect_references
from ..analysis.report import REPORT_NAME, InterferenceReport
from ..analysis.routes import RouteMap
from ..domain import Domain
from ..evaluation.bootstrap import Interval, difference
from ..evaluation.metrics import recovered
from ..evaluation.scorer import Scorer
from ..repair.held import rolled_back
from ..repair.route_rollback import RouteRollback
from .build import MODEL_FOLDER
from .domains import REWARDS, lab_rows
from .packed import load_packed


PROMPTS = 128  # of the test split, for each domain
LOSS_PROMPTS = 128  # of the selection split, for each domain
MAX_COMPLETION_LENGTH = 16
MAX_KEPT = 256  # measurements
MAX_STEP = 4.0


@dataclass(frozen=True)
class Effect:
    """
    What a rollback did.

    Args:
        recovered ([`Interval`]):
            Share of the lost score of the earlier domain, on test prompts.
        collateral (`dict[str, Interval]`):
            Change of every other domain, in points, on test prompts.
        loss (`float`):
            Share of the damage, in nats, that was taken back, on the references of the selection split.
        later_loss (`float`):
            Change of the mean loss of the later domains, in nats per token.
        routes (`int`):
            Number of routes that were rolled back.
    """

    recovered: Interval
    collateral: dict[str, Interval]
    loss: float
    later_loss: float
    routes: int


@dataclass(frozen=True)
class LiveResult:
    """
    A rollback beside what was predicted of it, and beside its control.

    Args:
        predicted_loss (`float`):
            Share of the damage that it should take back, see [`LiveRollback`].
        predicted_later_loss (`float`):
            Change of the mean loss of the later domains by their attribution, in nats per token.
        measured ([`Effect`]):
            What it did.
        control ([`Effect`]):
            What as many random routes of the same scope did at the same step.
        seconds (`float`):
            Time that both took.
    """

    predicted_loss: float
    predicted_later_loss: float
    measured: Effect
    control: Effect
    seconds: float


class LiveRollback:
    """
    Both checkpoints of a packed run in memory.

    The prediction is linear in the step:

    ```
    predicted = α Σ_r (f_r + 2 s_r + 3 (a_r - f_r - s_r)) / (L(θ1) - L(θ0))
    ```

    with `f_r` and `s_r` the first- and second-order damage of route r and `a_r` all that is attributed to it. A term
    of order k of the damage is homogeneous of degree k in the update, so that its slope at θ1, where the rollback
    begins, is k times the term (Euler's theorem on homogeneous functions). What is above second order is
    taken for third.
    Interaction of the chosen routes with each other is left out: the prediction is for small budgets and steps. Of the
    later domains only `a_r` is known. Their loss is flat at θ1, to which they were trained, so that `-α Σ_r a_r`
    overstates what a small rollback costs them.

    Args:
        folder (`pathlib.Path`):
            Folder of the run, see [`~lab.packed.pack`].
        prompts (`int`, *optional*, defaults to `PROMPTS`):
            Test prompts of each domain.

    Raises:
        `ValueError`: If the folder holds no packed run.
    """

    def __init__(self, folder: Path, prompts: int = PROMPTS):
        folder = Path(folder)
        reports = sorted(path.parent for path in folder.glob(f"analysis/*/{REPORT_NAME}"))
        if not reports:
            raise ValueError(f"{folder}: expected a packed run of the lab with a report in analysis/, found none")
        self.report = InterferenceReport.from_pretrained(reports[0])
        self.model = load_packed(folder, Path(self.report.after).name)
        before = load_packed(folder, Path(self.report.before).name)
        self.before = dict(before.named_parameters())
        self.route_map = RouteMap(self.model.config)
        self.earlier, self.later = self.report.earlier, self.report.later
        self.prompts = prompts
        tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
        self._scorer = Scorer(tokenizer, max_new_tokens=MAX_COMPLETION_LENGTH, batch_size=4 * prompts, temperature=1.0)
        names = sorted(REWARDS, key=lambda name: (name != self.earlier, name))
        self._rows = {name: lab_rows(name, "test", prompts) for name in names}
        config = InterferenceConfig(reference="dataset", reference_column="answer")
        self._references = {}
        for name in (self.earlier, *self.later):
            rows = Dataset.from_list(lab_rows(name, "selection", LOSS_PROMPTS))
            domain = Domain(name=name, selection_dataset=rows, reward_funcs=REWARDS[name])
            references = collect_references(self.model, tokenizer, domain, config)
            self._references[name] = references.batches(LOSS_PROMPTS, tokenizer.pad_token_id, self.model.device)
        self._kept: OrderedDict[tuple, Effect] = OrderedDict()
        self._lock = threading.Lock()  # a rollback changes the one model in place for a while
        self.peak = self._scores(before)
        self.damaged = self._scores(self.model)
        self._loss_before = {name: mean_loss(before, batches) for name, batches in self._references.items()}
        self._loss_after = self._losses()

    def measure(
        self, criterion: str = "damage", budget: float = 0.02, step: float = 1.0, scope: str = "mlp", seed: int = 0
    ) -> LiveResult:
        """
        Roll back, measure, and put everything back.

        Args:
            criterion (`str`, *optional*, defaults to `"damage"`):
                What routes are ranked by, see `repair.criteria.CRITERIA`.
            budget (`float`, *optional*, defaults to `0.02`):
                Share of the routes of the scope.
            step (`float`, *optional*, defaults to `1.0`):
                α.
            scope (`str`, *optional*, defaults to `"mlp"`):
                `"mlp"`, `"attention"` or `"joint"`.
            seed (`int`, *optional*, defaults to `0`):
                Seed of the random routes of the control.

        Returns:
            [`LiveResult`]: What was predicted and what was measured.

        Raises:
            `ValueError`: If an argument is out of range.
        """
        start = time.perf_counter()
        if not 0 <= step <= MAX_STEP:
            raise ValueError(f"step: expected 0 to {MAX_STEP}, found {step}")
        chosen = RouteRollback(criterion=criterion, budget=budget, scope=scope, step=step, seed=seed + 1)
        control = RouteRollback(criterion="random", budget=budget, scope=scope, step=step, seed=seed)
        routes = chosen.select(self.report, self.route_map)
        measures = self.report.routes
        result = LiveResult(
            predicted_loss=float(step * _slope(measures, routes) / self.report.damage),
            predicted_later_loss=float(-step * measures["later_damage"][routes].sum()),
            measured=self._effect(chosen),
            control=self._effect(control),
            seconds=0.0,
        )
        return LiveResult(**{**vars(result), "seconds": time.perf_counter() - start})

    def _effect(self, rollback: RouteRollback) -> Effect:
        key = (rollback.criterion, rollback.budget, rollback.scope, rollback.step, rollback.seed)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            routes = rollback.select(self.report, self.route_map)
            with rolled_back(self.model, self.before, self.route_map, routes, rollback.step):
                scores, losses = self._scores(self.model), self._losses()
            before, after = self._loss_before[self.earlier], self._loss_after[self.earlier]
            effect = Effect(
                recovered=recovered(scores[self.earlier], self.damaged[self.earlier], self.peak[self.earlier]),
                collateral={
                    name: difference(scores[name], self.damaged[name]) for name in scores if name != self.earlier
                },
                loss=(after - losses[self.earlier]) / (after - before),
                later_loss=float(np.mean([losses[name] - self._loss_after[name] for name in self.later])),
                routes=len(routes),
            )
            self._kept[key] = effect
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
            return effect

    def complete(self, prompt: str, rollback: RouteRollback, temperature: float, seed: int, tokens: int) -> str:
        """
        What the rolled back model answers.

        Args:
            prompt (`str`):
                The prompt.
            rollback ([`RouteRollback`]):
                The rollback.
            temperature (`float`):
                Temperature of sampling; 0 is greedy.
            seed (`int`):
                Seed of sampling.
            tokens (`int`):
                Longest completion.

        Returns:
            `str`: The answer.
        """
        scorer = Scorer(self._scorer.tokenizer, max_new_tokens=tokens, temperature=temperature, seed=seed)
        with self._lock:
            routes = rollback.select(self.report, self.route_map)
            with rolled_back(self.model, self.before, self.route_map, routes, rollback.step) as model:
                return scorer.complete(model, [prompt])[0]

    def _scores(self, model) -> dict[str, np.ndarray]:
        # All domains in one batch: one pass over the tokens instead of four.
        rows = [(name, row) for name, of_domain in self._rows.items() for row in of_domain]
        completions = self._scorer.complete(model, [row["prompt"] for _, row in rows])
        scores: dict[str, list[float]] = {name: [] for name in self._rows}
        for (name, row), completion in zip(rows, completions, strict=True):
            columns = {key: [value] for key, value in row.items() if key != "prompt"}
            scores[name] += REWARDS[name](prompts=[row["prompt"]], completions=[completion], **columns)
        return {name: np.array(values) for name, values in scores.items()}

    def _losses(self) -> dict[str, float]:
        return {name: mean_loss(self.model, batches) for name, batches in self._references.items()}


def _slope(measures: dict[str, np.ndarray], routes: np.ndarray) -> float:
    first, second, whole = (measures[name][routes].sum() for name in ("first_order", "second_order", "damage"))
    return float(first + 2 * second + 3 * (whole - first - second))
