"""What a run will do and need, before it starts."""

import math
import os
import shutil
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from rich.console import Group
from rich.filesize import decimal
from transformers import AutoConfig, AutoModelForCausalLM

from ..recipe import RunFile, build_dataclass
from ..run import STAGES_NAME, Run
from ..tables import console_table
from .checks import check_run
from .config import SequentialGRPOConfig
from .schedule import Stage


_BYTES_PER_TOKEN = 4  # of text, in the files of scores


@dataclass
class StagePlan:
    """A stage of the schedule, before it runs. Tokens are upper bounds."""

    stage: Stage
    steps: int
    learning_rate: float
    prompts: int
    generated_tokens: int
    trained_tokens: int
    done: bool


@dataclass
class RunPlan:
    """A run, before it starts, without the stages that callbacks may ask for. `disk` holds bytes at their peak."""

    output_dir: str
    stages: list[StagePlan]
    score_rounds: int
    score_prompts: int
    score_tokens: int
    disk: dict[str, int]
    free: int
    notes: list[str]

    def render(self) -> Group:
        """The plan for the terminal."""
        todo = [plan for plan in self.stages if not plan.done]
        names = ("steps", "learning_rate", "prompts", "generated_tokens", "trained_tokens")
        rows = [
            [f"{position} {plan.stage.domain}{', done' if plan.done else ''}"]
            + [f"{getattr(plan, name):,}" for name in names]
            for position, plan in enumerate(self.stages, start=1)
        ]
        sums = ["" if name == "learning_rate" else f"{sum(getattr(plan, name) for plan in todo):,}" for name in names]
        header = ["stage", "steps", "learning rate", "prompts", "tokens generated", "tokens trained on"]
        needed = sum(self.disk.values())
        sizes = {**self.disk, "together": needed, "free": self.free}
        return Group(
            console_table(f"{len(todo)} of {len(self.stages)} stages to do", header, [*rows, ["to do", *sums]]),
            "Tokens are upper bounds.",
            f"Scoring: {self.score_prompts:,} prompts, {self.score_rounds} times over, "
            f"at most {self.score_tokens:,} tokens generated.",
            *self.notes,
            *([f"Warning: the disk may be too small by {decimal(needed - self.free)}."] if needed > self.free else []),
            console_table(
                f"Disk for {self.output_dir}, about",
                ["content", "size"],
                [[content, decimal(size)] for content, size in sizes.items()],
            ),
        )


def stage_steps(settings: Mapping[str, Any], dataset: Dataset | IterableDataset) -> int:
    """Optimizer steps of one stage, as transformers and TRL count them."""
    if settings["max_steps"] > 0:
        return settings["max_steps"]
    if not hasattr(dataset, "__len__"):
        raise ValueError("max_steps: expected a number of steps for a dataset without a length, found -1")
    # One generation batch is used `num_iterations` times, each time in `steps_per_generation` slices.
    prompts = settings["generation_batch_size"] // settings["num_generations"]
    slices = len(dataset) // prompts * settings["num_iterations"] * settings["steps_per_generation"]
    per_epoch = max(math.ceil(slices / settings["gradient_accumulation_steps"]), 1)
    return math.ceil(settings["num_train_epochs"] * per_epoch)


def plan_run(run: RunFile, args: SequentialGRPOConfig) -> RunPlan:
    """
    What a run will do and need. Nothing is written and no weights are loaded.

    Args:
        run ([`RunFile`]):
            Model and domains.
        args ([`SequentialGRPOConfig`]):
            Settings of the training.

    Returns:
        [`RunPlan`]: The plan.

    Raises:
        `ValueError`: If the run could not start.
    """
    schedule = check_run(run.domains, args)
    folder = Path(args.output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"output_dir: expected a folder that can be written to, found {existing}")
    earlier = Run(folder) if (folder / STAGES_NAME).exists() else None
    records = [] if earlier is None else earlier.records
    trained = sum(record.kind == "train" for record in records)
    datasets = {domain.name: domain.train_dataset for domain in run.domains}
    weights = model_bytes(run, args)
    moments = 0 if args.save_only_model else 2 * weights  # those of Adam
    stages, folders, kept, peak = [], 0, 0, 0
    for position, stage in enumerate(schedule):
        settings = ChainMap(args.stage_settings(stage.overrides), vars(args))
        steps = stage_steps(settings, datasets[stage.domain])
        stages.append(_stage_plan(stage, settings, steps, args.world_size, position < trained))
        if position < trained:
            continue
        adapters = position + 1 if args.adapter_per_stage else 1
        folders += weights * (2 * adapters if args.adapter_per_stage else 1)  # each adapter, and their sum
        size = adapters * weights + moments
        written = _checkpoints(settings, steps, datasets[stage.domain])
        limit = settings["save_total_limit"] or written
        peak = max(peak, kept + min(written, limit + 1) * size)  # a new one is written before the oldest one goes
        kept += min(written, limit) * size if args.keep_checkpoints else 0
    todo = sum(not plan.done for plan in stages)
    score_rounds = todo + (earlier is None) + (earlier is not None and earlier.current is not None)
    score_prompts = sum(len(domain.eval_dataset) for domain in run.domains if domain.eval_dataset is not None)
    completion = args.score_max_new_tokens or args.max_completion_length
    score_tokens = score_rounds * score_prompts * args.score_samples * completion
    notes = []
    if any(stage.overrides.get("eval_strategy", args.eval_strategy) != "no" for stage in schedule):
        notes.append("The evaluations of eval_strategy come on top.")
    if run.refresh is not None:
        notes.append("Refresh stages come on top, if they are asked for.")
    if earlier is not None:
        done = ", ".join(record.name for record in records) or "nothing"
        notes.append(f"{args.output_dir} holds a run that --resume continues. Finished: {done}.")
    return RunPlan(
        output_dir=args.output_dir,
        stages=stages,
        score_rounds=score_rounds,
        score_prompts=score_prompts,
        score_tokens=score_tokens,
        disk={"stage folders": folders, "checkpoints at a time": peak, "scores": score_tokens * _BYTES_PER_TOKEN},
        free=shutil.disk_usage(existing).free,
        notes=notes,
    )


def _stage_plan(stage: Stage, settings: Mapping[str, Any], steps: int, world: int, done: bool) -> StagePlan:
    slices = steps * settings["gradient_accumulation_steps"]
    generations = math.ceil(slices / (settings["steps_per_generation"] * settings["num_iterations"]))
    size, completion = settings["generation_batch_size"], settings["max_completion_length"]
    return StagePlan(
        stage=stage,
        steps=steps,
        learning_rate=settings["learning_rate"],
        prompts=generations * (size // settings["num_generations"]),
        generated_tokens=generations * size * completion,
        trained_tokens=slices * settings["per_device_train_batch_size"] * world * completion,
        done=done,
    )


def model_bytes(run: RunFile, args: SequentialGRPOConfig) -> int:
    """Bytes of the weights that are trained and saved. Of the model only the configuration is read."""
    options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    known = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
    try:
        config = AutoConfig.from_pretrained(run.model, **known)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {run.model!r} is neither a folder with a config nor on the Hub ({error})") from error
    if os.path.isdir(run.model) and not list(Path(run.model).glob("*.safetensors")):
        raise ValueError(f"model: expected safetensors weights in {run.model!r}, found none")
    dtype = options.get("dtype", "float32")
    dtype = config.dtype or torch.float32 if dtype == "auto" else dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype
        )
        if run.peft is not None:
            model = get_peft_model(model, build_dataclass(LoraConfig, run.peft, "peft"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return sum(parameter.numel() * parameter.element_size() for parameter in trained)


def _checkpoints(settings: Mapping[str, Any], steps: int, dataset: Dataset | IterableDataset) -> int:
    every = settings["save_steps"]
    if settings["save_strategy"] == "no":
        return 0
    if settings["save_strategy"] == "epoch":
        every = stage_steps({**settings, "max_steps": -1, "num_train_epochs": 1}, dataset)
    return math.ceil(steps / (math.ceil(steps * every) if every < 1 else every))
