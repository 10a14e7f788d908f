"""`trl-interfere heal`."""

import sys
from dataclasses import dataclass
from typing import Any

from ..evaluation.score_matrix import ScoreMatrix
from ..reporting.verdict import share_of, verdict
from ..run import Run, lock_folder
from ..tables import console_table
from .options import Options, empty_folder, option, pairs, parse
from .output import show
from .runs import recipe_of, training_settings


EXAMPLE = "trl-interfere heal out"
TOO_DEAR = 3  # exit code of a repair that costs a domain more than was allowed


@dataclass(kw_only=True)
class HealOptions(Options):
    """
    Take back what a run broke, without training: a LoRA adapter over the final stage.

    Checkpoints from elsewhere: --final B --peak math=A --recipe FILE --output_dir repair
    """

    run: str | None = option(None, "folder of a run")
    domain: list[str] | None = option(
        None, "domains to heal; by default all earlier ones that later stages have not made better"
    )
    max_drop: float = option(1.0, "points that no domain may lose to the repair on the selection split", least=0)
    rank: int | None = option(64, "rank of the change of each layer; 0 keeps all of it", least=0)
    search: bool = option(False, "try heavier weights for the domains that are not restored")
    merge: bool = option(False, "write whole weights too, into merged/")
    final: str | None = option(None, "checkpoint to heal, in place of a run")
    peak: list[str] | None = option(None, "checkpoints at which the damaged domains were best, e.g. math=A code=C")
    recipe: str | None = option(None, "YAML file that names the domains; by default the one of the run")
    output_dir: str | None = option(None, "folder of the repair without a run, new or empty")


def main(arguments: list[str]) -> int | None:
    options = parse(HealOptions, arguments, "run", EXAMPLE)
    if options.run is None:
        return heal_checkpoints(options)
    if options.final or options.peak or options.output_dir:
        raise ValueError("--final, --peak, --output_dir: expected without a run, which has its own stages")
    run = Run(options.run)
    recipe = recipe_of(run, options.recipe)
    options.prepare()
    from ..repair.heal import heal_run

    with run.lock():
        repair = heal_run(
            run,
            recipe.domains,
            rank=options.rank or None,
            max_drop=options.max_drop,
            merge=options.merge,
            names=options.domain,
            search=options.search,
            progress=sys.stderr.isatty(),
        )
    record, next_step = repair and repair.record, f"trl-interfere push {run.folder} USER/REPO"
    show(verdict(run, ScoreMatrix.from_run(run), record))
    if record is not None:
        return report(record, options, run.weights(run.stages[-1]), next_step)
    what = "no domain that was trained before the last stage has lost anything beyond chance"
    show(f"Nothing was healed: {what}. Next: {next_step}")
    return None


def heal_checkpoints(options: HealOptions) -> int | None:
    peaks = pairs(options.peak, "peak")
    if not (options.final and peaks and options.output_dir):
        raise ValueError("expected the folder of a run, or --final B --peak math=A --recipe FILE --output_dir repair")
    folder = empty_folder(options.output_dir)
    recipe = recipe_of(None, options.recipe)
    options.prepare()
    from ..evaluation.checkpoints import chosen_domains, scorer_of
    from ..models import load_tokenizer
    from ..repair.heal import heal
    from ..repair.subspace_rollback import SubspaceRollback

    domains = chosen_domains(recipe.domains, None, "test")
    chosen_domains(recipe.domains, list(peaks), "test")
    bars = sys.stderr.isatty()
    scorer = scorer_of(load_tokenizer(options.final), training_settings(recipe), progress=bars)
    method = SubspaceRollback(rank=options.rank or None, max_new_tokens=scorer.max_new_tokens)
    settings = {"max_drop": options.max_drop, "search": options.search, "progress": bars}
    with lock_folder(folder):
        repair, _ = heal(options.final, peaks, domains, scorer, method, **settings)
        if options.merge:
            repair.merge().save_pretrained(folder / "merged")
            scorer.tokenizer.save_pretrained(folder / "merged")
        repair.save_pretrained(folder)
    return report(repair.record, options, folder, f"trl-interfere evaluate {options.final} {folder}")


def report(record: dict[str, Any], options: HealOptions, folder: Any, next_step: str) -> int | None:
    """Scores at the peak, at the end and healed; whether the price was paid that was allowed; what to do next."""
    rows = [
        [domain, *(f"{entry[name]:.1f}" for name in ("peak", "final", "healed")), share_of(entry)]
        + [str(entry[name]) for name in ("lost", "regained", "newly_lost")]
        for domain, entry in record["domains"].items()
    ]
    header = ["domain", "peak", "final", "healed", "recovered", "still lost", "regained", "newly lost"]
    show(console_table("Scores on the test split; prompts", header, rows))
    show(f"Recovered of all: {share_of(record['recovered_all'])}; worst change {record['worst']:+.1f} points.")
    if record["within_max_drop"]:
        show(f"The repair is in {folder}. Next: {next_step}")
        return None
    show(
        f"The repair is in {folder}, but on the selection split it costs a domain {-record['worst_on_selection']:.1f} "
        f"points, more than --max_drop {options.max_drop:g}. Next: trl-interfere heal {options.run or ''} --search"
    )
    return TOO_DEAR
