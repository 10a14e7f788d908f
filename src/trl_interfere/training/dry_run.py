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
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.filesize import decimal
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from ..recipe import RunFile, build_dataclass
from ..run import STAGES_NAME, Run
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
    """
    A run, before it starts. Stages that callbacks may ask for are not in it. `finished` is `None` if there is no run
    in `output_dir`; `disk` holds bytes at their peak, by what they hold.
    """

    output_dir: str
    stages: list[StagePlan]
    finished: list[str] | None
    refresh: dict[str, Any] | None
    evaluated: bool
    score_rounds: int
    score_prompts: int
    score_tokens: int
    disk: dict[str, int]
    free: int

    def render(self) -> Group:
        """The plan for the terminal."""
        todo = [plan for plan in self.stages if not plan.done]
        schedule = Table(
            title=f"{len(todo)} of {len(self.stages)} stages to do",
            caption="Tokens are upper bounds.",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        for name in ("stage", "kind", "domain"):
            schedule.add_column(name, overflow="fold")
        for name in ("steps", "learning\nrate", "prompts", "tokens\ngenerated", "tokens\ntrained on"):
            schedule.add_column(name, justify="right", no_wrap=True)
        for position, plan in enumerate(self.stages, start=1):
            schedule.add_row(
                f"{position} done" if plan.done else str(position),
                plan.stage.kind,
                plan.stage.domain,
                f"{plan.steps:,}",
                f"{plan.learning_rate:g}",
                f"{plan.prompts:,}",
                f"{plan.generated_tokens:,}",
                f"{plan.trained_tokens:,}",
            )
        names = ("steps", "prompts", "generated_tokens", "trained_tokens")
        steps, *totals = (f"{sum(getattr(plan, name) for plan in todo):,}" for name in names)
        schedule.add_section()
        schedule.add_row("to do", "", "", steps, "", *totals)

        needed = sum(self.disk.values())
        disk = Table(title=f"Disk for {self.output_dir}, about", box=SIMPLE_HEAD, pad_edge=False)
        disk.add_column("content")
        disk.add_column("size", justify="right")
        for content, size in self.disk.items():
            disk.add_row(content, decimal(size))
        disk.add_section()
        disk.add_row("together", decimal(needed))
        disk.add_row("free", decimal(self.free))

        lines = [
            f"Scoring: {self.score_prompts:,} prompts, {self.score_rounds} times over, "
            f"at most {self.score_tokens:,} tokens generated."
        ]
        if self.evaluated:
            lines.append("The evaluations of eval_strategy come on top.")
        if self.refresh is not None:
            settings = ", ".join(f"{name} {value}" for name, value in self.refresh.items())
            lines.append(f"Refresh stages come on top, if they are asked for ({settings or 'default settings'}).")
        if self.finished is not None:
            done = ", ".join(self.finished) or "nothing"
            lines.append(f"{self.output_dir} holds a run that --resume continues. Finished: {done}.")
        if needed > self.free:
            lines.append(f"Warning: the disk may be too small by {decimal(needed - self.free)}.")
        return Group(schedule, *lines, disk)


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
    Work out what a run will do and need. Nothing is written and no weights are loaded.

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
    datasets = {domain.name: domain.train_dataset for domain in run.domains if domain.train_dataset is not None}
    _check_folder(Path(args.output_dir))
    earlier = Run(args.output_dir) if (Path(args.output_dir) / STAGES_NAME).exists() else None
    finished = None if earlier is None else earlier.stages
    current = [] if earlier is None or earlier.current is None else [earlier.current]
    trained = sum(record.kind == "train" for record in [*(finished or []), *current])
    weights = model_bytes(run, args)
    moments = 0 if args.save_only_model else 2 * weights  # those of Adam
    stages, folders = [], 0
    kept = peak = (0, 0)  # bytes and number of checkpoints
    for position, stage in enumerate(schedule):
        settings = ChainMap(args.stage_settings(stage.overrides), vars(args))
        group = settings["generation_batch_size"] // settings["num_generations"]
        dataset = datasets[stage.domain]
        steps = stage_steps(settings, dataset)
        slices = steps * settings["gradient_accumulation_steps"]
        generations = math.ceil(slices / (settings["steps_per_generation"] * settings["num_iterations"]))
        batch = settings["per_device_train_batch_size"] * args.world_size
        completion = settings["max_completion_length"]
        stages.append(
            StagePlan(
                stage=stage,
                steps=steps,
                learning_rate=settings["learning_rate"],
                prompts=generations * group,
                generated_tokens=generations * settings["generation_batch_size"] * completion,
                trained_tokens=slices * batch * completion,
                done=position < trained,
            )
        )
        if position < trained:
            continue
        adapters = position + 1 if args.adapter_per_stage else 1
        folders += weights * (2 * adapters if args.adapter_per_stage else 1)  # each adapter, and their sum
        written = _checkpoints(settings, steps, dataset)
        limit = settings["save_total_limit"] or written
        size = adapters * weights + moments
        # A new checkpoint is written before the oldest one goes.
        held = min(written, limit + 1)
        peak = max(peak, (kept[0] + held * size, kept[1] + held))
        if args.keep_checkpoints:
            kept = kept[0] + min(written, limit) * size, kept[1] + min(written, limit)
    todo = [plan for plan in stages if not plan.done]
    score_prompts = sum(len(domain.eval_dataset) for domain in run.domains if domain.eval_dataset is not None)
    score_rounds = len(todo) + (not finished) + sum(record.kind != "base" for record in current)
    completion = args.score_max_new_tokens or args.max_completion_length
    score_tokens = score_rounds * score_prompts * args.score_samples * completion
    folder = Path(args.output_dir).absolute()
    return RunPlan(
        output_dir=args.output_dir,
        stages=stages,
        finished=None
        if finished is None
        else [record.name for record in finished] + [f"{record.name} (not yet scored)" for record in current],
        refresh=run.refresh,
        evaluated=any(stage.overrides.get("eval_strategy", args.eval_strategy) != "no" for stage in schedule),
        score_rounds=score_rounds,
        score_prompts=score_prompts,
        score_tokens=score_tokens,
        disk={
            f"stage folders: {len(todo)}": folders,
            f"checkpoints at a time: {peak[1]}": peak[0],
            "scores": score_tokens * _BYTES_PER_TOKEN,
        },
        free=shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free,
    )


def model_bytes(run: RunFile, args: SequentialGRPOConfig) -> int:
    """Bytes of the weights that are trained and saved. Of the model only the configuration is read."""
    options = dict(args.model_init_kwargs or {})
    known = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
    try:
        config = AutoConfig.from_pretrained(run.model, **{"trust_remote_code": args.trust_remote_code, **known})
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model: {run.model!r} is neither a folder with a config and safetensors weights nor readable from the "
            f"Hub ({error})"
        ) from error
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
    if settings["save_strategy"] == "no":
        return 0
    if settings["save_strategy"] == "epoch":
        return math.ceil(steps / stage_steps({**settings, "max_steps": -1, "num_train_epochs": 1}, dataset))
    every = settings["save_steps"]
    return math.ceil(steps / (math.ceil(steps * every) if every < 1 else every))


def _check_folder(folder: Path) -> None:
    found = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not found.is_dir() or not os.access(found, os.W_OK):
        raise ValueError(f"output_dir: expected a folder that can be written to, found {found}")
