"""Second part of the repair study: passes of training after the last stage, and what is done during the stages."""

import copy
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging import fisher, squared_gradients
from peft import LoraConfig
from projection import Projected
from transformers import PreTrainedModel, PrinterCallback

from trl_interfere import Domain, Run, SequentialGRPOTrainer, StageCallback
from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.lab.pipeline import MAX_COMPLETION_LENGTH, STAGE_LEARNING_RATES, Lab
from trl_interfere.models import load_model
from trl_interfere.repair.heal import heal_run, lost_beyond_interval
from trl_interfere.repair.peak_samples import peak_samples
from trl_interfere.training.refresh import distillation
from trl_interfere.training.rehearsal import rehearse
from trl_interfere.training.schedule import Stage


if TYPE_CHECKING:
    from repair_study import StudyRun

POINTS = (1, 2, 5, 10, 20)  # steps of one training, after which it is scored
AFTER_HEAL = (2, 5)
# Of 5e-5, 1e-4, 2e-4 and 3e-4, constant and falling to 0, the one that brought most back on the selection split of the
# first run of seed 0.
TAUGHT_RATE = 1e-4
# Of 1e-5, 2e-5, 4e-5 and 1e-4, the one with which five steps of distillation brought most back on the selection splits
# of the first six runs.
RATE_AFTER_HEAL = 4e-5
SHARES, BETAS = (0.05, 0.2), (0.01, 0.05, 0.2)
LORA_RANK, LORA_RATE = 4, 1e-3
BATCH = 128


class Taken(Exception):
    """The last model that was wanted is taken: the stage need not be scored."""


class Snapshots(StageCallback):
    """Asks for one stage, and keeps the model after some of its steps."""

    def __init__(self, stage: Stage, points: tuple[int, ...]):
        self.stage, self.points = stage, points
        self.models: dict[int, PreTrainedModel] = {}
        self.seconds: dict[int, float] = {}

    def request_stage(self, stages, score_matrix, schedule_finished):
        return self.stage

    def on_train_begin(self, args, state, control, **kwargs):
        self.since = time.process_time()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.points:
            self.seconds[state.global_step] = time.process_time() - self.since
            self.models[state.global_step] = load_model(MODEL_FOLDER)
            self.models[state.global_step].load_state_dict(model.state_dict())
        if state.global_step == self.points[-1]:
            raise Taken


def distilled(run: "StudyRun") -> list[dict]:
    """Distillation of the domains that lost more than the interval; then of all, held ones by the final stage."""
    lost = lost_beyond_interval(*run.comparison.scores)
    rows = _passes(run, "distill", _taught({name: run.run.trained(name).name for name in lost}), POINTS)
    return rows + _passes(run, "distill all", _taught(_all_teachers(run)), (10,))


def after_heal(run: "StudyRun") -> list[dict]:
    """A heal, and some steps of each refresh of what it has not brought back."""
    lost = {name: run.run.trained(name).name for name in lost_beyond_interval(*run.comparison.scores)}
    teachers = {"heal, distill": lost, "heal, distill all": _all_teachers(run)}
    stages = {name: _taught(found, RATE_AFTER_HEAL) for name, found in teachers.items()}
    grpo = {"learning_rate": RATE_AFTER_HEAL, "max_steps": AFTER_HEAL[-1]}
    stages["heal, refresh"] = Stage(run.worst, "refresh", grpo)
    folder = _copy(run)
    repair = heal_run(Run(folder), list(run.lab.domains.values()), scorer=run.comparison.scorer)
    cost = repair.record["cost"]
    rows = [run.comparison.row("heal", repair.merge(), cost, rank=64)]
    for name, stage in stages.items():
        rows += _passes(run, name, stage, AFTER_HEAL, folder, cost)
    shutil.rmtree(folder)
    return rows


def fisher_merging(run: "StudyRun") -> list[dict]:
    """The mean of the stages, weighed by the diagonal of each domain's Fisher information."""
    compare = run.comparison
    final, peaks = str(compare.final), {name: str(peak) for name, peak in compare.peaks.items()}
    since = time.process_time()
    own = peak_samples(final, peaks, compare.domains, 64, max_new_tokens=MAX_COMPLETION_LENGTH, batch_size=64)
    models = [load_model(peaks.get(name, final)) for name in own]
    merged = fisher(models, [squared_gradients(model, own[name]) for name, model in zip(own, models, strict=True)])
    passes = sum(len(references.completions) for references in own.values())
    cost = {f"sequences_{kind}": passes for kind in ("sampled", "forward", "backward")}
    return [compare.row("Fisher merging", merged, {**cost, "seconds": time.process_time() - since})]


def prevention(run: "StudyRun") -> list[dict]:
    """Stages that are trained otherwise, each as long as before; figures against the run as it was."""
    domains, order = run.lab.domains, run.order
    later = {"model": str(run.stage(order[0])), "names": order[1:], "seed": run.seed + 1}
    rows = []
    for share in SHARES:
        mixed = [rehearse(domains[name], [domains[n] for n in order[:i]], share) for i, name in enumerate(order) if i]
        rows.append(_trained(run, "rehearsal", [*mixed, domains[order[0]]], share=share, **later))
    callback = Projected([domains[name] for name in order])
    rows.append(_trained(run, "projected steps", list(domains.values()), callbacks=[callback], **later))
    for beta in BETAS:
        settings = {"beta": beta, "kl_reference": "stage"}
        rows.append(_trained(run, "KL to the stage before", list(domains.values()), settings, beta=beta))
    lora = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear")
    settings = {"learning_rate": LORA_RATE, "stage_overrides": None}
    rows.append(_trained(run, "LoRA", list(domains.values()), settings, peft_config=lora, rank=LORA_RANK))
    whole = rehearse(domains[order[0]], [domains[n] for n in order[1:]], 1 - 1 / len(order))
    steps = {"max_steps": run.lab.steps * len(order)}
    others = [domains[name] for name in order[1:]]
    rows.append(_trained(run, "mixed from the start", [whole, *others], steps, names=order[:1]))
    return rows


def _taught(teachers: dict[str, str], rate: float = TAUGHT_RATE) -> Stage:
    return distillation(teachers, {"learning_rate": rate, "max_steps": POINTS[-1]})


def _all_teachers(run: "StudyRun") -> dict[str, str]:
    restored = {name: run.run.trained(name).name for name in run.comparison.peaks}
    return {name: restored.get(name, run.run.final.name) for name in run.order}


def _copy(run: "StudyRun") -> Path:
    folder = run.study / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("checkpoints", "analysis", "figures"))
    return folder


def _passes(
    run: "StudyRun",
    name: str,
    stage: Stage,
    points: tuple[int, ...],
    healed: Path | None = None,
    before: dict[str, float] | None = None,
) -> list[dict]:
    """One refresh of a copy of the run, scored after some of its steps."""
    folder = _copy(run) if healed is None else healed
    lab = Lab(folder.absolute(), seed=run.seed, order=run.order, rate=run.rate)
    snapshots = Snapshots(stage, points)
    args = lab.args(save_strategy="no")
    trainer = SequentialGRPOTrainer(str(MODEL_FOLDER), args, list(lab.domains.values()), callbacks=[snapshots])
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=True)
    except Taken:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if healed is None:
        shutil.rmtree(folder)
    rows = []
    for steps, model in snapshots.models.items():
        sequences = steps * BATCH
        cost = {"sequences_sampled": sequences, "sequences_forward": sequences, "sequences_backward": sequences}
        if "teachers" in stage.overrides:
            cost["sequences_forward"] += sequences
        cost["seconds"] = snapshots.seconds[steps]
        total = {key: value + (before or {}).get(key, 0) for key, value in cost.items()}
        taught = {"taught": list(stage.overrides["teachers"])} if "teachers" in stage.overrides else {}
        rows.append(run.comparison.row(name, model, total, steps=steps, **taught))
    return rows


def _trained(
    run: "StudyRun",
    name: str,
    domains: list[Domain],
    settings: dict[str, Any] | None = None,
    model: str = str(MODEL_FOLDER),
    names: list[str] | None = None,
    seed: int | None = None,
    callbacks: list | None = None,
    peft_config: Any = None,
    **labels: Any,
) -> dict:
    """Stages of their own, from a model; `names` are the domains that are trained."""
    folder = run.study / "trained"
    shutil.rmtree(folder, ignore_errors=True)
    names = names or run.order
    changes = {"output_dir": str(folder), "order": names, "seed": run.seed if seed is None else seed}
    rates = {one: {"learning_rate": rate} for one, rate in STAGE_LEARNING_RATES.items() if one in names}
    args = run.lab.args(**{**changes, "stage_overrides": rates, "save_strategy": "no", **(settings or {})})
    unscored = [_unscored(domain) for domain in domains]
    trainer = SequentialGRPOTrainer(model, args, unscored, callbacks=callbacks, peft_config=peft_config)
    trainer.remove_callback(PrinterCallback)
    since = time.process_time()
    trainer.train()
    sequences = BATCH * sum(record.steps for record in trainer.run.stages)
    cost = {f"sequences_{kind}": sequences for kind in ("sampled", "forward", "backward")}
    if trainer.args.beta:  # the reference model
        cost["sequences_forward"] += sequences
    cost["seconds"] = time.process_time() - since
    final = trainer.model if peft_config is None else trainer.model.merge_and_unload()
    row = run.comparison.row(name, final, cost, **labels)
    shutil.rmtree(folder)
    return row


def _unscored(domain: Domain) -> Domain:
    domain = copy.copy(domain)  # a rehearsed one has rows of others, which a new Domain refuses
    domain.eval_dataset = None
    return domain
