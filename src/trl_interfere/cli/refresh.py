"""`trl-interfere refresh`."""

from dataclasses import dataclass, fields

import numpy as np

from ..evaluation.bootstrap import difference
from ..evaluation.metrics import recovered
from ..evaluation.score_matrix import ScoreMatrix
from ..reporting.verdict import losses
from ..run import Run
from .options import Options, option, parse
from .output import show
from .runs import most_damaged, recipe_of
from .train import show_scores, with_progress


EXAMPLE = "trl-interfere refresh out --steps 10"
WORSE = 3  # exit code of a refresh that made things worse


@dataclass(kw_only=True)
class RefreshOptions(Options):
    """
    Train damaged domains of a finished run again, for a few steps: by their rewards, or by distillation from the
    checkpoints of their peaks. A refresh that makes things worse is dropped. Stopped and started again, it goes on.

    Settings that were given to train as options are given here again.
    """

    run: str = option("", "folder of a run")
    domain: list[str] | None = option(
        None, "domains to refresh; by default the one that has lost most, with --method distill all that have lost"
    )
    method: str = option(
        "grpo", "grpo: by rewards; distill: by the checkpoints of the peaks", choices=["grpo", "distill"]
    )
    reward_weight: float = option(0.0, "weight of the rewards that are added with --method distill", least=0)
    steps: int = option(10, "optimizer steps", least=1)
    learning_rate: float | None = option(None, "learning rate; by default that of the domain's stages", least=0)
    recipe: str | None = option(None, "YAML file of the training; by default the one of the run")
    model: str | None = option(None, "folder or Hub id of the base model, if it was given to train")
    max_drop: float = option(1.0, "points that no other domain may lose", least=0)
    keep: bool = option(False, "keep a refresh that made things worse")


def main(arguments: list[str]) -> int | None:
    options, rest = parse(RefreshOptions, arguments, "run", EXAMPLE, rest=True)
    run = Run(options.run)
    recipe = recipe_of(run, options.recipe)
    domains = options.domain or [most_damaged(run)]
    if options.domain is None and options.method == "distill":
        domains = list(losses(run, ScoreMatrix.from_run(run)))
    names = [entry.name for entry in recipe.domains if entry.train_dataset is not None]
    for domain in domains:
        if domain not in names:
            raise ValueError(f"--domain: expected a domain with a train_dataset, {names}, found {domain!r}")
    if options.method == "grpo" and (len(domains) > 1 or options.reward_weight):
        raise ValueError("--method: expected distill, for several domains or a --reward_weight, found grpo")
    options.prepare()
    from ..hub.callback import HubCallback, update_card
    from ..training.options import parse_options
    from ..training.recipe_trainer import build_trainer, load_run
    from ..training.refresh import RefreshCallback, distillation
    from ..training.requested_refresh import RequestedRefresh
    from ..training.schedule import Stage

    settings = parse_options(rest, known=[field.name for field in fields(options)])
    path = options.recipe or run.recipe
    settings["output_dir"] = str(run.folder)
    loaded = load_run(path, settings, options.model, recipe)
    publish, loaded[1].push_to_hub = loaded[1].push_to_hub, False  # not before it is known to be no worse
    trainer, hub = build_trainer(path, loaded=loaded), HubCallback()
    trainer.add_callback(hub)
    trainer.remove_callback(RefreshCallback)  # what the recipe says about refreshes belongs to the training
    with_progress(trainer)
    given = {"learning_rate": options.learning_rate, "max_steps": options.steps}
    overrides = {name: value for name, value in given.items() if value is not None}
    stage = Stage(domains[0], "refresh", overrides)
    if options.method == "distill":
        stage = distillation({name: run.peak(name).name for name in domains}, overrides, options.reward_weight)
    trainer.add_callback(RequestedRefresh(run.folder, stage))
    trainer.train(resume_from_checkpoint=True)
    if not trainer.is_world_process_zero():
        return None
    show_scores(trainer.score_matrix)
    run = Run(run.folder)
    code = verdict(run, domains, options.max_drop)
    if code and not options.keep:
        dropped = run.drop()
        update_card(run.folder)
        show(f"Stage {dropped} is dropped (--keep keeps it). Next: trl-interfere heal {run.folder}")
    elif publish:
        hub.push()
    return code


def verdict(run: Run, domains: list[str], max_drop: float) -> int | None:
    """What the last stage did to its domains, and to the others."""
    after, before = run.stages[-1], run.stages[-2]
    both = [name for name in after.scores if name in before.scores]
    changes = {name: difference(run.scores(after, name), run.scores(before, name)) for name in both}
    parts = []
    for domain in domains:
        share = recovered(*(run.scores(stage, domain) for stage in (after, before, run.peak(domain))))
        brought = f", {share:.0%} of what was lost" if np.isfinite(share.value) else ""
        parts.append(f"{domain} by {changes[domain]:+.1f} points{brought}")
    worst = min((name for name in changes if name not in domains), key=lambda name: changes[name].value, default=None)
    price = "" if worst is None else f"; worst change of another domain: {worst} {changes[worst]:+.1f}"
    show(f"The refresh changed {'; '.join(parts)}{price}.")
    gained = sum(changes[domain].value for domain in domains)
    if gained < 0 or (worst is not None and changes[worst].value < -max_drop):
        show(f"It made things worse. Stage {before.name} is as it was, in {run.weights(before)}.")
        return WORSE
    show(f"The weights are in {run.weights(after)}. Next: trl-interfere push {run.folder} USER/REPO")
    return None
