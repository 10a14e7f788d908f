"""Damage of an update to an earlier domain: first order, second order, and its attribution to routes."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from .gradients import Batches, Tensors, mean_gradient
from .routes import RouteMap


Direction = Mapping[str, torch.Tensor]


class Elementwise(Mapping):
    """Tensors that are computed when they are asked for, so that one of them is in memory at a time."""

    def __init__(self, names: Iterable[str], compute: Callable[[str], torch.Tensor]):
        self._names, self._compute = dict.fromkeys(names), compute

    def __contains__(self, name: object) -> bool:
        return name in self._names  # that of Mapping would compute the tensor

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class UpdatePath:
    """
    The straight line between two checkpoints, walked by one model in memory: θ(t) = θ0 + t δ. As a context it puts
    the model back at θ0. It makes one copy of the weights, θ0; δ is computed tensor by tensor.
    """

    def __init__(self, model: PreTrainedModel, after: Direction, offload: bool = False):
        self.model = model
        parameters = dict(model.named_parameters())
        self._devices = {name: parameter.device for name, parameter in parameters.items()}
        places = dict.fromkeys(parameters, torch.device("cpu")) if offload else self._devices
        self.start = {name: entry.detach().to(places[name], copy=True) for name, entry in parameters.items()}
        self.end = {name: after[name].detach() for name in parameters}
        self.delta: Direction = Elementwise(parameters, self._difference)

    def __enter__(self) -> "UpdatePath":
        return self

    def __exit__(self, *exception: object) -> None:
        self.move(0.0)

    def move(self, t: float) -> PreTrainedModel:
        """Put the model at θ(t). 0 and 1 restore θ0 and θ1 to the bit."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if t == 0 or t == 1:
                    parameter.copy_(self.start[name] if t == 0 else self.end[name])
                else:
                    start, end = (tensors[name].to(parameter) for tensors in (self.start, self.end))
                    torch.lerp(start, end, t, out=parameter.data)
        return self.model

    def offset(self, direction: Direction, step: float) -> PreTrainedModel:
        """Put the model at θ0 + step * direction; parameters without a direction stay at θ0."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in direction:
                    torch.add(self.start[name].to(parameter), direction[name], alpha=step, out=parameter.data)
                else:
                    parameter.copy_(self.start[name])
        return self.model

    def _difference(self, name: str) -> torch.Tensor:
        device, start = self._devices[name], self.start[name]
        return self.end[name].to(device, start.dtype) - start.to(device)


@dataclass
class RouteTerms:
    """A sum over all parameters, by route, and `outside` over those that no route owns."""

    routes: np.ndarray
    outside: float

    @property
    def total(self) -> float:
        return float(self.routes.sum()) + self.outside

    def __add__(self, other: "RouteTerms") -> "RouteTerms":
        return RouteTerms(self.routes + other.routes, self.outside + other.outside)

    def __mul__(self, factor: float) -> "RouteTerms":
        return RouteTerms(factor * self.routes, factor * self.outside)


def dot(route_map: RouteMap, first: Direction, second: Direction, consume: bool = False) -> RouteTerms:
    """
    Inner product of two vectors over all parameters, by route, on the accelerator if one of both lies there; `consume`
    says that the tensors of `first` may be overwritten. Half precision is multiplied in float32 and summed in float64.
    """

    def product(name: str) -> torch.Tensor:
        a, b = first[name], second[name]
        dtype = torch.float32 if torch.finfo(a.dtype).bits < 32 else a.dtype
        a = a.to(b.device) if a.device.type == "cpu" else a
        b = b.to(a.device, dtype)
        product = a.mul_(b) if consume and a.dtype == dtype else a.to(dtype) * b
        # Outside routes only the whole counts, and that of an embedding is slow in float64.
        return product if route_map.cut(name) is not None else product.sum(dim=-1).double()

    return RouteTerms(*route_map.sum_by_route(Elementwise(first, product)))


def norm(tensors: Direction) -> float:
    """Euclidean norm of a vector over all parameters, over the last axis of each tensor in float32 or more."""

    def part(tensor: torch.Tensor) -> torch.Tensor:
        rows = torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.promote_types(tensor.dtype, torch.float32))
        return torch.linalg.vector_norm(rows, dtype=torch.float64)

    parts = [part(tensors[name]) for name in tensors]
    return float(torch.linalg.vector_norm(torch.stack([entry.to(parts[0].device) for entry in parts])))


def difference_step(path: UpdatePath) -> float:
    """
    Step of the central difference, as a share of the update.

    ```
    ε = min(1, (u |θ0| / |δ|)^(1/3))
    ```

    with u the machine epsilon of the parameters, at least that of float32, in which the norms of transformers compute.
    It balances truncation, of order ε² relative to the update, and the rounding of parameters, u |θ0| / (ε |δ|)
    (Nocedal and Wright, Numerical Optimization, section 8.1).
    """
    update = norm(path.delta)
    if update == 0:
        raise ValueError("update: expected parameters that differ, found a δ of zero")
    dtype = next(iter(path.start.values())).dtype
    rounding = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    return min(1.0, (rounding * norm(path.start) / update) ** (1 / 3))


def first_order(
    path: UpdatePath, batches: Batches, route_map: RouteMap, gradient: Tensors | None = None
) -> RouteTerms:
    """First-order damage, ∇L(θ0)·δ, by route."""
    if gradient is None:
        _, gradient = mean_gradient(path.move(0.0), batches)
    return dot(route_map, gradient, path.delta)


def hessian_terms(
    path: UpdatePath,
    batches: Batches,
    route_map: RouteMap,
    direction: Direction,
    step: float,
    against: Direction,
) -> RouteTerms:
    """
    δ_r·(H v)_r by route, for a direction v and δ = `against`. Two gradient passes.

    ```
    H v = (∇L(θ0 + ε v) - ∇L(θ0 - ε v)) / (2 ε)
    ```
    """
    points = ((lambda sign=sign: path.offset(direction, sign * step), sign / (2 * step)) for sign in (1, -1))
    return _summed(points, batches, route_map, against)


def second_order(path: UpdatePath, batches: Batches, route_map: RouteMap, step: float) -> RouteTerms:
    """Second-order damage, ½ δᵀHδ (arXiv 2606.02398), by route: ½ δ_r·(Hδ)_r."""
    return hessian_terms(path, batches, route_map, path.delta, step, path.delta) * 0.5


def second_order_error(path: UpdatePath, batches: Batches, route_map: RouteMap, step: float) -> float:
    """
    Relative error of the total of [`second_order`], from a few references. Eight gradient passes.

    ```
    max S - min S over the steps 2ε, ε, ε/2, ε/4, as a share of S(ε)
    ```

    Truncation is a quarter of this range; rounding grows as the step shrinks, and would have to cancel in all of them
    to be missed. Infinite where the total is zero.
    """
    found = [second_order(path, batches, route_map, factor * step).total for factor in (2, 1, 0.5, 0.25)]
    return (max(found) - min(found)) / abs(found[1]) if found[1] else float("inf")


def attribution(path: UpdatePath, batches: Batches, route_map: RouteMap, nodes: int) -> RouteTerms:
    """
    Damage attributed to each route: integrated gradients (arXiv 1703.01365) along the update.

    ```
    a_r = ∫₀¹ ∇_r L(θ0 + t δ)·δ_r dt
    ```

    by Gauss-Legendre quadrature, one gradient pass per node, exact for losses that are polynomials of degree
    `2 * nodes` in t. All parts sum to L(θ1) - L(θ0).
    """
    positions, weights = np.polynomial.legendre.leggauss(nodes)
    pairs = zip(positions, weights, strict=True)
    points = ((lambda at=at: path.move((at + 1) / 2), weight / 2) for at, weight in pairs)
    return _summed(points, batches, route_map, path.delta)


def _summed(
    points: Iterable[tuple[Callable[[], PreTrainedModel], float]],
    batches: Batches,
    route_map: RouteMap,
    against: Direction,
) -> RouteTerms:
    """Weighted sum of the gradients at several points, of which one is in memory at a time, by route."""
    total = RouteTerms(np.zeros(route_map.num_routes), 0.0)
    for move, weight in points:
        _, gradient = mean_gradient(move(), batches)
        total += dot(route_map, gradient, against, consume=True) * weight
        del gradient
    return total
