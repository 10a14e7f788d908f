"""`trl-interfere train`."""

import os
import sys
from collections import ChainMap
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..run import Run
from .options import Options, option, parse
from .output import show
from .runs import recipe_of


EXAMPLE = "trl-interfere train recipe.yaml --output_dir out"


@dataclass(kw_only=True)
class TrainOptions(Options):
    """
    Train a causal language model through domains in sequence.

    All settings of SequentialGRPOConfig are options too, e.g. --learning_rate 1e-5, and go before those of the recipe.
    """

    recipe: str = option("", "YAML file with the model, the domains and the settings; or the run to go on with")
    model: str | None = option(None, "folder or Hub id; goes before the one of the recipe")
    resume: bool = option(False, "go on with the run in the output folder")
    dry_run: bool = option(False, "print schedule, steps, tokens and disk, and write nothing")
    max_stages: int | None = option(None, "stop after so many stages; exit code 75 if more are left", least=1)
    process_per_stage: bool = option(False, "run each stage in a process of its own")
    help_options: bool = option(False, "show all training options")

    def __post_init__(self):
        super().__post_init__()
        if self.max_stages is not None and self.process_per_stage:
            raise ValueError("--max_stages: expected without --process_per_stage, which runs all stages")


def main(arguments: list[str]) -> int | None:
    from ..training.options import options_parser, parse_options

    if {"--help_options", "--help-options"} & {*arguments}:
        print(options_parser().format_help())
        return None
    if "--config" in arguments:
        raise ValueError("--config: expected the recipe first, trl-interfere train FILE [options]")
    options, rest = parse(TrainOptions, arguments, "recipe", EXAMPLE, rest=True)
    settings = parse_options(rest, known=[field.name for field in fields(options)])
    if options.process_per_stage and not options.dry_run:
        from ..training.processes import train_in_processes

        own = ("--process-per-stage", "--resume")  # the parent's, and not passed on to its children
        passed = [argument for argument in arguments if argument.replace("_", "-") not in own]
        return train_in_processes(["train", *passed], options.resume)
    options.prepare()
    from ..hub.callback import HubCallback
    from ..training.dry_run import plan_run
    from ..training.processes import STAGES_LEFT
    from ..training.recipe_trainer import RecipeKeeper, build_trainer, load_run

    kept = recipe_of(Run(options.recipe)) if Path(options.recipe).is_dir() else None  # that of the run to go on with
    loaded = load_run(options.recipe, settings, options.model, kept, dry=options.dry_run)
    if options.dry_run:
        plan = plan_run(*loaded).render()
        if os.environ.get("RANK", "0") == "0":
            show(plan, f"Next: trl-interfere train {options.recipe}")
        return None
    trainer = build_trainer(options.recipe, loaded=loaded)
    trainer.add_callback(HubCallback())
    if kept is None:
        trainer.add_callback(RecipeKeeper(options.recipe, settings, options.model))
    with_progress(trainer)
    trainer.train(resume_from_checkpoint=options.resume, max_stages=options.max_stages)
    if options.max_stages is not None and trainer.next_stage() is not None:
        return STAGES_LEFT
    if trainer.is_world_process_zero():
        show_scores(trainer.score_matrix)
        show(f"Everything is in {trainer.args.output_dir}. Next: trl-interfere analyze {trainer.args.output_dir}")
    return None


def with_progress(trainer: Any) -> None:
    """Bars on stderr for the run and its stage, in place of those of transformers."""
    from transformers import PrinterCallback, ProgressCallback

    from ..training.dry_run import stage_steps
    from ..training.progress import StageProgress

    args, main_process = trainer.args, trainer.is_world_process_zero()
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.scorer.progress = main_process and sys.stderr.isatty() and not args.disable_tqdm
    if main_process:
        steps = []
        for stage in trainer.schedule:
            settings = ChainMap(args.stage_settings(stage.overrides), vars(args))
            steps.append(stage_steps(settings, trainer.domains[stage.domain].train_dataset))
        trainer.add_callback(StageProgress(steps, bars=not args.disable_tqdm))


def show_scores(matrix: Any) -> None:
    from ..evaluation.metrics import ScoreSummary

    show(matrix.to_table(), ScoreSummary.from_matrix(matrix).to_table())
