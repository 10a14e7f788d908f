"""Criteria by which routes are ranked for a rollback, and controls."""

import numpy as np

from ..analysis.report import InterferenceReport
from ..analysis.routes import RouteMap


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
    Score of each route; routes with the highest scores are rolled back first. `random_matched` is ranked by `damage`.
    `route_conflict` is our reconstruction of the criterion of arXiv 2606.02398, whose formula is not known to us:
    among the `active_share` most active routes of their kind in both domains, the part of the later update that
    opposes the earlier one. `protection` is the weight of the mean benefit of the later domains, which is subtracted.
    """
    routes = report.routes
    if criterion == "random":
        return np.random.default_rng(seed).permutation(route_map.num_routes).astype(float)
    if criterion == "magnitude":
        return routes["edit_size"]
    if criterion == "route_conflict":
        if "opposed" not in routes:
            raise ValueError("route_conflict: expected a report that was made with `base`, found one without")
        active = np.ones(route_map.num_routes, dtype=bool)
        for name in ("activity_earlier", "activity_later"):
            for kind in (route_map.of_kind(kind) for kind, counts in route_map.counts.items() if sum(counts)):
                activity = routes[name][kind]
                active[kind] &= activity >= np.quantile(activity, 1 - report.config["active_share"])
        return np.where(active, routes["opposed"], -1.0)
    return routes["damage" if criterion == "random_matched" else criterion] + protection * routes["later_damage"]


def matched_routes(
    chosen: np.ndarray, report: InterferenceReport, route_map: RouteMap, seed: int = 0, neighbours: int = 8
) -> np.ndarray:
    """
    A control: for each chosen route a random other one of the same kind and layer with an update of like size, drawn
    from the nearest in size that are left. There are fewer where a layer has not enough others.
    """
    rng, size = np.random.default_rng(seed), report.routes["edit_size"]
    free = np.ones(route_map.num_routes, dtype=bool)
    free[chosen] = False
    matched = []
    for route in np.asarray(chosen, dtype=int):
        kind, layer, position = route_map.locate(route)
        start = route - position
        others = start + np.flatnonzero(free[start : start + route_map.counts[kind][layer]])
        if len(others):
            distance = np.abs(size[others] - size[route])
            nearest = others[np.argpartition(distance, min(neighbours, len(others)) - 1)[:neighbours]]
            matched.append(rng.choice(nearest))
            free[matched[-1]] = False
    return np.array(matched, dtype=int)
