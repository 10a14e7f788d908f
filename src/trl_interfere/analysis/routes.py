"""Routes: the smallest units of computation, and the slices of the tensors that each of them owns."""

import re
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PretrainedConfig

from .architectures import ARCHITECTURES, KINDS, Architecture, Count


SCOPES = {"mlp": ("mlp",), "attention": ("query", "key_value"), "joint": KINDS}
# Modules that any model may be wrapped in.
WRAPPERS = ("base_model", "module", "_orig_mod")


@dataclass(frozen=True, eq=False)
class Cut:
    """
    How routes share a tensor: in blocks along one axis, or along an axis of experts and another.

    Args:
        axes (`tuple[int, ...]`):
            Axes that are cut.
        owners (`numpy.ndarray`):
            Route that owns each block, with one axis for each of `axes`. A fused tensor has more than one block of a
            route.
        writes (`bool`):
            Whether the routes write to the residual stream through the tensor.
    """

    axes: tuple[int, ...]
    owners: np.ndarray
    writes: bool

    def blocks(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """
        Bring a tensor into blocks.

        Args:
            name (`str`):
                Its name, for the error.
            tensor (`torch.Tensor`):
                The tensor.

        Returns:
            `torch.Tensor` of shape `(number of blocks, elements per block)`: Blocks in the order of `owners`.

        Raises:
            `ValueError`: If an axis cannot be cut into as many equal blocks.
        """
        self.block_sizes(name, tensor)
        order = tuple(range(len(self.axes)))
        return tensor.movedim(self.axes, order).reshape(self.owners.size, -1)

    def block_sizes(self, name: str, tensor: torch.Tensor) -> list[int]:
        """
        Length of a block along each of `axes`.

        Args:
            name (`str`):
                Name of the tensor, for the error.
            tensor (`torch.Tensor`):
                The tensor.

        Returns:
            `list[int]`: Lengths.

        Raises:
            `ValueError`: If an axis cannot be cut into as many equal blocks.
        """
        sizes = []
        for axis, count in zip(self.axes, self.owners.shape, strict=True):
            length = tensor.shape[axis] if axis < tensor.ndim else 0
            if length == 0 or length % count:
                raise ValueError(
                    f"tensor {name}: expected axis {axis} to hold {count} equal blocks, "
                    f"found shape {tuple(tensor.shape)}"
                )
            sizes.append(length // count)
        return sizes


class RouteMap:
    """
    Which slices of which tensors a route owns.

    A route is an MLP intermediate channel (its row of gate and up, its column of down), also one of an expert, a query
    head (its rows of q, its columns of o) or a key/value head (its rows of k and v). Every element of a parameter
    belongs to exactly one route or to none; what lies outside routes is said in [`Architecture`]. Routes are numbered
    by kind, then by layer, then within the layer.

    Names of tensors may be those of the model in memory or those in its files, where these differ.

    Args:
        config ([`~transformers.PretrainedConfig`]):
            Configuration of a causal language model.
        description ([`Architecture`], *optional*):
            Description of the architecture. Defaults to the one of `ARCHITECTURES` for the model type.

    Attributes:
        num_routes (`int`):
            Number of routes.
        num_layers (`int`):
            Number of layers.
        counts (`dict[str, tuple[int, ...]]`):
            Number of routes of each kind in each layer.
        experts (`tuple[int, ...]`):
            Number of experts in each layer, 0 in one without.

    Raises:
        `ValueError`: If the architecture is unknown, or its description does not fit the configuration.
    """

    def __init__(self, config: PretrainedConfig, description: Architecture | None = None):
        if description is None and config.model_type not in ARCHITECTURES:
            raise ValueError(
                f"no route map for model type {config.model_type!r}, expected one of {sorted(ARCHITECTURES)}; "
                "describe it with `RouteMap(config, description=Architecture(...))`, see "
                "`trl_interfere.analysis.architectures` and the examples in it"
            )
        self.description = description or ARCHITECTURES[config.model_type]
        config = config.get_text_config()
        self.num_layers = config.num_hidden_layers
        self.counts = {
            kind: tuple(_count(config, self.description, kind, layer) for layer in range(self.num_layers))
            for kind in KINDS
        }
        self.experts = tuple(
            _setting(config, self.description.experts, layer) or 0 for layer in range(self.num_layers)
        )
        self._starts, total = {}, 0
        for kind in KINDS:
            self._starts[kind] = total + np.cumsum((0, *self.counts[kind]))
            total += sum(self.counts[kind])
        self.num_routes = total
        parents = "|".join(map(re.escape, (*WRAPPERS, *self.description.parents)))
        self._layer = re.compile(rf"(?:(?:{parents})\.)*{re.escape(self.description.layers)}\.(\d+)\.(.+)")

    def place(self, name: str) -> tuple[int, str] | None:
        """
        Layer of a tensor and its name within the layer, which are the same in the model and in its files.

        Args:
            name (`str`):
                Name of a parameter, in the model or in its files.

        Returns:
            `tuple[int, str]` or `None`: `None` if the tensor is not one of a layer.
        """
        match = self._layer.fullmatch(name)
        return None if match is None else (int(match[1]), match[2])

    def cut(self, name: str) -> Cut | None:
        """
        How routes share a tensor.

        Args:
            name (`str`):
                Name of a parameter, in the model or in its files.

        Returns:
            [`Cut`] or `None`: `None` if the tensor lies outside routes.

        Raises:
            `ValueError`: If the configuration has no such layer or expert.
        """
        place = self.place(name)
        if place is None:
            return None
        layer, tensor = place
        if layer >= self.num_layers:
            raise ValueError(f"tensor {name}: expected a layer below {self.num_layers}, found {layer}")
        expert = _NUMBER.search(tensor)
        slices = self.description.tensors.get(_NUMBER.sub("*", tensor))
        if slices is None:
            return None
        experts, parts = self.experts[layer], []
        if (expert is not None and int(expert[0]) >= experts) or (slices.experts_axis is not None and not experts):
            raise ValueError(f"tensor {name}: expected an expert of {experts} in layer {layer}")
        for kind in slices.kinds:
            routes = np.arange(*self._starts[kind][layer : layer + 2])
            if expert is not None or slices.experts_axis is not None:
                routes = routes.reshape(experts, -1)
            parts.append(routes if expert is None else routes[int(expert[0])])
        owners = np.concatenate(parts, axis=-1)
        if slices.interleaved:
            if len({part.shape for part in parts}) > 1:
                raise ValueError(
                    f"tensor {name}: expected as many routes of each kind, since they take turns, found "
                    f"{[f'{part.size} {kind}' for kind, part in zip(slices.kinds, parts, strict=True)]}"
                )
            owners = np.stack(parts, axis=-1).reshape(owners.shape)
        axes = (slices.axis,) if slices.experts_axis is None else (slices.experts_axis, slices.axis)
        return Cut(axes, owners, slices.writes)

    def sum_by_route(self, tensors: dict[str, torch.Tensor]) -> tuple[np.ndarray, float]:
        """
        Sum the elements of tensors over the slices of each route.

        Args:
            tensors (`dict[str, torch.Tensor]`):
                Tensors with the names and shapes of the parameters.

        Returns:
            `tuple`: Sums of shape `(num_routes,)` in float64, and the sum of all elements outside routes.
        """
        sums, outside = np.zeros(self.num_routes), 0.0
        for name, tensor in tensors.items():
            cut = self.cut(name)
            if cut is None:
                outside += tensor.sum(dtype=torch.float64).item()
            else:
                blocks = cut.blocks(name, tensor).sum(dim=1, dtype=torch.float64)
                np.add.at(sums, cut.owners.ravel(), blocks.cpu().numpy())
        return sums, outside

    def spread(self, name: str, values: np.ndarray, tensor: torch.Tensor) -> torch.Tensor | None:
        """
        Give each element of a tensor the value of its route.

        Args:
            name (`str`):
                Name of the parameter.
            values (`numpy.ndarray` of shape `(num_routes,)`):
                One value per route.
            tensor (`torch.Tensor`):
                The parameter; it supplies shape, dtype and device.

        Returns:
            `torch.Tensor` or `None`: A tensor that broadcasts to the shape of the parameter; `None` outside routes.
        """
        cut = self.cut(name)
        if cut is None:
            return None
        blocks = torch.as_tensor(values[cut.owners], dtype=tensor.dtype, device=tensor.device)
        for axis, size in enumerate(cut.block_sizes(name, tensor)):
            blocks = blocks.repeat_interleave(size, dim=axis)
        return blocks.reshape([tensor.shape[axis] if axis in cut.axes else 1 for axis in range(tensor.ndim)])

    def scope(self, name: str) -> np.ndarray:
        """
        Routes of a scope.

        Args:
            name (`str`):
                `"mlp"`, `"attention"` or `"joint"`.

        Returns:
            `numpy.ndarray` of shape `(num_routes,)`: Whether each route belongs to it.
        """
        if name not in SCOPES:
            raise ValueError(f"scope: expected one of {sorted(SCOPES)}, found {name!r}")
        mask = np.zeros(self.num_routes, dtype=bool)
        for kind in SCOPES[name]:
            mask[self.of_kind(kind)] = True
        return mask

    def of_kind(self, kind: str) -> slice:
        """Routes of a kind: `"mlp"`, `"query"` or `"key_value"`."""
        return slice(int(self._starts[kind][0]), int(self._starts[kind][-1]))

    def of_layer(self, kind: str, layer: int) -> np.ndarray:
        """
        Routes of a kind in one layer.

        Args:
            kind (`str`):
                `"mlp"`, `"query"` or `"key_value"`.
            layer (`int`):
                Index of the layer.

        Returns:
            `numpy.ndarray` of shape `(num_routes,)`: Whether each route belongs to them.
        """
        mask = np.zeros(self.num_routes, dtype=bool)
        mask[slice(*self._starts[kind][layer : layer + 2])] = True
        return mask

    def locate(self, route: int) -> tuple[str, int, int]:
        """
        Where a route lies.

        Args:
            route (`int`):
                Index of the route.

        Returns:
            `tuple[str, int, int]`: Kind, layer, and position in the layer. In a layer of experts the channels of the
            first expert come first, then those of the second, and so on.
        """
        kind = next(kind for kind in KINDS if route < self._starts[kind][-1])
        layer = int(np.searchsorted(self._starts[kind], route, side="right")) - 1
        return kind, layer, int(route - self._starts[kind][layer])


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _setting(config: PretrainedConfig, setting: Count | None, layer: int) -> int | None:
    if setting is None or callable(setting):
        return setting and setting(config, layer)
    return getattr(config, setting, None)


def _count(config: PretrainedConfig, description: Architecture, kind: str, layer: int) -> int:
    count = _setting(config, description.counts.get(kind), layer)
    if count is None and kind == "key_value":
        return _count(config, description, "query", layer)
    if count is None:
        raise ValueError(
            f"counts[{kind!r}]: expected a setting of the configuration of {config.model_type!r} or a function, "
            f"found {description.counts.get(kind)!r}"
        )
    return int(count)


# Where a layer's tensors stand in its name, whatever the architecture; and what is not the language model.
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.(\w+)")
_TOWER = re.compile(r"(?:^|\.)((?:vision|audio)_(?:tower|model)|visual)\.")
_PARENTS = re.compile(rf"^(?:(?:{'|'.join(WRAPPERS)}|model|language_model|transformer)\.)+")
_MODULES = {
    "self_attn": "attention",
    "attn": "attention",
    "attention": "attention",
    "crossattention": "attention",
    "mlp": "mlp",
}


def module_of(name: str) -> str:
    """
    Module that a parameter is counted with: attention, MLP or norms of a layer, or what lies outside layers.

    Args:
        name (`str`):
            Name of a parameter, e.g. `"model.layers.3.self_attn.q_proj.weight"` or `"transformer.h.3.ln_1.bias"`.

    Returns:
        `str`: E.g. `"layers.3.attention"`, `"layers.3.mlp"`, `"layers.3.norm"`, `"embed_tokens"`, `"vision_tower"`.
    """
    tower, layer = _TOWER.search(name), _LAYER.search(name)
    if tower is not None:
        return tower[1]
    if layer is None:
        return _PARENTS.sub("", name).removesuffix(".weight").removesuffix(".bias")
    return f"layers.{layer[1]}.{_MODULES.get(layer[2], 'norm')}"
