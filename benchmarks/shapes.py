"""Models of known shapes with random weights, for what depends on size and not on what a model has learnt."""

from pathlib import Path


# Of the configurations that these models were published with.
SHAPES = {
    "qwen3-0.6b": (1024, 3072, 28, 16, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, True),
    "qwen3-4b": (2560, 9728, 36, 32, True),
    "qwen3-8b": (4096, 12288, 36, 32, False),
}
# 48 layers of 128 experts: 8 of them for a token.
MOE_SHAPES = {"qwen3-30b-a3b": (2048, 768, 48, 32, 128, 8)}
VOCABULARY = 151936


def random_model(shape: str, dtype, device: str = "cpu", layers: int | None = None):
    """
    A model with random weights.

    Args:
        shape (`str`):
            One of [`SHAPES`] or [`MOE_SHAPES`].
        dtype (`torch.dtype`):
            Data type of the weights.
        device (`str`, *optional*, defaults to `"cpu"`):
            Where it is made.
        layers (`int`, *optional*):
            Number of layers, if it is to be smaller.

    Returns:
        [`~transformers.PreTrainedModel`]: The model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if shape in MOE_SHAPES:
        hidden, inner, depth, heads, experts, chosen = MOE_SHAPES[shape]
        kind, tied = "qwen3_moe", False
        extra = {"moe_intermediate_size": inner, "num_experts": experts, "num_experts_per_tok": chosen}
    else:
        hidden, inner, depth, heads, tied = SHAPES[shape]
        kind, extra = "qwen3", {}
    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=4 if extra else 8,
        head_dim=128,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        **extra,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def save_with_tokenizer(model, folder: Path) -> None:
    """
    Write such a model, with the tokenizer of the lab: its ids are a part of the vocabulary.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        folder (`pathlib.Path`):
            Where it is written.
    """
    from transformers import AutoTokenizer

    from trl_interfere.lab import MODEL_FOLDER

    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
