"""The whole story on the embedded model: train in sequence, see what broke, heal it, compare the ways to repair it."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from transformers import PrinterCallback

from ..analysis.analyzer import InterferenceAnalyzer
from ..analysis.config import InterferenceConfig
from ..analysis.conflict_subspace import contraction
from ..analysis.report import InterferenceReport
from ..analysis.routes import RouteMap
from ..analysis.weight_diff import stage_edits
from ..checkpoint import Checkpoint
from ..evaluation.score_matrix import ScoreMatrix
from ..models import load_model
from ..repair.comparison import Comparison
from ..repair.heal import heal_run
from ..reporting import plots
from ..reporting.claims import edit_claims, forgetting_claims, refresh_claims, report_claims, rollback_claims
from ..reporting.verdict import arm_of
from ..run import Run, StageRecord, read_json, write_atomically, write_json
from ..training.config import SequentialGRPOConfig
from ..training.trainer import SequentialGRPOTrainer
from . import MODEL_FOLDER
from .domains import SIZES, TASKS, lab_domain
from .progress import LabProgress


SCHEMA_VERSION = 2
STEPS_PER_STAGE = 100
LEARNING_RATE = 1e-4
STAGE_LEARNING_RATES = {"math": 4e-5, "writing": 5e-5}
MAX_COMPLETION_LENGTH = 16
REFRESH_SHARE = 0.1  # of the steps of a stage
ANALYSIS = {"reference": "dataset", "reference_column": "answer", "batch_size": 64}
SUBSPACE_SIZE = 6  # of the pair that the repairs are for
SUBSPACE_PROMPTS = 64
# Criterion, budget, scope and protection of the rollbacks of routes.
ROLLBACKS = (
    ("damage", 0.02, "mlp", 1.0),
    ("route_conflict", 0.02, "mlp", 0.0),
    ("random", 0.02, "mlp", 0.0),
    ("damage", 0.32, "joint", 1.0),
)


class Lab:
    """
    One run of the lab, in one folder. Every part is kept on disk when it is done, so that a run that was killed goes
    on where it stopped and ends with the same results.
    """

    def __init__(
        self,
        output_dir: str | Path,
        seed: int = 0,
        order: list[str] | None = None,
        steps: int = STEPS_PER_STAGE,
        prompts: int = SIZES["test"],
        rate: float = 1,
    ):
        self.folder = Path(output_dir)
        self.order = list(TASKS) if order is None else order
        if not set(self.order) <= set(TASKS) or len(set(self.order)) != len(self.order) or len(self.order) < 2:
            raise ValueError(f"order: expected at least two different ones of {list(TASKS)}, found {self.order}")
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, found {steps}")
        if not 1 <= prompts <= SIZES["test"]:
            raise ValueError(f"prompts: expected 1 to {SIZES['test']}, found {prompts}")
        visible = [path for path in self.folder.glob("*") if not path.name.startswith(".")]
        if visible and not (self.folder / "stages.json").exists():
            raise ValueError(f"{self.folder}: holds files that are not of a lab run, choose another output folder")
        self.seed, self.steps, self.rate = seed, steps, rate
        self.progress = LabProgress()
        self.domains = {name: lab_domain(name, prompts) for name in self.order}
        # What the story follows: math, or the first domain where math is not followed by another one.
        self.earlier = "math" if "math" in self.order[:-1] else self.order[0]

    def run(self) -> dict[str, Any]:
        """Run everything that is not done."""
        trainer = self.train()
        reports = self._analyze()
        rivals = self._rivals(trainer, reports[0])
        healed, edits = self._heal(trainer), self._edits()
        self.progress.bar.close()
        run = Run(self.folder)
        results = {
            "schema_version": SCHEMA_VERSION,
            "seed": self.seed,
            "order": self.order,
            "steps_per_stage": self.steps,
            "stages": [_stage_row(record) for record in run.stages],
            "pairs": [_pair_row(report) for report in reports],
            "healed": healed,
            "rivals": rivals,
            "edits": edits,
            "seconds": {record.name: round(record.seconds, 1) for record in run.stages},
        }
        claims = report_claims(reports[0]) + edit_claims(edits["changed"]) + forgetting_claims(trainer.score_matrix)
        claims += refresh_claims(rivals, self.earlier) + rollback_claims(rivals, self.earlier)
        results["claims"] = [claim._asdict() for claim in claims]
        plots.save_figures(reports[0], self.folder / "figures")
        for name, figure in {
            "changed_overlaps": plots.plot_overlaps(edits["changed"], "changed"),
            "scores": plots.plot_scores(ScoreMatrix.from_run(run)),
            "module_cosines": plots.plot_module_cosines(reports[-1]),
            "damage_concentration": plots.plot_damage_concentration(reports),
            "pareto": plots.plot_pareto([arm_of(row) for row in filter(None, [healed, *rivals])]),
        }.items():
            figure.savefig(self.folder / "figures" / f"{name}.png", dpi=150)
        write_json(self.folder / "results.json", results)
        return results

    def args(self, **changes: Any) -> SequentialGRPOConfig:
        """Settings of the training."""
        rates = {name: self.rate * rate for name, rate in STAGE_LEARNING_RATES.items() if name in self.order}
        settings = {
            "output_dir": str(self.folder),
            "seed": self.seed,
            "order": self.order,
            "max_steps": self.steps,
            "learning_rate": self.rate * LEARNING_RATE,
            "stage_overrides": {name: {"learning_rate": rate} for name, rate in rates.items()},
            "lr_scheduler_type": "constant",
            "adam_beta2": 0.99,
            "per_device_train_batch_size": 128,
            "gradient_accumulation_steps": 1,
            "num_generations": 8,
            "max_completion_length": MAX_COMPLETION_LENGTH,
            "temperature": 1.0,
            "score_temperature": 1.0,
            "score_batch_size": 256,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "logging_steps": 10,
            "save_steps": max(1, self.steps // 5),
            "save_total_limit": 1,
            "report_to": [],
            "disable_tqdm": True,
            "log_level": "error",
        }
        return SequentialGRPOConfig(**{**settings, **changes})

    def train(self) -> SequentialGRPOTrainer:
        """Train through the domains, as far as it is not done."""
        trainer = SequentialGRPOTrainer(model=str(MODEL_FOLDER), args=self.args(), domains=list(self.domains.values()))
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self.progress)
        self.progress.begin("train", len(self.order) * self.steps)
        trainer.train(resume_from_checkpoint=True)
        # What the commands that take a run need to know of it.
        function = f"{lab_domain.__module__}.{lab_domain.__name__}"
        sizes = {name: len(domain.eval_dataset) for name, domain in self.domains.items()}
        domains = [{"domain": function, "name": name, "options": {"test_size": size}} for name, size in sizes.items()]
        recipe = {"model": MODEL_FOLDER.name, "domains": domains, "analysis": ANALYSIS}
        write_atomically(self.folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
        return trainer

    def refreshed(self, domain: str, model: str | Path, folder: Path, steps: int) -> SequentialGRPOTrainer:
        """A trainer after some steps of GRPO on one domain, from other weights, in a folder of its own."""
        args = self.args(output_dir=str(folder), order=[domain], max_steps=steps, stage_overrides=None)
        domains = [replace(self.domains[domain], eval_dataset=None)]
        trainer = SequentialGRPOTrainer(model=str(model), args=args, domains=domains)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=True)
        return trainer

    @cached_property
    def _trained(self) -> dict[str, StageRecord]:
        return {record.domain: record for record in Run(self.folder).stages if record.kind == "train"}

    def _weights(self, record: StageRecord) -> Path:
        return MODEL_FOLDER if record.folder is None else self.folder / record.folder

    def _analyze(self) -> list[InterferenceReport]:
        run, before = Run(self.folder), self._trained[self.earlier]
        following = self.order[self.order.index(self.earlier) + 1 :]
        # The whole of what came later, and what the next domain did by itself.
        pairs = {self.earlier: following}
        if len(following) > 1:
            pairs[f"{self.earlier}-after-{following[0]}"] = following[:1]
        reports = []
        self.progress.begin("analyze", len(pairs) * 5 + 1)
        for name, later in pairs.items():
            folder = run.analysis(name)
            if not (folder / "report.json").exists():
                size = SUBSPACE_SIZE if later == following else 0
                settings = {"quadrature_nodes": 6, "subspace_size": size, "subspace_prompts": SUBSPACE_PROMPTS}
                config = InterferenceConfig(**ANALYSIS, **settings)
                records = (before, self._trained[later[-1]], run.stages[before.index - 1])
                analyzer = InterferenceAnalyzer.from_pretrained(*map(self._weights, records), config=config)
                report = analyzer.analyze(
                    self.domains[self.earlier],
                    [self.domains[name] for name in later],
                    progress=self.progress.advance,
                    others=[d for name, d in self.domains.items() if name not in (self.earlier, *later)],
                )
                for update in report.updates.values():
                    update |= {key: self._relative(update[key]) for key in ("before", "after")}
                names = {key: self._relative(getattr(report, key)) for key in ("base", "before", "after")}
                replace(report, **names).save_pretrained(folder)
            reports.append(InterferenceReport.from_pretrained(folder))
        return reports

    def _relative(self, checkpoint: str) -> str:
        if Path(checkpoint) == MODEL_FOLDER:
            return "lab"
        return Path(checkpoint).relative_to(self.folder).as_posix()

    def _rivals(self, trainer: SequentialGRPOTrainer, report: InterferenceReport) -> list[dict[str, Any]]:
        """Other repairs of the domain that the story follows, each by the protocol of [`Comparison`]."""
        path = self.folder / "rivals.json"
        rows = read_json(path, SCHEMA_VERSION)["rows"] if path.exists() else []
        run, final, peak = Run(self.folder), self._trained[self.order[-1]], self._trained[self.earlier]
        at_end = {name: run.scores(final, name) for name in self.order}
        scores = ({**at_end, self.earlier: run.scores(peak, self.earlier)}, at_end)
        domains, peaks = list(self.domains.values()), {self.earlier: self._weights(peak)}
        compare = Comparison(self._weights(final), peaks, domains, trainer.scorer, scores)
        steps = max(1, int(REFRESH_SHARE * self.steps))

        def refresh() -> dict[str, Any]:
            refreshed = self.refreshed(self.earlier, compare.final, self.folder / "rivals" / "refresh", steps)
            sequences, found = steps * refreshed.args.per_device_train_batch_size, None
            cost = {f"sequences_{kind}": sequences for kind in ("sampled", "forward", "backward")}
            row = compare.row("refresh", refreshed.model, cost, steps=steps)
            if report.directions is not None and len(report.directions):
                models = (load_model(peaks[self.earlier]), load_model(compare.final), refreshed.model)
                tensors = (dict(model.named_parameters()) for model in models)
                found = contraction(RouteMap(models[0].config), *tensors, report.directions, self.seed)
            return row | {"contraction": found}

        work = [lambda arm=arm: compare.routes(report, *arm) for arm in ROLLBACKS]
        work += [lambda: compare.interpolation(self.earlier), refresh]
        self.progress.begin("compare", len(work))
        self.progress.advance(amount=len(rows))
        for arm in work[len(rows) :]:
            rows.append(arm())
            self.progress.advance(rows[-1]["arm"])
            write_json(path, {"schema_version": SCHEMA_VERSION, "rows": rows})
        return rows

    def _heal(self, trainer: SequentialGRPOTrainer) -> dict[str, Any] | None:
        """The record of the heal, which is made once; `None` where nothing was lost."""
        run = Run(self.folder)
        if run.stages[-1].kind != "heal":
            self.progress.begin("heal", 1)
            if heal_run(run, list(self.domains.values()), scorer=trainer.scorer) is None:
                return None
        record = read_json(run.repair / "repair.json", 1)
        shown = ("domains", "recovered_all", "worst", "cost", "rank", "references", "within_max_drop")
        return {"arm": "heal", **{name: record[name] for name in shown}}

    def _edits(self) -> dict[str, Any]:
        records = [Run(self.folder).stages[0], *self._trained.values()]
        checkpoints = [Checkpoint(self._weights(record)) for record in records]
        edits = stage_edits(checkpoints, list(self._trained), RouteMap(checkpoints[0].config))
        for update in edits["updates"].values():
            update |= {key: self._relative(update[key]) for key in ("before", "after")}
        return edits


def _stage_row(record: StageRecord) -> dict[str, Any]:
    shown = {key: getattr(record, key) for key in ("index", "kind", "domain", "steps", "seconds")}
    figures = ("value", "low", "high", "n")
    return shown | {"scores": {name: {key: entry[key] for key in figures} for name, entry in record.scores.items()}}


def _pair_row(report: InterferenceReport) -> dict[str, Any]:
    shown = ("loss_before", "loss_after", "first_order", "second_order", "attributed", "outside_routes")
    modules = report.cosines["modules"]
    lowest, highest = min(modules, key=modules.get), max(modules, key=modules.get)
    return {
        "earlier": report.earlier,
        "later": report.later,
        "global_cosine": report.cosines["global"],
        "most_conflicting": {"module": lowest, "cosine": modules[lowest]},
        "most_synergistic": {"module": highest, "cosine": modules[highest]},
        **{name: getattr(report, name) for name in shown},
    }
