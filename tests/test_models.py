import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.models import load_model, load_tokenizer, local_folder


TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "pad_token_id": 0}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
MOE = TEXT | {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16, "patch_size": 2}
MROPE = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
NESTED = {
    "qwen2_5_vl": {"vision_config": VISION | {"depth": 1, "fullatt_block_indexes": [0]}, "text_config": MROPE},
    "qwen3_vl": {"vision_config": VISION | {"depth": 1, "deepstack_visual_indexes": [0]}, "text_config": MROPE},
}


def lora(model, folder, **settings):
    """Save a random adapter of the model, and return the model that PEFT merges."""
    adapted = get_peft_model(model, LoraConfig(**{"r": 2, **settings}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload()


@pytest.mark.parametrize("family", NESTED)
def test_nested_language_models_load_whole(tmp_path, family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **copy.deepcopy(NESTED[family]))
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("targets", [["experts.gate_up_proj"], ["experts.gate_up_proj", "experts.down_proj"]])
def test_adapters_of_expert_parameters_are_merged(tmp_path, targets):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **MOE)).save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base")
    trained = {"target_modules": ["q_proj"], "target_parameters": targets}
    merged = lora(load_model(tmp_path / "base"), tmp_path / "adapter", **trained)
    loaded = load_model(tmp_path / "adapter")
    for (name, found), expected in zip(loaded.named_parameters(), merged.parameters(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)
        changed = "q_proj" in name or name.endswith(tuple(targets))
        assert torch.equal(found, base.get_parameter(name)) != changed


def test_broken_adapters(tmp_path):
    lora(load_model(MODEL_FOLDER), tmp_path, target_modules=["q_proj"])
    (tmp_path / "adapter_model.safetensors").unlink()
    for message in ("expected an adapter", "adapter_config.json"):
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)
        (tmp_path / "adapter_config.json").write_text("{")


def test_a_folder_without_a_tokenizer_is_refused_or_takes_that_of_another(tmp_path):
    # transformers makes an empty tokenizer for these, to which every prompt is nothing
    AutoConfig.for_model("qwen2", **TEXT).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="plain: expected the files of a tokenizer, found none"):
        load_tokenizer(tmp_path / "plain")
    with pytest.warns(UserWarning, match=f"plain has no tokenizer, that of {MODEL_FOLDER} is taken"):
        found = load_tokenizer(tmp_path / "plain", base=MODEL_FOLDER)
    assert found.get_vocab() == load_tokenizer(MODEL_FOLDER).get_vocab()
    lora(load_model(MODEL_FOLDER), tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.warns(UserWarning, match=f"that of {MODEL_FOLDER}"):
        assert load_tokenizer(tmp_path / "adapter").get_vocab() == found.get_vocab()


def test_folders(tmp_path):
    (tmp_path / "odd@name").mkdir()
    assert local_folder(tmp_path / "odd@name") == tmp_path / "odd@name"
    with pytest.raises(ValueError, match="nowhere/at/all: expected a folder"):
        local_folder("nowhere/at/all")
