"""Criteria by which routes are ranked for a rollback."""

import numpy as np

from ..analysis.report import InterferenceReport
from ..analysis.routes import KINDS, RouteMap


CRITERIA = {
    "damage": "damage attributed to the route along the update",
    "second_order": "second-order damage of the route, ½ δ_r·(Hδ)_r",
    "first_order": "first-order damage of the route, ∇_r L·δ_r",
    "route_conflict": "size of the update opposed to the earlier edit, on routes that are active in both domains",
    "magnitude": "size of the update on the route",
    "random": "control: routes drawn at random",
    "random_matched": "control: for each route of `damage` another one of its layer with an update of like size",
}
# Criteria in nats, from which the damage of the later domains can be subtracted.
IN_NATS = ("damage", "second_order", "first_order")


def route_scores(
    criterion: str, report: InterferenceReport, route_map: RouteMap, protection: float = 0.0, seed: int = 0
) -> np.ndarray:
    """
    Score of each route; routes with the highest scores are rolled back first.

    `route_conflict` is our reconstruction of the criterion of arXiv 2606.02398, whose formula is not known to us:
    among the `active_share` most active routes of their kind in both domains, the part of the later update that
    opposes the earlier one.

    Args:
        criterion (`str`):
            One of `CRITERIA`.
        report ([`InterferenceReport`]):
            The analysis.
        route_map ([`RouteMap`]):
            The routes of the model.
        protection (`float`, *optional*, defaults to `0.0`):
            Weight of the mean benefit of the later domains, subtracted from criteria in nats.
        seed (`int`, *optional*, defaults to `0`):
            Seed of `"random"`.

    Returns:
        `numpy.ndarray` of shape `(num_routes,)`: Scores.

    Raises:
        `ValueError`: If the criterion is unknown, or needs a measure that the report lacks.
    """
    routes = report.routes
    if criterion not in CRITERIA:
        raise ValueError(f"criterion: expected one of {sorted(CRITERIA)}, found {criterion!r}")
    if protection and criterion not in IN_NATS:
        raise ValueError(f"protection: expected a criterion of {IN_NATS}, found {criterion!r}")
    if criterion == "random":
        return np.random.default_rng(seed).permutation(len(routes["damage"])).astype(float)
    if criterion == "magnitude":
        return routes["edit_size"]
    if criterion == "route_conflict":
        if "opposed" not in routes:
            raise ValueError("route_conflict: expected a report that was made with `base`, found one without")
        active = np.ones(route_map.num_routes, dtype=bool)
        for name in ("activity_earlier", "activity_later"):
            for kind in KINDS:
                of_kind = route_map.of_kind(kind)
                least = np.quantile(routes[name][of_kind], 1 - report.config["active_share"])
                active[of_kind] &= routes[name][of_kind] >= least
        return np.where(active, routes["opposed"], -1.0)
    return routes[criterion] + protection * routes["later_damage"]


def matched_routes(
    chosen: np.ndarray, report: InterferenceReport, route_map: RouteMap, seed: int = 0, neighbours: int = 8
) -> np.ndarray:
    """
    A control: for each chosen route a random other one of the same kind and layer with an update of like size.

    Args:
        chosen (`numpy.ndarray` of shape `(chosen,)`):
            Indices of routes.
        report ([`InterferenceReport`]):
            The analysis.
        route_map ([`RouteMap`]):
            The routes of the model.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
        neighbours (`int`, *optional*, defaults to `8`):
            Number of routes, nearest in size first, that are drawn from.

    Returns:
        `numpy.ndarray`: Indices of as many routes, none of them chosen, while a layer has enough others.
    """
    rng = np.random.default_rng(seed)
    size = report.routes["edit_size"]
    free = np.ones(route_map.num_routes, dtype=bool)
    free[chosen] = False
    matched = []
    for route in chosen:
        candidates = np.flatnonzero(free & route_map.of_layer(*route_map.locate(route)[:2]))
        if len(candidates) == 0:
            continue
        nearest = candidates[np.argsort(np.abs(size[candidates] - size[route]), kind="stable")[:neighbours]]
        pick = rng.choice(nearest)
        free[pick] = False
        matched.append(pick)
    return np.array(matched, dtype=int)
