"""Routes: the smallest units of computation, and the slices of the tensors that each of them owns."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PretrainedConfig

from .architectures import ARCHITECTURES, KINDS, Architecture, Count


SCOPES = {"mlp": ("mlp",), "attention": ("query", "key_value", "linear"), "joint": KINDS}
# Modules that any model may be wrapped in.
WRAPPERS = ("base_model", "module", "_orig_mod")
_PARENTS = re.compile(rf"^(?:(?:{'|'.join(WRAPPERS)}|model|language_model|transformer|gpt_neox|decoder)\.)+")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, eq=False)
class Cut:
    """
    How routes share a tensor: in blocks along one axis, or along an axis of experts and another. `owners` holds the
    route of each block, with one axis for each of `axes`.
    """

    axes: tuple[int, ...]
    owners: np.ndarray
    writes: bool

    def block_sizes(self, name: str, tensor: torch.Tensor) -> list[int]:
        """Length of a block along each of `axes`."""
        shape, counts = tuple(tensor.shape), dict(zip(self.axes, self.owners.shape, strict=True))
        for axis, count in counts.items():
            if axis >= len(shape) or shape[axis] == 0 or shape[axis] % count:
                raise ValueError(
                    f"tensor {name}: expected axis {axis} to hold {count} equal blocks, found shape {shape}"
                )
        return [shape[axis] // count for axis, count in counts.items()]


class RouteMap:
    """
    Which slices of which tensors a route owns.

    A route is an MLP intermediate channel (its row of gate and up, its column of down), also one of an expert, a query
    head (its rows of q, its columns of o), a key/value head (its rows of k and v) or a head of linear attention. Every
    element of a parameter belongs to one route or to none. Routes are numbered by kind, then by layer, then within the
    layer. Names of tensors may be those of the model in memory or those in its files.

    Args:
        config ([`~transformers.PretrainedConfig`]):
            Configuration of a causal language model.
        description ([`Architecture`], *optional*):
            Description of the architecture. Defaults to the one of `ARCHITECTURES` for the model type.

    Attributes:
        num_routes (`int`): Number of routes.
        num_layers (`int`): Number of layers.
        counts (`dict[str, tuple[int, ...]]`): Number of routes of each kind in each layer.
        experts (`tuple[int, ...]`): Number of experts in each layer, 0 in one without.

    Raises:
        `ValueError`: If the architecture is unknown, or its description does not fit the configuration.
    """

    def __init__(self, config: PretrainedConfig, description: Architecture | None = None):
        text = config.get_text_config()
        known = ARCHITECTURES.get(config.model_type, ARCHITECTURES.get(text.model_type))
        if description is None and known is None:
            raise ValueError(
                f"no route map for model type {config.model_type!r}, expected one of {sorted(ARCHITECTURES)}; "
                "describe it with `RouteMap(config, description=Architecture(...))`, see docs/science/interference.md"
            )
        self.config, self.described, self.description = text, description is not None, description or known
        self.num_layers = text.num_hidden_layers
        layers = range(self.num_layers)
        self.experts = tuple(_setting(text, self.description.experts, layer) or 0 for layer in layers)
        self.shared = tuple(_setting(text, self.description.shared, layer) or 0 for layer in layers)
        self.counts, self._starts, self.num_routes = {}, {}, 0
        for kind in KINDS:
            counts = [0] * self.num_layers
            if kind != "linear" or kind in self.description.counts:
                more = self.shared if kind == "mlp" else counts
                counts = [_count(text, self.description, kind, layer) + more[layer] for layer in layers]
                self.counts[kind] = tuple(counts)
            self._starts[kind] = self.num_routes + np.cumsum((0, *counts))
            self.num_routes += sum(counts)
        parents = "|".join(map(re.escape, (*WRAPPERS, *self.description.parents)))
        self._layer = re.compile(rf"(?:(?:{parents})\.)*{re.escape(self.description.layers)}\.(\d+)\.(.+)")

    def place(self, name: str) -> tuple[int, str] | None:
        """Layer of a tensor and its name within the layer, or `None` if it is not one of a layer."""
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
            routes = self._routes(kind, layer)
            if slices.blocks is not None and routes.size:
                routes = routes[slices.blocks(self.config)]
            if expert is not None or slices.experts_axis is not None:
                routes = routes.reshape(experts, -1)
            parts.append(routes if expert is None else routes[int(expert[0])])
        owners = np.concatenate(parts, axis=-1)
        if not owners.size:
            return None
        if slices.interleaved:
            if len({part.shape for part in parts}) > 1:
                raise ValueError(
                    f"tensor {name}: expected as many routes of each kind, since they take turns, found "
                    f"{[f'{part.size} {kind}' for kind, part in zip(slices.kinds, parts, strict=True)]}"
                )
            owners = np.stack(parts, axis=-1).reshape(owners.shape)
        axes = (slices.axis,) if slices.experts_axis is None else (slices.experts_axis, slices.axis)
        return Cut(axes, owners, slices.writes)

    def check(self, names: Iterable[str], where: str, on_disk: Iterable[str] = ()) -> None:
        """
        Refuse a description that does not cover the tensors of a model and of its files: each route needs one to read
        with and one to write with, a bias of one that routes read with is described as well, and every name of a
        description that was passed in has to be found.
        """
        found = self._check_covers(names, where)
        if on_disk:
            found |= self._check_covers(on_disk, f"{where} on disk")
        for name in self.description.tensors if self.described else ():
            if name not in found and (on_disk or "*" not in name) and not name.endswith(".bias"):
                raise ValueError(f"{where}: expected the tensor {name} of the description in a layer, found none")

    def _check_covers(self, names: Iterable[str], where: str) -> set[str]:
        """Names of the description that occur."""
        found, tensors = set(), self.description.tensors
        touched = {part: np.zeros(self.num_routes, dtype=bool) for part in ("read", "write")}
        touched["write"][self.of_kind("key_value")] = True
        for name in names:
            place, cut = self.place(name), self.cut(name)
            weight = place and tensors.get(f"{place[1].removesuffix('.bias')}.weight")
            if cut is not None:
                found.add(_NUMBER.sub("*", place[1]))
                touched["write" if cut.writes else "read"][cut.owners.ravel()] = True
            elif weight is not None and name.endswith(".bias") and not weight.writes:
                raise ValueError(f"{where}: tensor {name}: expected in the description, as its weight is, found none")
        for part, mask in touched.items():
            if not mask.all():
                kind, layer, _ = self.locate(int(mask.argmin()))
                described = sorted(name for name, slices in tensors.items() if slices.writes == (part == "write"))
                raise ValueError(
                    f"{where}: expected tensors through which the {kind} routes of layer {layer} {part}, among "
                    f"{described}, found none"
                )
        return found

    def modules(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """
        Module that each tensor is counted with: the first part of its name, or in a layer `"layers.3.attention"`,
        `"layers.3.linear_attention"` or `"layers.3.mlp"` by the routes of the tensors of the same parent, and without
        any `"layers.3.norm"`, if all these tensors are vectors, or `"layers.3.other"`.
        """
        labels = {"linear": "linear_attention", "mlp": "mlp", "shared": "mlp"}
        owner = {
            name.split(".")[0]: labels.get(slices.kinds[0], "attention")
            for name, slices in self.description.tensors.items()
        }
        modules, matrices = {}, set()
        for name, shape in shapes.items():
            place = self.place(name)
            layer, path = (None, _PARENTS.sub("", name)) if place is None else place
            modules[name] = layer, path.split(".")[0]
            if "." not in path or len(shape) > 1:
                matrices.add(modules[name])
        for name, (layer, part) in modules.items():
            label = owner.get(part) or ("other" if (layer, part) in matrices else "norm")
            modules[name] = part if layer is None else f"layers.{layer}.{label}"
        return modules

    def outside(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
        """Share of all elements that no route owns, by the part of a layer or of the model, the largest first."""
        sizes, parts = {name: math.prod(shape) for name, shape in shapes.items()}, Counter()
        for name, size in sizes.items():
            if self.cut(name) is None:
                place = self.place(name)
                parts[(_PARENTS.sub("", name) if place is None else place[1]).split(".")[0]] += size
        return {part: size / sum(sizes.values()) for part, size in parts.most_common()}

    def sum_by_route(self, tensors: Mapping[str, torch.Tensor]) -> tuple[np.ndarray, float]:
        """
        Sum the elements of tensors over the slices of each route.

        Args:
            tensors (`Mapping[str, torch.Tensor]`):
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
                cut.block_sizes(name, tensor)
                blocks = tensor.movedim(cut.axes, tuple(range(len(cut.axes)))).reshape(cut.owners.size, -1)
                blocks = blocks.sum(dim=1, dtype=torch.float64)
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
        """Mask of the routes of a scope: `"mlp"`, `"attention"` or `"joint"`."""
        if name not in SCOPES:
            raise ValueError(f"scope: expected one of {sorted(SCOPES)}, found {name!r}")
        mask = np.zeros(self.num_routes, dtype=bool)
        for kind in SCOPES[name]:
            mask[self.of_kind(kind)] = True
        return mask

    def of_kind(self, kind: str) -> slice:
        """Routes of a kind: `"mlp"`, `"query"`, `"key_value"` or `"linear"`."""
        return slice(int(self._starts[kind][0]), int(self._starts[kind][-1]))

    def of_layer(self, kind: str, layer: int) -> np.ndarray:
        """Mask of the routes of a kind in one layer."""
        mask = np.zeros(self.num_routes, dtype=bool)
        mask[slice(*self._starts[kind][layer : layer + 2])] = True
        return mask

    def locate(self, route: int) -> tuple[str, int, int]:
        """Kind, layer and position of a route in its layer, where the channels of an expert stand together."""
        kind = next(kind for kind in KINDS if route < self._starts[kind][-1])
        layer = int(np.searchsorted(self._starts[kind], route, side="right")) - 1
        return kind, layer, int(route - self._starts[kind][layer])

    def _routes(self, kind: str, layer: int) -> np.ndarray:
        start, stop = self._starts["mlp" if kind == "shared" else kind][layer : layer + 2]
        if kind == "shared":
            return np.arange(stop - self.shared[layer], stop)
        return np.arange(start, stop - self.shared[layer] if kind == "mlp" else stop)


def _setting(config: PretrainedConfig, setting: Count | None, layer: int) -> int | None:
    return setting(config, layer) if callable(setting) else getattr(config, setting or "", None)


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
