"""The choice of routes and steps for a rollback of checkpoints on disk."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ..analysis.analyzer import InterferenceAnalyzer
from ..analysis.architectures import Architecture
from ..analysis.config import InterferenceConfig
from ..analysis.report import InterferenceReport
from ..analysis.routes import RouteMap
from ..analysis.weight_diff import update_statistics
from ..checkpoint import Checkpoint
from ..domain import Domain
from ..evaluation.bootstrap import difference, score
from ..evaluation.scorer import Scorer
from ..models import is_adapter, load_model, load_tokenizer
from ..recipe import RunFile, build_dataclass
from ..training.config import SequentialGRPOConfig
from .explanation import RollbackExplanation, explain
from .joint import domain_weights, joint_before, joint_report
from .rollback import RouteRollback
from .route_steps import WeightedLoss
from .staleness import check_not_stale


def training_settings(run: RunFile) -> dict[str, Any]:
    return {field.name: field.default for field in fields(SequentialGRPOConfig)} | run.training


def sampling_settings(run: RunFile) -> dict[str, Any]:
    settings = training_settings(run)
    return {
        "temperature": settings["score_temperature"],
        "num_samples": settings["score_samples"],
        "batch_size": settings["score_batch_size"],
        "max_new_tokens": settings["score_max_new_tokens"] or settings["max_completion_length"],
    }


def analysis_settings(run: RunFile) -> dict[str, Any]:
    longest = run.training.get("max_completion_length")
    return {**({"max_new_tokens": longest} if longest else {}), **run.analysis}


# Criteria that need the checkpoints alone.
WITHOUT_DATA = ("magnitude", "random")


@dataclass
class RouteChoice:
    """
    Routes that are rolled back, and how far.

    Args:
        routes (`numpy.ndarray` of shape `(chosen,)`):
            Their indices.
        step (`float` or `numpy.ndarray` of shape `(chosen,)`):
            Share of the update that is taken back, of all of them or of each.
        settings (`dict`):
            How they were chosen, as it stands in `rollback.json`.
        explanation ([`RollbackExplanation`], *optional*):
            The account of it; `None` without a report.
        target (`numpy.ndarray` of shape `(num_routes,)`, *optional*):
            With several reports, the position of the checkpoint that each route goes back to.
    """

    routes: np.ndarray
    step: float | np.ndarray
    settings: dict[str, Any] = field(default_factory=dict)
    explanation: RollbackExplanation | None = None
    target: np.ndarray | None = None


def locate_checkpoint(name: str | None, report: str | Path) -> str:
    """
    Find a checkpoint that a report names by a relative path.

    `trl-interfere analyze` writes paths as they were given, the lab writes them relative to its folder. Therefore the
    folder of the report and those that it lies in come first, the nearest one before the others, then the working
    directory.

    Args:
        name (`str`):
            What the report names: a path or a Hub id, `None` in a report of several domains.
        report (`str` or `pathlib.Path`):
            Folder of the report.

    Returns:
        `str`: Folder of the checkpoint, or its Hub id.

    Raises:
        `ValueError`: If nothing is named, or there is no such folder, nor such a repository.
    """
    if name is None:
        raise ValueError(
            f"{report}: a report of several domains names no checkpoint before the update, expected the reports of "
            "single domains that it was made of"
        )
    folder = Path(report).absolute()
    for parent in (folder, *folder.parents, Path.cwd()):
        if (parent / name).is_dir():
            return str(parent / name)
    try:
        Checkpoint(name)
    except ValueError as error:
        raise ValueError(
            f"{report}: names the checkpoint {name!r}, found it neither in the folder of the report or one that this "
            "lies in, nor in the working directory, nor on the Hub: say where it is with --before or --after"
        ) from error
    return name


def choose_routes(
    rollback: RouteRollback,
    before: str | Path | Sequence[str | Path] | None,
    after: str | Path,
    report: InterferenceReport | Sequence[InterferenceReport] | None = None,
    run: RunFile | None = None,
    base: str | Path | None = None,
    description: Architecture | None = None,
    dtype: str = "float32",
    progress: Callable[[str], None] = lambda _: None,
    later_weight: float = 1.0,
    max_drop: float | None = None,
    weights: dict[str, float] | None = None,
) -> RouteChoice:
    """
    Choose routes, and search for the step where that is asked for.

    A search takes the losses of the earlier and, with a weight, of the later domains on references of their selection
    splits, and of the steps with the lowest sum the one with the best mean score on these splits. With `max_drop`, it
    takes the one with the best score of the earlier domains among those that cost no domain more than that.

    With several reports, one for each earlier domain, one set of routes is chosen for all of them, see
    [`joint_report`].

    Args:
        rollback ([`RouteRollback`]):
            Criterion, budget, scope and step.
        before (`str` or `pathlib.Path`, *optional*):
            Checkpoint before the update. Defaults to the model of the adapter `after`. One for each of several
            reports.
        after (`str` or `pathlib.Path`):
            Checkpoint after it.
        report ([`InterferenceReport`] or `list[InterferenceReport]`, *optional*):
            The analysis, or one for each earlier domain. Without it, only the criteria in `WITHOUT_DATA` are possible.
        run ([`RunFile`], *optional*):
            Names the domains, for a search of steps and for more than one round.
        base (`str` or `pathlib.Path`, *optional*):
            Where the model of an adapter lies, if not where the adapter says.
        description ([`Architecture`], *optional*):
            Description of the architecture, if it is none of those that are known.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Data type that a search computes in.
        progress (`Callable[[str], None]`, *optional*):
            Called with the name of each part when it begins.
        later_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the loss of each later domain in a search of the step.
        max_drop (`float`, *optional*):
            Points of 100 that a searched step may cost a domain of the reports on its selection split.
        weights (`dict[str, float]`, *optional*):
            With several reports, the weight of each earlier domain, of which only the ratios count. Defaults to 1
            each. A domain of weight 0 is not repaired, but counts as a later one in a search.

    Returns:
        [`RouteChoice`]: Routes and steps.

    Raises:
        `ValueError`: If the settings need a report or domains that are not given, or the report is of another model or
            of checkpoints that were trained again since, or no step that a search tried is confirmed by the scores.
    """
    searched = isinstance(rollback.step, str)
    if not 0 <= later_weight < float("inf"):
        raise ValueError(f"later_weight: expected 0 or more, found {later_weight}")
    if rollback.step == 0:
        raise ValueError("step: expected a number above 0, found 0, with which nothing is rolled back")
    if max_drop is not None and not max_drop >= 0:
        raise ValueError(f"max_drop: expected 0 or more points, found {max_drop}")
    for name, given in (
        ("max_drop", max_drop is not None),
        ("later_weight", later_weight != 1.0),
    ):
        if given and not searched:
            raise ValueError(
                f"{name}: expected a step that is searched for, such as 'optimal', found {rollback.step:g}, which is "
                "taken as it is"
            )
    reports = [report] if isinstance(report, InterferenceReport) else list(report or [])
    befores = [before] if before is None or isinstance(before, (str, Path)) else list(before)
    target = None
    if len(reports) > 1:
        if len(befores) != len(reports):
            raise ValueError(
                f"before: expected one checkpoint for each of {len(reports)} reports, found {len(befores)}"
            )
        if is_adapter(after):
            raise ValueError(f"{after}: expected whole weights for a rollback of several domains, found an adapter")
        report, target = joint_report(reports, weights)
        earlier = domain_weights([entry.earlier for entry in reports], weights)
    else:
        if weights is not None:
            raise ValueError("weights: expected with several reports, one for each earlier domain")
        report = reports[0] if reports else None
        if report is not None and report.before is None:
            raise ValueError(
                f"report: the one of {report.earlier} goes back to several checkpoints and names none of them, "
                "expected one report for each of these domains"
            )
        earlier = {} if report is None else {report.earlier: 1.0}
    model = Checkpoint(after, base=base)
    route_map = RouteMap(model.config, description)
    settings = {
        **asdict(rollback),
        "step_rule": rollback.step if searched else "fixed",
    }
    del settings["step"]  # the record has the one that was taken
    if report is None:
        if rollback.criterion not in WITHOUT_DATA:
            raise ValueError(
                f"criterion: {rollback.criterion!r} needs a report (trl-interfere analyze), without one it is one of "
                f"{list(WITHOUT_DATA)}"
            )
        measures = SimpleNamespace(routes={"damage": np.zeros(route_map.num_routes)}, config={})
        if rollback.criterion == "magnitude":
            progress("edit sizes")
            first = Checkpoint(model.folder) if befores[0] is None else Checkpoint(befores[0], base=base)
            measures.routes["edit_size"] = update_statistics([first, model], route_map)[0].edit_size
    else:
        measures = report
        if len(report.routes["damage"]) != route_map.num_routes:
            raise ValueError(
                f"{after}: expected a model of {len(report.routes['damage'])} routes as in the report, "
                f"found {route_map.num_routes}"
            )
        for entry, name in zip(reports, befores, strict=True):
            if name is not None and earlier[entry.earlier]:
                check_not_stale(entry, route_map, Checkpoint(name, base=base), model)
        settings |= {"earlier": report.earlier, "later": report.later}
        if target is not None:
            settings["weights"] = {
                name: value if weights is None else weights.get(name, 0.0) for name, value in earlier.items()
            }
    if searched or rollback.rounds > 1:
        if report is None or run is None:
            asked = f"step {rollback.step!r}" if searched else f"{rollback.rounds} rounds"
            raise ValueError(
                f"{asked}: needs a report and the domains that it names: give --report, and --config with the YAML "
                "file of the training"
            )
        choice = _search(
            rollback,
            befores,
            after,
            report,
            {name: weight for name, weight in earlier.items() if weight},
            target,
            run,
            base,
            description,
            dtype,
            progress,
            settings,
            later_weight,
            max_drop,
        )
        choice.target = target
        return choice
    parameters = _parameters(model, route_map)
    routes = rollback.select(measures, route_map, parameters)
    explanation = None
    if report is not None:
        steps = np.full(len(routes), float(rollback.step))
        explanation = explain(rollback, report, route_map, parameters, routes, steps)
        settings |= {"damage": report.damage, "expected": explanation.expected}
        if report.damage > 0:
            settings["share_of_damage"] = explanation.carried_share
    return RouteChoice(routes, float(rollback.step), settings, explanation, target)


def _parameters(model: Checkpoint, route_map: RouteMap) -> np.ndarray:
    counts = np.zeros(route_map.num_routes, dtype=np.int64)
    for name, stored in model.tensors.items():
        cut = route_map.cut(name)
        if cut is not None:
            np.add.at(counts, cut.owners.ravel(), stored.rows * stored.columns // cut.owners.size)
    return counts


def _search(
    rollback: RouteRollback,
    befores: list[str | Path | None],
    after: str | Path,
    report: InterferenceReport,
    earlier: dict[str, float],
    target: np.ndarray | None,
    run: RunFile,
    base: str | Path | None,
    description: Architecture | None,
    dtype: str,
    progress: Callable[[str], None],
    settings: dict[str, Any],
    later_weight: float,
    max_drop: float | None,
) -> RouteChoice:
    domains = _domains([*earlier, *report.later], run)
    tokenizer = load_tokenizer(str(after))
    progress("load")
    last = _load_whole(after, after, base, dtype)
    firsts = [_load_whole(before, after, base, dtype) for before in befores]
    starts = [dict(model.named_parameters()) for model in firsts]
    start = starts[0] if target is None else joint_before(starts, target, RouteMap(last.config, description))
    config = build_dataclass(InterferenceConfig, analysis_settings(run), "analysis")
    progress("reference completions")
    references, later = {}, [domains[name] for name in report.later]
    # Completions of an earlier domain come from the checkpoint that it goes back to.
    owners = {report.earlier: firsts[0]} if target is None else dict(zip(settings["weights"], firsts, strict=True))
    for name in earlier:
        analyzer = InterferenceAnalyzer(owners[name], last, tokenizer, config=config, description=description)
        references |= analyzer.references(domains[name], [entry for entry in later if entry.name not in references])
    losses = {
        name: WeightedLoss(batches, earlier.get(name, later_weight))
        for name, batches in analyzer.batches(references).items()
    }
    template = training_settings(run)["chat_template_kwargs"]
    scorer = Scorer(tokenizer, chat_template_kwargs=template, **sampling_settings(run))

    def values(model: PreTrainedModel) -> dict[str, np.ndarray]:
        return {name: scorer.score(model, domain, domain.selection_dataset).values for name, domain in domains.items()}

    too_dear: list[str] = []

    def confirm(model: PreTrainedModel) -> float:
        progress("score a step")
        found = {name: float(part.mean()) for name, part in values(model).items()}
        if max_drop is None:
            return float(np.mean(list(found.values())))
        change, name = min((100 * (value - damaged[name].mean()), name) for name, value in found.items())
        if change < -max_drop:
            too_dear.append(f"{name} {change:+.1f}")
            return float("-inf")
        return float(np.mean([found[name] for name in earlier]))

    progress("score the damaged model")
    damaged = values(last)
    progress("losses of steps")
    try:
        _, explanation = rollback.repair(
            report, model=last, description=description, before=start, confirm=confirm, losses=losses
        )
    except ValueError as error:
        if not too_dear:
            raise
        raise ValueError(
            f"max_drop: expected a step that costs no domain more than {max_drop:g} points on the selection split, "
            f"found none among those that were tried ({', '.join(too_dear)}): nothing is written"
        ) from error
    progress("score the repaired model")
    repaired = values(last)
    scores = {
        name: {
            "damaged": score(damaged[name]).to_dict(),
            "repaired": score(repaired[name]).to_dict(),
            "difference": difference(repaired[name], damaged[name]).to_dict(),
        }
        for name in damaged
    }
    steps = np.array([entry["step"] for entry in explanation.routes])
    change = np.mean([entry["difference"]["value"] for entry in scores.values()])
    if isinstance(rollback.step, str):  # a number is taken whatever the scores say
        if not steps.any():
            raise ValueError(
                f"step {rollback.step!r}: the losses are lowest where no route is rolled back, with the later domains "
                f"at weight {later_weight:g}: nothing is written"
            )
        if change < 0:
            points = ", ".join(f"{name} {entry['difference']['value']:+.1f}" for name, entry in scores.items())
            raise ValueError(
                f"step {rollback.step!r}: the step of the lowest losses is not confirmed by the scores of the "
                f"selection split ({points} points): nothing is written; give a number to have it all the same"
            )
    account = explanation.to_dict()
    for key in ("routes", "layers", "criterion", "scope", "budget", "budget_of"):
        account.pop(key, None)
    settings |= {
        "search": {
            "split": "selection",
            "later_weight": later_weight,
            "max_drop": max_drop,
            "references": {
                name: {"n": len(part.prompts), "tokens": part.num_tokens} for name, part in references.items()
            },
            "scores": scores,
            **account,
        }
    }
    routes = np.array([entry["route"] for entry in explanation.routes])
    return RouteChoice(routes, float(steps[0]) if np.ptp(steps) == 0 else steps, settings, explanation)


def _domains(names: list[str], run: RunFile) -> dict[str, Domain]:
    known = {domain.name: domain for domain in run.domains}
    for name in names:
        if name not in known:
            raise ValueError(f"the report names the domain {name!r}, the configuration has {sorted(known)}")
        if known[name].selection_dataset is None:
            raise ValueError(
                f"domain {name!r} of the report: expected selection prompts (`selection:` in the configuration) to "
                "choose the step on, found none"
            )
    return {name: known[name] for name in names}


def _load_whole(name: str | Path | None, after: str | Path, base: str | Path | None, dtype: str) -> PreTrainedModel:
    # Whole weights; those of an adapter are merged into its model, in memory only.
    if name is None:
        return load_model(Checkpoint(after, base=base).folder, dtype=dtype)
    return load_model(name, dtype=dtype, base=base)
