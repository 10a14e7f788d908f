"""`trl-interfere analyze`."""

import os
import shutil
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..domain import Domain
from ..evaluation.bootstrap import difference
from ..evaluation.flips import flips
from ..evaluation.score_matrix import ScoreMatrix
from ..recipe import RunFile, build_dataclass
from ..reporting.verdict import losses
from ..reporting.verdict import verdict as run_verdict
from ..run import Run, lock_folder, write_atomically
from .options import Options, option, parse
from .output import show
from .runs import Update, domains_of, recipe_of, update_of_checkpoints, update_of_run


EXAMPLE = "trl-interfere analyze out"


@dataclass(kw_only=True)
class AnalyzeOptions(Options):
    """
    Show what a run broke, and where.

    By default the most damaged domain, from its own training to the final stage. Checkpoints from elsewhere:
    --final B --peak math=A --later qa writing --recipe FILE --output_dir report
    """

    run: str | None = option(None, "folder of a run")
    domain: str | None = option(None, "damaged domain; by default the one that has lost most")
    final: str | None = option(None, "checkpoint after the update, in place of a run")
    peak: list[str] | None = option(None, "checkpoint before it, e.g. math=A")
    later: list[str] | None = option(None, "domains that the update was trained on")
    base: str | None = option(None, "checkpoint that the damaged domain's own training started from")
    recipe: str | None = option(None, "YAML file that names the domains; by default the one of the run")
    output_dir: str | None = option(None, "folder of the report; by default analysis/DOMAIN in the run")
    dtype: str = option("float32", "data type to compute in")


def main(arguments: list[str]) -> None:
    options = parse(AnalyzeOptions, arguments, "run", EXAMPLE)
    run = None if options.run is None else Run(options.run)
    if run is None:
        update = update_of_checkpoints(options.final, options.peak, options.later)
        if options.output_dir is None:
            raise ValueError("--output_dir: expected a folder for the report, since there is no run")
    elif options.final or options.peak or options.later:
        raise ValueError("--final, --peak, --later: expected without a run, which has its own stages")
    elif not (options.domain or losses(run, matrix := ScoreMatrix.from_run(run))):
        show(run_verdict(run, matrix), f"Next: trl-interfere compare {run.folder}, or name a --domain to look at one")
        return
    else:
        update = update_of_run(run, options.domain)
    folder = Path(options.output_dir) if options.output_dir else run.analysis(update.earlier)
    recipe = recipe_of(run, options.recipe)
    domains = domains_of(recipe, [update.earlier, *update.later])
    options.prepare()
    with lock_folder(folder if run is None else run.folder):
        report = analyze(update, domains, recipe, options, folder)
    elsewhere = f"--final {update.after} --peak {update.earlier}={update.before} --recipe {options.recipe}"
    next_step = f"trl-interfere heal {run.folder if run else elsewhere}"
    show(*verdict(report, run, update), f"The report and its figures are in {folder}. Next: {next_step}")


def analyze(update: Update, domains: list[Domain], recipe: RunFile, options: AnalyzeOptions, folder: Path) -> Any:
    """Analyse, and put the report into its folder when all of it is written."""
    from ..analysis.analyzer import InterferenceAnalyzer
    from ..analysis.config import InterferenceConfig
    from ..reporting.card import report_markdown
    from ..reporting.plots import save_figures

    # Completions are as long as in the training, where the recipe does not say otherwise.
    longest = recipe.training.get("max_completion_length")
    settings = {**({"max_new_tokens": longest} if longest else {}), **recipe.analysis}
    config = build_dataclass(InterferenceConfig, settings, "recipe, analysis")
    scratch = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    scratch.mkdir(parents=True)  # an analysis must not be lost to a folder that cannot be made
    base, (earlier, *later) = options.base or update.base, domains
    analyzer = InterferenceAnalyzer.from_pretrained(
        update.before, update.after, base=base, config=config, dtype=options.dtype
    )
    passes = analyzer.passes(later=len(later))
    starts = dict(zip(passes, accumulate(passes.values(), initial=0), strict=False))
    with tqdm(total=sum(passes.values()), disable=None) as bar:

        def begin(part: str) -> None:
            bar.set_description(part, refresh=False)
            bar.update(starts[part] - bar.n)

        report = analyzer.analyze(earlier, later, progress=begin)
    report.save_pretrained(scratch)
    write_atomically(scratch / "report.md", report_markdown(report))
    save_figures(report, scratch / "figures")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(scratch, folder)
    return report


def verdict(report: Any, run: Run | None, update: Update) -> list[str]:
    """Points and prompts lost and where, then nats."""
    lines = []
    if run is not None:
        before, after = (run.scores(stage, report.earlier) for stage in (update.stage, run.final))
        counts = flips(before, after).counts()
        lines.append(
            f"{report.earlier} lost {difference(before, after):.1f} points to {', '.join(report.later)}: of "
            f"{len(before)} prompts {counts['lost']} were lost, {counts['kept']} kept, {counts['regained']} won."
        )
    layers = report.by_layer("damage")
    if report.damage > 0 and layers:
        kind = max(layers, key=lambda kind: layers[kind].sum())
        worst = sorted(np.argsort(layers[kind])[::-1][:3])
        lines.append(
            f"Where: {layers[kind].sum() / report.damage:.0%} of the damage passes through {kind} routes, most of it "
            f"in layers {', '.join(map(str, worst))}."
        )
    lines.append(
        f"Loss on its references: {report.loss_before:.3f} before, {report.loss_after:.3f} after, damage "
        f"{report.damage:+.3f} nats a token (attributed {report.attributed:+.3f}, residual {report.residual:+.3f})."
    )
    return lines
