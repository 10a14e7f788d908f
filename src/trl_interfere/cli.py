"""The command `trl-interfere`."""

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


app = typer.Typer(
    help="Sequential GRPO with TRL, interference analysis and route repair.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_CORES = os.cpu_count() or 1
Threads = Annotated[int, typer.Option(min=1, help="Threads to compute with; results repeat for the same number.")]


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


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="YAML file with the model, the domains and the settings.")],
    output_dir: Annotated[Path | None, typer.Option(help="Folder of the run; over the one in the file.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue the run in the output folder.")] = False,
    threads: Threads = _CORES,
) -> None:
    """Train a causal language model through domains in sequence."""
    _prepare(threads)
    from .training.run_file import build_trainer

    trainer = build_trainer(config, output_dir)
    trainer.train(resume_from_checkpoint=resume)
    Console().print(trainer.score_matrix.to_table())
    Console().print(f"Stages, scores and the manifest are in {trainer.args.output_dir}.")


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
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from .analysis.analyzer import InterferenceAnalyzer
    from .analysis.config import InterferenceConfig
    from .analysis.plots import plot_damage_concentration, plot_module_cosines
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
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("start")
        report = analyzer.analyze(
            domains[earlier],
            [domains[name] for name in names],
            progress=lambda part: progress.update(task, description=part),
        )
    report.save_pretrained(output_dir)
    (output_dir / "figures").mkdir()
    for name, figure in (
        ("module_cosines", plot_module_cosines(report)),
        ("damage_concentration", plot_damage_concentration([report])),
    ):
        figure.savefig(output_dir / "figures" / f"{name}.png", dpi=150)
    Console().print(Markdown(report.to_markdown()))


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
