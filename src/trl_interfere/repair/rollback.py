"""A search for the step of a rollback in memory."""

from collections.abc import Callable

import numpy as np
from transformers import PreTrainedModel

from .held import rolled_back as rolled_back
from .route_rollback import RouteRollback as RouteRollback


def line_search(
    model: PreTrainedModel,
    before: dict,
    route_map,
    routes: np.ndarray,
    objective: Callable[[PreTrainedModel], float],
    steps: tuple[float, ...],
) -> float:
    """The step at which an objective is lowest."""
    found = {}
    for step in steps:
        with rolled_back(model, before, route_map, routes, step) as candidate:
            found[step] = objective(candidate)
    return min(found, key=found.get)
