"""Whether the checkpoints of a report are still those that it was made of."""

import numpy as np
import torch

from ..analysis.report import InterferenceReport
from ..analysis.routes import KINDS, RouteMap
from ..checkpoint import Checkpoint, check_comparable
from .blocks import Blocks, touched_blocks
from .history import RollbackHistory
from .step import route_steps
from .streaming import read_bits


# Data types that an analysis may have computed in; a report names the stored one only.
_COMPUTED_IN = (torch.float32, torch.bfloat16, torch.float16)
_TOLERANCE = 0.01
_MOST_ROUTES = 512
_MOST_GROUPS = 3


def check_not_stale(report: InterferenceReport, route_map: RouteMap, before: Checkpoint, after: Checkpoint) -> None:
    """
    Check that an update is the one that a report is about, by the sizes ‖δ_r‖ of its edits.

    The tensors of one kind of route in one layer are read, where the report has edits, and those of two more if the
    sizes differ there: a checkpoint may have been repaired for another domain. Routes that were rolled back since, as
    `rollback.json` says, may differ. Weights that are stored in another data type than those of the report are not
    compared.

    Args:
        report ([`InterferenceReport`]):
            The analysis.
        route_map ([`RouteMap`]):
            The routes of the model.
        before ([`Checkpoint`]):
            The checkpoint before the update.
        after ([`Checkpoint`]):
            The checkpoint after it.

    Raises:
        `ValueError`: If the sizes differ by more than 1% on most routes, or a checkpoint is of another model.
    """
    if len(report.routes["damage"]) != route_map.num_routes:
        raise ValueError(
            f"{after.name}: expected a model of {len(report.routes['damage'])} routes as in the report, "
            f"found {route_map.num_routes}"
        )
    check_comparable(before, after)
    sizes = report.routes["edit_size"]
    names = [name for name in after.tensors if route_map.cut(name) is not None]
    if {checkpoint[name].dtype for checkpoint in (before, after) for name in names} != {report.dtype}:
        return
    candidates = sizes > 0
    folder = after.folder if after.adapter is None else after.adapter.path.parent
    for record in RollbackHistory.read(folder, files=False).records:
        candidates &= ~np.isin(np.arange(route_map.num_routes), record.get("routes", []))
    groups = [
        (kind, layer, np.flatnonzero(candidates & route_map.of_layer(kind, layer)))
        for kind in KINDS
        for layer in range(route_map.num_layers)
    ]
    groups = sorted((group for group in groups if len(group[2])), key=lambda group: -len(group[2]))
    problem = None
    for kind, layer, routes in groups[:_MOST_GROUPS]:
        routes = routes[:: max(1, len(routes) // _MOST_ROUTES)]
        found = [np.sqrt(squares[routes]) for squares in _squares(route_map, before, after, routes)]
        differing = [np.flatnonzero(~np.isclose(part, sizes[routes], rtol=_TOLERANCE, atol=0)) for part in found]
        best = min(range(len(found)), key=lambda position: len(differing[position]))
        if 2 * len(differing[best]) <= len(routes):
            return
        worst = differing[best][0]
        problem = problem or (
            f"the edits of {len(differing[best])} of {len(routes)} {kind} routes of layer {layer} have another size "
            f"(route {routes[worst]}: {found[best][worst]:.3g}, in the report {sizes[routes[worst]]:.3g})"
        )
    if problem is not None:
        raise ValueError(
            f"{after.name}: expected the update from {before.name} that the report of {report.earlier} is about, "
            f"found another one: {problem}. Was one trained again, merged or rounded since, or is it another one? "
            "Analyse it anew, or say with --before and --after where those of the report are"
        )


def _squares(route_map: RouteMap, before: Checkpoint, after: Checkpoint, routes: np.ndarray) -> list[np.ndarray]:
    # ‖δ_r‖² of these routes, for each data type that an analysis may have computed in.
    squares = [np.zeros(route_map.num_routes) for _ in _COMPUTED_IN]
    chosen = route_steps(route_map, routes, 1.0)
    for name, stored in after.tensors.items():
        touched = touched_blocks(route_map, name, chosen, torch.empty(stored.shape, device="meta"))
        if touched is None:
            continue
        blocks = touched[0]
        owners = route_map.cut(name).owners.ravel()[blocks.index]
        first, last = (_slices(checkpoint, name, blocks) for checkpoint in (before, after))
        for sums, dtype in zip(squares, _COMPUTED_IN, strict=True):
            delta = last - first if dtype == torch.float32 else (last.to(dtype) - first.to(dtype)).float()
            np.add.at(sums, owners, delta.square().sum(dim=1, dtype=torch.float64).numpy())
    return squares


def _slices(checkpoint: Checkpoint, name: str, blocks: Blocks) -> torch.Tensor:
    stored = checkpoint[name]
    values = blocks.take(read_bits(stored)).view(getattr(torch, stored.dtype))
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    factors = checkpoint.factors(name)
    if factors is not None:
        left, right = (torch.from_numpy(factor) for factor in factors)
        values = values + blocks.take(left @ right).to(values)
    return values
