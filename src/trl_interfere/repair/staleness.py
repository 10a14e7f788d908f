"""Whether the checkpoints of a report are still those that it was made of."""

from collections.abc import Sequence

import numpy as np
import torch

from ..analysis.checkpoint import Checkpoint, check_comparable
from ..analysis.report import InterferenceReport
from ..analysis.routes import RouteMap
from ..training.manifest import read_json
from .blocks import Blocks, touched_blocks
from .history import HISTORY_NAME, SCHEMA_VERSION
from .step import route_steps
from .streaming import read_bits


# Data types that an analysis may have computed in; a report names the stored one only.
_COMPUTED_IN = (torch.float32, torch.bfloat16, torch.float16)
_TOLERANCE = 0.01
_MOST_ROUTES = 512


def check_not_stale(
    report: InterferenceReport,
    route_map: RouteMap,
    before: Checkpoint | Sequence[Checkpoint],
    after: Checkpoint,
    target: np.ndarray | None = None,
) -> None:
    """
    Check that an update is the one that a report is about, by the sizes ‖δ_r‖ of its edits.

    The tensors of one layer are read: a checkpoint that was trained again differs in all of them. Routes that have
    been rolled back since, as `rollback.json` says, may differ.

    Args:
        report ([`InterferenceReport`]):
            The analysis, or that of [`joint_report`].
        route_map ([`RouteMap`]):
            The routes of the model.
        before ([`Checkpoint`] or `list[Checkpoint]`):
            The checkpoint before the update, or with `target` several of them.
        after ([`Checkpoint`]):
            The checkpoint after it.
        target (`numpy.ndarray` of shape `(num_routes,)`, *optional*):
            Position in `before` of the checkpoint that each route goes back to.

    Raises:
        `ValueError`: If the sizes differ by more than 1% on most routes, or a checkpoint is of another model.
    """
    befores = [before] if isinstance(before, Checkpoint) else list(before)
    for checkpoint in befores:
        check_comparable(checkpoint, after)
    target = np.zeros(route_map.num_routes, dtype=int) if target is None else target
    history = (after.folder if after.adapter is None else after.adapter.path.parent) / HISTORY_NAME
    records = read_json(history, SCHEMA_VERSION).get("rollbacks", []) if history.is_file() else []
    candidates = np.ones(route_map.num_routes, dtype=bool)
    candidates[[route for record in records for route in record.get("routes", [])]] = False
    layers = [candidates & route_map.of_layer("mlp", layer) for layer in range(route_map.num_layers)]
    routes = np.flatnonzero(max(layers, key=np.count_nonzero))
    routes = routes[:: max(1, len(routes) // _MOST_ROUTES)]
    if not len(routes):
        return
    expected = report.routes["edit_size"][routes]
    found = [np.sqrt(squares[routes]) for squares in _squares(route_map, befores, after, target, routes)]
    differing = [np.flatnonzero(~np.isclose(sizes, expected, rtol=_TOLERANCE, atol=0)) for sizes in found]
    best = min(range(len(found)), key=lambda position: len(differing[position]))
    if 2 * len(differing[best]) <= len(routes):
        return
    worst = differing[best][0]
    _, layer, channel = route_map.locate(int(routes[worst]))
    names = " or ".join(checkpoint.name for checkpoint in befores)
    raise ValueError(
        f"{after.name}: expected the update from {names} that the report of {report.earlier} is about, found another "
        f"one: the edits of {len(differing[best])} of {len(routes)} MLP channels of layer {layer} have another size "
        f"(channel {channel}: {found[best][worst]:.3g}, in the report {expected[worst]:.3g}). Was one trained again,"
        " or is it another one? Analyse it anew, or say with --before and --after where those of the report are"
    )


def _squares(
    route_map: RouteMap, befores: list[Checkpoint], after: Checkpoint, target: np.ndarray, routes: np.ndarray
) -> list[np.ndarray]:
    # ‖δ_r‖² of these routes, for each data type that an analysis may have computed in.
    squares = [np.zeros(route_map.num_routes) for _ in _COMPUTED_IN]
    chosen = route_steps(route_map, routes, 1.0)
    for name, stored in after.tensors.items():
        touched = touched_blocks(route_map, name, chosen, torch.empty(stored.shape, device="meta"))
        if touched is None:
            continue
        blocks = touched[0]
        owners = route_map.cut(name).owners.ravel()[blocks.index]
        last = _slices(after, name, blocks)
        first = _slices(befores[0], name, blocks)
        for position, checkpoint in enumerate(befores[1:], start=1):
            mine = torch.as_tensor(target[owners] == position)[:, None]
            first = torch.where(mine, _slices(checkpoint, name, blocks), first)
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
