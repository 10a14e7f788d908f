"""Criteria by which routes are ranked for a rollback."""

import numpy as np

from ..analysis.report import InterferenceReport


CRITERIA = {
    "damage": "damage attributed to the route along the update",
    "second_order": "second-order damage of the route, ½ δ_r·(Hδ)_r",
    "first_order": "first-order damage of the route, ∇_r L·δ_r",
    "route_conflict": "size of the update opposed to the earlier edit, on routes that are active in both domains",
    "magnitude": "size of the update on the route",
    "random": "control: routes drawn at random",
}
# Criteria in nats, from which the damage of the later domains can be subtracted.
_IN_NATS = ("damage", "second_order", "first_order")


def route_scores(criterion: str, report: InterferenceReport, protection: float = 0.0, seed: int = 0) -> np.ndarray:
    """
    Score of each route; routes with the highest scores are rolled back first.

    `route_conflict` is our reconstruction of the criterion of arXiv 2606.02398, whose formula is not known to us: among
    the `active_share` most active routes of both domains, the part of the later update that opposes the earlier one.

    Args:
        criterion (`str`):
            One of `CRITERIA`.
        report ([`InterferenceReport`]):
            The analysis.
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
    if protection and criterion not in _IN_NATS:
        raise ValueError(f"protection: expected a criterion of {_IN_NATS}, found {criterion!r}")
    if criterion == "random":
        return np.random.default_rng(seed).permutation(len(routes["damage"])).astype(float)
    if criterion == "magnitude":
        return routes["edit_size"]
    if criterion == "route_conflict":
        if "opposed" not in routes:
            raise ValueError("route_conflict: expected a report that was made with `base`, found one without")
        share = report.config["active_share"]
        active = np.ones(len(routes["opposed"]), dtype=bool)
        for name in ("activity_earlier", "activity_later"):
            active &= routes[name] >= np.quantile(routes[name], 1 - share)
        return np.where(active, routes["opposed"], -1.0)
    return routes[criterion] + protection * routes["later_damage"]
