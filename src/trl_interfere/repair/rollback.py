"""RouteRollback: move chosen routes back toward the earlier checkpoint."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..analysis.architectures import Architecture
from ..analysis.attribution import UpdatePath, attribution
from ..analysis.gradients import Tensors
from ..analysis.report import InterferenceReport
from ..analysis.routes import SCOPES, RouteMap
from ..checkpoint import Checkpoint
from ..models import load_model
from .blocks import touched_blocks
from .criteria import CRITERIA, IN_NATS, matched_routes, route_scores
from .explanation import RollbackExplanation, explain
from .route_steps import Losses, RouteQuadratic, solve_steps, weighted_loss
from .staleness import check_not_stale
from .step import move_back, route_steps


# Steps that a line search tries. Beyond 1 a route moves past its earlier state.
STEPS = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
# Steps of lowest loss whose score is taken, where a search is confirmed by score.
CONFIRMED = 3
PER_ROUTE = ("per_route", "per_route_exact")
BUDGETS_OF = ("routes", "parameters")
# Quadrature of the attribution between two rounds.
_ROUND_NODES = 4


@dataclass
class RouteRollback:
    """
    Training-free repair: put the most damaged routes back to where they were.

    ```
    θ_r ← θ1_r - α (θ1_r - θ0_r)        for the chosen routes r
    ```

    Example:

    ```python
    >>> from trl_interfere import RouteRollback

    >>> repaired = RouteRollback(criterion="damage", budget=0.02, scope="mlp").apply(report)
    >>> repaired.save_pretrained("out/repaired")
    ```

    Args:
        criterion (`str`, *optional*, defaults to `"damage"`):
            What routes are ranked by, see `trl_interfere.repair.criteria.CRITERIA`.
        budget (`float`, *optional*, defaults to `0.02`):
            Share of the scope that is rolled back.
        scope (`str`, *optional*, defaults to `"mlp"`):
            `"mlp"`, `"attention"` or `"joint"`.
        step (`float` or `str`, *optional*, defaults to `1.0`):
            α. 1 restores the routes, more goes beyond them. `"optimal"` takes the one of `STEPS` at which the
            `objective` of [`~RouteRollback.repair`] is lowest, and among the lowest ones that with the best score.
            `"per_route"` gives each route its own step by the quadratic model of the loss, `"per_route_exact"` by the
            loss itself, see [`solve_steps`].
        protection (`float`, *optional*, defaults to `0.0`):
            Weight of what the later domains owe a route, which is subtracted from its score (criteria in nats only).
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random criteria.
        budget_of (`str`, *optional*, defaults to `"routes"`):
            What the budget is a share of: the `"routes"` of the scope, or their `"parameters"`.
        rounds (`int`, *optional*, defaults to `1`):
            Parts in which the budget is spent. After each of them the damage that is left is attributed anew, and with
            a protection what the later domains owe the routes, so that two routes that carry the same damage are not
            both chosen. With `criterion="damage"` only.

    Raises:
        `ValueError`: If a setting is out of range.
    """

    criterion: str = "damage"
    budget: float = 0.02
    scope: str = "mlp"
    step: float | str = 1.0
    protection: float = 0.0
    seed: int = 0
    budget_of: str = "routes"
    rounds: int = 1

    def __post_init__(self):
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion: expected one of {sorted(CRITERIA)}, found {self.criterion!r}")
        if self.scope not in SCOPES:
            raise ValueError(f"scope: expected one of {sorted(SCOPES)}, found {self.scope!r}")
        if self.protection and self.criterion not in IN_NATS:
            raise ValueError(f"protection: expected a criterion of {IN_NATS}, found {self.criterion!r}")
        if not 0 <= self.protection < np.inf:
            raise ValueError(f"protection: expected 0 or more, found {self.protection}")
        if not isinstance(self.budget, Real) or not 0 < self.budget <= 1:
            raise ValueError(f"budget: expected a share above 0 and up to 1, found {self.budget!r}")
        if self.step not in ("optimal", *PER_ROUTE) and not (
            isinstance(self.step, (int, float)) and 0 <= self.step < np.inf
        ):
            known = ", ".join(repr(name) for name in ("optimal", *PER_ROUTE))
            raise ValueError(f"step: expected a number of 0 or more or one of {known}, found {self.step!r}")
        if self.budget_of not in BUDGETS_OF:
            raise ValueError(f"budget_of: expected one of {list(BUDGETS_OF)}, found {self.budget_of!r}")
        if not isinstance(self.seed, Integral) or self.seed < 0:
            raise ValueError(f"seed: expected a whole number of 0 or more, found {self.seed!r}")
        self.seed, self.budget = int(self.seed), float(self.budget)  # as JSON values
        if not isinstance(self.rounds, int) or self.rounds < 1:
            raise ValueError(f"rounds: expected a whole number, at least 1, found {self.rounds!r}")
        if self.rounds > 1 and self.criterion != "damage":
            raise ValueError(f"rounds: expected criterion 'damage' with more than one round, found {self.criterion!r}")

    def select(
        self, report: InterferenceReport, route_map: RouteMap, parameters: np.ndarray | None = None
    ) -> np.ndarray:
        """
        Routes to roll back, in one round.

        Args:
            report ([`InterferenceReport`]):
                The analysis.
            route_map ([`RouteMap`]):
                The routes of the model.
            parameters (`numpy.ndarray` of shape `(num_routes,)`, *optional*):
                Number of parameters of each route, see [`route_parameters`]; needed with `budget_of="parameters"`.

        Returns:
            `numpy.ndarray` of shape `(chosen,)`: Indices of routes, highest score first. `"random_matched"` has fewer
            than asked for where a layer has not as many others.

        Raises:
            `ValueError`: If the number of parameters is needed and not given, or nothing is left to match.
        """
        ranked_by = "damage" if self.criterion == "random_matched" else self.criterion
        scores = route_scores(ranked_by, report, route_map, protection=self.protection, seed=self.seed)
        candidates = np.flatnonzero(route_map.scope(self.scope))
        ranked = candidates[np.argsort(-scores[candidates], kind="stable")]
        chosen = ranked[: self._count(ranked, parameters)]
        if self.criterion == "random_matched":
            matched = matched_routes(chosen, report, route_map, seed=self.seed)
            if not len(matched):
                raise ValueError(
                    f"random_matched: expected other routes of the same layers beside the {len(chosen)} of 'damage', "
                    f"found none at a budget of {self.budget:g}"
                )
            return matched
        return chosen

    def _count(self, ranked: np.ndarray, parameters: np.ndarray | None) -> int:
        """How many of the ranked routes the budget pays for, at least one."""
        if self.budget_of == "routes":
            return max(1, round(self.budget * len(ranked)))
        if parameters is None:
            raise ValueError("budget_of: 'parameters' needs the number of parameters of each route, found none")
        spent = np.cumsum(parameters[ranked])
        return max(1, int(np.searchsorted(spent, self.budget * spent[-1] * (1 + 1e-12), side="right")))

    def _select_in_rounds(
        self,
        report: InterferenceReport,
        route_map: RouteMap,
        parameters: np.ndarray,
        model: PreTrainedModel,
        before: Tensors,
        losses: Losses,
    ) -> np.ndarray:
        step = self.step if isinstance(self.step, (int, float)) else 1.0
        later = [name for name in losses if name in set(report.later) - set(report.earlier.split("+"))]
        scores = route_scores(self.criterion, report, route_map, protection=self.protection, seed=self.seed)
        candidates = np.flatnonzero(route_map.scope(self.scope))
        chosen = np.array([], dtype=int)
        for number in range(1, self.rounds + 1):
            left = np.setdiff1d(candidates, chosen)
            ranked = np.concatenate([chosen, left[np.argsort(-scores[left], kind="stable")]])
            total = self._count(ranked, parameters)
            chosen = ranked[: max(len(chosen), 1, round(total * number / self.rounds))]
            if number < self.rounds:
                with rolled_back(model, before, route_map, chosen, step):
                    # From the repaired weights to the earlier ones: what going there would take back.
                    path, scores = UpdatePath(model, before), np.zeros(route_map.num_routes)
                    for name, entry in losses.items():
                        # As in the first round, where `later_damage` is the mean over the later domains.
                        weight = self.protection / len(later) if name in later else entry.weight
                        if weight:
                            scores -= weight * attribution(path, entry.batches, route_map, _ROUND_NODES).routes
                    path.move(0.0)
        return chosen

    def apply(
        self,
        report: InterferenceReport,
        model: PreTrainedModel | None = None,
        objective: Callable[[PreTrainedModel], float] | None = None,
        description: Architecture | None = None,
        **kwargs,
    ) -> PreTrainedModel:
        """
        Roll back.

        Args:
            report ([`InterferenceReport`]):
                The analysis; it names both checkpoints.
            model ([`~transformers.PreTrainedModel`], *optional*):
                Model that holds the weights after the update; it is changed in place. Defaults to loading them.
            objective (`Callable[[PreTrainedModel], float]`, *optional*):
                What `step="optimal"` minimises, such as a loss on the selection split.
            description ([`Architecture`], *optional*):
                Description of the architecture, if it is none of those that are known.
            **kwargs:
                Further arguments of [`~RouteRollback.repair`].

        Returns:
            [`~transformers.PreTrainedModel`]: The repaired model.

        Raises:
            `ValueError`: See [`~RouteRollback.repair`].
        """
        return self.repair(report, model, objective, description, **kwargs)[0]

    def repair(
        self,
        report: InterferenceReport,
        model: PreTrainedModel | None = None,
        objective: Callable[[PreTrainedModel], float] | None = None,
        description: Architecture | None = None,
        before: Tensors | None = None,
        confirm: Callable[[PreTrainedModel], float] | None = None,
        losses: Losses | None = None,
    ) -> tuple[PreTrainedModel, RollbackExplanation]:
        """
        Roll back, and account for it.

        Args:
            report ([`InterferenceReport`]):
                The analysis; it names both checkpoints.
            model ([`~transformers.PreTrainedModel`], *optional*):
                Model that holds the weights after the update; it is changed in place. Defaults to loading them.
            objective (`Callable[[PreTrainedModel], float]`, *optional*):
                What a search for the step minimises, such as a loss on the selection split. Defaults to the weighted
                sum of `losses`.
            description ([`Architecture`], *optional*):
                Description of the architecture, if it is none of those that are known.
            before (`dict[str, torch.Tensor]`, *optional*):
                Parameters before the update, by name. Defaults to loading them.
            confirm (`Callable[[PreTrainedModel], float]`, *optional*):
                Score on the selection split, the higher the better, `-inf` for a step that is out of the question. Of
                the `CONFIRMED` steps with the lowest objective the one with the best score is taken. A score of
                all domains keeps the step from repairing one of them at the cost of another.
            losses (`dict[str, WeightedLoss]`, *optional*):
                References of the domains on the selection split and their weights: the damaged domain, and with a
                weight of their own those that are to be spared. Needed for steps of routes and for rounds, which
                weigh the report's later domains by `protection` and the others by their weights; where given, what is
                expected and what is achieved are measured on them.

        Returns:
            `tuple`: The repaired model and a [`RollbackExplanation`].

        Raises:
            `ValueError`: If the settings need an objective or losses, and there are none, the model or `before` is not
                of the report's model, or a checkpoint that it names was trained again since. What is handed over as
                `model` or `before` is not compared with the report.
        """
        if self.step == "optimal" and objective is None and losses is None and confirm is None:
            raise ValueError("step: 'optimal' needs an objective, such as a loss on the selection split")
        for setting, needed in ((f"step: {self.step!r}", self.step in PER_ROUTE), ("rounds", self.rounds > 1)):
            if needed and not losses:
                raise ValueError(f"{setting}: needs `losses`, references of the domains on the selection split")
        if before is None and report.before is None:
            raise ValueError(
                "before: a report of several domains goes back to several checkpoints, expected their parameters as "
                "`joint_before` puts them together, found none"
            )
        if model is None and before is None:
            last = Checkpoint(report.after)
            check_not_stale(report, RouteMap(last.config, description), Checkpoint(report.before), last)
        model = load_model(report.after) if model is None else model
        before = dict(load_model(report.before).named_parameters()) if before is None else before
        route_map = RouteMap(model.config, description)
        parameters = route_parameters(model, route_map)
        _check(report, route_map, parameters, model, before)
        if self.rounds == 1:
            routes = self.select(report, route_map, parameters)
        else:
            routes = self._select_in_rounds(report, route_map, parameters, model, before, losses)
        if objective is None and losses:
            objective = lambda candidate: weighted_loss(candidate, losses)  # noqa: E731
        steps, tried = np.ones(len(routes)), []
        arguments = (model, before, route_map, routes)
        if self.step in PER_ROUTE:
            steps = solve_steps(*arguments, losses, exact=self.step == "per_route_exact").steps
            # The quadratic model is a local one, and the exact one is of losses only: how far to go is found as any
            # step is.
            scale, tried = search_step(*arguments, objective, confirm, steps=(0.25, 0.5, 0.75, 1.0, 1.25), along=steps)
            steps = scale * steps
        elif self.step == "optimal":
            step, tried = search_step(*arguments, objective, confirm)
            steps = step * steps
        else:
            steps = float(self.step) * steps
        expected, achieved = None, None
        if losses:
            quadratic = RouteQuadratic(*arguments, losses)
            try:
                expected = -quadratic(steps)[0]
            finally:
                quadratic.close()
            achieved = weighted_loss(model, losses)
        roll_back(*arguments, steps)
        if losses:
            achieved -= weighted_loss(model, losses)
        return model, explain(self, report, route_map, parameters, routes, steps, expected, achieved, tried)


def _check(
    report: InterferenceReport, route_map: RouteMap, parameters: np.ndarray, model: PreTrainedModel, before: Tensors
) -> None:
    expected, found = len(report.routes["damage"]), route_map.num_routes
    if found != expected:
        raise ValueError(f"model: expected one of {expected} routes as in the report, found one of {found}")
    if isinstance(model, PeftModel) or not parameters.all():
        raise ValueError(
            f"model: expected whole weights of {found} routes, found an adapter on them: merge it first "
            "(`merge_and_unload`), or roll back its folder (`roll_back_folder`)"
        )
    for name, parameter in model.named_parameters():
        if route_map.cut(name) is not None and (name not in before or before[name].shape != parameter.shape):
            place = f"shape {tuple(before[name].shape)}" if name in before else "none"
            raise ValueError(f"before: expected {name} of shape {tuple(parameter.shape)}, found {place}")


def route_parameters(model: PreTrainedModel, route_map: RouteMap) -> np.ndarray:
    """
    Number of parameters of each route.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        route_map ([`RouteMap`]):
            Its routes.

    Returns:
        `numpy.ndarray` of shape `(num_routes,)`: The numbers.
    """
    counts = np.zeros(route_map.num_routes, dtype=np.int64)
    for name, parameter in model.named_parameters():
        cut = route_map.cut(name)
        if cut is not None:
            np.add.at(counts, cut.owners.ravel(), parameter.numel() // cut.owners.size)
    return counts


def roll_back(
    model: PreTrainedModel, before: Tensors, route_map: RouteMap, routes: np.ndarray, step: float | np.ndarray
) -> None:
    """
    Move the slices of routes from θ1 to θ1 - step * (θ1 - θ0), in place. A step of 1 restores θ0 to the bit.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        before (`dict[str, torch.Tensor]`):
            Parameters before the update, by name.
        route_map ([`RouteMap`]):
            The routes.
        routes (`numpy.ndarray` of shape `(chosen,)`):
            Indices of the routes.
        step (`float` or `numpy.ndarray` of shape `(chosen,)`):
            Share of the update that is taken back, of all routes alike or of each.
    """
    steps = route_steps(route_map, routes, step)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            touched = touched_blocks(route_map, name, steps, parameter)
            if touched is not None:
                blocks, owned = touched
                blocks.put(parameter, move_back(blocks.take(parameter), blocks.take(before[name].detach()), owned))


@contextmanager
def rolled_back(
    model: PreTrainedModel, before: Tensors, route_map: RouteMap, routes: np.ndarray, step: float | np.ndarray
) -> Iterator[PreTrainedModel]:
    """
    Context in which routes are rolled back; afterwards every parameter is as before, to the bit.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        before (`dict[str, torch.Tensor]`):
            Parameters before the update, by name.
        route_map ([`RouteMap`]):
            The routes.
        routes (`numpy.ndarray` of shape `(chosen,)`):
            Indices of the routes.
        step (`float` or `numpy.ndarray` of shape `(chosen,)`):
            Share of the update that is taken back, of all routes alike or of each.
    """
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if route_map.cut(name)}
    try:
        roll_back(model, before, route_map, routes, step)
        yield model
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in kept:
                    parameter.copy_(kept[name])


def line_search(
    model: PreTrainedModel,
    before: Tensors,
    route_map: RouteMap,
    routes: np.ndarray,
    objective: Callable[[PreTrainedModel], float],
    steps: tuple[float, ...] = STEPS,
) -> float:
    """
    The step at which an objective is lowest.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model after the update; it is left as it was.
        before (`dict[str, torch.Tensor]`):
            Parameters before the update, by name.
        route_map ([`RouteMap`]):
            The routes.
        routes (`numpy.ndarray` of shape `(chosen,)`):
            Indices of the routes.
        objective (`Callable[[PreTrainedModel], float]`):
            What is minimised.
        steps (`tuple[float, ...]`, *optional*, defaults to `STEPS`):
            Steps that are tried.

    Returns:
        `float`: The best step.

    Raises:
        `ValueError`: If the objective is nowhere finite.
    """
    return search_step(model, before, route_map, routes, objective, steps=steps)[0]


def search_step(
    model: PreTrainedModel,
    before: Tensors,
    route_map: RouteMap,
    routes: np.ndarray,
    objective: Callable[[PreTrainedModel], float] | None,
    confirm: Callable[[PreTrainedModel], float] | None = None,
    steps: tuple[float, ...] = STEPS,
    along: np.ndarray | None = None,
) -> tuple[float, list[dict[str, float]]]:
    """
    The step with the best score among those with the lowest objective.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model after the update; it is left as it was.
        before (`dict[str, torch.Tensor]`):
            Parameters before the update, by name.
        route_map ([`RouteMap`]):
            The routes.
        routes (`numpy.ndarray` of shape `(chosen,)`):
            Indices of the routes.
        objective (`Callable[[PreTrainedModel], float]`, *optional*):
            What is minimised, such as a loss. Without it every step is scored.
        confirm (`Callable[[PreTrainedModel], float]`, *optional*):
            Score, the higher the better, of the `CONFIRMED` steps with the lowest objective. A step that is out of the
            question scores `-inf`; where all of these do, the next ones are scored too, until one does not. Without
            it the lowest one is taken.
        steps (`tuple[float, ...]`, *optional*, defaults to `STEPS`):
            Steps that are tried.
        along (`numpy.ndarray` of shape `(chosen,)`, *optional*):
            Step of each route that `steps` are multiples of. Defaults to 1 for each.

    Returns:
        `tuple[float, list[dict]]`: The step, and `step`, `objective` and `score` of all that were tried.

    Raises:
        `ValueError`: If the objective is nowhere finite.
    """
    along = np.ones(len(routes)) if along is None else along
    tried = [{"step": float(step)} for step in steps]
    for key, measure in (("objective", objective), ("score", confirm)):
        if measure is None:
            continue
        ranked, enough = tried, len(tried)
        if key == "score" and objective is not None:
            ranked, enough = sorted(tried, key=lambda entry: _finite(entry["objective"])), CONFIRMED
        found = []
        for entry in ranked:
            if len(found) >= enough and np.isfinite(found).any():
                break
            with rolled_back(model, before, route_map, routes, entry["step"] * along) as candidate:
                entry[key] = float(measure(candidate))
            found.append(entry[key])
        if not np.isfinite(found).any():
            raise ValueError(f"{key}: expected a finite value at one of the steps {tuple(steps)}, found {found}")
    if confirm is None:
        best = min(tried, key=lambda entry: _finite(entry["objective"]))
    else:
        best = min((entry for entry in tried if "score" in entry), key=lambda entry: _finite(-entry["score"]))
    return best["step"], tried


def _finite(value: float) -> float:
    return value if np.isfinite(value) else np.inf
