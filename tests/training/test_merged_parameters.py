"""Adapters merged one layer at a time, and the model as it was."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl_interfere.training.merged_parameters import merged_parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}])
def test_against_a_merged_copy(make_model, dtype, options):
    plain = make_model("llama-biases", dtype=dtype)
    names = {name for name, _ in plain.named_parameters()}
    model = get_peft_model(plain, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], **options))
    if not options:
        model.add_adapter("second", LoraConfig(r=2, target_modules=["up_proj", "q_proj"]))
        model.base_model.set_adapter(["default", "second"])
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    left = merged_parameters(model)
    next(left)
    left.close()  # by an engine that fails half-way
    found = {name: tensor.clone() for name, tensor in merged_parameters(model)}
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    merged = model.merge_and_unload()
    expected = dict(merged.named_parameters())
    assert found.keys() == expected.keys() == names
    for name in names:
        assert torch.equal(found[name], expected[name]), name
