"""Architectures: which tensors of a layer the routes share, and how."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from transformers import PretrainedConfig

from .layer_counts import (
    deepseek_experts,
    deepseek_shared,
    gemma_channels,
    gemma_experts,
    gemma_keys,
    gemma_width,
    if_layer,
    jamba_experts,
    lfm2_width,
    linear_blocks,
    local_experts,
    qwen_experts,
)


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


def _experts(parent: str, *files: tuple[str, str, str]) -> dict[str, Slices]:
    """One tensor that holds all experts in the model; in its files each expert may have its own."""
    tensors = {
        f"{parent}.gate_up_proj": Slices(1, ("mlp", "mlp"), experts_axis=0),
        f"{parent}.down_proj": Slices(2, ("mlp",), experts_axis=0, writes=True),
    }
    for gate, up, down in files:
        tensors |= {f"{name}.weight": Slices(0, ("mlp",)) for name in (gate, up)}
        tensors[f"{down}.weight"] = Slices(1, ("mlp",), writes=True)
    return tensors


def _split_experts(parent: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> tuple:
    return tuple(f"{parent}.*.{name}" for name in names)


def _fused(name: str, out: str, axis: int = 0, interleaved: bool = False) -> dict[str, Slices]:
    """Query, key and value in one tensor, and the output projection."""
    kinds = ("query", "key_value", "key_value")
    return {
        f"{name}.weight": Slices(axis, kinds, interleaved=interleaved),
        f"{name}.bias": Slices(0, kinds, interleaved=interleaved),
        f"{out}.weight": Slices(1 - axis, ("query",), writes=True),
    }


def _moe(
    tensors: dict[str, Slices],
    experts: Callable[[PretrainedConfig, int], int],
    width: str = "moe_intermediate_size",
    dense: str = "intermediate_size",
    shared: Callable[[PretrainedConfig], int] = lambda config: 0,
    counts: dict[str, Count] | None = None,
) -> Architecture:
    """Layers of experts, with or without shared ones, and layers with one dense MLP in the place of experts."""
    return Architecture(
        tensors,
        counts={
            **(LLAMA.counts if counts is None else counts),
            "mlp": lambda config, layer: (
                experts(config, layer) * getattr(config, width) if experts(config, layer) else getattr(config, dense)
            ),
        },
        experts=experts,
        shared=lambda config, layer: shared(config) if experts(config, layer) else 0,
    )


LLAMA = Architecture({**_attention(), **_mlp()})
MIXTRAL = _moe(
    {**_attention(), **_experts("mlp.experts", _split_experts("block_sparse_moe.experts", ("w1", "w3", "w2")))},
    local_experts,
    width="intermediate_size",
)
GRANITE_MOE = _moe(
    {
        **_attention(),
        **_experts("block_sparse_moe.experts"),
        "block_sparse_moe.input_linear.weight": Slices(1, ("mlp", "mlp"), experts_axis=0),
        "block_sparse_moe.output_linear.weight": Slices(2, ("mlp",), experts_axis=0, writes=True),
    },
    local_experts,
    width="intermediate_size",
)
_QWEN_MLP = {**_mlp(), **_experts("mlp.experts", _split_experts("mlp.experts"))}
QWEN3_MOE = _moe({**_attention(), **_QWEN_MLP}, qwen_experts)
# In these a head of linear attention is a query and a key head with the value heads that they serve.
_LINEAR_COUNTS: dict[str, Count] = {
    "query": if_layer("full_attention", "num_attention_heads"),
    "key_value": if_layer("full_attention", "num_key_value_heads"),
    "linear": if_layer("linear_attention", "linear_num_key_heads"),
}
_LINEAR = {
    **{f"linear_attn.{name}": Slices(0, ("linear",)) for name in ("A_log", "dt_bias")},
    "linear_attn.conv1d.weight": Slices(0, ("linear",), blocks=linear_blocks),
    "linear_attn.in_proj_qkvz.weight": Slices(0, ("linear",)),
    "linear_attn.in_proj_ba.weight": Slices(0, ("linear",)),
    "linear_attn.in_proj_qkv.weight": Slices(0, ("linear",), blocks=linear_blocks),
    **{f"linear_attn.in_proj_{name}.weight": Slices(0, ("linear",)) for name in "zba"},
    "linear_attn.out_proj.weight": Slices(1, ("linear",), writes=True),
}
QWEN3_5 = Architecture({**_attention(), **_mlp(), **_LINEAR}, {**LLAMA.counts, **_LINEAR_COUNTS})
QWEN3_NEXT = _moe(
    {**_attention(), **_LINEAR, **_QWEN_MLP, **_mlp("mlp.shared_expert.", kind="shared")},
    lambda config, layer: (
        qwen_experts(config, layer) if hasattr(config, "decoder_sparse_step") else config.num_experts
    ),
    dense="shared_expert_intermediate_size",
    shared=lambda config: config.shared_expert_intermediate_size,
    counts=_LINEAR_COUNTS,
)
GLM4_MOE = _moe(
    {**_attention(), **_QWEN_MLP, **_mlp("mlp.shared_experts.", kind="shared")},
    deepseek_experts,
    shared=deepseek_shared,
)
DEEPSEEK_V3 = _moe(
    {**_QWEN_MLP, **_mlp("mlp.shared_experts.", kind="shared")},
    deepseek_experts,
    shared=deepseek_shared,
    counts={"query": lambda config, layer: 0},  # latent attention lies outside routes
)
GPT_OSS = _moe(
    {
        **_attention(),
        "self_attn.sinks": Slices(0, ("query",)),
        "mlp.experts.gate_up_proj": Slices(2, ("mlp", "mlp"), interleaved=True, experts_axis=0),
        "mlp.experts.gate_up_proj_bias": Slices(1, ("mlp", "mlp"), interleaved=True, experts_axis=0),
        "mlp.experts.down_proj": Slices(1, ("mlp",), experts_axis=0, writes=True),
    },
    local_experts,
    width="intermediate_size",
)
LLAMA4 = _moe(
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
PHI3 = Architecture(
    {
        **_fused("self_attn.qkv_proj", "self_attn.o_proj"),
        "mlp.gate_up_proj.weight": Slices(0, ("mlp", "mlp")),
        "mlp.down_proj.weight": Slices(1, ("mlp",), writes=True),
    }
)
GLM = Architecture({**_attention(), **{name: PHI3.tensors[name] for name in PHI3.tensors if name[:3] == "mlp"}})
STARCODER2 = Architecture({**_attention(), **_mlp("mlp.", ("c_fc",), "c_proj")})
PHI = Architecture({**_attention(out="dense"), **_mlp("mlp.", ("fc1",), "fc2")})
GPT_NEOX = Architecture(
    {
        **_fused("attention.query_key_value", "attention.dense", interleaved=True),
        **_mlp("mlp.", ("dense_h_to_4h",), "dense_4h_to_h"),
    },
    counts={"mlp": "intermediate_size", "query": "num_attention_heads"},
    parents=("gpt_neox",),
)
_GPT = {"layers": "h", "parents": ("transformer",)}
# Conv1D stores a weight with inputs as rows.
GPT2 = Architecture(
    {
        **_fused("attn.c_attn", "attn.c_proj", axis=1),
        "mlp.c_fc.weight": Slices(1, ("mlp",)),
        "mlp.c_fc.bias": Slices(0, ("mlp",)),
        "mlp.c_proj.weight": Slices(0, ("mlp",), writes=True),
    },
    counts={"mlp": lambda config, layer: config.n_inner or 4 * config.n_embd, "query": "num_attention_heads"},
    **_GPT,
)
GPTJ = Architecture(
    {**_attention("attn", "out_proj"), **_mlp("mlp.", ("fc_in",), "fc_out")},
    counts=GPT2.counts,
    **_GPT,
)
OPT = Architecture(
    {**_attention(out="out_proj"), **_mlp("", ("fc1",), "fc2")},
    counts={"mlp": "ffn_dim", "query": "num_attention_heads"},
    parents=("model", "decoder"),
)
BLOOM = Architecture(
    {
        **_fused("self_attention.query_key_value", "self_attention.dense", interleaved=True),
        **_mlp("mlp.", ("dense_h_to_4h",), "dense_4h_to_h"),
    },
    counts={"mlp": lambda config, layer: 4 * config.hidden_size, "query": "n_head"},
    **_GPT,
)
MPT = Architecture(
    {
        **_fused("attn.Wqkv", "attn.out_proj"),
        **_mlp("ffn.", ("up_proj",), "down_proj"),
    },
    counts={"mlp": lambda config, layer: config.expansion_ratio * config.d_model, "query": "n_heads"},
    layers="blocks",
    parents=("transformer",),
)


LFM2 = Architecture(
    {**_attention(out="out_proj"), **_mlp("feed_forward.", ("w1", "w3"), "w2")},
    counts={**_LINEAR_COUNTS, "mlp": lfm2_width, "linear": lambda config, layer: 0},
)
FALCON_H1 = Architecture({**_attention(), **_mlp("feed_forward.")})
BAMBA = Architecture(FALCON_H1.tensors, {**LFM2.counts, "mlp": "intermediate_size"})
JAMBA = _moe(
    {**FALCON_H1.tensors, **_experts("feed_forward.experts", _split_experts("feed_forward.experts"))},
    jamba_experts,
    width="intermediate_size",
    counts=LFM2.counts,
)


# The dense MLP stands beside the experts, where a Gemma 4 has any, as a shared one does.
GEMMA4 = Architecture(
    {**_attention(), **_mlp(kind="shared"), **_experts("experts", _split_experts("experts"))},
    counts={"mlp": gemma_channels, "query": "num_attention_heads", "key_value": gemma_keys},
    experts=gemma_experts,
    shared=gemma_width,
)
# By model type. A model with a nested language model has the type of that one.
_TYPES = (
    (
        LLAMA,
        "llama mistral ministral ministral3 qwen2 qwen3 smollm3 gemma gemma2 gemma3_text vaultgemma olmo olmo2 olmo3 "
        "granite cohere cohere2 exaone4 seed_oss helium ernie4_5 hunyuan_v1_dense stablelm nemotron arcee apertus "
        "qwen2_vl_text qwen2_5_vl_text qwen3_vl_text",
    ),
    (GLM, "glm glm4"),
    (PHI3, "phi3"),
    (PHI, "phi"),
    (STARCODER2, "starcoder2"),
    (GPT_NEOX, "gpt_neox"),
    (GPT2, "gpt2"),
    (GPTJ, "gptj"),
    (OPT, "opt"),
    (BLOOM, "bloom"),
    (MPT, "mpt"),
    (LFM2, "lfm2"),
    (FALCON_H1, "falcon_h1"),
    (BAMBA, "bamba"),
    (JAMBA, "jamba"),
    (GEMMA4, "gemma3n_text gemma4_text"),
    (MIXTRAL, "mixtral phimoe"),
    (GRANITE_MOE, "granitemoe"),
    (QWEN3_MOE, "qwen3_moe"),
    (QWEN3_5, "qwen3_5_text"),
    (QWEN3_NEXT, "qwen3_5_moe_text qwen3_next"),
    (GLM4_MOE, "glm4_moe"),
    (DEEPSEEK_V3, "deepseek_v3"),
    (GPT_OSS, "gpt_oss"),
    (LLAMA4, "llama4_text"),
)
ARCHITECTURES = {name: architecture for architecture, names in _TYPES for name in names.split()}
