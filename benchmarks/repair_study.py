"""
Repairs of the lab's models over seeds and orders, every arm by one protocol, into docs/repair.md and its data.

    python benchmarks/repair_study.py --output-dir repair-study --seeds 0 1 2 3 4 --jobs 2

Each pair of a seed and an order has a folder, and each part of it a file. What is there is not done again, so that a
study that was stopped goes on. Three runs with three times the learning rate are trained beside them. Prints, on the
last line, the means as one JSON object.
"""

import argparse
import json
import shutil
import warnings
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jobs import run_all
from merging import merge
from refresh_arms import after_heal, distilled, fisher_merging, prevention
from repair_page import write_page
from transformers import PreTrainedModel

from trl_interfere.analysis.analyzer import InterferenceAnalyzer
from trl_interfere.analysis.config import InterferenceConfig
from trl_interfere.analysis.references import collect_references
from trl_interfere.analysis.report import InterferenceReport
from trl_interfere.evaluation.checkpoints import scorer_of
from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.lab.pipeline import MAX_COMPLETION_LENGTH, Lab
from trl_interfere.models import load_model, load_tokenizer
from trl_interfere.repair.comparison import Comparison
from trl_interfere.repair.heal import PROTECTIONS, lost_beyond_interval, run_peaks
from trl_interfere.repair.peak_samples import peak_samples
from trl_interfere.repair.repair import Repair
from trl_interfere.repair.subspace_rollback import SubspaceRollback
from trl_interfere.run import Run, read_json, write_json


# Orders that end with a loss of math: qa costs it most, and a later stage of code gives it back.
ORDERS = ("code,math,qa,writing", "math,code,qa,writing", "code,math,writing,qa")
PARTS = ("train", "subspace", "controls", "rivals", "refresh", "settings", "distilled", "after_heal", "fisher_merging",
         "prevention")  # fmt: skip
RUNS_OF_PART = {"prevention": 6}  # it trains the stages anew for every arm; all other parts are of all runs
LARGE_STEPS = 3  # times the learning rate, in runs of their own
RANKS = (4, 8, 32)
REFERENCES = (16, 32, 128, 256)
RIDGES = (1e-6, 1e-4, 1e-3, 0.1)
REFRESH_STEPS = 10
SCALES = (0.1, 0.2, 0.3, 0.5, 1.0)  # of the task vectors in merging
SCHEMA_VERSION = 3


class StudyRun:
    """One seed in one order, at one multiple of the lab's learning rates."""

    def __init__(self, folder: Path, seed: int, order: str, rate: int = 1):
        self.seed, self.order, self.rate = seed, order.split(","), rate
        self.name = f"seed-{seed}-{order.replace(',', '-')}" + ("" if rate == 1 else f"-rate-{rate}")
        self.folder, self.study = folder / "runs" / self.name, folder / "study" / self.name
        self.labels = {"seed": seed, "order": order, "rate": rate}

    @cached_property
    def lab(self) -> Lab:
        return Lab(self.folder.absolute(), seed=self.seed, order=self.order, rate=self.rate)

    @cached_property
    def run(self) -> Run:
        return Run(self.folder)

    def stage(self, name: str) -> Path:
        return self.folder / self.run.trained(name).folder

    @cached_property
    def comparison(self) -> Comparison:
        """All earlier domains that later stages have not made better, see `run_peaks`."""
        run, domains = self.run, list(self.lab.domains.values())
        scorer, final = scorer_of(load_tokenizer(MODEL_FOLDER), run.identity["config"]), run.final
        peaks = run_peaks(run, domains, scorer)
        at_end = {name: run.scores(final, name) for name in self.order}
        at_peak = {name: run.scores(peaks.get(name, final), name) for name in self.order}
        folders = {name: self.folder / record.folder for name, record in peaks.items()}
        return Comparison(self.folder / final.folder, folders, domains, scorer, (at_peak, at_end))

    @property
    def worst(self) -> str:
        """The domain that lost most."""
        at_peak, at_end = self.comparison.scores
        return max(self.comparison.peaks, key=lambda name: (at_peak[name] - at_end[name]).mean())

    def report(self) -> InterferenceReport:
        """Analysis of what the stages after its own did to the domain that lost most."""
        folder, name = self.study / "analysis", self.worst
        if not (folder / "report.json").exists():
            position = self.order.index(name)
            base = MODEL_FOLDER if position == 0 else self.stage(self.order[position - 1])
            config = InterferenceConfig(
                reference="dataset", reference_column="answer", batch_size=64, quadrature_nodes=6
            )
            analyzer = InterferenceAnalyzer.from_pretrained(
                before=self.comparison.peaks[name], after=self.comparison.final, base=base, config=config
            )
            later = [self.lab.domains[later] for later in self.order[position + 1 :]]
            analyzer.analyze(self.lab.domains[name], later).save_pretrained(folder)
        return InterferenceReport.from_pretrained(folder)


PLAIN: dict[str, Any] = {"max_new_tokens": MAX_COMPLETION_LENGTH, "batch_size": 64, "rank": None}


def subspace(run: StudyRun) -> list[dict]:
    """The subspace rollback at full rank and at rank 16, and in one shot."""
    arms = [("subspace", {}), ("one shot", {"sequential": False}), ("rank", {"rank": 16})]
    return [run.comparison.subspace(name, **{**PLAIN, **settings})[0] for name, settings in arms]


def settings(run: StudyRun) -> list[dict]:
    """Every setting of it, one at a time."""
    compare = run.comparison
    tried = [("rank", {"rank": rank}) for rank in RANKS]
    tried += [("references", {"references": count}) for count in REFERENCES]
    tried += [("ridge", {"ridge": ridge}) for ridge in RIDGES]
    tried += [("modules", {"modules": modules}) for modules in ("mlp", "attention")]
    rows = [compare.subspace(name, **{**PLAIN, **setting})[0] for name, setting in tried]
    damaged = {n: peak for n, peak in compare.peaks.items() if n in lost_beyond_interval(*compare.scores)}
    if damaged and damaged != compare.peaks:
        some = SubspaceRollback(**PLAIN).fit(compare.final, damaged, compare.domains)
        rows.append(compare.row("beyond the interval alone", some.merge(), some.record["cost"]))
    tokenizer = load_tokenizer(str(compare.final))
    config = InterferenceConfig(reference="dataset", reference_column="answer", max_prompts=64)
    given = {
        domain.name: collect_references(None, tokenizer, domain, config, domain.train_dataset)
        for domain in compare.domains
    }
    rows.append(compare.subspace("answers", given, **PLAIN)[0])
    searched = {}
    for weight in PROTECTIONS:
        weights = {domain.name: 1.0 if domain.name in compare.peaks else weight for domain in compare.domains}
        searched[weight] = partial(_healed, compare, {**PLAIN, "weights": weights})
    rows.append(compare.arm("searched weights", searched))
    rows.append(compare.arm("embeddings too", {None: partial(_with_embeddings, run)}))
    return rows


def _healed(compare: Comparison, settings: dict[str, Any]) -> PreTrainedModel:
    return SubspaceRollback(**settings).fit(compare.final, compare.peaks, compare.domains).merge()


def controls(run: StudyRun) -> list[dict]:
    """What the same construction does without the right moments or directions."""
    compare = run.comparison
    repair = SubspaceRollback(**{**PLAIN, "rank": 16}).fit(compare.final, compare.peaks, compare.domains)
    rows = [compare.row("identity moments", mean_of_stages(compare, list(repair.factors)))]
    generator = torch.Generator().manual_seed(run.seed)
    rows.append(compare.row("random directions", _random_directions(repair, generator).merge()))
    final, peaks = str(compare.final), {name: str(peak) for name, peak in compare.peaks.items()}
    own = peak_samples(final, peaks, compare.domains, 64, max_new_tokens=MAX_COMPLETION_LENGTH, batch_size=64)
    names = list(own)
    shuffled = {name: own[names[(i + 1) % len(names)]] for i, name in enumerate(names)}
    rows.append(compare.subspace("moments of another domain", shuffled, **PLAIN)[0])
    return rows


def rivals(run: StudyRun) -> list[dict]:
    """Rollbacks of routes, and merging of the stages' weights."""
    compare, report = run.comparison, run.report()
    rows = [
        compare.routes(report, "damage", 0.02, "mlp", protection=1.0),
        compare.routes(report, "damage", 0.32, "joint", protection=1.0),
        compare.routes(report, "route_conflict", 0.02, "mlp"),
        compare.routes(report, "random", 0.02, "mlp"),
        compare.routes(report, "random", 0.32, "joint"),
        compare.interpolation(run.worst),
    ]
    stages = [run.stage(name) for name in run.order]
    for method in ("task_arithmetic", "ties"):
        rows.append(compare.arm(method, {scale: partial(_merged, stages, method, scale) for scale in SCALES}))
    return rows


def refresh(run: StudyRun) -> list[dict]:
    """Ten steps of GRPO on the domain that lost most."""
    folder = run.study / "refresh"
    trainer = run.lab.refreshed(run.worst, run.comparison.final, folder, REFRESH_STEPS)
    sequences = REFRESH_STEPS * trainer.args.per_device_train_batch_size
    cost = {f"sequences_{kind}": sequences for kind in ("sampled", "forward", "backward")}
    rows = [run.comparison.row("refresh", trainer.model, cost, steps=REFRESH_STEPS)]
    shutil.rmtree(folder)
    return rows


WORK: dict[str, Callable[[StudyRun], list[dict]]] = {
    "subspace": subspace,
    "controls": controls,
    "rivals": rivals,
    "refresh": refresh,
    "settings": settings,
    "distilled": distilled,
    "after_heal": after_heal,
    "fisher_merging": fisher_merging,
    "prevention": prevention,
}


@torch.no_grad()
def _merged(stages: list[Path], method: str, scale: float) -> PreTrainedModel:
    model = load_model(MODEL_FOLDER)
    tasks = [dict(load_model(stage).named_parameters()) for stage in stages]
    tensors = merge(dict(model.named_parameters()), tasks, method, scale)
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])
    return model


@torch.no_grad()
def mean_of_stages(compare: Comparison, layers: list[str]) -> PreTrainedModel:
    """The least squares with the identity in place of all moments: the mean over domains of the layers' weights."""
    model = load_model(compare.final)
    others = [dict(load_model(compare.peaks.get(d.name, compare.final)).named_parameters()) for d in compare.domains]
    for name in layers:
        weight = model.get_parameter(f"{name}.weight")
        weight.copy_(torch.stack([tensors[f"{name}.weight"] for tensors in others]).mean(0))
    return model


def _random_directions(repair: Repair, generator: torch.Generator) -> Repair:
    """Random changes of the same rank and norm in each layer."""
    factors = {}
    for name, (left, right) in repair.factors.items():
        b, a = (torch.randn(part.shape, generator=generator) for part in (left, right))
        factors[name] = (b * (left @ right).norm() / (b @ a).norm(), a)
    return Repair(factors, repair.checkpoint, repair.record)


@torch.no_grad()
def _with_embeddings(run: StudyRun) -> PreTrainedModel:
    """Embeddings first, averaged by how often each domain's references use a token; then the linear layers."""
    compare, folder = run.comparison, run.study / "embeddings"
    final, peaks = str(compare.final), {name: str(peak) for name, peak in compare.peaks.items()}
    own = peak_samples(final, peaks, compare.domains, 64, max_new_tokens=MAX_COMPLETION_LENGTH, batch_size=64)
    model = load_model(final)
    weight = model.get_input_embeddings().weight
    total, count = torch.zeros_like(weight), torch.zeros(len(weight), 1)
    for name, references in own.items():
        used = torch.zeros(len(weight), 1)
        tokens = torch.tensor(
            [t for parts in (references.prompts, references.completions) for row in parts for t in row]
        )
        used.index_add_(0, tokens, torch.ones(len(tokens), 1) / len(tokens))
        total += used * load_model(peaks.get(name, final)).get_input_embeddings().weight
        count += used
    weight.copy_(torch.where(count > 0, total / count.clamp(min=1e-12), weight))
    model.save_pretrained(folder)
    load_tokenizer(final).save_pretrained(folder)
    healed = SubspaceRollback(**PLAIN).fit(folder, compare.peaks, compare.domains, own).merge()
    shutil.rmtree(folder)
    return healed


def work(folder: Path, seed: int, order: str, rate: int, part: str, threads: int) -> None:
    """Do one part of a run, if it is not done."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")
    run = StudyRun(folder, seed, order, rate)
    path = run.study / f"{part}.json"
    if part == "train":
        run.lab.train()
    elif not path.exists():
        print(f"{run.name}: {part}", flush=True)
        rows = [{**run.labels, "restored": list(run.comparison.peaks), **row} for row in WORK[part](run)]
        write_json(path, {"schema_version": SCHEMA_VERSION, "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("repair-study"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds")
    parser.add_argument("--orders", nargs="+", default=list(ORDERS), help="orders, each separated by commas")
    parser.add_argument(
        "--parts", nargs="+", choices=(*PARTS, "report"), default=[*PARTS, "report"], help="what is done"
    )
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder that the page is written to")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process of its own")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run; results repeat for the same number")
    arguments = parser.parse_args()
    folder, parts = arguments.output_dir, [part for part in arguments.parts if part != "report"]
    places = [(seed, order, 1) for seed in arguments.seeds for order in arguments.orders]
    large = [(arguments.seeds[0], order, LARGE_STEPS) for order in arguments.orders]
    # Part by part over all runs, so that a study that is stopped has whole columns.
    for part in parts:
        chosen = places[: RUNS_OF_PART.get(part)] + (large if part in ("train", "subspace") else [])
        run_all(work, [(folder, *place, part, arguments.threads) for place in chosen], arguments.jobs)
    if "report" in arguments.parts:
        rows = []
        for path in sorted((folder / "study").glob("*/*.json")):
            rows += read_json(path, SCHEMA_VERSION)["rows"]
        print(json.dumps(write_page(rows, arguments.docs)))


if __name__ == "__main__":
    main()
