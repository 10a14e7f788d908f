"""The conflict subspace: the few directions of route space that carry the second-order damage."""

from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from .attribution import Direction, Elementwise, UpdatePath, difference_step, hessian_terms, norm
from .gradients import Batches
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
    one Hessian product by central difference: two gradient passes. Its step makes a displacement as long as that of
    [`second_order`], ε |δ|, whatever c.
    """

    def __init__(
        self, path: UpdatePath, batches: Batches, route_map: RouteMap, update: Direction | None, step: float | None
    ):
        super().__init__(np.float64, (route_map.num_routes, route_map.num_routes))
        self.path, self.batches, self.route_map = path, batches, route_map
        self.update = path.delta if update is None else update
        self.length = (difference_step(path) if step is None else step) * norm(path.delta)
        self.names = [name for name in self.update if route_map.cut(name) is not None]
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
        if not np.isfinite(size):
            raise ValueError(f"update: expected finite tensors, found a norm of {size}")
        step = self.length / size
        return hessian_terms(self.path, self.batches, self.route_map, direction, step, against=self.update).routes


def conflict_subspace(
    path: UpdatePath,
    batches: Batches,
    route_map: RouteMap,
    size: int,
    update: Direction | None = None,
    step: float | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], np.ndarray]:
    """
    Leading eigenpairs of [`RouteOperator`] by Lanczos (ARPACK through scipy), and the concentration of the damage.

    Returns the figures, and the eigenvectors of shape `(found, num_routes)`. It takes at least `2 * size + 2` Hessian
    products; the model of the path is left away from θ0; `update` may stand in the place of δ. The figures are
    `eigenvalues`, of the largest sizes, largest size first, in nats per token; `shares` of the second-order damage by
    routes in each eigenvector, λ_i (u_i·1)² / 1ᵀM1, which sum to 1 over all eigenvectors and to more over the first k
    where others are negative; `effective_dimension`, the participation ratio (Σ|λ_i|)² / Σλ_i² of the eigenvalues that
    were computed, a lower bound on that of all of them; `second_order`, ½ 1ᵀM1; `top_routes`, the share of it in the
    routes with the largest ½ δ_r·(Hδ)_r, by the share of routes, empty if there is no damage of second order;
    `applications`, the Hessian products that this took; and `converged`, whether all eigenpairs were found.
    """
    count = route_map.num_routes
    if not 1 <= size < count:
        raise ValueError(f"size: expected 1 to {count - 1} for {count} routes, found {size}")
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
    A random update of the same norm in every tensor: the control of the conflict subspace.

    Tensors are drawn again, from a seed of their own, whenever they are asked for, so that the control needs no
    model-sized copy.
    """
    names = list(path.delta)
    position = {name: index for index, name in enumerate(names)}
    sizes: dict[str, torch.Tensor] = {}

    def draw(name: str) -> torch.Tensor:
        like = path.delta[name]
        if name not in sizes:
            sizes[name] = torch.linalg.vector_norm(like, dtype=torch.float64)
        # On the host, so that the control does not depend on the device.
        generator = torch.Generator().manual_seed(seed * len(names) + position[name])
        noise = torch.randn(like.shape, generator=generator).to(like.device)
        scale = sizes[name] / torch.linalg.vector_norm(noise, dtype=torch.float64).clamp(min=1e-30)
        return (noise * scale.to(noise.dtype)).to(like.dtype)

    return Elementwise(names, draw)
