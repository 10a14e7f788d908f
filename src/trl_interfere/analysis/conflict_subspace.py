"""The conflict subspace: the few directions of route space that carry the second-order damage."""

from dataclasses import asdict, dataclass
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


@dataclass
class Spectrum:
    """
    Leading eigenpairs of the damage operator on route space, and how concentrated the second-order damage is.

    Args:
        eigenvalues (`list[float]`):
            Eigenvalues of the largest sizes, largest size first, in nats per token.
        shares (`list[float]`):
            Share of the second-order damage by routes in each eigenvector, λ_i (u_i·1)² / 1ᵀM1. The shares of all
            eigenvectors sum to 1; those of the first k to more where the others have negative ones.
        effective_dimension (`float`):
            Participation ratio of the eigenvalues, (Σ|λ_i|)² / Σλ_i²: 1 for one direction, k for k equal ones. It is
            taken over those that were computed, which is a lower bound on that of all of them.
        second_order (`float`):
            ½ 1ᵀM1, the second-order damage by routes alone, in nats per token.
        top_routes (`dict[str, float]`):
            Share of `second_order` in the routes with the largest ½ δ_r·(Hδ)_r, by the share of routes (`TOP_SHARES`).
            Empty if there is no damage of second order.
        applications (`int`):
            Hessian products that this took, of two gradient passes each.
        converged (`bool`):
            Whether all eigenpairs that were asked for were found.
    """

    eigenvalues: list[float]
    shares: list[float]
    effective_dimension: float
    second_order: float
    top_routes: dict[str, float]
    applications: int
    converged: bool

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, as they stand in `report.json`."""
        return asdict(self)


def route_operator(
    path: UpdatePath,
    batches: Batches,
    route_map: RouteMap,
    update: Direction | None = None,
    step: float | None = None,
) -> LinearOperator:
    """
    The symmetric operator of the second-order damage on route space, with one coefficient for each route.

    ```
    (M c)_r = δ_r·(H Σ_s c_s δ_s)_r
    ```

    so that ½ cᵀMc is the second-order damage of an update whose routes are scaled by c. Each application is one
    Hessian product by central difference: two gradient passes. Its step makes a displacement as long as that of
    [`second_order`], ε |δ|, whatever c.
    """
    update = path.delta if update is None else update
    length = (difference_step(path) if step is None else step) * norm(path.delta)
    names = [name for name in update if route_map.cut(name) is not None]

    def apply(coefficients: np.ndarray) -> np.ndarray:
        coefficients = np.asarray(coefficients, dtype=np.float64).ravel()

        def scaled(name: str) -> torch.Tensor:
            tensor = update[name]
            return tensor * route_map.spread(name, coefficients, tensor)

        direction = Elementwise(names, scaled)
        size = norm(direction)
        if size == 0:
            return np.zeros(route_map.num_routes)
        if not np.isfinite(size):
            raise ValueError(f"update: expected finite tensors, found a norm of {size}")
        return hessian_terms(path, batches, route_map, direction, length / size, against=update).routes

    shape = (route_map.num_routes, route_map.num_routes)
    return LinearOperator(shape, matvec=apply, rmatvec=apply, dtype=np.float64)


def conflict_subspace(
    path: UpdatePath,
    batches: Batches,
    route_map: RouteMap,
    size: int,
    update: Direction | None = None,
    step: float | None = None,
    seed: int = 0,
) -> tuple[Spectrum, np.ndarray]:
    """
    Leading eigenpairs of [`route_operator`] by Lanczos (ARPACK through scipy), and the concentration of the damage.

    Args:
        path ([`UpdatePath`]):
            The update; its model is left away from θ0.
        batches (`list[dict[str, torch.Tensor]]`):
            References of the damaged domain. `2 * size + 2` Hessian products are the least that this takes, so that a
            few references are the wiser choice.
        route_map ([`RouteMap`]):
            The routes.
        size (`int`):
            Number of eigenpairs, below the number of routes.
        update (`Mapping[str, torch.Tensor]`, *optional*):
            δ. Defaults to the update of the path; see [`random_update`] for the control.
        step (`float`, *optional*):
            ε. Defaults to [`difference_step`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of the first Lanczos vector.

    Returns:
        `tuple[Spectrum, numpy.ndarray]`: The figures, and the eigenvectors of shape `(found, num_routes)`.

    Raises:
        `ValueError`: If `size` is out of range, or the operator is not finite.
    """
    count = route_map.num_routes
    if not 1 <= size < count:
        raise ValueError(f"size: expected 1 to {count - 1} for {count} routes, found {size}")
    operator, applications = route_operator(path, batches, route_map, update, step), 0

    def apply(coefficients: np.ndarray) -> np.ndarray:
        nonlocal applications
        applications += 1
        return operator.matvec(coefficients)

    parts = 0.5 * apply(np.ones(count))
    if not np.isfinite(parts).all():
        raise ValueError("update: expected a finite Hessian product, found NaN or infinity")
    if not parts.any():  # nothing changed within routes
        return Spectrum([], [], 0.0, 0.0, {}, applications, True), np.zeros((0, count))
    start = np.random.default_rng(seed).standard_normal(count)
    converged = True
    try:
        values, vectors = eigsh(
            LinearOperator(operator.shape, matvec=apply, dtype=np.float64),
            k=size,
            which="LM",
            v0=start,
            ncv=min(count, 2 * size + 1),
            tol=_TOLERANCE,
            maxiter=4,
        )
    except ArpackNoConvergence as error:
        values, vectors, converged = error.eigenvalues, error.eigenvectors, False
    order = np.argsort(-np.abs(values))
    values, vectors = values[order], vectors[:, order].T
    total = float(parts.sum())
    along = np.array([0.5 * value * vector.sum() ** 2 for value, vector in zip(values, vectors, strict=True)])
    ranked = np.cumsum(np.sort(parts)[::-1])
    squares = float(np.sum(values**2))
    spectrum = Spectrum(
        eigenvalues=[float(value) for value in values],
        shares=[float(part) for part in along / total] if total else [],
        effective_dimension=float(np.abs(values).sum() ** 2 / squares) if squares else 0.0,
        second_order=total,
        top_routes={f"{share:g}": float(ranked[max(1, round(share * count)) - 1] / total) for share in TOP_SHARES}
        if total > 0
        else {},
        applications=applications,
        converged=converged,
    )
    return spectrum, vectors


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
