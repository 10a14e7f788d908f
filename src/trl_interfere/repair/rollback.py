"""RouteRollback: move chosen routes back toward the earlier checkpoint."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from ..analysis.analyzer import load_model
from ..analysis.architectures import Architecture
from ..analysis.gradients import Tensors
from ..analysis.report import InterferenceReport
from ..analysis.routes import SCOPES, RouteMap
from .blocks import touched_blocks
from .criteria import CRITERIA, IN_NATS, matched_routes, route_scores
from .step import move_back, route_steps


# Steps that a line search tries. Beyond 1 a route moves past its earlier state.
STEPS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)


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
            Share of the routes of the scope that is rolled back.
        scope (`str`, *optional*, defaults to `"mlp"`):
            `"mlp"`, `"attention"` or `"joint"`.
        step (`float` or `str`, *optional*, defaults to `1.0`):
            α. 1 restores the routes, more goes beyond them. `"optimal"` takes the one of `STEPS` at which the
            `objective` of [`~RouteRollback.apply`] is lowest.
        protection (`float`, *optional*, defaults to `0.0`):
            Weight of what the later domains owe a route, which is subtracted from its score (criteria in nats only).
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random criteria.

    Raises:
        `ValueError`: If a setting is out of range.
    """

    criterion: str = "damage"
    budget: float = 0.02
    scope: str = "mlp"
    step: float | str = 1.0
    protection: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion: expected one of {sorted(CRITERIA)}, found {self.criterion!r}")
        if self.scope not in SCOPES:
            raise ValueError(f"scope: expected one of {sorted(SCOPES)}, found {self.scope!r}")
        if self.protection and self.criterion not in IN_NATS:
            raise ValueError(f"protection: expected a criterion of {IN_NATS}, found {self.criterion!r}")
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget: expected a share above 0 and up to 1, found {self.budget}")
        if self.step != "optimal" and not (isinstance(self.step, (int, float)) and np.isfinite(self.step)):
            raise ValueError(f"step: expected a number or 'optimal', found {self.step!r}")

    def select(self, report: InterferenceReport, route_map: RouteMap) -> np.ndarray:
        """
        Routes to roll back.

        Args:
            report ([`InterferenceReport`]):
                The analysis.
            route_map ([`RouteMap`]):
                The routes of the model.

        Returns:
            `numpy.ndarray` of shape `(chosen,)`: Indices of routes, highest score first.
        """
        in_scope = route_map.scope(self.scope)
        count = max(1, round(self.budget * in_scope.sum()))
        ranked_by = "damage" if self.criterion == "random_matched" else self.criterion
        scores = route_scores(ranked_by, report, route_map, protection=self.protection, seed=self.seed)
        candidates = np.flatnonzero(in_scope)
        chosen = candidates[np.argsort(-scores[candidates], kind="stable")[:count]]
        if self.criterion == "random_matched":
            return matched_routes(chosen, report, route_map, seed=self.seed)
        return chosen

    def apply(
        self,
        report: InterferenceReport,
        model: PreTrainedModel | None = None,
        objective: Callable[[PreTrainedModel], float] | None = None,
        description: Architecture | None = None,
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

        Returns:
            [`~transformers.PreTrainedModel`]: The repaired model.

        Raises:
            `ValueError`: If the step is `"optimal"` and there is no objective.
        """
        if self.step == "optimal" and objective is None:
            raise ValueError("step: 'optimal' needs an objective, such as a loss on the selection split")
        model = load_model(report.after) if model is None else model
        before = dict(load_model(report.before).named_parameters())
        route_map = RouteMap(model.config, description)
        routes = self.select(report, route_map)
        step = self.step if self.step != "optimal" else line_search(model, before, route_map, routes, objective)
        roll_back(model, before, route_map, routes, step)
        return model


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
            Share of the update that is taken back, of all routes or of each.
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
            Share of the update that is taken back, of all routes or of each.
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
    values = []
    for step in steps:
        with rolled_back(model, before, route_map, routes, step) as candidate:
            values.append(objective(candidate))
    if not np.isfinite(values).any():
        raise ValueError(f"objective: expected a finite value at one of the steps {steps}, found {values}")
    return steps[int(np.nanargmin(values))]
