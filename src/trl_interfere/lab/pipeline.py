"""The whole story on the embedded model: train in sequence, diagnose, roll back with controls, refresh."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PrinterCallback

from ..analysis.analyzer import InterferenceAnalyzer
from ..analysis.config import InterferenceConfig
from ..analysis.contraction import contraction
from ..analysis.report import InterferenceReport
from ..analysis.routes import RouteMap
from ..analysis.stage_edits import StageEdits, stage_edits
from ..checkpoint import Checkpoint
from ..evaluation.bootstrap import Interval, difference
from ..evaluation.metrics import recovered
from ..hub.callback import HubCallback
from ..models import load_model
from ..repair.interpolation import interpolated
from ..repair.rollback import RouteRollback, line_search, rolled_back
from ..reporting.claims import edit_claims, forgetting_claims, refresh_claims, report_claims, rollback_claims
from ..reporting.plots import (
    plot_changed_overlaps,
    plot_damage_concentration,
    plot_module_cosines,
    plot_rollback,
    plot_score_matrix,
)
from ..run import StageRecord, read_json, write_atomically
from ..training.callbacks import StageCallback
from ..training.config import SequentialGRPOConfig
from ..training.refresh import RefreshCallback
from ..training.trainer import SequentialGRPOTrainer
from .build import MODEL_FOLDER
from .domains import SIZES, TASKS, lab_domain
from .progress import LabProgress


SCHEMA_VERSION = 1
STEPS_PER_STAGE = 100
LEARNING_RATE = 1e-4
STAGE_LEARNING_RATES = {"math": 4e-5, "writing": 5e-5}
MAX_COMPLETION_LENGTH = 16
REFRESH_SHARE = 0.1  # of the steps of a stage
RANDOM_DRAWS = 5
CRITERIA = ("damage", "second_order", "first_order", "route_conflict", "magnitude")
CONTROLS = ("random", "random_matched")
BUDGET = 0.02
SEARCHED_STEPS = (1.0, 1.5, 2.0)
CURVE_BUDGETS = (0.005, 0.08, 0.32)
SUBSPACE_SIZE = 6  # of the pair that the repairs are for
SUBSPACE_PROMPTS = 64
ORDER_NAME = ".order.json"  # analyses and repairs are of pairs of one order


def check_order(order: list[str]) -> None:
    """
    Refuse an order that the lab cannot run.

    Args:
        order (`list[str]`):
            Names of the domains in the order of training.

    Raises:
        `ValueError`: If a name is unknown or occurs twice, or there are fewer than two.
    """
    for name in order:
        if name not in TASKS:
            raise ValueError(f"order: unknown domain {name!r}, expected some of {list(TASKS)}")
    if len(set(order)) != len(order) or len(order) < 2:
        raise ValueError(f"order: expected at least two different domains, found {order}")


class Lab:
    """
    One run of the lab, in one folder. Every part is kept on disk when it is done, so that a run that was killed goes
    on where it stopped and ends with the same results.

    Args:
        output_dir (`str` or `pathlib.Path`):
            Folder of the run.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the training.
        order (`list[str]`, *optional*):
            Names of the domains in the order of training. Defaults to code, math, qa, writing.
        steps (`int`, *optional*, defaults to `STEPS_PER_STAGE`):
            Optimizer steps of each stage.
        prompts (`int`, *optional*, defaults to `512`):
            Test prompts of each domain.
        progress ([`LabProgress`], *optional*):
            Shows how far the run is.

    Raises:
        `ValueError`: If an argument is out of range, or the folder holds something else.
    """

    def __init__(
        self,
        output_dir: str | Path,
        seed: int = 0,
        order: list[str] | None = None,
        steps: int = STEPS_PER_STAGE,
        prompts: int = SIZES["test"],
        progress: LabProgress | None = None,
    ):
        self.folder = Path(output_dir)
        self.order = list(TASKS) if order is None else order
        check_order(self.order)
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, found {steps}")
        if not 1 <= prompts <= SIZES["test"]:
            raise ValueError(f"prompts: expected 1 to {SIZES['test']}, found {prompts}")
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder}: expected a folder, found a file")
        visible = [path for path in self.folder.glob("*") if not path.name.startswith(".")]
        if visible and not (self.folder / "stages.json").exists():
            raise ValueError(f"{self.folder}: holds files that are not of a lab run, choose another output folder")
        if (self.folder / ORDER_NAME).exists():
            found = json.loads((self.folder / ORDER_NAME).read_text())
            if found != self.order:
                raise ValueError(
                    f"{self.folder}: holds a run of the lab with the order {','.join(found)}, found "
                    f"{','.join(self.order)}; choose another output folder"
                )
        self.seed = seed
        self.steps = steps
        self.progress = progress or LabProgress(quiet=True)
        self.domains = {name: lab_domain(name, prompts) for name in self.order}
        # What the story follows: math, or the first domain where math is not followed by another one.
        self.earlier = "math" if "math" in self.order[:-1] else self.order[0]

    def run(self) -> dict[str, Any]:
        """
        Run everything that is not done.

        Returns:
            `dict`: Content of `results.json`.
        """
        trainer = self._trainer()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / ORDER_NAME, json.dumps(self.order) + "\n")
        self._train(trainer)
        pairs, reports = self._analyze(trainer.run.stages)
        rollback = self._roll_back(trainer, pairs, reports)
        refresh = self._refresh(trainer, pairs, reports)
        edits = self._edits(trainer.run.stages)
        shown = [row for row in rollback if row["pair"] == 0]
        claims = [
            *report_claims(reports[0]),
            *edit_claims(edits),
            *forgetting_claims(trainer.score_matrix),
            *refresh_claims(refresh, shown),
            *rollback_claims(shown),
        ]
        results = {
            "schema_version": SCHEMA_VERSION,
            "seed": self.seed,
            "order": self.order,
            "steps_per_stage": self.steps,
            "stages": [self._stage_row(record) for record in trainer.run.stages],
            "pairs": [
                self._pair_row(earlier, later, report)
                for (earlier, later, *_), report in zip(pairs, reports, strict=True)
            ],
            "rollback": rollback,
            "refresh": refresh,
            "edits": edits.to_dict(),
            "claims": [claim.to_dict() for claim in claims],
            "seconds": self._seconds(),
        }
        figures = self.folder / "figures"
        figures.mkdir(exist_ok=True)
        for kind in ("sparsity", "overlaps", "damage_by_layer", "eigenvalues"):
            reports[0].plot(kind).savefig(figures / f"{kind}.png", dpi=150)
        for name, figure in (
            ("changed_overlaps", plot_changed_overlaps(edits)),
            ("score_matrix", plot_score_matrix(trainer.score_matrix)),
            ("module_cosines", plot_module_cosines(reports[-1])),
            ("damage_concentration", plot_damage_concentration(reports)),
            ("rollback_curve", plot_rollback(shown, self.earlier)),
        ):
            figure.savefig(figures / f"{name}.png", dpi=150)
        write_atomically(self.folder / "results.json", json.dumps(results, indent=2) + "\n")
        return results

    def _trainer(self) -> SequentialGRPOTrainer:
        args = SequentialGRPOConfig(
            output_dir=str(self.folder),
            seed=self.seed,
            order=self.order,
            max_steps=self.steps,
            learning_rate=LEARNING_RATE,
            stage_overrides={
                name: {"learning_rate": rate} for name, rate in STAGE_LEARNING_RATES.items() if name in self.order
            },
            lr_scheduler_type="constant",
            adam_beta2=0.99,
            per_device_train_batch_size=128,
            gradient_accumulation_steps=1,
            num_generations=8,
            max_completion_length=MAX_COMPLETION_LENGTH,
            temperature=1.0,
            score_temperature=1.0,
            score_batch_size=256,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_steps=10,
            save_steps=max(1, self.steps // 5),
            save_total_limit=1,
            report_to=[],
            disable_tqdm=True,
            log_level="error",
        )
        domains, callbacks = list(self.domains.values()), [HubCallback()]
        trainer = SequentialGRPOTrainer(str(MODEL_FOLDER), args, domains, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self.progress)
        trainer.add_callback(_Stopwatch(self))
        return trainer

    def _train(self, trainer: SequentialGRPOTrainer) -> None:
        self.progress.begin("train", len(self.order) * self.steps)
        trainer.train(resume_from_checkpoint=True)
        self.progress.end()

    def _analyze(self, stages: list[StageRecord]) -> tuple[list[tuple], list[InterferenceReport]]:
        trained = {record.domain: record for record in stages if record.kind == "train"}
        position = self.order.index(self.earlier)
        following = self.order[position + 1 :]
        peak = trained[self.earlier]
        base = stages[peak.index - 1]
        # (earlier, later domains, checkpoint before the earlier domain's own stage, before, after)
        pairs = [(self.earlier, following, base, peak, trained[following[-1]])]
        if len(following) > 1:
            pairs.append((self.earlier, following[:1], base, peak, trained[following[0]]))
        reports = []
        self.progress.begin("analyze", len(pairs) * 5 + 1)
        for index, (earlier, later, base, before, after) in enumerate(pairs):
            folder = self.folder / "analysis" / f"{index}-{earlier}-after-{'-'.join(later)}"
            if not (folder / "report.json").exists():
                size = SUBSPACE_SIZE if index == 0 else 0
                with self._timed("analyze"):
                    report = self._analyzer(base, before, after, subspace_size=size).analyze(
                        self.domains[earlier],
                        [self.domains[name] for name in later],
                        progress=lambda part: self.progress.advance(part),
                        others=[domain for name, domain in self.domains.items() if name not in (earlier, *later)],
                    )
                    report = self._with_relative_names(report)
                    report.save_figures(folder / "figures")
                    report.save_pretrained(folder)
            reports.append(InterferenceReport.from_pretrained(folder))
        self.progress.end()
        return pairs, reports

    def _analyzer(
        self, base: StageRecord, before: StageRecord, after: StageRecord, subspace_size: int = 0
    ) -> InterferenceAnalyzer:
        config = InterferenceConfig(
            reference="dataset",
            reference_column="answer",
            batch_size=64,
            quadrature_nodes=6,
            subspace_size=subspace_size,
            subspace_prompts=SUBSPACE_PROMPTS,
        )
        return InterferenceAnalyzer.from_pretrained(
            before=self._weights(before), after=self._weights(after), base=self._weights(base), config=config
        )

    def _weights(self, record: StageRecord) -> Path:
        return MODEL_FOLDER if record.folder is None else self.folder / record.folder

    def _with_relative_names(self, report: InterferenceReport) -> InterferenceReport:
        updates = {
            name: {**update, **{key: self._relative(update[key]) for key in ("before", "after")}}
            for name, update in report.updates.items()
        }
        checkpoints = {name: self._relative(getattr(report, name)) for name in ("base", "before", "after")}
        return replace(report, **checkpoints, updates=updates)

    def _relative(self, checkpoint: str | None) -> str | None:
        if checkpoint is None or Path(checkpoint) == MODEL_FOLDER:
            return checkpoint and "lab"
        return Path(checkpoint).relative_to(self.folder).as_posix()

    def _edits(self, stages: list[StageRecord]) -> StageEdits:
        trained = [record for record in stages if record.kind == "train"]
        checkpoints = [Checkpoint(self._weights(record)) for record in (stages[0], *trained)]
        edits = stage_edits(checkpoints, [record.domain for record in trained], RouteMap(checkpoints[0].config))
        for update in edits.updates.values():
            update.before, update.after = (self._relative(name) for name in (update.before, update.after))
        return edits

    def _contraction(self, pair: tuple, report: InterferenceReport, refreshed: StageRecord) -> dict[str, Any] | None:
        """How much of the damage's displacement a refresh left, within the conflict subspace and beside it."""
        if report.directions is None or not len(report.directions):
            return None
        *_, before, after = pair
        models = [load_model(self._weights(record)) for record in (before, after, refreshed)]
        tensors = (dict(model.named_parameters()) for model in models)
        return contraction(RouteMap(models[0].config), *tensors, report.directions, self.seed)

    def _roll_back(
        self, trainer: SequentialGRPOTrainer, pairs: list[tuple], reports: list[InterferenceReport]
    ) -> list[dict[str, Any]]:
        plan = [  # pair, criterion, budget, scope, how the step is chosen
            *((0, name, BUDGET, "mlp", rule) for name in (*CRITERIA, *CONTROLS) for rule in ("fixed", "optimal")),
            *((0, "damage_protected", BUDGET, "mlp", rule) for rule in ("fixed", "optimal")),
            *((0, "damage", budget, "mlp", "optimal") for budget in CURVE_BUDGETS),
            *((0, "random", budget, "mlp", "optimal") for budget in CURVE_BUDGETS[2:]),
            *((0, name, 0.32, "joint", "optimal") for name in ("damage", "random")),
            (0, "interpolation", 1.0, "all", "optimal"),
            *((1, name, BUDGET, "mlp", "fixed") for name in ("damage", "route_conflict", "random") if len(pairs) > 1),
        ]
        path = self.folder / "repair" / "rollback.json"
        rows = read_json(path, SCHEMA_VERSION)["rows"] if path.exists() else []
        self.progress.begin("roll back", len(plan))
        self.progress.advance("", amount=len(rows))
        bench = None
        for pair, criterion, budget, scope, rule in plan[len(rows) :]:
            with self._timed("repair"):
                if bench is None or bench.pair != pair:
                    bench = _RepairBench(self, trainer, pair, pairs[pair], reports[pair])
                rows.append(bench.row(criterion, budget, scope, rule, rows))
            self.progress.advance(f"{criterion}, {100 * budget:g}% of {scope}")
            write_atomically(path, json.dumps({"schema_version": SCHEMA_VERSION, "rows": rows}, indent=1) + "\n")
        self.progress.end()
        return rows

    def _refresh(
        self, trainer: SequentialGRPOTrainer, pairs: list[tuple], reports: list[InterferenceReport]
    ) -> dict[str, Any] | None:
        steps = max(1, int(REFRESH_SHARE * self.steps))
        self.progress.begin("refresh", steps)
        overrides = {"learning_rate": LEARNING_RATE}
        trainer.add_callback(RefreshCallback(max_steps=steps, domains=[self.earlier], overrides=overrides))
        trainer.train(resume_from_checkpoint=True)
        self.progress.end()
        stages = trainer.run.stages
        if stages[-1].kind != "refresh":
            return None  # nothing was lost, or no more than max_drop or noise
        read = trainer.run.scores
        peak = next(record for record in stages if record.domain == self.earlier)
        damaged, repaired = stages[-2], stages[-1]
        share = recovered(*(read(record, self.earlier) for record in (repaired, damaged, peak)))
        return {
            "domain": self.earlier,
            "steps": repaired.steps,
            **_share_fields(share),
            "collateral": {
                name: difference(read(repaired, name), read(damaged, name)).value
                for name in self.order
                if name != self.earlier
            },
            "contraction": self._contraction(pairs[0], reports[0], repaired),
        }

    def _stage_row(self, record: StageRecord) -> dict[str, Any]:
        scores = {
            name: {key: entry[key] for key in ("value", "low", "high", "n")} for name, entry in record.scores.items()
        }
        return {
            "index": record.index,
            "kind": record.kind,
            "domain": record.domain,
            "steps": record.steps,
            "seconds": record.seconds,
            "scores": scores,
        }

    def _pair_row(self, earlier: str, later: list[str], report: InterferenceReport) -> dict[str, Any]:
        return {
            "earlier": earlier,
            "later": later,
            "global_cosine": report.cosines["global"],
            "most_conflicting": report.extreme_module(conflicting=True),
            "most_synergistic": report.extreme_module(conflicting=False),
            "loss_before": report.loss_before,
            "loss_after": report.loss_after,
            "first_order": report.first_order,
            "second_order": report.second_order,
            "attributed": report.attributed,
            "outside_routes": report.outside_routes,
        }

    def _seconds(self) -> dict[str, float]:
        path = self.folder / "seconds.json"
        spent = json.loads(path.read_text()) if path.exists() else {}
        return {part: round(spent.get(part, 0.0), 1) for part in ("train", "evaluate", "analyze", "repair")}

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(part, time.perf_counter() - start)

    def add_seconds(self, part: str, seconds: float) -> None:
        """
        Add to the time spent on a part of the run, over all its processes.

        Args:
            part (`str`):
                `"train"`, `"evaluate"`, `"analyze"` or `"repair"`.
            seconds (`float`):
                Seconds to add.
        """
        path = self.folder / "seconds.json"
        spent = json.loads(path.read_text()) if path.exists() else {}
        spent[part] = spent.get(part, 0.0) + seconds
        write_atomically(path, json.dumps(spent) + "\n")


def _share_fields(share: Interval) -> dict[str, float | None]:
    # Where nothing was lost, nothing can be recovered: null, which JSON has and NaN it has not.
    fields = {"recovered": share.value, "low": share.low, "high": share.high}
    return {**{name: value if math.isfinite(value) else None for name, value in fields.items()}, "n": share.n}


class _Stopwatch(StageCallback):
    """Splits the time of a stage into training and evaluation."""

    def __init__(self, lab: Lab):
        self.lab = lab
        self.since = time.perf_counter()

    def _lap(self) -> float:
        before, self.since = self.since, time.perf_counter()
        return self.since - before

    def on_stage_begin(self, index, stage):
        self._lap()

    def on_train_end(self, args, state, control, **kwargs):
        self.lab.add_seconds("train", self._lap())

    def on_stage_end(self, record, score_matrix):
        self.lab.add_seconds("evaluate", self._lap())


class _RepairBench:
    """Both checkpoints of a pair in memory, and what is needed to score a repair."""

    def __init__(self, lab: Lab, trainer: SequentialGRPOTrainer, pair: int, spec: tuple, report: InterferenceReport):
        self.pair, self.report, self.lab = pair, report, lab
        earlier, _, base, before, after = spec
        self.earlier = earlier
        analyzer = lab._analyzer(base, before, after)
        self.route_map = analyzer.route_map
        self.model = analyzer.after
        self.before = dict(analyzer.before.named_parameters())
        read = trainer.run.scores
        self.peak = read(before, earlier)
        self.damaged = {name: read(after, name) for name in lab.order}
        self.scorer = trainer.scorer

    def objective(self, model) -> float:
        """What the line search minimises: minus the mean score of all domains, on the selection split."""
        domains = self.lab.domains.values()
        scores = [self.scorer.score(model, domain, domain.selection_dataset).values.mean() for domain in domains]
        return -float(np.mean(scores))

    def row(self, criterion: str, budget: float, scope: str, rule: str, done: list[dict]) -> dict[str, Any]:
        """One repair, measured; a control with `rule="optimal"` takes the step that `damage` took at its budget."""
        draws = RANDOM_DRAWS if criterion in CONTROLS else 1
        same = {"pair": self.pair, "criterion": criterion, "budget": budget, "scope": scope}
        like = {"pair": self.pair, "criterion": "damage", "budget": budget, "scope": scope, "step_rule": rule}
        steps, scores = [], []
        for draw in range(draws):
            if criterion == "interpolation":
                step, result = self._interpolate()
            else:
                protection = 1.0 if criterion == "damage_protected" else 0.0
                rollback = RouteRollback(
                    criterion=criterion.removesuffix("_protected"),
                    budget=budget,
                    scope=scope,
                    protection=protection,
                    seed=draw,
                )
                routes = rollback.select(self.report, self.route_map)
                arguments = (self.model, self.before, self.route_map, routes)
                if rule == "fixed":
                    step = 1.0
                elif criterion in CONTROLS:
                    step = next(row["step"] for row in done if like.items() <= row.items())
                else:
                    step = line_search(*arguments, self.objective, steps=SEARCHED_STEPS)
                for row in done:  # the best step may be the fixed one, which is measured
                    if same.items() <= row.items() and row["step"] == step:
                        return {**row, "step_rule": rule}
                with rolled_back(*arguments, step):
                    result = self._scores()
            steps.append(step)
            scores.append(result)
        mean = {name: np.mean([result[name] for result in scores], axis=0) for name in scores[0]}
        share = recovered(mean[self.earlier], self.damaged[self.earlier], self.peak)
        return {
            "pair": self.pair,
            "criterion": criterion,
            "scope": scope,
            "budget": budget,
            "step": float(np.mean(steps)),
            "step_rule": rule,
            **_share_fields(share),
            "draws": draws,
            "split": "test",
            "collateral": {
                name: difference(values, self.damaged[name]).value
                for name, values in mean.items()
                if name != self.earlier
            },
        }

    def _interpolate(self) -> tuple[float, dict[str, np.ndarray]]:
        shares = (0.1, 0.2, 0.3, 0.4, 0.5)
        losses = []
        for share in shares:
            with interpolated(self.model, self.before, share):
                losses.append(self.objective(self.model))
        share = shares[int(np.argmin(losses))]
        with interpolated(self.model, self.before, share):
            return share, self._scores()

    def _scores(self) -> dict[str, np.ndarray]:
        return {
            name: self.scorer.score(self.model, domain, domain.eval_dataset).values
            for name, domain in self.lab.domains.items()
        }
