"""Steps of single routes: the small quadratic problem in the coordinates of the chosen routes."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from transformers import PreTrainedModel

from ..analysis.damage import UpdatePath, first_order
from ..analysis.gradients import Batches, Tensors, mean_loss
from ..analysis.routes import RouteMap
from ..analysis.subspace import route_operator


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
) -> RouteSteps:
    """
    The steps at which [`RouteQuadratic`] is least, each between 0 and a bound, by L-BFGS-B (Byrd, Lu, Nocedal and Zhu,
    SIAM J. Sci. Comput. 16, 1995) through scipy.

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
            Most Hessian products of each domain.

    Returns:
        [`RouteSteps`]: The steps.

    Raises:
        `ValueError`: If there are no losses, or they are not finite.
    """
    if not any(entry.weight for entry in losses.values()):
        raise ValueError("losses: expected at least one domain with a weight, found none")
    quadratic = RouteQuadratic(model, before, route_map, routes, losses)
    try:
        if not np.isfinite(quadratic.gradient).all():
            raise ValueError("losses: expected finite gradients after the update, found NaN or infinity")
        found = minimize(
            quadratic,
            np.ones(len(routes)),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0.0, bound)] * len(routes),
            options={"maxfun": evaluations},
        )
    finally:
        quadratic.close()
    return RouteSteps(steps=found.x, expected=float(found.fun), passes=quadratic.passes)
