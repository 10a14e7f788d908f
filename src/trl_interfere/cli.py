"""The command `trl-interfere`."""

import os
import sys
import warnings
from collections import ChainMap
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


# `--output_dir` is `--output-dir`: TRL's users write the one, the shell's the other.
app = typer.Typer(
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
    help="Sequential GRPO with TRL, interference analysis and route repair.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_CORES = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # shared by the processes
Threads = Annotated[int, typer.Option(min=1, help="Threads to compute with; results repeat for the same number.")]
_PARENT_OPTIONS = ("--process-per-stage", "--resume")  # the parent's, and not passed on to its children


class Split(StrEnum):
    """Part of a domain that is scored."""

    eval = "eval"
    selection = "selection"


@app.command()
def lab(
    output_dir: Annotated[Path, typer.Option(help="Folder of the run; started again, it goes on.")] = Path("lab-out"),
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    order: Annotated[
        str, typer.Option(help="Domains in the order of training, separated by commas.")
    ] = "code,math,qa,writing",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each stage.")] = 100,
    prompts: Annotated[int, typer.Option(min=1, max=512, help="Test prompts of each domain.")] = 512,
    threads: Threads = 2,
) -> None:
    """Run the whole story on the embedded model: train in sequence, diagnose, roll back, refresh."""
    _prepare(threads)
    from .lab.pipeline import Lab
    from .lab.progress import LabProgress
    from .lab.summary import print_summary, write_report

    names = [name.strip() for name in order.split(",") if name.strip()]
    run = Lab(output_dir, seed=seed, order=names, steps=steps, prompts=prompts, progress=LabProgress())
    results = run.run()
    write_report(results, output_dir)
    print_summary(results, Console())
    Console().print(f"Everything is in {output_dir}: results.json, report.md, figures/, stages/, analysis/.")


def _print_training_options(show: bool) -> None:
    if show:
        from .training.options import options_parser

        print(options_parser().format_help())
        raise typer.Exit()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Option(help="YAML file with the model, the domains and the settings.")],
    model: Annotated[str | None, typer.Option(help="Folder or Hub id; over the one in the file.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder of the run; over the one in the file.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print schedule, steps, tokens and disk, and write nothing.")
    ] = False,
    max_stages: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many stages; exit code 75 if more are left.")
    ] = None,
    process_per_stage: Annotated[
        bool, typer.Option("--process-per-stage", help="Run each stage in a process of its own.")
    ] = False,
    help_options: Annotated[
        bool,
        typer.Option(
            "--help-options", is_eager=True, callback=_print_training_options, help="Show all training options."
        ),
    ] = False,
    threads: Threads = _CORES,
) -> None:
    """
    Train a causal language model through domains in sequence.

    All settings of SequentialGRPOConfig are options too, e.g. `--learning_rate 1e-5`, and go before those in the file.
    """
    if process_per_stage and not dry_run:
        if max_stages is not None:
            raise ValueError("--max-stages: expected without --process-per-stage, which runs all stages")
        from .training.processes import train_in_processes

        arguments = [argument for argument in sys.argv[1:] if argument.replace("_", "-") not in _PARENT_OPTIONS]
        raise typer.Exit(train_in_processes(arguments, resume))

    _prepare(threads)
    from transformers import PrinterCallback, ProgressCallback

    from .evaluation.score_summary import ScoreSummary
    from .training.options import parse_options
    from .training.plan import plan_run, stage_steps
    from .training.processes import STAGES_LEFT
    from .training.progress import StageProgress
    from .training.run_file import build_trainer, load_run

    options = parse_options(context.args, known=[name for name in context.params if name != "help_options"])
    if output_dir is not None:
        options["output_dir"] = str(output_dir)
    if dry_run:
        plan = plan_run(*load_run(config, options, model))
        if os.environ.get("RANK", "0") == "0":
            Console().print(plan.render())
        return

    trainer = build_trainer(config, options, model)
    args, main_process = trainer.args, trainer.is_world_process_zero()
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.scorer.progress = main_process and sys.stderr.isatty() and not args.disable_tqdm
    progress = StageProgress(
        [
            stage_steps(
                ChainMap(args.stage_settings(stage.overrides), vars(args)), trainer.domains[stage.domain].train_dataset
            )
            for stage in trainer.schedule
        ],
        bars=not args.disable_tqdm,
    )
    if main_process:
        trainer.add_callback(progress)
    try:
        trainer.train(resume_from_checkpoint=resume, max_stages=max_stages)
    finally:
        progress.close()
    if max_stages is not None and trainer.next_stage() is not None:
        raise typer.Exit(STAGES_LEFT)
    if main_process:
        matrix = trainer.score_matrix
        Console().print(matrix.to_table(), ScoreSummary.from_matrix(matrix).to_table())
        Console().print(f"Stages, scores and the manifest are in {args.output_dir}.")


@app.command()
def evaluate(
    config: Annotated[Path, typer.Option(help="YAML file of the training: it names the domains.")],
    model: Annotated[
        list[str] | None,
        typer.Option(help="Folder, adapter folder or Hub id; may be repeated. Defaults to the model of the file."),
    ] = None,
    domains: Annotated[str | None, typer.Option(help="Names separated by commas. Defaults to all.")] = None,
    split: Annotated[Split, typer.Option(help="Prompts to score on.")] = Split.eval,
    output_dir: Annotated[Path, typer.Option(help="Folder of scores.json and the scores per prompt.")] = Path(
        "evaluation"
    ),
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy. Defaults to the file's.")] = None,
    num_samples: Annotated[int | None, typer.Option(min=1, help="Completions per prompt.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Prompts to generate for at once.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest completion.")] = None,
    threads: Threads = _CORES,
) -> None:
    """Score checkpoints on the domains, and compare them with the first one prompt by prompt."""
    _prepare(threads)
    from .domains.loading import load_run_file
    from .evaluation.checkpoints import evaluate_checkpoints, print_evaluation

    run = load_run_file(config)
    names = None if domains is None else [name.strip() for name in domains.split(",") if name.strip()]
    sampling = {
        "temperature": temperature,
        "num_samples": num_samples,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
    }
    evaluation = evaluate_checkpoints(
        run,
        model or [run.model],
        output_dir,
        domains=names,
        split=split.value,
        progress=sys.stderr.isatty(),
        **{name: value for name, value in sampling.items() if value is not None},
    )
    print_evaluation(evaluation, Console())
    Console().print(f"The scores are in {output_dir}: scores.json and scores/.")


@app.command()
def analyze(
    config: Annotated[Path, typer.Option(help="YAML file of the training: it names the domains.")],
    before: Annotated[str, typer.Option(help="Checkpoint before the update: a folder or Hub id.")],
    after: Annotated[str, typer.Option(help="Checkpoint after the update.")],
    earlier: Annotated[str, typer.Option(help="Domain that may have been damaged.")],
    later: Annotated[str, typer.Option(help="Domains that the update was trained on, separated by commas.")],
    output_dir: Annotated[Path, typer.Option(help="Folder of the report.")],
    base: Annotated[
        str | None, typer.Option(help="Checkpoint that the earlier domain's own training started from.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Data type to compute in.")] = "float32",
    threads: Threads = _CORES,
) -> None:
    """Analyse what an update did to an earlier domain."""
    _prepare(threads)
    from rich.markdown import Markdown
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from .analysis.analyzer import InterferenceAnalyzer
    from .analysis.config import InterferenceConfig
    from .domains.loading import build_dataclass, load_run_file

    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"{output_dir}: expected an empty or a new folder")
    run = load_run_file(config)
    domains = {domain.name: domain for domain in run.domains}
    names = [name.strip() for name in later.split(",") if name.strip()]
    for name in (earlier, *names):
        if name not in domains:
            raise ValueError(f"unknown domain {name!r}, {config} has {sorted(domains)}")
    settings = build_dataclass(InterferenceConfig, run.analysis, f"{config}, analysis")
    analyzer = InterferenceAnalyzer.from_pretrained(before, after, base=base, config=settings, dtype=dtype)
    passes = analyzer.passes(later=len(names))
    columns = (
        TextColumn("{task.description:<38}"),
        BarColumn(),
        TextColumn("{task.completed:.1f}/{task.total:.1f} gradient passes"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("start", total=sum(passes.values()))

        def begin(part: str) -> None:
            done = sum(list(passes.values())[: list(passes).index(part)])
            progress.update(task, description=part, completed=done)

        report = analyzer.analyze(domains[earlier], [domains[name] for name in names], progress=begin)
        progress.update(task, description="done", completed=sum(passes.values()))
    report.save_pretrained(output_dir)
    report.save_figures(output_dir / "figures")
    Console().print(Markdown(report.to_markdown()))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs or reports, or folders of such folders.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Defaults to a free one from 7860 on.")] = None,
    hub: Annotated[bool, typer.Option(help="Let the page read repositories of the Hub.")] = True,
    browser: Annotated[bool, typer.Option(help="Open the page.")] = True,
    threads: Threads = _CORES,
) -> None:
    """Show runs and reports side by side, in a page on this machine."""
    try:
        from .app.page import build_page, launch
    except ImportError as error:
        raise ValueError(
            f"compare: expected the extra 'space', pip install 'trl-interfere[space]' ({error})"
        ) from error
    from .comparison.catalog import is_packed_lab

    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # torch is loaded when a model is asked
    lab = next((folder for folder in folders if is_packed_lab(folder)), None)
    rest = [folder for folder in folders if folder != lab]
    launch(build_page(rest, lab=lab, hub=hub), server_name=host, server_port=port, inbrowser=browser)


def _prepare(threads: int) -> None:
    import torch
    import transformers
    from datasets import disable_progress_bars

    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    # TRL still passes options under names that transformers has renamed; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")


def main() -> None:
    """Run the command; bad input ends with one message and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("TRL_INTERFERE_TRACEBACK"):
            raise
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"Error: {error}")
        sys.exit(2)
