"""Steps of single routes: the small quadratic problem in the coordinates of the chosen routes."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from transformers import PreTrainedModel

from ..analysis.attribution import Elementwise, UpdatePath, dot, first_order
from ..analysis.conflict_subspace import route_operator
from ..analysis.gradients import Batches, Tensors, mean_gradient, mean_loss
from ..analysis.routes import RouteMap


@dataclass
class WeightedLoss:
    """
    Loss of a domain on references of the selection split, and how much it counts.

    Args:
        batches (`list[dict[str, torch.Tensor]]`):
            References of the domain.
        weight (`float`, *optional*, defaults to `1.0`):
            Weight in the sum over domains.
    """

    batches: Batches
    weight: float = 1.0


Losses = dict[str, WeightedLoss]


@dataclass
class RouteSteps:
    """
    Steps of the chosen routes, and what they are expected to do.

    Args:
        steps (`numpy.ndarray` of shape `(chosen,)`):
            α of each route.
        expected (`float`):
            Change of the weighted loss by the quadratic model, in nats per token.
        passes (`int`):
            Gradient passes over the references of one domain that this took.
    """

    steps: np.ndarray
    expected: float
    passes: int


class RouteQuadratic:
    """
    Second-order model of a weighted loss in the steps of chosen routes, around the weights after the update.

    ```
    q(α) = Σ_d w_d [ g_d·α + ½ αᵀ M_d α ]      g_d,r = -∇_r L_d(θ1)·δ_r      M_d,rs = δ_rᵀ H_d(θ1) δ_s
    ```

    the loss of θ1 - Σ_r α_r δ_r, less that of θ1. M α is one Hessian product of [`route_operator`] for each domain,
    two gradient passes. M itself is never built.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model after the update. It is moved by each product; `close` puts it back to the bit.
        before (`dict[str, torch.Tensor]`):
            Parameters before the update, by name.
        route_map ([`RouteMap`]):
            The routes.
        routes (`numpy.ndarray` of shape `(chosen,)`):
            Indices of the routes.
        losses (`dict[str, WeightedLoss]`):
            Loss of each domain that counts: the damaged one, and those that are to be spared.
    """

    def __init__(
        self, model: PreTrainedModel, before: Tensors, route_map: RouteMap, routes: np.ndarray, losses: Losses
    ):
        self.routes, self.route_map, self.passes = routes, route_map, 0
        # The direction of the path is the rollback itself: from θ1 to θ0.
        self.path = UpdatePath(model, before)
        parts = [entry for entry in losses.values() if entry.weight]
        self.gradient = np.zeros(len(routes))
        for entry in parts:
            self.gradient += entry.weight * first_order(self.path, entry.batches, route_map).routes[routes]
            self.passes += 1
        self.operators = [(entry.weight, route_operator(self.path, entry.batches, route_map)) for entry in parts]

    def __call__(self, steps: np.ndarray) -> tuple[float, np.ndarray]:
        """Value and gradient at steps of shape `(chosen,)`."""
        spread = np.zeros(self.route_map.num_routes)
        spread[self.routes] = steps
        product = np.zeros(len(self.routes))
        if spread.any():
            for weight, operator in self.operators:
                product += weight * operator.matvec(spread)[self.routes]
                self.passes += 2
        return float(self.gradient @ steps + 0.5 * steps @ product), self.gradient + product

    def close(self) -> None:
        """Put the model back to the weights after the update."""
        self.path.move(0.0)


class RouteLoss:
    """
    The weighted loss itself in the steps of chosen routes, Σ_d w_d L_d(θ1 - Σ_r α_r δ_r), and its gradient by the
    chain rule, -Σ_d w_d ∇_r L_d·δ_r: one gradient pass for each domain, exact at any distance.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model after the update. It is moved by each evaluation; `close` puts it back to the bit.
        before (`dict[str, torch.Tensor]`):
            Parameters before the update, by name.
        route_map ([`RouteMap`]):
            The routes.
        routes (`numpy.ndarray` of shape `(chosen,)`):
            Indices of the routes.
        losses (`dict[str, WeightedLoss]`):
            Loss of each domain that counts.
    """

    def __init__(
        self, model: PreTrainedModel, before: Tensors, route_map: RouteMap, routes: np.ndarray, losses: Losses
    ):
        self.routes, self.route_map, self.passes = routes, route_map, 0
        self.path = UpdatePath(model, before)
        self.parts = [entry for entry in losses.values() if entry.weight]
        self.start: float | None = None

    def __call__(self, steps: np.ndarray) -> tuple[float, np.ndarray]:
        """Value, less that of the first call at steps of 0 if there was one, and gradient at steps `(chosen,)`."""
        spread = np.zeros(self.route_map.num_routes)
        spread[self.routes] = steps
        delta = self.path.delta

        def scaled(name: str) -> torch.Tensor:
            tensor = delta[name]
            return tensor * self.route_map.spread(name, spread, tensor)

        names = [name for name in delta if self.route_map.cut(name) is not None]
        model = self.path.offset(Elementwise(names, scaled), 1.0)
        value, slope = 0.0, np.zeros(len(self.routes))
        for entry in self.parts:
            loss, gradient = mean_gradient(model, entry.batches)
            value += entry.weight * loss
            slope += entry.weight * dot(self.route_map, gradient, delta, consume=True).routes[self.routes]
            self.passes += 1
        if self.start is None and not spread.any():
            self.start = value
        return value - (self.start or 0.0), slope

    def close(self) -> None:
        """Put the model back to the weights after the update."""
        self.path.move(0.0)


def weighted_loss(model: PreTrainedModel, losses: Losses) -> float:
    """Sum over domains of the mean token loss times its weight."""
    return sum(entry.weight * mean_loss(model, entry.batches) for entry in losses.values() if entry.weight)


def solve_steps(
    model: PreTrainedModel,
    before: Tensors,
    route_map: RouteMap,
    routes: np.ndarray,
    losses: Losses,
    bound: float = 4.0,
    evaluations: int = 25,
    exact: bool = False,
) -> RouteSteps:
    """
    The steps at which [`RouteQuadratic`] is least, or with `exact` [`RouteLoss`], each between 0 and a bound, by
    L-BFGS-B (Byrd, Lu, Nocedal and Zhu, SIAM J. Sci. Comput. 16, 1995) through scipy.

    The quadratic model is a local one: where a rollback takes a loss far from where it was, only the exact one sees
    it. The exact one costs half as many gradient passes. Both fit as many numbers as there are routes to the
    references.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model after the update; it is left as it was, to the bit.
        before (`dict[str, torch.Tensor]`):
            Parameters before the update, by name.
        route_map ([`RouteMap`]):
            The routes.
        routes (`numpy.ndarray` of shape `(chosen,)`):
            Indices of the routes.
        losses (`dict[str, WeightedLoss]`):
            Loss of each domain that counts.
        bound (`float`, *optional*, defaults to `4.0`):
            Largest step. A loss may curve downwards along a route, where the quadratic model has no least value.
        evaluations (`int`, *optional*, defaults to `25`):
            Most evaluations: Hessian products, or with `exact` gradients, of each domain.
        exact (`bool`, *optional*, defaults to `False`):
            Whether to minimise the loss itself.

    Returns:
        [`RouteSteps`]: The steps.

    Raises:
        `ValueError`: If there are no losses, or they are not finite.
    """
    if not any(entry.weight for entry in losses.values()):
        raise ValueError("losses: expected at least one domain with a weight, found none")
    function = (RouteLoss if exact else RouteQuadratic)(model, before, route_map, routes, losses)
    try:
        if not np.isfinite(function(np.zeros(len(routes)))[1]).all():
            raise ValueError("losses: expected finite gradients after the update, found NaN or infinity")
        found = minimize(
            function,
            np.zeros(len(routes)),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0.0, bound)] * len(routes),
            options={"maxfun": evaluations},
        )
    finally:
        function.close()
    return RouteSteps(steps=found.x, expected=float(found.fun), passes=function.passes)
