"""What follows from a run: the most damaged domain, its peak, the final stage, the recipe."""

from dataclasses import dataclass, fields
from typing import Any

from ..domain import Domain
from ..evaluation.score_matrix import ScoreMatrix
from ..recipe import RunFile, load_run_file
from ..reporting.verdict import losses
from ..run import Run, StageRecord
from .options import pairs


def recipe_of(run: Run | None, recipe: str | None = None) -> RunFile:
    """The recipe that is named, or the one that the run has kept."""
    if recipe is not None:
        return load_run_file(recipe)
    if run is None or run.recipe is None:
        where = "" if run is None else f" ({run.folder} was trained from Python)"
        raise ValueError(f"--recipe: expected the YAML file that names the domains{where}")
    return load_run_file(run.recipe, run.recipe_folder)


def domains_of(recipe: RunFile, names: list[str]) -> list[Domain]:
    known = {domain.name: domain for domain in recipe.domains}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown domain {unknown[0]!r}, expected some of {sorted(known)}")
    return [known[name] for name in names]


def training_settings(recipe: RunFile, **given: Any) -> dict[str, Any]:
    """All settings of the training: those given, those of the recipe, else the defaults."""
    from ..training.config import SequentialGRPOConfig

    defaults = {field.name: field.default for field in fields(SequentialGRPOConfig)}
    return defaults | recipe.training | {name: value for name, value in given.items() if value is not None}


def most_damaged(run: Run) -> str:
    """The domain that has lost most, beyond chance, from its peak to the final stage."""
    found = losses(run, ScoreMatrix.from_run(run))
    if not found:
        raise ValueError(f"{run.folder}: no domain has lost anything beyond chance; to look at one, name a --domain")
    return next(iter(found))


@dataclass
class Update:
    """What is between two checkpoints: the damaged domain as it was, and the final one."""

    earlier: str
    later: list[str]
    before: str
    after: str
    base: str | None = None  # where the training of the damaged domain started from
    stage: StageRecord | None = None  # of a run, the one with the weights before


def update_of_run(run: Run, domain: str | None) -> Update:
    """From the own training of a domain, by default of the most damaged one, to the final stage."""
    domain = domain or most_damaged(run)
    own, final = run.trained(domain), run.final
    begun = own or run.peak(domain)  # a domain that the base model knew
    between = run.stages[begun.index + 1 : final.index + 1]
    later = list(dict.fromkeys(record.domain for record in between if record.domain not in (None, domain)))
    if not later:
        raise ValueError(f"--domain: expected one that other domains were trained after, found {domain!r}")
    base = None if own is None else str(run.weights(own.index - 1))
    return Update(domain, later, str(run.weights(begun)), str(run.weights(final)), base, begun)


def update_of_checkpoints(final: str | None, peak: list[str] | None, later: list[str] | None) -> Update:
    """From a checkpoint `--peak math=A` to another one, `--final B`."""
    named = pairs(peak, "peak")
    if final is None or len(named) != 1 or not later:
        raise ValueError("expected the folder of a run, or --final B --peak math=A --later qa --recipe FILE")
    ((domain, checkpoint),) = named.items()
    return Update(domain, later, checkpoint, final)
