"""Architectures: which tensors of a layer the routes share, and how."""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PretrainedConfig


KINDS = ("mlp", "query", "key_value")
Count = str | Callable[[PretrainedConfig, int], int]


@dataclass(frozen=True)
class Slices:
    """
    How the routes of a layer share a tensor: along one axis, in equal blocks, one block per route.

    Args:
        axis (`int`):
            Axis of the tensor that is cut into blocks.
        kinds (`tuple[str, ...]`):
            Kinds of routes whose blocks lie on the axis, in their order: `"mlp"`, `"query"`, `"key_value"`. A fused
            tensor has several, such as `("query", "key_value", "key_value")` for query, key and value in one, or
            `("mlp", "mlp")` for gate and up in one.
        interleaved (`bool`, *optional*, defaults to `False`):
            Whether the kinds take turns: the first block of each, then the second block of each, and so on.
        experts_axis (`int`, *optional*):
            Axis that counts experts, if one tensor holds them all. It lies before `axis`.
        writes (`bool`, *optional*, defaults to `False`):
            Whether the routes write to the residual stream through the tensor: down and output projections.

    Raises:
        `ValueError`: If a kind is unknown, or the axis of experts does not lie first.
    """

    axis: int
    kinds: tuple[str, ...]
    interleaved: bool = False
    experts_axis: int | None = None
    writes: bool = False

    def __post_init__(self):
        if isinstance(self.kinds, str) or not self.kinds or not set(self.kinds) <= set(KINDS):
            raise ValueError(f"kinds: expected a tuple of some of {KINDS}, found {self.kinds!r}")
        if self.experts_axis is not None and self.experts_axis >= self.axis:
            raise ValueError(f"experts_axis: expected an axis before {self.axis}, found {self.experts_axis}")


@dataclass(frozen=True)
class Architecture:
    """
    Description of an architecture, from which [`RouteMap`] counts routes and finds their slices.

    Tensors that are not described lie outside routes: embeddings, the output layer, norms, routers, and biases that
    are added once for all routes.

    Example:

    ```python
    >>> from trl_interfere.analysis.architectures import Architecture, Slices

    >>> phi = Architecture(
    ...     tensors={
    ...         "self_attn.qkv_proj.weight": Slices(0, ("query", "key_value", "key_value")),
    ...         "self_attn.o_proj.weight": Slices(1, ("query",), writes=True),
    ...         "mlp.gate_up_proj.weight": Slices(0, ("mlp", "mlp")),
    ...         "mlp.down_proj.weight": Slices(1, ("mlp",), writes=True),
    ...     }
    ... )
    ```

    Args:
        tensors (`dict[str, Slices]`):
            Slices by the name of a tensor within a layer. `*` stands for the index of an expert.
        counts (`dict[str, str | Callable]`, *optional*):
            Number of routes of each kind in a layer: the name of a setting of the configuration, or a function of the
            configuration and the index of the layer. A number of key/value heads that is left out or `None` is that of
            query heads.
        experts (`str | Callable`, *optional*):
            Number of experts in a layer, likewise, and 0 in a layer that has none. The MLP routes of a layer with
            experts are the channels of the first expert, then those of the second, and so on.
        layers (`str`, *optional*, defaults to `"layers"`):
            Name of the list of layers.
        parents (`tuple[str, ...]`, *optional*, defaults to `("model", "language_model")`):
            Names of the modules that the list may lie in. Here a model and its files may differ.
    """

    tensors: dict[str, Slices]
    counts: dict[str, Count] = field(
        default_factory=lambda: {
            "mlp": "intermediate_size",
            "query": "num_attention_heads",
            "key_value": "num_key_value_heads",
        }
    )
    experts: Count | None = None
    layers: str = "layers"
    parents: tuple[str, ...] = ("model", "language_model")


ATTENTION = {
    "self_attn.q_proj.weight": Slices(0, ("query",)),
    "self_attn.q_proj.bias": Slices(0, ("query",)),
    "self_attn.k_proj.weight": Slices(0, ("key_value",)),
    "self_attn.k_proj.bias": Slices(0, ("key_value",)),
    "self_attn.v_proj.weight": Slices(0, ("key_value",)),
    "self_attn.v_proj.bias": Slices(0, ("key_value",)),
    "self_attn.o_proj.weight": Slices(1, ("query",), writes=True),
}
GATED_MLP = {
    "mlp.gate_proj.weight": Slices(0, ("mlp",)),
    "mlp.gate_proj.bias": Slices(0, ("mlp",)),
    "mlp.up_proj.weight": Slices(0, ("mlp",)),
    "mlp.up_proj.bias": Slices(0, ("mlp",)),
    "mlp.down_proj.weight": Slices(1, ("mlp",), writes=True),
}
EXPERTS = {
    # In the model one tensor holds all experts, in its files each expert has its own.
    "mlp.experts.gate_up_proj": Slices(1, ("mlp", "mlp"), experts_axis=0),
    "mlp.experts.down_proj": Slices(2, ("mlp",), experts_axis=0, writes=True),
    "mlp.experts.*.gate_proj.weight": Slices(0, ("mlp",)),
    "mlp.experts.*.up_proj.weight": Slices(0, ("mlp",)),
    "mlp.experts.*.down_proj.weight": Slices(1, ("mlp",), writes=True),
}


def _experts(config: PretrainedConfig, layer: int) -> int:
    sparse = layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
    return config.num_experts if sparse else 0


LLAMA = Architecture({**ATTENTION, **GATED_MLP})
QWEN3_MOE = Architecture(
    {**ATTENTION, **GATED_MLP, **EXPERTS},
    counts={
        **LLAMA.counts,
        "mlp": lambda config, layer: (
            _experts(config, layer) * config.moe_intermediate_size or config.intermediate_size
        ),
    },
    experts=_experts,
)
PHI3 = Architecture(
    {
        "self_attn.qkv_proj.weight": Slices(0, ("query", "key_value", "key_value")),
        "self_attn.o_proj.weight": Slices(1, ("query",), writes=True),
        "mlp.gate_up_proj.weight": Slices(0, ("mlp", "mlp")),
        "mlp.down_proj.weight": Slices(1, ("mlp",), writes=True),
    }
)
# Conv1D stores a weight with inputs as rows.
GPT2 = Architecture(
    {
        "attn.c_attn.weight": Slices(1, ("query", "key_value", "key_value")),
        "attn.c_attn.bias": Slices(0, ("query", "key_value", "key_value")),
        "attn.c_proj.weight": Slices(0, ("query",), writes=True),
        "mlp.c_fc.weight": Slices(1, ("mlp",)),
        "mlp.c_fc.bias": Slices(0, ("mlp",)),
        "mlp.c_proj.weight": Slices(0, ("mlp",), writes=True),
    },
    counts={"mlp": lambda config, layer: config.n_inner or 4 * config.n_embd, "query": "num_attention_heads"},
    layers="h",
    parents=("transformer",),
)
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "qwen3_moe": QWEN3_MOE,
    "gemma2": LLAMA,
    "gemma3": LLAMA,
    "gemma3_text": LLAMA,
    "smollm3": LLAMA,
    "phi3": PHI3,
    "gpt2": GPT2,
}
