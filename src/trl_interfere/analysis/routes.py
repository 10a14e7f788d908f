"""Routes: the smallest units of computation, and the slices of the tensors that each of them owns."""

import re
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PretrainedConfig


# For each kind of route, the tensors of a layer that it owns slices of, and the axis along which they are cut.
# An axis is cut into as many equal blocks as there are routes of the kind in the layer.
LLAMA_LIKE = {
    "mlp.gate_proj.weight": ("mlp", 0),
    "mlp.up_proj.weight": ("mlp", 0),
    "mlp.gate_proj.bias": ("mlp", 0),
    "mlp.up_proj.bias": ("mlp", 0),
    "mlp.down_proj.weight": ("mlp", 1),
    "self_attn.q_proj.weight": ("query", 0),
    "self_attn.q_proj.bias": ("query", 0),
    "self_attn.o_proj.weight": ("query", 1),
    "self_attn.k_proj.weight": ("key_value", 0),
    "self_attn.k_proj.bias": ("key_value", 0),
    "self_attn.v_proj.weight": ("key_value", 0),
    "self_attn.v_proj.bias": ("key_value", 0),
}
ARCHITECTURES = {"llama": LLAMA_LIKE, "mistral": LLAMA_LIKE, "qwen2": LLAMA_LIKE, "qwen3": LLAMA_LIKE}
KINDS = ("mlp", "query", "key_value")
SCOPES = {"mlp": ("mlp",), "attention": ("query", "key_value"), "joint": KINDS}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Cut:
    """
    How the routes of one layer share a tensor.

    Args:
        start (`int`):
            Index of the first of these routes.
        count (`int`):
            Number of routes.
        axis (`int`):
            Axis of the tensor that is cut into `count` equal blocks.
    """

    start: int
    count: int
    axis: int

    @property
    def routes(self) -> slice:
        return slice(self.start, self.start + self.count)


class RouteMap:
    """
    Which slices of which tensors a route owns.

    A route is an MLP intermediate channel (its row of gate and up, its column of down), a query head (its rows of q,
    its columns of o) or a key/value head (its rows of k and v). Every element of a parameter belongs to exactly one
    route or to none; embeddings, norms and the output layer lie outside routes. Routes are numbered by kind, then by
    layer, then within the layer.

    Args:
        config ([`~transformers.PretrainedConfig`]):
            Configuration of a causal language model.

    Raises:
        `ValueError`: If the architecture is unknown.
    """

    def __init__(self, config: PretrainedConfig):
        if config.model_type not in ARCHITECTURES:
            raise ValueError(
                f"no route map for model type {config.model_type!r}, expected one of {sorted(ARCHITECTURES)}; "
                "a new one is described by the tensors of a layer, see `trl_interfere.analysis.routes.ARCHITECTURES`"
            )
        self.cuts = ARCHITECTURES[config.model_type]
        self.num_layers = config.num_hidden_layers
        heads = config.num_attention_heads
        self.counts = {
            "mlp": config.intermediate_size,
            "query": heads,
            "key_value": getattr(config, "num_key_value_heads", None) or heads,
        }
        self._starts, total = {}, 0
        for kind in KINDS:
            self._starts[kind] = total
            total += self.counts[kind] * self.num_layers
        self.num_routes = total

    def cut(self, name: str) -> Cut | None:
        """
        How routes share a tensor.

        Args:
            name (`str`):
                Name of a parameter.

        Returns:
            [`Cut`] or `None`: `None` if the tensor lies outside routes.
        """
        match = _LAYER.search(name)
        if match is None or match[2] not in self.cuts:
            return None
        kind, axis = self.cuts[match[2]]
        return Cut(self._starts[kind] + int(match[1]) * self.counts[kind], self.counts[kind], axis)

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
                blocks = tensor.movedim(cut.axis, 0).reshape(cut.count, -1)
                sums[cut.routes] += blocks.sum(dim=1, dtype=torch.float64).cpu().numpy()
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
        column = torch.as_tensor(values[cut.routes], dtype=tensor.dtype, device=tensor.device)
        column = column.repeat_interleave(tensor.shape[cut.axis] // cut.count)
        return column.reshape([-1 if axis == cut.axis else 1 for axis in range(tensor.ndim)])

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
        return slice(self._starts[kind], self._starts[kind] + self.counts[kind] * self.num_layers)

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
        start = self._starts[kind] + layer * self.counts[kind]
        mask[start : start + self.counts[kind]] = True
        return mask

    def locate(self, route: int) -> tuple[str, int, int]:
        """
        Where a route lies.

        Args:
            route (`int`):
                Index of the route.

        Returns:
            `tuple[str, int, int]`: Kind, layer, and position in the layer.
        """
        kind = max((kind for kind in KINDS if self._starts[kind] <= route), key=lambda kind: self._starts[kind])
        return kind, *divmod(route - self._starts[kind], self.counts[kind])


def module_of(name: str) -> str:
    """
    Module that a parameter is counted with: attention or MLP of a layer, or what lies outside layers.

    Args:
        name (`str`):
            Name of a parameter, e.g. `"model.layers.3.self_attn.q_proj.weight"`.

    Returns:
        `str`: E.g. `"layers.3.attention"`, `"layers.3.mlp"`, `"layers.3.norm"`, `"embed_tokens"`.
    """
    match = _LAYER.search(name)
    if match is None:
        return name.removeprefix("model.").removesuffix(".weight").removesuffix(".bias")
    part = match[2].split(".")[0]
    return f"layers.{match[1]}." + {"self_attn": "attention", "mlp": "mlp"}.get(part, "norm")
