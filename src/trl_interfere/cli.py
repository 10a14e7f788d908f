"""The command `trl-interfere`."""

import os
import shlex
import sys
import warnings
from collections import ChainMap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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

_THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # shared by the processes
if "LOCAL_WORLD_SIZE" not in os.environ and os.environ.get("OMP_NUM_THREADS", "").isdecimal():
    # Where several processes have been started by hand, each with its share. A launcher sets 1, whatever there is.
    _THREADS = max(1, int(os.environ["OMP_NUM_THREADS"]))
Threads = Annotated[int, typer.Option(min=1, help="Threads to compute with; results repeat for the same number.")]
_PARENT_OPTIONS = ("--process-per-stage", "--resume")  # the parent's, and not passed on to its children


class Split(StrEnum):
    """Part of a domain that is scored."""

    eval = "eval"
    selection = "selection"


class Engine(StrEnum):
    """What completes prompts when checkpoints are scored."""

    transformers = "transformers"
    vllm = "vllm"


def _output() -> Console:
    """Where results are printed: tables in a log are not cut at the 80 columns that rich takes for one."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else 140)


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
    print_summary(results, _output())
    _output().print(f"Everything is in {output_dir}: results.json, report.md, figures/, stages/, analysis/.")


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
    threads: Threads = _THREADS,
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

    from .evaluation.metrics import ScoreSummary
    from .hub.callback import HubCallback
    from .training.dry_run import plan_run, stage_steps
    from .training.options import parse_options
    from .training.processes import STAGES_LEFT
    from .training.progress import StageProgress
    from .training.recipe_trainer import build_trainer, load_run

    options = parse_options(context.args, known=[name for name in context.params if name != "help_options"])
    if output_dir is not None:
        options["output_dir"] = str(output_dir)
    if dry_run:
        plan = plan_run(*load_run(config, options, model))
        if os.environ.get("RANK", "0") == "0":
            _output().print(plan.render())
        return

    trainer = build_trainer(config, options, model)
    trainer.add_callback(HubCallback())
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
        _output().print(matrix.to_table(), ScoreSummary.from_matrix(matrix).to_table())
        _output().print(f"Stages, scores and the manifest are in {args.output_dir}.")


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
    engine: Annotated[
        Engine, typer.Option(help="What completes the prompts; vllm needs the extra of that name.")
    ] = Engine.transformers,
    threads: Threads = _THREADS,
) -> None:
    """Score checkpoints on the domains, and compare them with the first one prompt by prompt."""
    _prepare(threads)
    from .evaluation.checkpoints import evaluate_checkpoints, print_evaluation
    from .recipe import load_run_file

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
        engine=engine.value,
        **{name: value for name, value in sampling.items() if value is not None},
    )
    print_evaluation(evaluation, _output())
    _output().print(f"The scores are in {output_dir}: scores.json and scores/.")


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
    threads: Threads = _THREADS,
) -> None:
    """Analyse what an update did to an earlier domain."""
    _prepare(threads)
    from rich.markdown import Markdown
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from .analysis.analyzer import InterferenceAnalyzer
    from .analysis.config import InterferenceConfig
    from .evaluation.checkpoints import analysis_settings
    from .recipe import build_dataclass, load_run_file

    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"{output_dir}: expected an empty or a new folder")
    run = load_run_file(config)
    domains = {domain.name: domain for domain in run.domains}
    names = [name.strip() for name in later.split(",") if name.strip()]
    for name in (earlier, *names):
        if name not in domains:
            raise ValueError(f"unknown domain {name!r}, {config} has {sorted(domains)}")
    settings = build_dataclass(InterferenceConfig, analysis_settings(run), f"{config}, analysis")
    with _made(output_dir):  # an analysis must not be lost to a folder that cannot be made
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
    figures, _, _ = report.to_markdown().partition("\n## ")
    _output().print(Markdown(figures))
    _output().print(
        f"Everything is in {output_dir}: report.json, report.md with the claims and their controls, figures/."
    )


@app.command()
def rollback(
    context: typer.Context,
    report: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of an analysis: it names the checkpoints and ranks the routes. Given once for each earlier "
            "domain, all of them are repaired by one set of routes."
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="With several reports, weights of their domains, e.g. math=2,qa=1.")
    ] = None,
    before: Annotated[
        str | None, typer.Option(help="Checkpoint before the update; over the one in the report.")
    ] = None,
    after: Annotated[str | None, typer.Option(help="Checkpoint after it; over the one in the report.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Where the model of an adapter lies, if not where the adapter says.")
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the result, new or empty. A delta is applied in place where it is left out."),
    ] = None,
    criterion: Annotated[
        str, typer.Option(help="What routes are ranked by; without a report magnitude or random.")
    ] = "damage",
    budget: Annotated[float, typer.Option(help="Share of the scope that is rolled back.")] = 0.02,
    budget_of: Annotated[str, typer.Option(help="What the budget is a share of: routes or parameters.")] = "routes",
    scope: Annotated[str, typer.Option(help="mlp, attention or joint.")] = "mlp",
    step: Annotated[
        str,
        typer.Option(
            help="Share of the update that is taken back: a number, or (with --config) optimal, per_route or "
            "per_route_exact."
        ),
    ] = "1.0",
    protection: Annotated[float, typer.Option(help="Weight of what the later domains owe a route.")] = 0.0,
    later_weight: Annotated[float, typer.Option(help="Weight of the later domains' losses in a search.")] = 1.0,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Points that a searched step may cost a domain; it repairs most among these."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Parts in which the budget is spent (--config).")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the random criteria.")] = 0,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of the training: it names the domains that a step is searched on.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Data type that a search computes in.")] = "float32",
    delta: Annotated[Path | None, typer.Option(help="File to write the touched slices to, old and new.")] = None,
    undo: Annotated[Path | None, typer.Option(help="Folder whose last rollback is undone.")] = None,
    apply_delta: Annotated[Path | None, typer.Option(help="Delta file to apply to --model.")] = None,
    revert_delta: Annotated[Path | None, typer.Option(help="Delta file to revert in --model.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder that a delta file is applied to or reverted in.")] = None,
    threads: Threads = _THREADS,
) -> None:
    """
    Roll routes of a checkpoint back without training, or undo it.

    From a report, or from two checkpoints; --undo, --apply-delta and --revert-delta need neither.
    """
    _prepare(threads)
    given = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]
    from .repair.command import Request, carry_out

    request = Request(
        reports=report or [],
        weights=weights,
        before=before,
        after=after,
        base=base,
        output_dir=output_dir,
        rollback={
            "criterion": criterion,
            "budget": budget,
            "budget_of": budget_of,
            "scope": scope,
            "step": step,
            "protection": protection,
            "rounds": rounds,
            "seed": seed,
        },
        config=config,
        dtype=dtype,
        later_weight=later_weight,
        max_drop=max_drop,
        delta=delta,
        undo=undo,
        apply_delta=apply_delta,
        revert_delta=revert_delta,
        model=model,
        given=given,
    )
    carry_out(request, _output(), progress=sys.stderr.isatty())


@app.command()
def sweep(
    config: Annotated[Path, typer.Option(help="YAML file of the training: it names the domains.")],
    report: Annotated[
        list[Path],
        typer.Option(
            help="Folder of a report that `analyze` wrote. Given several times, as for runs of several seeds, each is "
            "swept and the table and the figure show means and ranges."
        ),
    ],
    output_dir: Annotated[Path, typer.Option(help="Folder of the results; started again, it goes on.")],
    before: Annotated[
        str | None, typer.Option(help="Checkpoint before the update. Defaults to the one of the report.")
    ] = None,
    after: Annotated[
        str | None, typer.Option(help="Checkpoint after the update. Defaults to the one of the report.")
    ] = None,
    criteria: Annotated[
        str | None,
        typer.Option(
            help="Criteria and controls, separated by commas. Defaults to damage, damage_protected and all others "
            "that the report can rank by."
        ),
    ] = None,
    budgets: Annotated[str, typer.Option(help="Shares of the routes, separated by commas.")] = "0.02,0.08,0.32",
    scopes: Annotated[str, typer.Option(help="mlp, attention, joint, separated by commas.")] = "mlp",
    steps: Annotated[
        str | None,
        typer.Option(help="Steps that the best is chosen from, separated by commas. Defaults to eight, 0.25 to 4."),
    ] = None,
    protections: Annotated[
        str | None,
        typer.Option(
            help="Weights that the best protection is chosen from, separated by commas. Defaults to four, 0.5 to 1.5."
        ),
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws of each random control.")] = 5,
    max_drop: Annotated[
        float,
        typer.Option(min=0, help="Points that no domain may lose on the selection split, if a step keeps to that."),
    ] = 1.0,
    threads: Threads = _THREADS,
) -> None:
    """Roll back by several criteria and budgets, each at its own best step, beside random controls."""
    _prepare(threads)
    from rich.markdown import Markdown

    from .analysis.report import InterferenceReport
    from .analysis.routes import RouteMap
    from .checkpoint import Checkpoint
    from .recipe import load_run_file
    from .repair.bench import RepairBench
    from .repair.choice import locate_checkpoint
    from .repair.criteria import CRITERIA
    from .repair.staleness import check_not_stale
    from .repair.sweep import PROTECTIONS, STEPS, Sweep, check_settings, rankable
    from .repair.sweep import sweep as run_sweep
    from .reporting.repair_plots import plot_sweep
    from .run import write_atomically

    def listed(text: str, option: str, convert=str) -> list:
        try:
            return [convert(part.strip()) for part in text.split(",") if part.strip()]
        except ValueError:
            raise ValueError(f"--{option}: expected numbers separated by commas, found {text!r}") from None

    found = [InterferenceReport.from_pretrained(folder) for folder in report]
    console = Console(stderr=True)
    if criteria is None:
        possible = [set(rankable(entry)) for entry in found]
        names = [name for name in ("damage", "damage_protected", *CRITERIA) if all(name in part for part in possible)]
        names = list(dict.fromkeys(names))
        if "route_conflict" not in names:
            console.print("route_conflict is left out: it needs a report that was made with --base.")
    else:
        names = listed(criteria, "criteria")
    shares, parts = listed(budgets, "budgets", float), listed(scopes, "scopes")
    tried = STEPS if steps is None else tuple(listed(steps, "steps", float))
    weights = PROTECTIONS if protections is None else tuple(listed(protections, "protections", float))
    if len(found) > 1 and (before is not None or after is not None):
        raise ValueError("--before, --after: expected one --report with them, each of several reports names its own")
    if len({entry.earlier for entry in found}) > 1:
        raise ValueError(f"--report: expected reports of one domain, found {[entry.earlier for entry in found]}")
    for entry in found:
        check_settings(names, shares, parts, draws, max_drop, tried, weights, entry)
    places = [
        [
            locate_checkpoint(name, folder) if given is None else given
            for given, name in ((before, entry.before), (after, entry.after))
        ]
        for entry, folder in zip(found, report, strict=True)
    ]
    for entry, place in zip(found, places, strict=True):  # all of them before the first is swept
        first, last = (Checkpoint(name) for name in place)
        check_not_stale(entry, RouteMap(last.config), first, last)
    run = load_run_file(config)
    with _made(output_dir):
        together = Sweep()
        for number, (entry, place) in enumerate(zip(found, places, strict=True)):
            several = len(found) > 1
            bench = RepairBench.from_run(run, entry, *place, progress=sys.stderr.isatty())
            if bench.left_out and not number:
                console.print(f"Not measured, since they lack selection or eval prompts: {', '.join(bench.left_out)}.")
            result = run_sweep(
                bench,
                names,
                shares,
                parts,
                steps=tried,
                protections=weights,
                draws=draws,
                max_drop=max_drop,
                labels={"seed": number, "order": None} if several else None,
                path=output_dir / (f"sweep-{number}.json" if several else "sweep.json"),
                progress=console.print,
            )
            together.rows += result.rows
    table = together.to_table()
    write_atomically(output_dir / "sweep.md", f"# Rollbacks of {found[0].earlier}\n\n{table}")
    title = f"trl-interfere sweep --report {' --report '.join(folder.name for folder in report)}: {found[0].earlier}"
    plot_sweep(together.rows, title).savefig(output_dir / "sweep.png", dpi=150)
    _output().print(Markdown(table))
    files = "sweep.json" if len(found) == 1 else f"sweep-0.json to sweep-{len(found) - 1}.json"
    _output().print(f"Everything is in {output_dir}: {files}, sweep.md, sweep.png.")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def refresh(
    context: typer.Context,
    config: Annotated[Path, typer.Option(help="YAML file of the training, as it was for `train`.")],
    domain: Annotated[str, typer.Option(help="Domain to refresh.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the refresh.")] = 10,
    learning_rate: Annotated[
        float | None,
        typer.Option(min=0, help="Learning rate of the refresh. Defaults to that of the domain's stages."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder or Hub id, if it was given to `train`.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder of the run; over the one in the file.")] = None,
    threads: Threads = _THREADS,
) -> None:
    """
    Add a refresh to a finished training: a short RL pass on one domain. Stopped and started again, it goes on.

    Settings that were given to `train` as options are given here again.
    """
    _prepare(threads)
    from transformers import PrinterCallback, ProgressCallback

    from .evaluation.metrics import ScoreSummary
    from .hub.callback import HubCallback
    from .run import STAGES_NAME
    from .training.options import parse_options
    from .training.recipe_trainer import build_trainer, load_run
    from .training.refresh import RefreshCallback
    from .training.requested_refresh import RequestedRefresh

    options = parse_options(context.args, known=list(context.params))
    if output_dir is not None:
        options["output_dir"] = str(output_dir)
    loaded = load_run(config, options, model)
    folder = Path(loaded[1].output_dir)
    if not (folder / STAGES_NAME).exists():  # before the trainer makes the folder
        raise ValueError(f"{folder}: expected the folder of a training run with {STAGES_NAME}, found none")
    trainer = build_trainer(config, loaded=loaded)
    trainer.add_callback(HubCallback())
    if domain not in trainer.domains or trainer.domains[domain].train_dataset is None:
        names = [name for name, entry in trainer.domains.items() if entry.train_dataset is not None]
        raise ValueError(f"--domain: expected a domain with a train_dataset, {names}, found {domain!r}")
    # What the file says about refreshes belongs to the training.
    for callback in (RefreshCallback, PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    overrides = {} if learning_rate is None else {"learning_rate": learning_rate}
    trainer.add_callback(RequestedRefresh(trainer.args.output_dir, domain, steps, overrides))
    trainer.train(resume_from_checkpoint=True)
    if trainer.is_world_process_zero():
        matrix = trainer.score_matrix
        _output().print(matrix.to_table(), ScoreSummary.from_matrix(matrix).to_table())
        _output().print(f"The refreshed weights are in {trainer.args.output_dir}/{trainer.run.stages[-1].folder}.")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, or of a report.")],
    repo: Annotated[str, typer.Argument(help="Model repository, user/repo; made if there is none.")],
    stages: Annotated[
        bool, typer.Option("--stages", help="Publish each stage as a branch, e.g. stage-1-math.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    collection: Annotated[str | None, typer.Option(help="Title of a collection to add the model to.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List files and sizes, and send nothing.")] = False,
    license: Annotated[str | None, typer.Option(help="Licence. Defaults to that of the base model.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of the model on main. Defaults to the last stage.")
    ] = None,
    model_index: Annotated[bool, typer.Option("--model-index", help="Write the legacy model-index too.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another model in the repository.")] = False,
) -> None:
    """Publish a run with its analysis card, or a report. Run again, it sends only what is missing."""
    _prepare(1)
    from .analysis.report import REPORT_NAME
    from .hub.push import PushPlan, plan_push, plan_report, push_report, push_run
    from .hub.run_folder import RunFolder
    from .run import STAGES_NAME

    console = _output()
    if (folder / REPORT_NAME).is_file() and not (folder / STAGES_NAME).is_file():
        given = {"--stages": stages, "--collection": collection, "--model": model, "--model-index": model_index}
        for name, value in given.items():
            if value:
                raise ValueError(f"{name}: expected the folder of a run, found that of a report, {folder}")
        if dry_run:
            console.print(PushPlan(repo, [plan_report(folder, repo)]).to_table())
            return
        result = push_report(
            folder, repo, private=private or None, command=shlex.join(["trl-interfere", *sys.argv[1:]])
        )
    else:
        run = RunFolder.read(folder)
        settings = {"stages": stages, "model": model, "license": license, "with_model_index": model_index}
        if dry_run:
            console.print(plan_push(run, repo, **settings).to_table())
            return
        result = push_run(run, repo, private=private or None, collection=collection, overwrite=overwrite, **settings)
    for branch, commit in result.commits.items():
        console.print(f"{branch}: {commit}", highlight=False)
    console.print(f"Published: {result.url}" + (f", collection {result.collection}" if result.collection else ""))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs or reports, or folders of such folders.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Defaults to a free one from 7860 on.")] = None,
    hub: Annotated[bool, typer.Option(help="Let the page read repositories of the Hub.")] = True,
    browser: Annotated[bool, typer.Option(help="Open the page.")] = True,
    threads: Threads = 1,  # a model of the lab's size gains nothing by more, and loses much on busy cores
) -> None:
    """Show runs and reports side by side, in a page on this machine."""
    try:
        from .app.page import build_page, launch
    except ImportError as error:
        raise ValueError(
            f"compare: expected the extra 'space', pip install 'trl-interfere[space]' ({error})"
        ) from error
    from .app.catalog import is_packed_lab

    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # torch is loaded when a model is asked
    lab = next((folder for folder in folders if is_packed_lab(folder)), None)
    rest = [folder for folder in folders if folder != lab]
    launch(build_page(rest, lab=lab, hub=hub), server_name=host, server_port=port, inbrowser=browser)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder for results, which does not stay behind where nothing was written."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for place in missing:
            with suppress(OSError):  # not empty
                place.rmdir()


def _prepare(threads: int) -> None:
    import torch
    import transformers
    from datasets import disable_progress_bars

    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    # TRL still passes options under names that transformers has renamed; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator.*")


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
