"""Damage that an update did to an earlier domain, by every term of a report but the first order."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import reduce

from .attribution import RouteTerms, UpdatePath, attribution, difference_step, second_order, second_order_error
from .config import InterferenceConfig
from .conflict_subspace import conflict_subspace, random_update
from .gradients import Batches, Shard, mean_loss
from .routes import RouteMap
from .routing import HeldRouting


@dataclass
class Damage:
    """Terms of the damage; losses after the update, and what was attributed to each route, by domain."""

    step: float
    second_order: RouteTerms
    second_order_error: float | None
    terms: dict[str, RouteTerms]
    loss_after: dict[str, float]
    switching: float | None
    switched: int | None
    subspace: dict[str, Any] | None = None
    directions: np.ndarray | None = None


def measure_damage(
    path: UpdatePath,
    batches: dict[str, Batches],
    check: Batches,
    few: Batches,
    route_map: RouteMap,
    config: InterferenceConfig,
    progress: Callable[[str], None],
) -> Damage:
    """
    Walk the path of an update; its model, which is at θ0, is left elsewhere. The earlier domain comes first among the
    batches; `check` and `few` hold some of its references, for the error of the second order and for the conflict
    subspace. Experts of a router are held at the choice of θ0, so that the loss is smooth along the path.
    """
    model, (earlier, *later) = path.model, batches
    damaged = batches[earlier]
    routing = HeldRouting(model, next(batch for part in batches.values() for batch in part))
    for part in (damaged, check, few, *(batches[name] for name in later)):
        routing.record(part)
    step = difference_step(path) if config.difference_step is None else config.difference_step
    error = held = switching = switched = None
    with routing.held():
        second = second_order(path, damaged, route_map, step)
        if check and second.total:
            error = abs(second.total) * second_order_error(path, check, route_map, step)
        terms = {earlier: attribution(path, damaged, route_map, config.quadrature_nodes)}
        progress("damage of the later domains")
        nodes = config.later_quadrature_nodes
        terms |= {name: attribution(path, batches[name], route_map, nodes) for name in later}
        path.move(1.0)
        if routing.routers:
            held = mean_loss(model, damaged)
    loss_after = {name: mean_loss(model, part) for name, part in batches.items()}
    if held is not None:
        switching = loss_after[earlier] - held
        count = torch.tensor(routing.switched(damaged), device=model.device)
        switched = int(reduce(count, "sum") if isinstance(damaged, Shard) else count)
    found = Damage(step, second, error, terms, loss_after, switching, switched)
    if config.subspace_size:
        progress("conflict subspace")
        size, spectra = min(config.subspace_size, route_map.num_routes - 1), {}
        with routing.held():
            for name, update in (("random", random_update(path, config.seed)), ("update", path.delta)):
                spectrum, vectors = conflict_subspace(path, few, route_map, size, update, step, config.seed)
                spectra[name] = spectrum.to_dict()
        found.subspace, found.directions = {"update": spectra["update"], "random": spectra["random"]}, vectors
    return found
