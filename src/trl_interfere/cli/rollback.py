"""`trl-interfere rollback`."""

import sys
from dataclasses import dataclass

from ..run import Run
from .heal import report
from .options import Options, empty_folder, option, parse
from .runs import most_damaged, recipe_of, update_of_run


EXAMPLE = "trl-interfere rollback out --budget 0.02"


@dataclass(kw_only=True)
class RollbackOptions(Options):
    """Move the most damaged routes of a run back to where they were: the experiment of the paper, as an adapter."""

    run: str = option("", "folder of a run that trl-interfere analyze has looked at")
    domain: str | None = option(None, "damaged domain; by default the one that has lost most")
    criterion: str = option("damage", "what routes are ranked by")
    budget: float = option(0.02, "share of the routes of the scope")
    scope: str = option("mlp", "mlp, attention or joint")
    step: float = option(1.0, "1 restores the routes, more goes beyond")
    protection: float = option(0.0, "weight of what the later domains owe a route")
    seed: int = option(0, "seed of the random criteria")
    max_drop: float = option(1.0, "points that no domain may lose", least=0)
    recipe: str | None = option(None, "YAML file that names the domains; by default the one of the run")
    output_dir: str | None = option(None, "folder of the repair, new or empty; by default rollback in the run")


def main(arguments: list[str]) -> int | None:
    options = parse(RollbackOptions, arguments, "run", EXAMPLE)
    run = Run(options.run)
    domain = options.domain or most_damaged(run)
    update = update_of_run(run, domain)
    folder = empty_folder(options.output_dir or str(run.folder / "rollback"))
    if not run.analysis(domain).is_dir():
        raise FileNotFoundError(f"{run.analysis(domain)}: expected a report, run trl-interfere analyze {run.folder}")
    recipe = recipe_of(run, options.recipe)
    options.prepare()
    from .. import InterferenceReport, RouteRollback
    from ..evaluation.checkpoints import scorer_of
    from ..models import load_tokenizer
    from ..repair.heal import account, scores_of

    found = InterferenceReport.from_pretrained(run.analysis(domain))
    settings = (options.criterion, options.budget, options.scope, options.step, options.protection, options.seed)
    with run.lock():
        repair = RouteRollback(*settings).fit(found, before=update.before, after=update.after, base=run.base_model)
        scored = [entry for entry in recipe.domains if entry.name in run.final.scores]
        tokenizer = load_tokenizer(update.after, base=run.base_model)
        scorer = scorer_of(tokenizer, run.identity["config"], sys.stderr.isatty())
        healed = scores_of(scorer, repair.merge(), scored, "test")
        peaks = {name: run.scores(run.peak(name), name) for name in healed}
        final = {name: run.scores(run.final, name) for name in healed}
        repair.record.update(account(peaks, final, healed, [domain]))
        repair.save_pretrained(folder)
    worst = repair.record["worst"]
    record = {**repair.record, "worst_on_selection": worst, "within_max_drop": worst >= -options.max_drop}
    return report(record, options, folder, f"trl-interfere heal {run.folder}")
