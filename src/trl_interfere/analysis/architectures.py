"""Architectures: which tensors of a layer the routes share, and how."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from . import layer_counts
from .layer_counts import if_layer


KINDS = ("mlp", "query", "key_value", "linear")
Count = str | Callable[[PretrainedConfig, int], int]


@dataclass(frozen=True)
class Slices:
    """
    How the routes of a layer share a tensor: along one axis, in equal blocks, one block per route.

    Args:
        axis (`int`):
            Axis of the tensor that is cut into blocks.
        kinds (`tuple[str, ...]`):
            Kinds of routes whose blocks lie on the axis, in their order: `"mlp"`, `"query"`, `"key_value"`,
            `"linear"`, or `"shared"` for the MLP routes of shared experts. A fused tensor has several, such as
            `("query", "key_value", "key_value")` for query, key and value in one, or `("mlp", "mlp")` for gate and up
            in one.
        interleaved (`bool`, *optional*, defaults to `False`):
            Whether the kinds take turns: the first block of each, then the second block of each, and so on.
        experts_axis (`int`, *optional*):
            Axis that counts experts, if one tensor holds them all. It lies before `axis`.
        writes (`bool`, *optional*, defaults to `False`):
            Whether the routes write to the residual stream through the tensor: down and output projections.
        blocks (`Callable`, *optional*):
            Function of the configuration that gives, for each block on the axis, the position of its route among
            those of the kind, where that is not simply 0, 1, 2, ...

    Raises:
        `ValueError`: If a kind is unknown, or the axis of experts does not lie first.
    """

    axis: int
    kinds: tuple[str, ...]
    interleaved: bool = False
    experts_axis: int | None = None
    writes: bool = False
    blocks: Callable[[PretrainedConfig], np.ndarray] | None = None

    def __post_init__(self):
        if isinstance(self.kinds, str) or not self.kinds or not set(self.kinds) <= {*KINDS, "shared"}:
            raise ValueError(f"kinds: expected a tuple of some of {(*KINDS, 'shared')}, found {self.kinds!r}")
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
            query heads. MLP routes are counted without those of shared experts.
        experts (`str | Callable`, *optional*):
            Number of experts in a layer, likewise, and 0 in a layer that has none. The MLP routes of a layer with
            experts are the channels of the first expert, then those of the second, and so on.
        shared (`str | Callable`, *optional*):
            Number of channels of the shared experts of a layer, which follow those of the experts.
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
    shared: Count | None = None
    layers: str = "layers"
    parents: tuple[str, ...] = ("model", "language_model")


# By model type. A model with a nested language model has the type of that one.
ARCHITECTURES: dict[str, Architecture] = {}


def _add(types: str, *args: Any, **kwargs: Any) -> Architecture:
    described = Architecture(*args, **kwargs)
    ARCHITECTURES.update(dict.fromkeys(types.split(), described))
    return described


def _rows(kind: str, *names: str) -> dict[str, Slices]:
    """Weights and biases that a kind of route reads with: a row each."""
    return {f"{name}.{part}": Slices(0, (kind,)) for name in names for part in ("weight", "bias")}


def _attention(parent: str = "self_attn", out: str = "o_proj") -> dict[str, Slices]:
    return {
        **_rows("query", f"{parent}.q_proj"),
        **_rows("key_value", f"{parent}.k_proj", f"{parent}.v_proj"),
        f"{parent}.{out}.weight": Slices(1, ("query",), writes=True),
    }


def _mlp(
    parent: str = "mlp.", read: tuple[str, ...] = ("gate_proj", "up_proj"), write: str = "down_proj", kind: str = "mlp"
) -> dict[str, Slices]:
    names = (f"{parent}{name}" for name in read)
    return {**_rows(kind, *names), f"{parent}{write}.weight": Slices(1, (kind,), writes=True)}


def _experts(parent: str, files: str | None = None, **names: Any) -> dict[str, Slices]:
    """One tensor that holds all experts in the model; in its files each expert may have its own."""
    return {
        f"{parent}.gate_up_proj": Slices(1, ("mlp", "mlp"), experts_axis=0),
        f"{parent}.down_proj": Slices(2, ("mlp",), experts_axis=0, writes=True),
        **_mlp(f"{files or parent}.*.", **names),
    }


def _fused(name: str, out: str, axis: int = 0, interleaved: bool = False) -> dict[str, Slices]:
    """Query, key and value in one tensor, and the output projection."""
    kinds = ("query", "key_value", "key_value")
    return {
        f"{name}.weight": Slices(axis, kinds, interleaved=interleaved),
        f"{name}.bias": Slices(0, kinds, interleaved=interleaved),
        f"{out}.weight": Slices(1 - axis, ("query",), writes=True),
    }


def _moe(
    types: str,
    tensors: dict[str, Slices],
    experts: Callable[[PretrainedConfig, int], int],
    width: str = "moe_intermediate_size",
    dense: str = "intermediate_size",
    shared: Callable[[PretrainedConfig], int] = lambda config: 0,
    counts: dict[str, Count] | None = None,
) -> Architecture:
    """Layers of experts, with or without shared ones, and layers with one dense MLP in the place of experts."""
    return _add(
        types,
        tensors,
        counts={
            **(LLAMA.counts if counts is None else counts),
            "mlp": lambda config, layer: experts(config, layer) * getattr(config, width) or getattr(config, dense),
        },
        experts=experts,
        shared=lambda config, layer: shared(config) if experts(config, layer) else 0,
    )


LLAMA = _add(
    "llama mistral ministral ministral3 qwen2 qwen3 smollm3 gemma gemma2 gemma3_text vaultgemma olmo olmo2 olmo3 "
    "granite cohere cohere2 exaone4 seed_oss helium ernie4_5 hunyuan_v1_dense stablelm nemotron arcee apertus "
    "qwen2_vl_text qwen2_5_vl_text qwen3_vl_text",
    {**_attention(), **_mlp()},
)
_FUSED_MLP = {
    "mlp.gate_up_proj.weight": Slices(0, ("mlp", "mlp")),
    "mlp.down_proj.weight": Slices(1, ("mlp",), writes=True),
}
_add("glm glm4", {**_attention(), **_FUSED_MLP})
_add("phi3", {**_fused("self_attn.qkv_proj", "self_attn.o_proj"), **_FUSED_MLP})
_add("phi", {**_attention(out="dense"), **_mlp(read=("fc1",), write="fc2")})
_add("starcoder2", {**_attention(), **_mlp(read=("c_fc",), write="c_proj")})
_add(
    "opt",
    {**_attention(out="out_proj"), **_mlp("", ("fc1",), "fc2")},
    counts={"mlp": "ffn_dim", "query": "num_attention_heads"},
    parents=("model", "decoder"),
)
_NEOX_MLP = _mlp(read=("dense_h_to_4h",), write="dense_4h_to_h")
_add(
    "gpt_neox",
    {**_fused("attention.query_key_value", "attention.dense", interleaved=True), **_NEOX_MLP},
    counts={"mlp": "intermediate_size", "query": "num_attention_heads"},
    parents=("gpt_neox",),
)
_GPT = {"layers": "h", "parents": ("transformer",)}
_add(
    "bloom",
    {**_fused("self_attention.query_key_value", "self_attention.dense", interleaved=True), **_NEOX_MLP},
    counts={"mlp": lambda config, layer: 4 * config.hidden_size, "query": "n_head"},
    **_GPT,
)
_GPT_COUNTS: dict[str, Count] = {
    "mlp": lambda config, layer: config.n_inner or 4 * config.n_embd,
    "query": "num_attention_heads",
}
_add("gptj", {**_attention("attn", "out_proj"), **_mlp(read=("fc_in",), write="fc_out")}, _GPT_COUNTS, **_GPT)
_add(
    "gpt2",
    {  # Conv1D stores a weight with inputs as rows.
        **_fused("attn.c_attn", "attn.c_proj", axis=1),
        "mlp.c_fc.weight": Slices(1, ("mlp",)),
        "mlp.c_fc.bias": Slices(0, ("mlp",)),
        "mlp.c_proj.weight": Slices(0, ("mlp",), writes=True),
    },
    _GPT_COUNTS,
    **_GPT,
)
_add(
    "mpt",
    {**_fused("attn.Wqkv", "attn.out_proj"), **_mlp("ffn.", ("up_proj",), "down_proj")},
    counts={"mlp": lambda config, layer: config.expansion_ratio * config.d_model, "query": "n_heads"},
    layers="blocks",
    parents=("transformer",),
)

# A head of linear attention is a query and a key head with the value heads that they serve.
_BY_LAYER: dict[str, Count] = {
    "mlp": "intermediate_size",
    "query": if_layer("full_attention", "num_attention_heads"),
    "key_value": if_layer("full_attention", "num_key_value_heads"),
    "linear": if_layer("linear_attention", "linear_num_key_heads"),
}
_HYBRID: dict[str, Count] = {**_BY_LAYER, "linear": lambda config, layer: 0}  # Mamba and convolutions are no routes
_FEED_FORWARD = {**_attention(), **_mlp("feed_forward.")}
_add("falcon_h1", _FEED_FORWARD)
_add("bamba", _FEED_FORWARD, _HYBRID)
_add(
    "lfm2",
    {**_attention(out="out_proj"), **_mlp("feed_forward.", ("w1", "w3"), "w2")},
    {**_HYBRID, "mlp": layer_counts.lfm2_width},
)
_moe(
    "jamba",
    {**_FEED_FORWARD, **_experts("feed_forward.experts")},
    layer_counts.jamba_experts,
    width="intermediate_size",
    counts=_HYBRID,
)
_LINEAR = {
    **{f"linear_attn.{name}": Slices(0, ("linear",)) for name in ("A_log", "dt_bias")},
    **{f"linear_attn.in_proj_{name}.weight": Slices(0, ("linear",)) for name in ("z", "b", "a", "qkvz", "ba")},
    "linear_attn.in_proj_qkv.weight": Slices(0, ("linear",), blocks=layer_counts.linear_blocks),
    "linear_attn.conv1d.weight": Slices(0, ("linear",), blocks=layer_counts.linear_blocks),
    "linear_attn.out_proj.weight": Slices(1, ("linear",), writes=True),
}
_add("qwen3_5_text", {**_attention(), **_mlp(), **_LINEAR}, _BY_LAYER)

_QWEN_MLP = {**_mlp(), **_experts("mlp.experts")}
_SHARED_MLP = {**_QWEN_MLP, **_mlp("mlp.shared_experts.", kind="shared")}
_moe("qwen3_moe", {**_attention(), **_QWEN_MLP}, layer_counts.qwen_experts)
_moe(
    "qwen3_5_moe_text qwen3_next",
    {**_attention(), **_LINEAR, **_QWEN_MLP, **_mlp("mlp.shared_expert.", kind="shared")},
    layer_counts.qwen_experts,
    shared=lambda config: config.shared_expert_intermediate_size,
    counts=_BY_LAYER,
)
_DEEPSEEK = {"experts": layer_counts.deepseek_experts, "shared": layer_counts.deepseek_shared}
_moe("glm4_moe", {**_attention(), **_SHARED_MLP}, **_DEEPSEEK)
# Latent attention lies outside routes.
_moe("deepseek_v3", _SHARED_MLP, **_DEEPSEEK, counts={"query": lambda config, layer: 0})
_moe(
    "mixtral phimoe",
    {**_attention(), **_experts("mlp.experts", "block_sparse_moe.experts", read=("w1", "w3"), write="w2")},
    layer_counts.local_experts,
    width="intermediate_size",
)
_moe(
    "granitemoe",
    {
        **_attention(),
        **_experts("block_sparse_moe.experts"),
        "block_sparse_moe.input_linear.weight": Slices(1, ("mlp", "mlp"), experts_axis=0),
        "block_sparse_moe.output_linear.weight": Slices(2, ("mlp",), experts_axis=0, writes=True),
    },
    layer_counts.local_experts,
    width="intermediate_size",
)
_moe(
    "gpt_oss",
    {
        **_attention(),
        "self_attn.sinks": Slices(0, ("query",)),
        "mlp.experts.gate_up_proj": Slices(2, ("mlp", "mlp"), interleaved=True, experts_axis=0),
        "mlp.experts.gate_up_proj_bias": Slices(1, ("mlp", "mlp"), interleaved=True, experts_axis=0),
        "mlp.experts.down_proj": Slices(1, ("mlp",), experts_axis=0, writes=True),
    },
    layer_counts.local_experts,
    width="intermediate_size",
)
_moe(
    "llama4_text",
    {
        **_attention(),
        **_mlp("feed_forward."),
        **_mlp("feed_forward.shared_expert.", kind="shared"),
        "feed_forward.experts.gate_up_proj": Slices(2, ("mlp", "mlp"), experts_axis=0),
        "feed_forward.experts.down_proj": Slices(1, ("mlp",), experts_axis=0, writes=True),
    },
    lambda config, layer: config.num_local_experts if layer in config.moe_layers else 0,
    width="intermediate_size",
    dense="intermediate_size_mlp",
    shared=lambda config: config.intermediate_size,
)
# The dense MLP stands beside the experts, where a Gemma 4 has any, as a shared one does.
_add(
    "gemma3n_text gemma4_text",
    {**_attention(), **_mlp(kind="shared"), **_experts("experts")},
    counts={
        "mlp": layer_counts.gemma_channels,
        "query": "num_attention_heads",
        "key_value": layer_counts.gemma_keys,
    },
    experts=layer_counts.gemma_experts,
    shared=layer_counts.gemma_width,
)
