"""
SmolLM2-135M-Instruct through domains in sequence, by GRPO and by supervised stages: what it learns, loses, and gets
back. Into docs/study-smollm2.md and its data.

    python recipes/prepare_smollm2.py
    python benchmarks/smollm2_study.py --output-dir smollm2-study --runs grpo-0 grpo-1 sft-0 sft-1 --jobs 2

`warm-up` makes the model that GRPO starts from, `train` the runs, and the other parts repair, analyse and report them.
What is there is not done again, so that a study that was stopped goes on. Prints the first table as JSON.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jobs import run_all
from repair_study import mean_of_stages
from smollm2_page import write_page
from smollm2_price import Price
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from trl_interfere import Domain
from trl_interfere.analysis.analyzer import InterferenceAnalyzer
from trl_interfere.analysis.config import InterferenceConfig
from trl_interfere.analysis.references import collect_references
from trl_interfere.analysis.report import InterferenceReport
from trl_interfere.evaluation.bootstrap import score
from trl_interfere.evaluation.checkpoints import scorer_of
from trl_interfere.models import load_model, load_tokenizer
from trl_interfere.recipe import load_run_file
from trl_interfere.repair.comparison import Comparison
from trl_interfere.repair.heal import run_peaks
from trl_interfere.repair.subspace_rollback import SubspaceRollback
from trl_interfere.reporting.claims import report_claims
from trl_interfere.run import Run, read_json, write_json
from trl_interfere.training.recipe_trainer import build_trainer, load_run
from trl_interfere.training.refresh import distillation
from trl_interfere.training.requested_refresh import RequestedRefresh


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
MODEL = ROOT / "models" / "smollm2-135m-instruct"
PARTS = ("warm-up", "train", "scores", "heal", "controls", "refresh", "distill", "analysis", "rivals", "settings")
WARM_UP_STEPS, WARM_UP_BATCH, WARM_UP_RATE = 64, 32, 1e-4
REFRESH_STEPS, DISTILL_RATE = 10, 1e-5
USE_CPU = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if USE_CPU else "cuda")
PRICED = ("heal", "heal, chat held", "heal, ridge 0.1", "heal, one shot", "heal, full rank", "identity moments",
          "refresh", "distill")  # fmt: skip
SCHEMA_VERSION = 2
PLAIN: dict[str, Any] = {"max_new_tokens": 16, "batch_size": 64}


class PricedComparison(Comparison):
    """A comparison that also says what an arm changes outside all domains."""

    price: Price

    def row(self, name: str, model: PreTrainedModel, *arguments: Any, **labels: Any) -> dict:
        model = model.to(DEVICE)
        price = self.price.of(model) if name in PRICED else {}
        return {**super().row(name, model, *arguments, **labels), **price}


class StudyRun:
    """One run: by GRPO or by supervised stages, with one seed."""

    def __init__(self, folder: Path, name: str):
        self.name, self.folder, self.study = name, folder / name, folder / "study" / name
        self.kind, seed = name.split("-")
        self.seed, self.warm_up = int(seed), folder / "warm-up"

    @cached_property
    def recipe(self) -> Any:
        return load_run_file(RECIPES / "smollm2-study.yaml" if self.kind == "grpo" else self.folder / "domains.yaml")

    @cached_property
    def domains(self) -> dict[str, Domain]:
        return {domain.name: domain for domain in self.recipe.domains}

    @property
    def base(self) -> Path:
        return self.warm_up if self.kind == "grpo" else MODEL

    @property
    def stages(self) -> dict[str, Path]:
        """Checkpoint after the stage of each domain, in their order."""
        if self.kind == "sft":
            return {name: self.folder / f"{index}-{name}" for index, name in enumerate(self.domains)}
        run = Run(self.folder)
        return {record.domain: self.folder / record.folder for record in run.stages if record.kind == "train"}

    @cached_property
    def scorer(self):
        _, args = load_run(self.recipe_path, recipe=self.recipe)
        return scorer_of(load_tokenizer(str(self.base)), vars(args))

    @property
    def recipe_path(self) -> Path:
        return RECIPES / "smollm2-study.yaml" if self.kind == "grpo" else self.folder / "domains.yaml"

    @cached_property
    def scores(self) -> dict[str, dict[str, np.ndarray]]:
        """Score of each test prompt after each stage, from its base model on."""
        path = self.study / "scores.json"
        if self.kind == "grpo":
            run = Run(self.folder)
            return {
                record.domain or "base": {name: run.scores(record, name) for name in self.domains}
                for record in run.stages
                if record.kind == "train" or record.index == 0
            }
        if not path.exists():
            found = {}
            for stage, place in {"base": self.base, **self.stages}.items():
                model = load_model(place).to(DEVICE)
                found[stage] = {
                    name: self.scorer.score(model, domain, domain.eval_dataset).values.tolist()
                    for name, domain in self.domains.items()
                }
            write_json(path, {"schema_version": SCHEMA_VERSION, "stages": found})
        found = read_json(path, SCHEMA_VERSION)["stages"]
        return {stage: {name: np.array(v) for name, v in values.items()} for stage, values in found.items()}

    @cached_property
    def comparison(self) -> PricedComparison:
        stages, final = self.stages, list(self.stages)[-1]
        if self.kind == "grpo":
            restored = list(run_peaks(Run(self.folder), list(self.domains.values()), self.scorer))
        else:
            restored = list(stages)[:-1]
        at_end = self.scores[final]
        at_peak = {name: self.scores[name if name in restored else final][name] for name in self.domains}
        peaks = {name: stages[name] for name in restored}
        found = PricedComparison(
            stages[final], peaks, list(self.domains.values()), self.scorer, (at_peak, at_end), max_drop=2.0
        )
        found.price = Price(stages[final], DEVICE)
        return found

    @property
    def worst(self) -> str:
        """The domain that lost most."""
        at_peak, at_end = self.comparison.scores
        return max(self.comparison.peaks, key=lambda name: (at_peak[name] - at_end[name]).mean())


def warm_up(folder: Path, threads: int) -> None:
    """Supervised steps on right answers of all domains, in every form alike."""
    torch.set_num_threads(threads)
    if (folder / "warm-up" / "config.json").exists():
        return
    sys.path.append(str(RECIPES))
    from smollm2_domains import TASKS, domain, shown_answers

    rows = shown_answers([domain(name) for name in TASKS], WARM_UP_STEPS * WARM_UP_BATCH)
    part = folder / "warm-up.part"
    args = SFTConfig(
        str(part), max_steps=WARM_UP_STEPS, per_device_train_batch_size=WARM_UP_BATCH, learning_rate=WARM_UP_RATE,
        lr_scheduler_type="linear", warmup_steps=5, save_strategy="no", report_to=[], bf16=True, use_cpu=USE_CPU,
        gradient_checkpointing=False, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    trainer = SFTTrainer(str(MODEL), args, train_dataset=Dataset.from_list(list(rows)))
    trainer.train()
    trainer.save_model()
    part.rename(folder / "warm-up")


def train(run: StudyRun, options: dict[str, Any]) -> None:
    """The stages; `options` go before those of the recipe."""
    if run.kind == "sft":
        if not (run.folder / "domains.yaml").exists():
            shutil.rmtree(run.folder, ignore_errors=True)
            script = [sys.executable, str(RECIPES / "sft_stages.py"), str(MODEL)]
            subprocess.run([*script, "--output_dir", str(run.folder), "--seed", str(run.seed)], check=True)
        return
    options = {"output_dir": str(run.folder), "seed": run.seed, "use_cpu": USE_CPU, **options}
    loaded = load_run(run.recipe_path, options, str(run.warm_up), run.recipe)
    build_trainer(run.recipe_path, loaded=loaded).train(resume_from_checkpoint=run.folder.exists())


def scores(run: StudyRun) -> list[dict]:
    """Every stage on the test split, and the base and final model outside all domains."""
    rows = []
    for stage, found in run.scores.items():
        price = {}
        if stage == "base" or stage == list(run.stages)[-1]:
            place = run.base if stage == "base" else run.stages[stage]
            price = run.comparison.price.of(load_model(place).to(DEVICE))
        points = {name: {**score(values).to_dict(), "n": len(values)} for name, values in found.items()}
        rows.append({"arm": "stage", "stage": stage, "domains": points, **price})
    return rows


def heal(run: StudyRun) -> list[dict]:
    """The subspace rollback as the command makes it."""
    return [run.comparison.subspace("heal", **PLAIN, rank=64)[0]]


SETTINGS: dict[str, dict[str, Any]] = {
    "heal, chat held": {},
    "heal, ridge 0.1": {"ridge": 0.1},
    "heal, one shot": {"sequential": False},
    "heal, full rank": {"rank": None},
    "heal, rank 16": {"rank": 16},
    "heal, 16 references": {"references": 16},
    "heal, answers as references": {},
    "heal, 256 references": {"references": 256},
}


def setting(run: StudyRun, name: str) -> list[dict]:
    """One setting of the subspace rollback, everything else as in `heal`."""
    compare, given, domains = run.comparison, None, list(run.comparison.domains)
    if name == "heal, answers as references":
        config = InterferenceConfig(reference="dataset", reference_column="answer", max_prompts=64)
        given = {d.name: collect_references(None, run.scorer.tokenizer, d, config, d.train_dataset) for d in domains}
    elif name == "heal, chat held":
        domains.append(compare.price.chat)
    method = SubspaceRollback(**{**PLAIN, "rank": 64, **SETTINGS[name]})
    repair = method.fit(compare.final, compare.peaks, domains, given)
    return [compare.row(name, repair.merge(), repair.record["cost"])]


def controls(run: StudyRun) -> list[dict]:
    """A mean of the stages' weights: the same least squares with the identity in place of the moments."""
    layers = [
        name.removesuffix(".weight")
        for name, parameter in load_model(run.comparison.final).named_parameters()
        if ".layers." in name and parameter.ndim == 2
    ]
    return [run.comparison.row("identity moments", mean_of_stages(run.comparison, layers))]


def refresh(run: StudyRun) -> list[dict]:
    """Ten steps of GRPO on the domain that lost most."""
    folder = run.study / "refresh"
    options = {"output_dir": str(folder), "order": [run.worst], "max_steps": REFRESH_STEPS, "seed": run.seed,
               "save_strategy": "no", "use_cpu": USE_CPU, "stage_overrides": {}}  # fmt: skip
    path = RECIPES / "smollm2-study.yaml"
    settings = load_run_file(path)
    settings.domains = [Domain(d.name, d.train_dataset, d.reward_funcs) for d in run.recipe.domains]
    trainer = build_trainer(path, loaded=load_run(path, options, str(run.comparison.final), settings))
    trainer.train()
    sequences = REFRESH_STEPS * trainer.args.per_device_train_batch_size
    cost = {f"sequences_{kind}": sequences for kind in ("sampled", "forward", "backward")}
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    rows = [run.comparison.row("refresh", model, cost, steps=REFRESH_STEPS, domain=run.worst)]
    shutil.rmtree(folder)
    return rows


def distill(run: StudyRun) -> list[dict]:
    """Ten steps of distillation: the stage of each restored domain teaches it."""
    if run.kind == "sft":  # there is no run to go on with
        return []
    folder = run.study / "distill"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run.folder, folder, copy_function=os.link)
    teachers = {name: Run(folder).trained(name).name for name in run.comparison.peaks}
    stage = distillation(teachers, {"max_steps": REFRESH_STEPS, "learning_rate": DISTILL_RATE})
    options = {"output_dir": str(folder), "seed": run.seed, "use_cpu": USE_CPU}
    loaded = load_run(run.recipe_path, options, str(run.warm_up), load_run_file(run.recipe_path))
    trainer = build_trainer(run.recipe_path, loaded=loaded)
    trainer.add_callback(RequestedRefresh(folder, stage))
    trainer.train(resume_from_checkpoint=True)
    sequences = REFRESH_STEPS * trainer.args.per_device_train_batch_size
    cost = {f"sequences_{kind}": sequences for kind in ("sampled", "forward", "backward")}
    model = load_model(Run(folder).weights(Run(folder).stages[-1]))
    rows = [run.comparison.row("distill", model, cost, steps=REFRESH_STEPS)]
    shutil.rmtree(folder)
    return rows


def report_of(run: StudyRun) -> InterferenceReport:
    """What the stages after its own did to the domain that lost most."""
    folder, name = run.study / "analysis", run.worst
    if not (folder / "report.json").exists():
        order = list(run.domains)
        position = order.index(name)
        base = run.base if position == 0 else run.stages[order[position - 1]]
        config = InterferenceConfig(
            reference="dataset", reference_column="answer", max_prompts=64, batch_size=64, subspace_size=2
        )
        analyzer = InterferenceAnalyzer.from_pretrained(
            before=run.comparison.peaks[name], after=run.comparison.final, base=base, config=config
        )
        later = [run.domains[later] for later in order[position + 1 :]]
        analyzer.analyze(run.domains[name], later).save_pretrained(folder)
    return InterferenceReport.from_pretrained(folder)


def analysis(run: StudyRun) -> list[dict]:
    report = report_of(run)
    return [{"arm": "analysis", "domain": report.earlier, "claims": [c._asdict() for c in report_claims(report)]}]


def rivals(run: StudyRun) -> list[dict]:
    """Rollbacks of routes, and interpolation."""
    compare, report = run.comparison, report_of(run)
    return [
        compare.interpolation(run.worst),
        compare.routes(report, "damage", 0.02, "mlp", protection=1.0),
        compare.routes(report, "damage", 0.32, "joint", protection=1.0),
    ]


WORK: dict[str, Callable[[StudyRun], list[dict]]] = {
    "scores": scores,
    "heal": heal,
    "controls": controls,
    "refresh": refresh,
    "distill": distill,
    "analysis": analysis,
    "rivals": rivals,
    **{name: partial(setting, name=name) for name in SETTINGS},
}


study_run = cache(StudyRun)  # the models' answers on chat prompts are kept between parts


def rows_of(folder: Path) -> list[dict]:
    """All rows that there are."""
    files = sorted((folder / "study").glob("*/*-rows.json"))
    return [row for path in files for row in read_json(path, SCHEMA_VERSION)["rows"]]


def work(folder: Path, name: str, part: str, threads: int, steps: int | None = None) -> None:
    """Do one part of a run, if it is not done."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")
    run = study_run(folder.absolute(), name)
    if part == "settings":
        for other in SETTINGS:
            work(folder, name, other, threads)
        return
    path = run.study / f"{part.replace(', ', '-').replace(' ', '-')}-rows.json"
    if part == "train":
        train(run, {} if steps is None else {"max_steps": steps})
    elif not path.exists():
        print(f"{name}: {part}", flush=True)
        labels = {"run": name, "seed": run.seed, "restored": list(run.comparison.peaks)}
        asked = "settings" if part in SETTINGS else part
        labels["command"] = f"python benchmarks/smollm2_study.py --runs {name} --parts {asked}"
        write_json(path, {"schema_version": SCHEMA_VERSION, "rows": [{**labels, **row} for row in WORK[part](run)]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("smollm2-study"), help="folder of the runs")
    parser.add_argument("--runs", nargs="+", default=["sft-0", "sft-1", "grpo-0", "grpo-1"], help="kind and seed")
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "report"), default=[*PARTS, "report"])
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder that the page is written to")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process of its own")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run; results repeat for the same number")
    arguments = parser.parse_args()
    folder = arguments.output_dir
    if "warm-up" in arguments.parts:
        warm_up(folder, arguments.threads)
    for part in PARTS[1:]:
        if part in arguments.parts:
            run_all(work, [(folder, name, part, arguments.threads) for name in arguments.runs], arguments.jobs)
    if "report" in arguments.parts:
        print(json.dumps(write_page(rows_of(folder), arguments.docs)))


if __name__ == "__main__":
    main()
