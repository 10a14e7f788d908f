import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from trl_interfere.adapters import AdapterFactors
from trl_interfere.lab import MODEL_FOLDER


def saved_adapter(base, folder, std=1.0, **settings):
    """A random adapter of the model, and its updates as they are read from its folder."""
    model = get_peft_model(base, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    adapter = AdapterFactors(folder)
    return model, {name: left @ right for name in adapter.names for left, right in [adapter.factors(name)]}


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 16}}]
)
def test_updates_equal_those_of_peft(tmp_path, options):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options}
    model, updates = saved_adapter(base, tmp_path, **options)
    modules = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert set(updates) == {f"{name}.weight" for name in modules} and len(updates) == 2 * len(base.model.layers)
    for name, module in modules.items():
        torch.testing.assert_close(updates[f"{name}.weight"], module.get_delta_weight("default"))


def test_an_update_below_the_precision_of_the_weights_is_kept(tmp_path):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.bfloat16)
    before = base.get_parameter("model.layers.0.mlp.down_proj.weight").clone()
    _, updates = saved_adapter(base, tmp_path, std=1e-4, r=2, target_modules=["down_proj"])
    update = updates["model.layers.0.mlp.down_proj.weight"]
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.bfloat16), tmp_path
    ).merge_and_unload()
    after = merged.get_parameter("model.layers.0.mlp.down_proj.weight")
    assert (update != 0).float().mean() > 0.99
    assert ((after - before) != 0).float().mean() < 0.5  # what subtracting merged weights would have left


def test_modules_that_are_saved_whole(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected matrices lora_A and lora_B"):
        AdapterFactors(tmp_path)
