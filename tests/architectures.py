"""Settings that make tiny models of each type, and the vocabulary that they share."""

CHARACTERS = " 0123456789+=?abcdefgh"
VOCABULARY = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
# Of every tiny model, unless its own settings say otherwise.
TINY = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "pad_token_id": VOCABULARY["<pad>"],
    "bos_token_id": None,
    "eos_token_id": VOCABULARY["<eos>"],
}
_HEAD = {"head_dim": 6}
_OF_QWEN = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 5}
_EXPERTS = _OF_QWEN | {"num_local_experts": 3}
# Model type and settings: with and without biases, a head size of its own, tied and untied output layers.
FAMILIES = {
    "qwen3": ("qwen3", _HEAD | {"tie_word_embeddings": True}),
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", _HEAD),
}
# The others that the route map knows. Some of them compute parts in float32, or choose experts in jumps.
ARCHITECTURES = {
    **FAMILIES,
    "qwen3-moe": ("qwen3_moe", _HEAD | _OF_QWEN | {"mlp_only_layers": [1]}),
    "qwen3-moe-every-second": (
        "qwen3_moe",
        {"num_experts": 5, "num_experts_per_tok": 1, "moe_intermediate_size": 3, "decoder_sparse_step": 2},
    ),
    "gemma2": ("gemma2", _HEAD | {"query_pre_attn_scalar": 6}),
    "gemma3-text": ("gemma3_text", _HEAD | {"query_pre_attn_scalar": 6, "num_key_value_heads": 1}),
    "gemma3": ("gemma3", _HEAD | {"query_pre_attn_scalar": 6}),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {"n_inner": 12}),
    "gpt2-default-width": ("gpt2", {}),
    "smollm3": ("smollm3", {}),
}

_LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
_LINEAR |= _HEAD | {"linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
_SHARED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 5}
_SHARED |= {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
_LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
_PER_LAYER = _HEAD | {"vocab_size_per_layer_input": len(VOCABULARY), "hidden_size_per_layer_input": 4}
_PER_LAYER |= {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 4}
_PLAIN = "apertus arcee cohere cohere2 exaone4 gpt_neox granite nemotron olmo olmo2 olmo3 phi stablelm starcoder2"
_OWN_HEAD_SIZE = "ernie4_5 gemma hunyuan_v1_dense ministral ministral3 seed_oss vaultgemma"
# The further model types of the route map.
FURTHER = {
    **dict.fromkeys(_PLAIN.split(), {}),
    **dict.fromkeys(_OWN_HEAD_SIZE.split(), _HEAD),
    **dict.fromkeys(("glm", "glm4", "helium"), {"head_dim": 4}),
    **dict.fromkeys(("granitemoe", "mixtral", "phimoe"), _EXPERTS),
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "bloom": {"n_head": 4},
    "deepseek_v3": _SHARED | _LATENT | {"num_key_value_heads": 4},
    "falcon_h1": _HEAD | _MAMBA | {"mamba_d_ssm": 16, "mamba_d_head": 4},
    "gemma3n_text": _PER_LAYER
    | {"laurel_rank": 4, "intermediate_size": [12, 12], "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_text": _PER_LAYER | {"global_head_dim": 6},
    "glm4_moe": _SHARED | {"head_dim": 4},
    "gpt_oss": _EXPERTS | _HEAD,
    "gptj": {"n_inner": 12, "rotary_dim": 4},
    "jamba": _EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 4},
    "llama4_text": _EXPERTS
    | _HEAD
    | {"num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 10},
    "mpt": {"d_model": 16, "n_heads": 4, "n_layers": 2},
    "opt": {"ffn_dim": 12, "word_embed_proj_dim": 16},
    "qwen3_5_moe_text": _LINEAR | _EXPERTS | {"shared_expert_intermediate_size": 6},
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR | _EXPERTS | {"shared_expert_intermediate_size": 6},
}
