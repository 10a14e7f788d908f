"""RouteRollback: move chosen routes back toward the earlier checkpoint."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from ..analysis.analyzer import load_model
from ..analysis.gradients import Tensors
from ..analysis.report import InterferenceReport
from ..analysis.routes import RouteMap
from .criteria import CRITERIA, route_scores


@dataclass
class RouteRollback:
    """
    Training-free repair: put the most damaged routes back to where they were.

    ```
    θ_r ← θ1_r - α (θ1_r - θ0_r)        for the chosen routes r
    ```

    Args:
        criterion (`str`, *optional*, defaults to `"damage"`):
            What routes are ranked by, see [`CRITERIA`].
        budget (`float`, *optional*, defaults to `0.02`):
            Share of the routes of the scope that is rolled back.
        scope (`str`, *optional*, defaults to `"mlp"`):
            `"mlp"`, `"attention"` or `"joint"`.
        step (`float`, *optional*, defaults to `1.0`):
            α. 1 restores the routes, more goes beyond them. [`line_search`] chooses it.
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
    step: float = 1.0
    protection: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion: expected one of {sorted(CRITERIA)}, found {self.criterion!r}")
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget: expected a share above 0 and up to 1, found {self.budget}")

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
        scores = route_scores(self.criterion, report, protection=self.protection, seed=self.seed)
        candidates = np.flatnonzero(route_map.scope(self.scope))
        count = max(1, round(self.budget * len(candidates)))
        return candidates[np.argsort(-scores[candidates], kind="stable")[:count]]

    def apply(self, report: InterferenceReport, model: PreTrainedModel | None = None) -> PreTrainedModel:
        """
        Roll back.

        Args:
            report ([`InterferenceReport`]):
                The analysis; it names both checkpoints.
            model ([`~transformers.PreTrainedModel`], *optional*):
                Model that holds the weights after the update; it is changed in place. Defaults to loading them.

        Returns:
            [`~transformers.PreTrainedModel`]: The repaired model.
        """
        model = load_model(report.after) if model is None else model
        before = load_model(report.before)
        delta = {
            name: parameter.detach() - dict(before.named_parameters())[name].to(parameter)
            for name, parameter in model.named_parameters()
        }
        route_map = RouteMap(model.config)
        roll_back(model, delta, route_map, self.select(report, route_map), self.step)
        return model


def roll_back(model: PreTrainedModel, delta: Tensors, route_map: RouteMap, routes: np.ndarray, step: float) -> None:
    """
    Subtract `step` times the update from the slices of routes, in place.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        delta (`dict[str, torch.Tensor]`):
            The update, by parameter name.
        route_map ([`RouteMap`]):
            The routes.
        routes (`numpy.ndarray` of shape `(chosen,)`):
            Indices of the routes.
        step (`float`):
            Share of the update that is taken back.
    """
    weights = np.zeros(route_map.num_routes)
    weights[routes] = step
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = route_map.spread(name, weights, parameter)
            if spread is not None:
                parameter.sub_(spread * delta[name])
