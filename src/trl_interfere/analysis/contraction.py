"""How far an update still reaches into the conflict subspace of an earlier one."""

from typing import Any

import numpy as np

from .attribution import Direction, Elementwise, dot
from .gradients import Tensors
from .routes import RouteMap


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
