"""Tiny random checkpoints of many architectures, and references on them."""

import torch
from architectures import TINY
from transformers import AutoConfig, AutoModelForCausalLM

from trl_interfere import Domain
from trl_interfere.analysis.references import References
from trl_interfere.repair.repair import Repair
from trl_interfere.repair.subspace_rollback import SubspaceRollback


WIDTH, VOCABULARY = 16, 40
SETTINGS = TINY | {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 20}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 4}
LAYER_TYPES = ["sliding_attention", "full_attention"]
ATTENTION = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
MLP = [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
FUSED = [["self_attention.query_key_value"], ["self_attention.dense"], ["mlp.dense_h_to_4h"], ["mlp.dense_4h_to_h"]]
# Model type, settings, and the layers of a block in the order of a forward pass; those of a list get the same input.
# Some have windows, rope and masks of their own for each type of layer.
FAMILIES = {
    "qwen3": ("qwen3", {"head_dim": 6, "tie_word_embeddings": True}, ATTENTION + MLP),
    "llama-wide": ("llama", {"num_key_value_heads": 1, "intermediate_size": 8}, ATTENTION + MLP),
    "qwen2": ("qwen2", {}, ATTENTION + MLP),
    "phi3": ("phi3", {}, [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]]),
    "gpt2": ("gpt2", {"n_inner": 24}, [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]]),
    "falcon": ("falcon", {}, FUSED),  # of which the package has no route map
    "gpt_neox": ("gpt_neox", {}, [["attention.query_key_value"], ["attention.dense"], *FUSED[2:]]),
    "mistral-window": ("mistral", {"sliding_window": 3, "head_dim": 6}, ATTENTION + MLP),
    "gemma3": ("gemma3_text", {"head_dim": 6, "sliding_window": 3, "layer_types": LAYER_TYPES}, ATTENTION + MLP),
    "qwen3-moe": ("qwen3_moe", EXPERTS, [*ATTENTION, ["mlp.experts"]]),
    "qwen3-moe-mixed": ("qwen3_moe", EXPERTS | {"mlp_only_layers": [1]}, [*ATTENTION, ["mlp.experts"], *MLP]),
    "gpt_oss": ("gpt_oss", EXPERTS | {"num_local_experts": 4, "intermediate_size": 12}, [*ATTENTION, ["mlp.experts"]]),
}
# Sequences of unequal lengths by domain; the last domain lost nothing.
TOKENS = torch.Generator().manual_seed(0)
ROWS = {
    name: [torch.randint(2, VOCABULARY, (length,), generator=TOKENS).tolist() for length in (9, 4, 7, 12, 5)]
    for name in ("math", "code", "qa")
}


def save(root, family, names=("final", "math", "code"), dtype=torch.float32, shards="5GB", **more):
    """Save a random model of a family, moved from one name to the next; the folders by name."""
    kind, settings, _ = FAMILIES[family]
    config = AutoConfig.for_model(kind, **(SETTINGS | settings | more))
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # One is stored in the form in which transformers holds it, not with an expert in each tensor.
    options = {"max_shard_size": shards, "save_original_format": family != "qwen3-moe-mixed"}
    for name in names:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.to(dtype).save_pretrained(root / name, **options)
        model.float()
    return {name: root / name for name in names}


def load(folder, dtype=torch.float64):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    return model.eval()


def domains(names=ROWS):
    return [Domain(name, metric=lambda completions, **_: [1.0] * len(completions)) for name in names]


def references(rows=ROWS):
    return {
        name: References(name, [row[:2] for row in found], [row[2:] for row in found], len(found))
        for name, found in rows.items()
    }


def fit(folders, rows=ROWS, base=None, **settings) -> Repair:
    rollback = SubspaceRollback(**({"rank": None, "batch_size": 3, "dtype": "float64"} | settings))
    peaks = {name: folder for name, folder in folders.items() if name in rows}
    return rollback.fit(folders["final"], peaks, domains(rows), references(rows), base=base)
