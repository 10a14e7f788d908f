"""Damage that an update did to an earlier domain, by every term of a report but the first order."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils import reduce
from transformers import PreTrainedModel

from .attribution import (
    Direction,
    Elementwise,
    UpdatePath,
    attribution,
    difference_step,
    dot,
    second_order,
    second_order_error,
)
from .config import InterferenceConfig
from .conflict_subspace import conflict_subspace, random_update
from .gradients import Batches, Shard, mean_loss
from .routes import RouteMap
from .routing import HeldRouting


def measure_damage(
    path: UpdatePath,
    batches: dict[str, Batches],
    check: Batches,
    few: Batches,
    route_map: RouteMap,
    config: InterferenceConfig,
    loss_before: dict[str, float],
    progress: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """
    Fields of a report, and what routes carry, along the path of an update.

    The earlier domain comes first among the batches; `check` and `few` hold some of its references, for the error of
    the second order and for the conflict subspace. Experts of a router are held at the choice of θ0.
    """
    model, (earlier, *later) = path.model, batches
    damaged = batches[earlier]
    routing = HeldRouting(model, next(batch for part in batches.values() for batch in part))
    for part in (damaged, check, few, *(batches[name] for name in later)):
        routing.record(part)
    step = difference_step(path) if config.difference_step is None else config.difference_step
    fields: dict[str, Any] = {"difference_step": step}
    with routing.held():
        second = second_order(path, damaged, route_map, step)
        fields["second_order"] = second.total
        if check and second.total:
            fields["second_order_error"] = abs(second.total) * second_order_error(path, check, route_map, step)
        terms = {earlier: attribution(path, damaged, route_map, config.quadrature_nodes)}
        progress("damage of the later domains")
        nodes = config.later_quadrature_nodes
        terms |= {name: attribution(path, batches[name], route_map, nodes) for name in later}
        path.move(1.0)
        held = mean_loss(model, damaged) if routing.routers else None
    loss_after = {name: mean_loss(model, part) for name, part in batches.items()}
    if held is not None:
        count = torch.tensor(routing.switched(damaged), device=model.device)
        fields["switching"] = loss_after[earlier] - held
        fields["switched"] = int(reduce(count, "sum") if isinstance(damaged, Shard) else count)
    if config.subspace_size:
        progress("conflict subspace")
        size, spectra = min(config.subspace_size, route_map.num_routes - 1), {}
        with routing.held():
            for name, update in (("update", path.delta), ("random", random_update(path, config.seed))):
                found = conflict_subspace(path, few, route_map, size, update, step, config.seed)
                spectra[name] = found[0]
                fields.setdefault("directions", found[1])
        fields["subspace"] = spectra
    fields |= {
        "loss_after": loss_after[earlier],
        "later_loss_after": {name: loss_after[name] for name in later},
        "later_residual": {name: loss_after[name] - loss_before[name] - terms[name].total for name in later},
        "attributed": float(terms[earlier].routes.sum()),
        "outside_routes": terms[earlier].outside,
    }
    return fields, {
        "damage": terms[earlier].routes,
        "second_order": second.routes,
        "later_damage": np.mean([terms[name].routes for name in later], axis=0),
    }


def opposed_edits(
    route_map: RouteMap, base: PreTrainedModel, start: Direction, delta: Direction
) -> dict[str, np.ndarray]:
    """
    `opposed`, the length of the update against the earlier domain's own training, and `earlier_edit_size`.

    ```
    opposed_r = max(0, -<δ_A,r , δ_r> / |δ_A,r|)        δ_A = before - base
    ```
    """
    parameters = dict(base.named_parameters())

    def edit(name: str):
        like = delta[name]
        return start[name].to(like.device) - parameters[name].detach().to(like)

    earlier = Elementwise(start, edit)
    size = np.sqrt(dot(route_map, earlier, earlier).routes)
    inner = dot(route_map, earlier, delta).routes
    opposed = np.divide(-inner, size, out=np.zeros_like(inner), where=size > 0).clip(min=0)
    return {"opposed": opposed, "earlier_edit_size": size}
