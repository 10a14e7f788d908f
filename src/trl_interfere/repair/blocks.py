"""Blocks: the part of a tensor that a rollback touches."""

from dataclasses import dataclass

import numpy as np
import torch

from ..analysis.routes import RouteMap


@dataclass(frozen=True, eq=False)
class Blocks:
    """
    Some of the equal blocks that a tensor is cut into, along one axis or along an axis of experts and another.

    Args:
        axes (`tuple[int, ...]`):
            Axes that are cut, in ascending order.
        counts (`tuple[int, ...]`):
            Number of blocks along each of them.
        index (`numpy.ndarray` of shape `(blocks,)`):
            The blocks that are meant, counted over all axes, the last one fastest.
    """

    axes: tuple[int, ...]
    counts: tuple[int, ...]
    index: np.ndarray

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """
        Copy the blocks.

        Args:
            tensor (`torch.Tensor`):
                The tensor.

        Returns:
            `torch.Tensor` of shape `(blocks, elements per block)`: The blocks.
        """
        return self._view(tensor)[self._places(tensor)].reshape(len(self.index), -1)

    def put(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """
        Write the blocks, in place.

        Args:
            tensor (`torch.Tensor`):
                The tensor.
            values (`torch.Tensor` of shape `(blocks, elements per block)`):
                What [`~Blocks.take`] is to return.
        """
        view = self._view(tensor)
        view[self._places(tensor)] = values.reshape(len(self.index), *view.shape[len(self.axes) :])

    def _view(self, tensor: torch.Tensor) -> torch.Tensor:
        for axis, count in zip(reversed(self.axes), reversed(self.counts), strict=True):
            tensor = tensor.unflatten(axis, (count, -1))
        first = range(len(self.axes))
        return tensor.movedim([axis + place for place, axis in enumerate(self.axes)], list(first))

    def _places(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        places = np.unravel_index(self.index, self.counts)
        return tuple(torch.as_tensor(place, device=tensor.device) for place in places)


def touched_blocks(
    route_map: RouteMap, name: str, steps: np.ndarray, tensor: torch.Tensor
) -> tuple[Blocks, np.ndarray] | None:
    """
    Blocks of a tensor that a rollback touches.

    Args:
        route_map ([`RouteMap`]):
            The routes.
        name (`str`):
            Name of the tensor, in the model or in its files.
        steps (`numpy.ndarray` of shape `(num_routes,)`):
            Step of each route, 0 for those that stay.
        tensor (`torch.Tensor`):
            The tensor, or one of its shape.

    Returns:
        `tuple[Blocks, numpy.ndarray]` or `None`: The blocks and the step of each, `None` if there are none.

    Raises:
        `ValueError`: If the tensor cannot be cut as the architecture says.
    """
    cut = route_map.cut(name)
    if cut is None:
        return None
    cut.block_sizes(name, tensor)
    owned = steps[cut.owners.ravel()]
    index = np.flatnonzero(owned)
    return (Blocks(cut.axes, cut.owners.shape, index), owned[index]) if len(index) else None
