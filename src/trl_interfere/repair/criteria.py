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
    chosen = np.asarray(chosen, dtype=int)
    size = report.routes["edit_size"]
    taken = np.zeros(route_map.num_routes, dtype=bool)
    taken[chosen] = True
    lines: dict[tuple[str, int], _Line] = {}
    matched = []
    for route in chosen:
        kind, layer, position = route_map.locate(route)
        if (kind, layer) not in lines:
            first = int(route) - position
            lines[kind, layer] = _Line(
                first + np.flatnonzero(~taken[first : first + route_map.counts[kind][layer]]), size
            )
        nearest = lines[kind, layer].nearest(size[route], neighbours)
        if nearest:
            pick = nearest[rng.integers(len(nearest))]
            lines[kind, layer].remove(pick)
            matched.append(pick)
    return np.array(matched, dtype=int)


class _Line:
    """Routes in the order of their sizes. Links skip removed ones, so that a search costs what it returns."""

    def __init__(self, routes: np.ndarray, size: np.ndarray):
        order = np.argsort(size[routes], kind="stable")
        self.routes = routes[order].tolist()
        self.sizes = size[routes][order]
        self.place = {route: index for index, route in enumerate(self.routes)}
        # Places are shifted by one: 0 and the last one are ends that are never removed.
        self.before = list(range(-1, len(self.routes) + 1))
        self.after = list(range(1, len(self.routes) + 3))

    def nearest(self, size: float, count: int) -> list[int]:
        """Up to `count` routes, nearest in size first, of two as near the one that comes first."""
        after = self._kept(int(np.searchsorted(self.sizes, size)) + 1, self.after)
        before, found = self.before[after], []
        end = len(self.routes) + 1
        while len(found) < count and (before > 0 or after < end):
            below = (abs(self.sizes[before - 1] - size), self.routes[before - 1]) if before > 0 else (np.inf,)
            above = (abs(self.sizes[after - 1] - size), self.routes[after - 1]) if after < end else (np.inf,)
            if below < above:
                found.append(self.routes[before - 1])
                before = self.before[before]
            else:
                found.append(self.routes[after - 1])
                after = self.after[after]
        return found

    def remove(self, route: int) -> None:
        """Leave a route out from now on."""
        place = self.place.pop(route) + 1
        before, after = self.before[place], self.after[place]
        self.after[before], self.before[after] = after, before
        self.before[place] = -1  # the mark of a removed one

    def _kept(self, place: int, links: list[int]) -> int:
        """The first place from here on that was not removed; the links on the way are shortened."""
        passed = []
        while 0 < place <= len(self.routes) and self.before[place] == -1:
            passed.append(place)
            place = links[place]
        for one in passed:
            links[one] = place
        return place
