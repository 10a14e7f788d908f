"""The step of a rollback: how far each route goes back."""

import numpy as np
import torch

from ..analysis.routes import RouteMap


def route_steps(route_map: RouteMap, routes: np.ndarray, step: float | np.ndarray) -> np.ndarray:
    """
    Step of each route of a model.

    Args:
        route_map ([`RouteMap`]):
            The routes.
        routes (`numpy.ndarray` of shape `(chosen,)`):
            Indices of the routes that are rolled back.
        step (`float` or `numpy.ndarray` of shape `(chosen,)`):
            Share of the update that is taken back, of all of them or of each.

    Returns:
        `numpy.ndarray` of shape `(num_routes,)`: Steps, 0 for routes that are not rolled back.

    Raises:
        `ValueError`: If a route does not exist or is named twice, or a step is not a finite number.
    """
    routes, step = np.asarray(routes), np.asarray(step, dtype=np.float64)
    if routes.ndim != 1 or (routes.size and not np.issubdtype(routes.dtype, np.integer)):
        raise ValueError(f"routes: expected a list of indices, found shape {routes.shape} of {routes.dtype}")
    outside = routes[(routes < 0) | (routes >= route_map.num_routes)]
    if outside.size:
        raise ValueError(f"routes: expected indices from 0 to {route_map.num_routes - 1}, found {outside[0]}")
    if len(np.unique(routes)) != len(routes):
        raise ValueError("routes: expected each route once, found one twice")
    if step.shape not in ((), routes.shape):
        raise ValueError(f"step: expected a number or one for each of {len(routes)} routes, found shape {step.shape}")
    if not np.isfinite(step).all():
        raise ValueError(f"step: expected finite numbers, found {step[~np.isfinite(step)].ravel()[0]}")
    steps = np.zeros(route_map.num_routes)
    steps[routes.astype(int)] = step
    return steps


def move_back(after: torch.Tensor, before: torch.Tensor, step: np.ndarray) -> torch.Tensor:
    """
    Slices of routes after a rollback, `θ1 - α (θ1 - θ0)`.

    The result is θ1 to the bit at α = 0 and θ0 at α = 1. It is computed in float32 (float64, if one of both is) and
    rounded once; multiplication and addition are separate, so that it does not depend on shape, memory layout or
    device.

    Args:
        after (`torch.Tensor` of shape `(blocks, elements)`):
            Slices after the update, θ1.
        before (`torch.Tensor` of the same shape):
            Slices before it, θ0.
        step (`numpy.ndarray` of shape `(blocks,)`):
            α of each slice.

    Returns:
        `torch.Tensor`: Slices in the data type and on the device of `after`.
    """
    dtype = torch.promote_types(torch.promote_types(after.dtype, before.dtype), torch.float32)
    first, last = before.to(after.device, dtype), after.to(dtype)
    near = step < 0.5  # nearer to θ1 than to θ0
    factor = torch.as_tensor(np.where(near, -step, 1 - step), dtype=dtype, device=after.device)[:, None]
    start = torch.where(torch.as_tensor(near, device=after.device)[:, None], last, first)
    return (start + factor * (last - first)).to(after.dtype)
