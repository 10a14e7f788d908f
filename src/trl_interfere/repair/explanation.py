"""What a rollback did: which routes, in which layers, what was expected of it and what it achieved."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..analysis.report import InterferenceReport
from ..analysis.routes import RouteMap


@dataclass
class RollbackExplanation:
    """
    A rollback that accounts for itself. Losses are those of the damaged domain, in nats per token; a positive figure
    is damage taken back.

    Args:
        criterion (`str`):
            What routes were ranked by.
        scope (`str`):
            Where they were chosen.
        budget (`float`):
            Share of the scope that was asked for.
        budget_of (`str`):
            What it is a share of: `"routes"` or `"parameters"`.
        share_of_routes (`float`):
            Share of the routes of the scope that was rolled back.
        share_of_parameters (`float`):
            Share of the parameters of the routes of the scope.
        routes (`list[dict]`):
            For each route, highest score first: `route`, `kind`, `layer`, `position`, `step` and `damage`.
        layers (`list[dict]`):
            For each kind and layer with a route: `kind`, `layer`, `routes` and `damage`.
        damage (`float`):
            Damage of the whole update.
        carried (`float`):
            Damage attributed to the chosen routes.
        expected (`float`):
            Damage that these steps should take back by the attribution, Σ_r α_r a_r. It is linear in the steps, so
            that it promises too much beyond α = 1 or where routes undo the same damage.
        expected_second_order (`float`, *optional*):
            The same by the quadratic model around the damaged weights, with weights of the domains. `None` without
            losses.
        achieved (`float`, *optional*):
            Fall of the same weighted loss, as measured. `None` without losses.
        tried (`list[dict]`):
            What the search for the step saw: `step`, `objective` and, where it was confirmed, `score`.
    """

    criterion: str
    scope: str
    budget: float
    budget_of: str
    share_of_routes: float
    share_of_parameters: float
    routes: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    damage: float
    carried: float
    expected: float
    expected_second_order: float | None
    achieved: float | None
    tried: list[dict[str, Any]]

    @property
    def carried_share(self) -> float:
        """Share of the damage that is attributed to the chosen routes; above 1 where others were improved."""
        return self.carried / self.damage if self.damage else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, as JSON values."""
        return asdict(self)

    def to_markdown(self) -> str:
        """The explanation as a page to read, with the ten routes of the highest score."""

        def nats(value: float | None) -> str:
            return "not measured" if value is None else f"{value:+.4f}"

        steps = np.array([route["step"] for route in self.routes])
        step = f"{steps[0]:g}" if np.ptp(steps) == 0 else f"{steps.min():.2f} to {steps.max():.2f}, by route"
        # Of an update that did no damage as a whole there is no share.
        share = f" ({100 * self.carried_share:.1f}%)" if self.damage > 0 else ""
        rows = [
            ("routes", f"{len(self.routes)} ({100 * self.share_of_routes:.2g}% of {self.scope})"),
            ("their parameters", f"{100 * self.share_of_parameters:.2g}% of those of {self.scope} routes"),
            ("criterion", self.criterion),
            ("step α", step),
            ("damage of the update (nats per token)", nats(self.damage)),
            ("attributed to these routes", nats(self.carried) + share),
            ("expected by the attribution", nats(self.expected)),
            ("expected to second order, weighted loss", nats(self.expected_second_order)),
            ("achieved, weighted loss", nats(self.achieved)),
        ]
        lines = ["# Rollback", "", "| figure | value |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in rows]
        lines += ["", "| kind | layer | routes | damage |", "| --- | ---: | ---: | ---: |"]
        lines += [f"| {e['kind']} | {e['layer']} | {e['routes']} | {e['damage']:+.4f} |" for e in self.layers]
        lines += ["", "| kind | layer | position | step | damage |", "| --- | ---: | ---: | ---: | ---: |"]
        lines += [
            f"| {e['kind']} | {e['layer']} | {e['position']} | {e['step']:.3g} | {e['damage']:+.5f} |"
            for e in self.routes[:10]
        ]
        return "\n".join(lines) + "\n"


def explain(
    rollback: Any,
    report: InterferenceReport,
    route_map: RouteMap,
    parameters: np.ndarray,
    routes: np.ndarray,
    steps: np.ndarray,
    expected_second_order: float | None = None,
    achieved: float | None = None,
    tried: list[dict[str, Any]] | None = None,
) -> RollbackExplanation:
    """
    Account for a rollback.

    Args:
        rollback ([`RouteRollback`]):
            Its settings.
        report ([`InterferenceReport`]):
            The analysis.
        route_map ([`RouteMap`]):
            The routes.
        parameters (`numpy.ndarray` of shape `(num_routes,)`):
            Number of parameters of each route.
        routes (`numpy.ndarray` of shape `(chosen,)`):
            Indices of the routes, highest score first.
        steps (`numpy.ndarray` of shape `(chosen,)`):
            Step of each of them.
        expected_second_order (`float`, *optional*):
            Fall of the weighted loss by the quadratic model.
        achieved (`float`, *optional*):
            Fall of the weighted loss as measured.
        tried (`list[dict]`, *optional*):
            What the search for the step saw.

    Returns:
        [`RollbackExplanation`]: The account.
    """
    damage, in_scope = report.routes["damage"], route_map.scope(rollback.scope)
    listed, layers = [], {}
    for route, step in zip(routes, steps, strict=True):
        kind, layer, position = route_map.locate(int(route))
        listed.append(
            {
                "route": int(route),
                "kind": kind,
                "layer": layer,
                "position": position,
                "step": float(step),
                "damage": float(damage[route]),
            }
        )
        entry = layers.setdefault((kind, layer), {"kind": kind, "layer": layer, "routes": 0, "damage": 0.0})
        entry["routes"] += 1
        entry["damage"] += float(damage[route])
    return RollbackExplanation(
        criterion=rollback.criterion,
        scope=rollback.scope,
        budget=rollback.budget,
        budget_of=rollback.budget_of,
        share_of_routes=float(len(routes) / in_scope.sum()),
        share_of_parameters=float(parameters[routes].sum() / parameters[in_scope].sum()),
        routes=listed,
        layers=[layers[key] for key in sorted(layers)],
        damage=report.damage,
        carried=float(damage[routes].sum()),
        expected=float(steps @ damage[routes]),
        expected_second_order=expected_second_order,
        achieved=achieved,
        tried=tried or [],
    )
