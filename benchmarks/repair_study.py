"""
Repairs of the lab's damaged math, over seeds and orders: every criterion and control at its own best step, baselines,
one repair for all earlier domains, and refreshes.

    python benchmarks/repair_study.py --output-dir repair-study --seeds 0 1 2 3 4 --jobs 2

The comparison of criteria is made in all runs, the rest (`FURTHER_PARTS`) in those of some seeds. Every pair of a
seed and an order has a folder of its own, and every part of it a file; what is there is not done again, so that a
study that was stopped goes on, and one of more seeds takes over those that are done. With the default seeds it takes
about 2 h 30 min on two cores with AVX2, and 50 min more for each further seed. `--parts report` writes the page and
the data from what there is; with `--keep` it keeps the rows of the data for what this folder lacks. Prints the
acceptance figures, and on the last line the means as one JSON object.
"""

import argparse
import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import run_all
from repair_page import CURVE_STEPS, FREE_STEPS, MAX_DROP, STEPS, UNRELATED, WIDE, write_page
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

from trl_interfere.analysis.analyzer import InterferenceAnalyzer
from trl_interfere.analysis.attribution import Elementwise, UpdatePath, attribution, dot
from trl_interfere.analysis.config import InterferenceConfig
from trl_interfere.analysis.conflict_subspace import conflict_subspace
from trl_interfere.analysis.references import collect_references
from trl_interfere.analysis.report import InterferenceReport
from trl_interfere.evaluation.scorer import Scorer
from trl_interfere.lab.build import MODEL_FOLDER
from trl_interfere.lab.pipeline import LEARNING_RATE, MAX_COMPLETION_LENGTH, Lab
from trl_interfere.models import load_model
from trl_interfere.repair.bench import RepairBench, Scores, domain_scorer
from trl_interfere.repair.joint import joint_before, joint_report
from trl_interfere.repair.measures import reference_probability
from trl_interfere.repair.merging import held, merge
from trl_interfere.repair.rollback import RouteRollback, roll_back
from trl_interfere.repair.route_steps import WeightedLoss, solve_steps
from trl_interfere.repair.sweep import Sweep, sweep
from trl_interfere.run import read_json, write_atomically
from trl_interfere.training.rehearsal import rehearse
from trl_interfere.training.trainer import SequentialGRPOTrainer


# Orders that end with a loss of math: qa costs it most, and a later stage of code gives it back.
ORDERS = ("code,math,qa,writing", "math,code,qa,writing", "code,math,writing,qa")
MAIN_PARTS = ("train", "sweep", "wide", "unconstrained", "per_route")
FURTHER_PARTS = ("refresh", "cost", "baselines", "route_steps", "rounds", "joint", "curve", "rehearsal")
PARTS = (*MAIN_PARTS, *FURTHER_PARTS, "report")
REPAIRED = "math"
CRITERIA = (
    "damage",
    "damage_protected",
    "second_order",
    "first_order",
    "route_conflict",
    "magnitude",
    "random",
    "random_matched",
)
DRAWS = 3
WIDE_CRITERIA = ("damage", "damage_protected", "route_conflict", "magnitude", "random")
STEP_SCALES = (0.5, 0.75, 1.0, 1.25)  # of the steps that were solved for
REFRESH_STEPS = (0, 1, 2, 5, 10, 20)
SUBSPACE = 4
REHEARSAL_SHARE = 0.2
SCHEMA_VERSION = 2


class Run:
    """
    One seed in one order.

    Args:
        folder (`pathlib.Path`):
            Folder of the study.
        seed (`int`):
            Seed of the training.
        order (`list[str]`):
            Domains in the order of training.
    """

    def __init__(self, folder: Path, seed: int, order: list[str]):
        self.seed, self.order = seed, order
        self.name = f"seed-{seed}-{'-'.join(order)}"
        self.folder = folder / "runs" / self.name
        self.study = folder / "study" / self.name
        self.labels = {"seed": seed, "order": ",".join(order)}
        self.position = order.index(REPAIRED)

    @cached_property
    def lab(self) -> Lab:
        return Lab(self.folder.absolute(), seed=self.seed, order=self.order)

    def path(self, part: str) -> Path:
        return self.study / f"{part}.json"

    def done(self, part: str) -> bool:
        if part == "train":
            path = self.folder / "stages.json"
            return path.exists() and len(read_json(path, 1)["stages"]) > len(self.order)
        return self.path(part).exists() and read_json(self.path(part), SCHEMA_VERSION).get("finished", True)

    def rows(self, part: str) -> list[dict[str, Any]]:
        return read_json(self.path(part), SCHEMA_VERSION)["rows"] if self.path(part).exists() else []

    def write(self, part: str, rows: list[dict[str, Any]], finished: bool = True) -> None:
        content = {"schema_version": SCHEMA_VERSION, "finished": finished, "rows": rows}
        write_atomically(self.path(part), json.dumps(content, indent=1) + "\n")

    @property
    def lost(self) -> float:
        """Points of math that the later stages have cost, on the test split."""
        stages = read_json(self.folder / "stages.json", 1)["stages"]
        peak, last = (stages[index + 1]["scores"][REPAIRED]["value"] for index in (self.position, len(self.order) - 1))
        return peak - last

    def stage(self, index: int) -> Path:
        """Weights after the stage at a position of the order; -1 is the base model."""
        return MODEL_FOLDER if index < 0 else self.lab.folder / "stages" / f"{index + 1}-{self.order[index]}"

    @cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(str(MODEL_FOLDER))

    @cached_property
    def scorer(self) -> Scorer:
        # As the trainer of the lab scores its stages.
        return Scorer(self.tokenizer, max_new_tokens=MAX_COMPLETION_LENGTH, batch_size=256, temperature=1.0)

    @cached_property
    def config(self) -> InterferenceConfig:
        return InterferenceConfig(reference="dataset", reference_column="answer", batch_size=64, quadrature_nodes=6)

    def report(self, domain: str) -> InterferenceReport:
        """Analysis of what all stages after its own did to a domain."""
        folder, position = self.study / "analysis" / domain, self.order.index(domain)
        if not (folder / "report.json").exists():
            analyzer = InterferenceAnalyzer.from_pretrained(
                before=self.stage(position),
                after=self.stage(len(self.order) - 1),
                base=self.stage(position - 1),
                config=self.config,
            )
            later = [self.lab.domains[name] for name in self.order[position + 1 :]]
            report = analyzer.analyze(self.lab.domains[domain], later)
            names = {f: Path(getattr(report, f)).name for f in ("base", "before", "after")}
            replace(report, **names).save_pretrained(folder)
        return InterferenceReport.from_pretrained(folder)

    @cached_property
    def references(self) -> dict[str, Any]:
        model = load_model(self.stage(len(self.order) - 1))
        return {
            name: collect_references(model, self.tokenizer, domain, self.config)
            for name, domain in self.lab.domains.items()
        }

    def batches(self, name: str, count: int | None = None) -> list[dict[str, torch.Tensor]]:
        references = self.references[name]
        references = references if count is None else references.take(list(range(count)))
        return references.batches(64, self.tokenizer.pad_token_id, torch.device("cpu"))

    def losses(self, weight: float) -> dict[str, WeightedLoss]:
        """Losses on half of the selection split: of math, and of the other domains with a weight."""
        return {
            name: WeightedLoss(self.batches(name, 128), 1.0 if name == REPAIRED else weight) for name in self.order
        }

    def measure(self, model) -> dict[str, float]:
        """
        Points of each domain on the selection split. Where one answer is right its probability is the expected score;
        writing takes any sentence with the two words, so that completions have to be sampled.
        """
        found = {}
        for name, domain in self.lab.domains.items():
            if name == "writing":
                found[name] = 100 * float(self.scorer.score(model, domain, domain.selection_dataset).values.mean())
            else:
                found[name] = 100 * reference_probability(model, self._measured[name])
        return found

    @cached_property
    def _measured(self) -> dict[str, Any]:
        return {name: self.batches(name) for name in self.lab.domains}

    @cached_property
    def score(self):
        return domain_scorer(self.scorer, list(self.lab.domains.values()))

    def tensors(self, index: int) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in load_model(self.stage(index)).named_parameters()}

    @cached_property
    def bench(self) -> RepairBench:
        model = load_model(self.stage(len(self.order) - 1))
        return RepairBench(model, self.tensors(self.position), self.report(REPAIRED), self.score, self.measure)

    def best_protected(self) -> dict[str, Any]:
        """The row of the protected rollback of 2% of MLP routes."""
        return next(
            row
            for row in self.rows("sweep")
            if row["criterion"] == "damage_protected" and row["budget"] == 0.02 and row["step_rule"] == "best"
        )


# Parts


def take_over(run: Run) -> None:
    """The first stages of a run of the same seed in another order, as far as both have them in common."""
    found = []
    for path in run.folder.parent.glob(f"seed-{run.seed}-*/stages.json"):
        content = read_json(path, 1)
        count = len(os.path.commonprefix([[stage["domain"] for stage in content["run"]["schedule"]], run.order]))
        if 0 < count < len(content["stages"]):
            found.append((count, path.parent, content))
    if not found or run.folder.exists():
        return
    count, folder, content = max(found, key=lambda entry: entry[0])
    partial = run.folder.with_name(f"{run.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    stages = content["stages"][: count + 1]
    names = [stage["folder"] for stage in stages if stage["folder"]]
    for name in [*names, *(entry["file"] for stage in stages for entry in stage["scores"].values())]:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (folder / name).is_dir() else shutil.copyfile)(folder / name, partial / name)
    # As a run whose schedule ended there; training extends it.
    same = {**content["run"], "schedule": content["run"]["schedule"][:count]}
    content = {**content, "run": same, "run_name": None, "stages": stages, "current": None}
    write_atomically(partial / "stages.json", json.dumps(content, indent=2) + "\n")
    partial.rename(run.folder)


def train(run: Run) -> None:
    take_over(run)
    trainer = run.lab._trainer()
    trainer.train(resume_from_checkpoint=True)


def sweep_part(run: Run) -> None:
    """2% of MLP routes: the comparison of all criteria and controls."""
    path = run.study / "sweep-rows.json"
    found = sweep(
        run.bench,
        CRITERIA,
        steps=STEPS,
        draws=DRAWS,
        max_drop=MAX_DROP,
        labels=run.labels,
        path=path,
        progress=note(run, "sweep"),
    )
    run.write("sweep", found.rows)


def wide(run: Run) -> None:
    """32% of MLP and attention."""
    path = run.study / "wide-rows.json"
    found = sweep(
        run.bench, WIDE_CRITERIA, **WIDE, max_drop=MAX_DROP, labels=run.labels, path=path, progress=note(run, "wide")
    )
    run.write("wide", found.rows)


def unconstrained(run: Run) -> None:
    """Both comparisons with steps that may cost the other domains what they will."""
    settings = {"max_drop": 100.0, "fixed": False, "labels": run.labels, "progress": note(run, "unconstrained")}
    path = run.study / "unconstrained-rows.json"
    names = ("damage", "damage_protected", "route_conflict")
    rows = sweep(run.bench, names, steps=STEPS, draws=DRAWS, path=path, **settings).rows
    path = run.study / "unconstrained-wide-rows.json"
    free = {**WIDE, "steps": FREE_STEPS}
    rows += sweep(run.bench, ("damage", "damage_protected", "magnitude"), **free, path=path, **settings).rows
    run.write("unconstrained", rows)


def curve(run: Run) -> None:
    """Other budgets and scopes."""
    path = run.study / "curve-rows.json"
    settings = {
        "steps": CURVE_STEPS,
        "protections": (0.75, 1.0),
        "max_drop": MAX_DROP,
        "labels": run.labels,
        "path": path,
    }
    settings |= {"progress": note(run, "curve")}
    names = CRITERIA
    sweep(run.bench, names, (0.005, 0.08, 0.32), ("mlp",), draws=2, fixed=False, **settings)
    sweep(run.bench, names, (0.25,), ("attention",), draws=2, fixed=False, **settings)
    run.write("curve", Sweep.load(path).rows)


def solved_row(run: Run, label: str, rollback: RouteRollback, weights: tuple[float, ...], **settings: Any) -> dict:
    """A rollback of 2% of MLP routes with a step for each, solved for on half of the selection split."""
    bench = run.bench
    routes, candidates = rollback.select(bench.report, bench.route_map, bench.parameters), []
    for weight in weights:
        note(run, label)(f"other domains with weight {weight:g}")
        losses = run.losses(weight)
        found = solve_steps(bench.model, bench.before, bench.route_map, routes, losses, bound=6.0, **settings)
        candidates += [(scale * found.steps, weight, scale, found.passes) for scale in STEP_SCALES]
    measures = [bench.measured(routes, candidate[0]) for candidate in candidates]
    chosen = bench.choose(measures, MAX_DROP)
    steps, weight, scale, passes = candidates[chosen]
    more = {"protection": rollback.protection, "weight": weight, "scale": scale, "passes": passes}
    more |= {"selection": measures[chosen], "within_max_drop": bench.spares(measures[chosen], MAX_DROP)}
    more |= {"steps": steps.tolist()}
    return row(run, label, "mlp", 0.02, None, bench.figures([bench.scores(routes, steps)]), **more)


def per_route(run: Run) -> None:
    """Steps of single routes by the loss itself, at 2% of MLP routes."""
    rows = []
    for name, rollback in (
        ("damage_protected", RouteRollback(protection=run.best_protected()["protection"])),
        ("route_conflict", RouteRollback(criterion="route_conflict")),
        ("random_matched", RouteRollback(criterion="random_matched")),
    ):
        label = f"{name}_per_route_exact"
        rows.append(solved_row(run, label, rollback, (1.0, 3.0), evaluations=12, exact=True))
    run.write("per_route", rows)


def route_steps(run: Run) -> None:
    """Steps of single routes by the quadratic model, and more of their controls."""
    exact = {"evaluations": 12, "exact": True}
    protected = RouteRollback(protection=run.best_protected()["protection"])
    rows = [
        solved_row(run, "damage_protected_per_route", protected, (0.0, 1.0), evaluations=12),
        solved_row(run, "damage_per_route_exact", RouteRollback(), (1.0, 3.0), **exact),
        *(
            solved_row(run, f"{name}_per_route_exact", RouteRollback(criterion=name), (1.0, 3.0), **exact)
            for name in ("magnitude", "random")
        ),
    ]
    run.write("route_steps", rows)


def rounds(run: Run) -> None:
    """Routes chosen in rounds, with and without protection."""
    bench, rows = run.bench, []
    losses = {name: WeightedLoss(run.batches(name, 128), 1.0) for name in run.order[run.position :]}
    for label, protection in (("damage_rounds", 0.0), ("damage_protected_rounds", 1.0)):
        note(run, "rounds")(label)
        rollback = RouteRollback(rounds=4, protection=protection)
        routes = rollback._select_in_rounds(
            bench.report, bench.route_map, bench.parameters, bench.model, bench.before, losses
        )
        measures = [bench.measured(routes, step) for step in STEPS]
        found = chosen_row(
            run, label, "mlp", 0.02, STEPS, measures, [partial(bench.scores, routes, step) for step in STEPS]
        )
        rows.append({**found, "protection": protection})
    run.write("rounds", rows)


def chosen_row(
    run: Run,
    label: str,
    scope: str,
    budget: float,
    settings: Sequence[float],
    measures: list[dict[str, float]],
    scores: list[Callable[[], Scores]],
) -> dict[str, Any]:
    """The row of the setting that the selection split takes."""
    chosen = run.bench.choose(measures, MAX_DROP)
    found = {"selection": measures[chosen], "within_max_drop": run.bench.spares(measures[chosen], MAX_DROP)}
    return row(run, label, scope, budget, settings[chosen], run.bench.figures([scores[chosen]()]), **found)


def baselines(run: Run) -> None:
    """Interpolation, task arithmetic and TIES, each with its best setting on the selection split."""
    bench, rows = run.bench, []
    base, stages = run.tensors(-1), [run.tensors(index) for index in range(len(run.order))]
    after, before = stages[-1], bench.before
    lerped = [
        (share, {name: torch.lerp(after[name], before[name], share) for name in after})
        for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
    ]
    summed = [(scale, merge(base, stages, "task_arithmetic", scale)) for scale in (0.2, 0.3, 0.4, 0.5, 0.7)]
    ties = [(scale, merge(base, stages, "ties", scale, 0.2)) for scale in (0.5, 0.75, 1.0, 1.5, 2.0)]

    def found(tensors: dict[str, torch.Tensor], function: Callable) -> Any:
        with held(bench.model, tensors) as model:
            return function(model)

    for label, candidates in (("interpolation", lerped), ("task_arithmetic", summed), ("ties", ties)):
        note(run, "baselines")(label)
        settings, merged = zip(*candidates, strict=True)
        measures = [found(tensors, run.measure) for tensors in merged]
        scores = [partial(found, tensors, lambda model: run.score(model, "test")) for tensors in merged]
        rows.append(chosen_row(run, label, "all", 1.0, settings, measures, scores))
    run.write("baselines", rows)


def joint(run: Run) -> None:
    """One rollback for all earlier domains."""
    earlier = run.order[:-1]
    reports = [run.report(name) for name in earlier]
    befores = [run.tensors(run.order.index(name)) for name in earlier]
    damage = {name: max(report.damage, 0.0) for name, report in zip(earlier, reports, strict=True)}
    rows = run.rows("joint")
    done = {(row["criterion"], row["budget"], row["weights"]) for row in rows}
    for weighting in ("equal", "by damage"):
        # A domain that was not damaged has nothing to get back, and its loss is kept by the choice of the step.
        weights = {name: float(value > 0) * (1.0 if weighting == "equal" else value) for name, value in damage.items()}
        if not any(weights.values()):
            continue
        report, target = joint_report(reports, weights)
        before = joint_before(befores, target, run.bench.route_map)
        peaks = {name: befores[earlier.index(name)] for name in earlier if weights[name]}
        model = load_model(run.stage(len(run.order) - 1))
        bench = RepairBench(model, before, report, run.score, run.measure, peaks=peaks)
        both = [("damage_protected", 0.02), ("damage_protected", 0.08)]
        more = [("damage", 0.02), ("damage", 0.08), ("random", 0.02), ("random", 0.08), ("damage_protected", 0.32)]
        for criterion, budget in both + (more if weighting == "equal" else []):
            if (criterion, budget, weighting) in done:
                continue
            note(run, "joint")(f"{criterion}, {100 * budget:g}%, {weighting}")
            labels = {**run.labels, "weights": weighting, "repaired": list(peaks)}
            settings = {"steps": (0.5, 1.0, 1.5, 2.0, 3.0), "draws": 2, "max_drop": MAX_DROP, "fixed": False}
            found = sweep(bench, [criterion], [budget], labels=labels, **settings)
            rows += found.rows
            run.write("joint", rows, finished=False)
    run.write("joint", rows)


class _Watch(TrainerCallback):
    """Scores the model at some steps of a refresh, and keeps how far the routes are from the peak."""

    def __init__(self, run: Run, steps: tuple[int, ...], subspace: np.ndarray | None):
        self.run, self.steps, self.subspace, self.scores, self.distances = run, steps, subspace, {}, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.look(model, state.global_step)

    def look(self, model, step: int) -> None:
        bench = self.run.bench
        if self.subspace is not None:
            now = dict(model.named_parameters())
            after = dict(bench.model.named_parameters())
            names = list(bench.before)
            delta = Elementwise(names, lambda name: after[name].detach() - bench.before[name])
            moved = Elementwise(names, lambda name: now[name].detach() - bench.before[name])
            size = dot(bench.route_map, delta, delta).routes
            # Coordinates in route space: 1 on every route where nothing has been undone.
            found = np.divide(dot(bench.route_map, moved, delta).routes, size, out=np.zeros_like(size), where=size > 0)
            inside = self.subspace @ found
            self.distances[step] = (
                float(np.linalg.norm(inside)),
                float(np.linalg.norm(found - self.subspace.T @ inside)),
            )
        if step in self.steps:
            with torch.random.fork_rng():
                self.scores[step] = self.run.score(model, "test")


def refreshed(run: Run, model_folder: Path, domain: str, label: str, subspace: np.ndarray | None = None) -> _Watch:
    """A refresh from some weights, watched."""
    scratch = run.study / f"scratch-{label}"
    shutil.rmtree(scratch, ignore_errors=True)
    args = run.lab._trainer().args
    args.output_dir, args.order, args.max_steps, args.stage_overrides = str(scratch), [domain], REFRESH_STEPS[-1], None
    args.learning_rate, args.save_strategy = LEARNING_RATE, "no"
    domains = [replace(run.lab.domains[domain], eval_dataset=None)]
    trainer = SequentialGRPOTrainer(model=str(model_folder), args=args, domains=domains)
    trainer.remove_callback(PrinterCallback)
    watch = _Watch(run, REFRESH_STEPS, subspace)
    watch.look(trainer.model, 0)
    trainer.add_callback(watch)
    trainer.train()
    shutil.rmtree(scratch, ignore_errors=True)
    return watch


def refresh(run: Run) -> None:
    """Refreshes of math, of a domain unrelated to it, and of math after a rollback; contraction in the subspace."""
    bench, rows = run.bench, []
    path = UpdatePath(load_model(run.stage(run.position)), dict(bench.model.named_parameters()))
    spectrum, vectors = conflict_subspace(path, run.batches(REPAIRED, 64), bench.route_map, SUBSPACE)
    vectors = np.linalg.qr(vectors.T)[0].T
    best = run.best_protected()
    selected = RouteRollback(protection=best["protection"]).select(bench.report, bench.route_map)
    rolled = run.study / "rolled-back"
    model = load_model(run.stage(len(run.order) - 1))
    roll_back(model, bench.before, bench.route_map, selected, best["step"])
    model.save_pretrained(rolled)
    run.tokenizer.save_pretrained(rolled)
    last = run.stage(len(run.order) - 1)
    for label, folder, domain in (
        ("refresh", last, REPAIRED),
        ("refresh_after_rollback", rolled, REPAIRED),
        ("refresh_unrelated", last, UNRELATED),
    ):
        note(run, "refresh")(label)
        watch = refreshed(run, folder, domain, label, vectors if label != "refresh_unrelated" else None)
        for step, scores in watch.scores.items():
            rows.append(row(run, label, "all", 1.0, step, bench.figures([scores]), domain=domain))
        if watch.distances:
            rows[-1]["distances"] = {str(step): list(pair) for step, pair in watch.distances.items()}
            rows[-1]["spectrum"] = spectrum.to_dict()
    shutil.rmtree(rolled, ignore_errors=True)
    run.write("refresh", rows)


def cost(run: Run) -> None:
    """The rollback with fewer gradient passes behind its attribution."""
    bench, rows = run.bench, []
    later = run.order[run.position + 1 :]
    after = dict(bench.model.named_parameters())
    path = UpdatePath(load_model(run.stage(run.position)), after)
    for count, nodes, later_nodes in ((32, 1, 1), (64, 2, 1), (128, 3, 2), (256, 6, 2)):
        note(run, "cost")(f"{count} references, {nodes} nodes")
        count = min(count, len(run.references[REPAIRED].prompts))
        damage = attribution(path, run.batches(REPAIRED, count), bench.route_map, nodes).routes
        terms = [attribution(path, run.batches(name, count), bench.route_map, later_nodes) for name in later]
        owed = np.mean([entry.routes for entry in terms], axis=0)
        routes = {**bench.report.routes, "damage": damage, "later_damage": owed}
        thin = RepairBench(bench.model, bench.before, replace(bench.report, routes=routes), run.score, run.measure)
        for budget, scope in ((0.02, "mlp"), (0.32, "joint")):
            steps = (1.0, 1.5, 2.0, 3.0, 4.0) if scope == "mlp" else (0.2, 0.35, 0.5, 0.75, 1.0)
            settings = {"steps": steps, "protections": (0.75, 1.0), "max_drop": MAX_DROP}
            found = sweep(thin, ["damage_protected"], [budget], [scope], fixed=False, labels=run.labels, **settings)
            sequences = count * (nodes + later_nodes * len(later))
            rows += [{**entry, "sequences": sequences, "references": count, "nodes": nodes} for entry in found.rows]
    run.write("cost", rows)


def rehearsal(run: Run) -> None:
    """The later stages once more, with prompts of math among theirs."""
    folder = run.study / "rehearsal"
    args = run.lab._trainer().args
    later = run.order[run.position + 1 :]
    args.output_dir, args.order = str(folder), list(later)
    args.stage_overrides = {name: value for name, value in (args.stage_overrides or {}).items() if name in later}
    domains = [
        rehearse(domain, [run.lab.domains[REPAIRED]], REHEARSAL_SHARE, run.seed) if name in later else domain
        for name, domain in run.lab.domains.items()
    ]
    trainer = SequentialGRPOTrainer(model=str(run.stage(run.position)), args=args, domains=domains)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=True)
    scores = {name: trainer.run.scores(trainer.run.stages[-1], name) for name in run.order}
    run.write("rehearsal", [row(run, "rehearsal", "all", 1.0, REHEARSAL_SHARE, run.bench.figures([scores]))])


def row(run: Run, criterion: str, scope: str, budget: float, step: float | None, figures: dict, **more: Any) -> dict:
    place = {"criterion": criterion, "scope": scope, "budget": budget, "step_rule": "best", "step": step}
    return {**run.labels, **place, "protection": 0.0, **more, **figures}


def note(run: Run, part: str):
    return lambda text: print(f"{run.name}: {part}: {text}", flush=True)


WORK = {
    "train": train,
    "sweep": sweep_part,
    "wide": wide,
    "unconstrained": unconstrained,
    "per_route": per_route,
    "refresh": refresh,
    "cost": cost,
    "baselines": baselines,
    "route_steps": route_steps,
    "rounds": rounds,
    "joint": joint,
    "curve": curve,
    "rehearsal": rehearsal,
}


def work(folder: Path, seed: int, order: list[str], parts: list[str], threads: int) -> None:
    """
    Do what is not done of a run.

    Args:
        folder (`pathlib.Path`):
            Folder of the study.
        seed (`int`):
            Seed of the training.
        order (`list[str]`):
            Domains in the order of training.
        parts (`list[str]`):
            Names of the parts.
        threads (`int`):
            Threads.
    """
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")
    run = Run(folder, seed, order)
    for part in parts:
        if not run.done(part):
            note(run, part)("begins")
            WORK[part](run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("repair-study"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds")
    parser.add_argument("--further-seeds", type=int, nargs="*", default=[0], help="those with all parts")
    parser.add_argument("--orders", nargs="+", default=list(ORDERS), help="orders, each separated by commas")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is done")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder that the page is written to")
    parser.add_argument("--keep", action="store_true", help="keep rows of the page's data where a run lacks the part")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process of its own")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run; results repeat for the same number")
    arguments = parser.parse_args()
    if arguments.jobs < 1 or arguments.threads < 1:
        parser.error(f"expected jobs and threads of at least 1, found {arguments.jobs} and {arguments.threads}")
    places = [(seed, order.split(",")) for order in arguments.orders for seed in arguments.seeds]
    # The further parts of a run take up what its main ones have left, so that these come first.
    for group, seeds in ((MAIN_PARTS, arguments.seeds), (FURTHER_PARTS, arguments.further_seeds)):
        parts = [part for part in group if part in arguments.parts]
        chosen = [place for place in places if parts and place[0] in seeds]
        calls = [(arguments.output_dir, *place, parts, arguments.threads) for place in chosen]
        run_all(work, calls, arguments.jobs)
    if "report" in arguments.parts:
        runs = [Run(arguments.output_dir, seed, order) for seed, order in places]
        print(json.dumps(write_page(runs, arguments.docs, arguments.keep)))


if __name__ == "__main__":
    main()
