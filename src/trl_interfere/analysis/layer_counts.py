"""What the settings of a configuration say of a layer: its experts, its heads, its widths."""

from collections.abc import Callable

import numpy as np
from transformers import PretrainedConfig


def if_layer(kind: str, count: str) -> Callable[[PretrainedConfig, int], int]:
    """A count in the layers of one type, and none in the others."""
    return lambda config, layer: getattr(config, count) if config.layer_types[layer] == kind else 0


def local_experts(config: PretrainedConfig, layer: int) -> int:
    return config.num_local_experts


def qwen_experts(config: PretrainedConfig, layer: int) -> int:
    dense = getattr(config, "mlp_only_layers", None) or []
    step = getattr(config, "decoder_sparse_step", None) or 1
    return config.num_experts if layer not in dense and (layer + 1) % step == 0 else 0


def deepseek_experts(config: PretrainedConfig, layer: int) -> int:
    return config.n_routed_experts if layer >= config.first_k_dense_replace else 0


def deepseek_shared(config: PretrainedConfig) -> int:
    return (config.n_shared_experts or 0) * config.moe_intermediate_size


def jamba_experts(config: PretrainedConfig, layer: int) -> int:
    experts = config.layers_num_experts[layer]
    return experts if experts > 1 else 0


def linear_blocks(config: PretrainedConfig) -> np.ndarray:
    """Heads of a gated delta rule in a tensor that holds all keys, all queries, then all values."""
    heads, step = config.linear_num_key_heads, np.gcd(config.linear_key_head_dim, config.linear_value_head_dim)
    width = config.linear_value_head_dim * (config.linear_num_value_heads // heads)
    sizes = (config.linear_key_head_dim, config.linear_key_head_dim, width)
    return np.concatenate([np.repeat(np.arange(heads), size // step) for size in sizes])


def lfm2_width(config: PretrainedConfig, layer: int) -> int:
    if not config.block_auto_adjust_ff_dim:
        return config.intermediate_size
    width = int((config.block_ffn_dim_multiplier or 1) * int(2 * config.intermediate_size / 3))
    return config.block_multiple_of * -(-width // config.block_multiple_of)


def gemma_keys(config: PretrainedConfig, layer: int) -> int:
    """Key/value heads of Gemma 3n and 4: the last layers may read those of earlier ones."""
    if layer >= config.num_hidden_layers - (config.num_kv_shared_layers or 0):
        return 0
    full = config.layer_types[layer] == "full_attention"
    if full and getattr(config, "attention_k_eq_v", False):
        return config.num_global_key_value_heads or config.num_key_value_heads
    return config.num_key_value_heads


def gemma_experts(config: PretrainedConfig, layer: int) -> int:
    return config.num_experts if getattr(config, "enable_moe_block", False) else 0


def gemma_channels(config: PretrainedConfig, layer: int) -> int:
    return gemma_experts(config, layer) * (getattr(config, "moe_intermediate_size", 0) or 0)


def gemma_width(config: PretrainedConfig, layer: int) -> int:
    if not isinstance(config.intermediate_size, int):
        return config.intermediate_size[layer]
    shared = layer >= config.num_hidden_layers - (config.num_kv_shared_layers or 0)
    return config.intermediate_size * (2 if shared and getattr(config, "use_double_wide_mlp", False) else 1)
