"""The conflict subspace: the few directions of route space that carry the second-order damage."""

from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from .attribution import Direction, Elementwise, UpdatePath, dot, hessian_terms, norm
from .gradients import Batches, Tensors
from .routes import RouteMap


# Shares of the routes, by size of their part, whose share of the second-order damage is given.
TOP_SHARES = (0.01, 0.02, 0.05, 0.1)
# Relative accuracy asked of eigenvalues; the central difference does not carry much more in float32.
_TOLERANCE = 1e-3


class RouteOperator(LinearOperator):
    """
    The symmetric operator of the second-order damage on route space, with one coefficient for each route.

    ```
    (M c)_r = δ_r·(H Σ_s c_s δ_s)_r
    ```

    so that ½ cᵀMc is the second-order damage of an update whose routes are scaled by c. Each of its `applications` is
    one Hessian product, at a distance of ε |δ| as in [`second_order`], whatever c.
    """

    def __init__(self, path: UpdatePath, batches: Batches, route_map: RouteMap, update: Direction, step: float):
        super().__init__(np.float64, (route_map.num_routes, route_map.num_routes))
        self.path, self.batches, self.route_map, self.update = path, batches, route_map, update
        self.length = step * norm(path.delta)
        self.names = [name for name in update if route_map.cut(name) is not None]
        self.applications = 0

    def _matvec(self, coefficients: np.ndarray) -> np.ndarray:
        self.applications += 1
        coefficients = np.asarray(coefficients, dtype=np.float64).ravel()

        def scaled(name: str) -> torch.Tensor:
            tensor = self.update[name]
            return tensor * self.route_map.spread(name, coefficients, tensor)

        direction = Elementwise(self.names, scaled)
        size = norm(direction)
        if size == 0:
            return np.zeros(self.route_map.num_routes)
        step = self.length / size
        return hessian_terms(self.path, self.batches, self.route_map, direction, step, self.update).routes


def conflict_subspace(
    path: UpdatePath,
    batches: Batches,
    route_map: RouteMap,
    size: int,
    update: Direction,
    step: float,
    seed: int = 0,
) -> tuple[dict[str, Any], np.ndarray]:
    """
    Figures of the leading eigenpairs of [`RouteOperator`] by Lanczos, and the eigenvectors `(found, num_routes)`.

    They are `eigenvalues`, largest size first, in nats per token; `shares` of the second-order damage by routes in
    each eigenvector, λ_i (u_i·1)² / 1ᵀM1; `effective_dimension`, the participation ratio (Σ|λ_i|)² / Σλ_i² of these
    eigenvalues, a lower bound on that of all; `second_order`, ½ 1ᵀM1; `top_routes`, the share of it in the routes with
    the largest ½ δ_r·(Hδ)_r, by the share of routes, empty without damage; `applications`, the Hessian products that
    it took; and `converged`, whether all eigenpairs were found.
    """
    count = route_map.num_routes
    operator = RouteOperator(path, batches, route_map, update, step)
    parts = 0.5 * operator.matvec(np.ones(count))
    if not np.isfinite(parts).all():
        raise ValueError("update: expected a finite Hessian product, found NaN or infinity")
    converged, values, vectors = True, np.zeros(0), np.zeros((count, 0))
    if parts.any():  # else nothing changed within routes
        start, vectors_kept = np.random.default_rng(seed).standard_normal(count), min(count, 2 * size + 1)
        try:
            values, vectors = eigsh(operator, size, v0=start, ncv=vectors_kept, tol=_TOLERANCE, maxiter=4)
        except ArpackNoConvergence as error:
            values, vectors, converged = error.eigenvalues, error.eigenvectors, False
    order = np.argsort(-np.abs(values))
    values, vectors = values[order], vectors[:, order].T
    total = float(parts.sum())
    along = np.array([0.5 * value * vector.sum() ** 2 for value, vector in zip(values, vectors, strict=True)])
    ranked = np.cumsum(np.sort(parts)[::-1])
    squares = float(np.sum(values**2))
    figures = {
        "eigenvalues": values.tolist(),
        "shares": (along / total).tolist() if total else [],
        "effective_dimension": float(np.abs(values).sum() ** 2 / squares) if squares else 0.0,
        "second_order": total,
        "top_routes": {f"{share:g}": float(ranked[max(1, round(share * count)) - 1] / total) for share in TOP_SHARES}
        if total > 0
        else {},
        "applications": operator.applications,
        "converged": converged,
    }
    return figures, vectors


def random_update(path: UpdatePath, seed: int = 0) -> Direction:
    """
    A random update of the same norm in every tensor: the control of the conflict subspace. Its tensors are drawn
    again, each from a seed of its own, whenever they are asked for.
    """
    seeds = {name: seed * len(path.delta) + position for position, name in enumerate(path.delta)}

    def draw(name: str) -> torch.Tensor:
        like = path.delta[name]
        # On the host, so that the control does not depend on the device.
        noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(seeds[name])).to(like.device)
        size, drawn = (torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in (like, noise))
        return (noise * (size / drawn.clamp(min=1e-30)).to(noise.dtype)).to(like.dtype)

    return Elementwise(seeds, draw)


def subspace_norms(
    route_map: RouteMap, delta: Direction, displacements: list[Direction], directions: np.ndarray
) -> np.ndarray:
    r"""
    Lengths of displacements within the subspace of the directions s_i = Σ_r u_ir δ_r, ‖P_S d‖.

    ```
    ‖P_S d‖² = bᵀ G⁻¹ b        b_i = <s_i, d> = Σ_r u_ir <δ_r, d_r>        G_ij = <s_i, s_j> = Σ_r u_ir u_jr ‖δ_r‖²
    ```

    The theorem of arXiv 2606.02398 on refresh bounds ‖P_S(θ_t - θ*_A)‖ by (1 - αμ)^t ‖P_S δ_B‖: `displacements` are
    θ_t - θ*_A.
    """
    squares = dot(route_map, delta, delta).routes
    gram = (directions * squares) @ directions.T
    lengths = []
    for displacement in displacements:
        along = directions @ dot(route_map, delta, displacement).routes
        # Directions on routes without an edit stand for nothing: the pseudo-inverse leaves them out.
        lengths.append(np.sqrt(max(0.0, along @ np.linalg.pinv(gram, hermitian=True) @ along)))
    return np.array(lengths)


def contraction(
    route_map: RouteMap, before: Tensors, after: Tensors, refreshed: Tensors, directions: np.ndarray, seed: int = 0
) -> dict[str, Any]:
    """How much of an update's displacement a refresh left, within the conflict subspace and beside it."""

    def away(parameters: Tensors) -> Elementwise:
        return Elementwise(before, lambda name: (parameters[name] - before[name]).detach())

    displacements = [away(after), away(refreshed)]
    inside, beside = (
        subspace_norms(route_map, displacements[0], displacements, vectors)
        for vectors in (directions, np.random.default_rng(seed).standard_normal(directions.shape))
    )
    routes = [np.sqrt(dot(route_map, entry, entry).routes.sum()) for entry in displacements]
    return {
        "directions": len(directions),
        "subspace": float(inside[1] / inside[0]),
        "random": float(beside[1] / beside[0]),
        "routes": float(routes[1] / routes[0]),
    }
