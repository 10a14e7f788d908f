"""One rollback for several damaged domains."""

from dataclasses import replace

import numpy as np
import torch

from ..analysis.gradients import Tensors
from ..analysis.report import InterferenceReport
from ..analysis.routes import RouteMap


# Measures in nats per token, which add up over domains.
_SUMMED = ("damage", "first_order", "second_order")


def joint_report(
    reports: list[InterferenceReport], weights: dict[str, float] | None = None
) -> tuple[InterferenceReport, np.ndarray]:
    """
    One report for several earlier domains that the training up to the same checkpoint has damaged.

    Each domain has a checkpoint of its own to go back to, the one after its own stage. The damage of a route is the
    weighted sum of what it does to each domain, and the route goes back to the checkpoint of the domain that it harms
    most:

    ```
    a_r = Σ_d w_d a_d,r        target_r = argmax_d w_d a_d,r
    ```

    The weights are scaled to a mean of 1 over the domains that have one, so that only their ratios count and a
    protection of 1 means what it does for one domain.

    Args:
        reports (`list[InterferenceReport]`):
            One analysis for each earlier domain, all with the same checkpoint `after`.
        weights (`dict[str, float]`, *optional*):
            w_d by name of the domain. Defaults to 1 each. A domain of weight 0 is not repaired, but counts
            as a later one.

    Returns:
        `tuple[InterferenceReport, numpy.ndarray]`: The report, which names no `before`, since there are several, and
        for each route the position of the report whose `before` it goes back to: [`joint_before`] puts these together
        for a live model, [`roll_back_folder`] takes both for a folder.

    Raises:
        `ValueError`: If there are no reports, two of one domain, or reports of different updates.
    """
    if not reports:
        raise ValueError("reports: expected at least one, found none")
    names = [report.earlier for report in reports]
    if len(set(names)) < len(names):
        raise ValueError(f"reports: expected one for each domain, found {names}")
    ends = sorted({report.after for report in reports})
    if len(ends) > 1:
        raise ValueError(f"reports: expected the same checkpoint `after` in all, found {ends}")
    factors = np.array(list(domain_weights(names, weights).values()))
    parts = np.stack([factor * report.routes["damage"] for factor, report in zip(factors, reports, strict=True)])
    parts[factors == 0] = -np.inf
    target = parts.argmax(axis=0)
    routes = {
        name: sum(factor * report.routes[name] for factor, report in zip(factors, reports, strict=True))
        for name in _SUMMED
    }
    for name in reports[0].routes.keys() - routes.keys():
        if all(name in report.routes for report in reports):
            # What belongs to one update, such as its size, is that of the update which the route goes back on.
            routes[name] = np.stack([report.routes[name] for report in reports])[target, np.arange(len(target))]

    def total(field: str) -> float:
        return float(sum(factor * getattr(report, field) for factor, report in zip(factors, reports, strict=True)))

    repaired = [name for name, factor in zip(names, factors, strict=True) if factor]
    report = replace(
        reports[0],
        before=None,
        earlier="+".join(repaired),
        later=sorted({*names, *(name for report in reports for name in report.later)} - set(repaired))
        or reports[-1].later,
        **{name: total(name) for name in ("loss_before", "loss_after", "first_order", "second_order")},
        **{name: total(name) for name in ("attributed", "outside_routes")},
        routes=routes,
    )
    return report, target


def domain_weights(names: list[str], weights: dict[str, float] | None = None) -> dict[str, float]:
    """
    Weights of the domains of a joint rollback, with a mean of 1 over those above 0.

    Args:
        names (`list[str]`):
            Names of the domains.
        weights (`dict[str, float]`, *optional*):
            Weights as they were given. Defaults to 1 each; a domain without one has 0.

    Returns:
        `dict[str, float]`: Weight of each domain, in the order of `names`.

    Raises:
        `ValueError`: If a weight is negative or not finite, none is above 0, or one is of another domain.
    """
    given = dict.fromkeys(names, 1.0) if weights is None else weights
    if set(given) - set(names) or not any(given.get(name, 0.0) > 0 for name in names):
        raise ValueError(f"weights: expected some of {names}, at least one above 0, found {weights}")
    found = np.array([given.get(name, 0.0) for name in names])
    if (found < 0).any() or not np.isfinite(found).all():
        raise ValueError(f"weights: expected numbers of 0 or more, found {weights}")
    return dict(zip(names, (found / found[found > 0].mean()).tolist(), strict=True))


def joint_before(befores: list[Tensors], target: np.ndarray, route_map: RouteMap) -> Tensors:
    """
    Parameters to go back to, each route from a checkpoint of its own.

    Args:
        befores (`list[dict[str, torch.Tensor]]`):
            Parameters of the `before` of each report, by name.
        target (`numpy.ndarray` of shape `(num_routes,)`):
            Position of the checkpoint of each route.
        route_map ([`RouteMap`]):
            The routes.

    Returns:
        `dict[str, torch.Tensor]`: Parameters by name. Those outside routes, which no rollback moves, are the first's.
    """
    composed = {}
    for name, first in befores[0].items():
        result = first.detach().clone()
        for position, tensors in enumerate(befores[1:], start=1):
            chosen = route_map.spread(name, (target == position).astype(float), result)
            if chosen is not None:
                result = torch.where(chosen.bool(), tensors[name].detach().to(result), result)
        composed[name] = result
    return composed
