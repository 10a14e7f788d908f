"""Adapters through stages: what is trained, what is frozen, what reloads."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_runs import AskOnce, assert_same, build, config, math_domain, weights, writing_domain
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_interfere import SequentialGRPOTrainer
from trl_interfere.adapters import AdapterFactors
from trl_interfere.lab import MODEL_FOLDER


LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
NAMES = ["default", "2-writing", "3-refresh-math"]


class Gradients(TrainerCallback):
    """Which adapters had a gradient at an optimizer step."""

    def __init__(self):
        self.seen = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        stage = Path(args.output_dir).name
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.seen.setdefault(stage, set()).update(part for part in NAMES if f".{part}." in name)
                assert "lora" in name


@pytest.fixture(scope="module")
def per_stage(tmp_path_factory):
    gradients = Gradients()
    settings = {"peft_config": LoraConfig(**LORA), "adapter_per_stage": True, "learning_rate": 1e-2, "beta": 0.05}
    trainer = build(tmp_path_factory.mktemp("adapters"), callbacks=[AskOnce(), gradients], **settings)
    trainer.train()
    return trainer, gradients


def adapter(folder, name):
    return load_file(Path(folder) / "adapters" / name / "adapter_model.safetensors")


def test_each_stage_trains_its_own_adapter_only(per_stage):
    trainer, gradients = per_stage
    assert gradients.seen == {"1-math": {NAMES[0]}, "2-writing": {NAMES[1]}, "3-refresh-math": {NAMES[2]}}
    stages = Path(trainer.args.output_dir) / "stages"
    folders = [stages / name for name in gradients.seen]
    for position, folder in enumerate(folders):
        assert {path.name for path in (folder / "adapters").iterdir()} == set(NAMES[: position + 1])
        own = adapter(folder, NAMES[position])
        assert any(tensor.abs().max() > 0 for key, tensor in own.items() if "lora_B" in key)
        for earlier in range(position):
            assert_same(adapter(folder, NAMES[earlier]), adapter(folders[earlier], NAMES[earlier]))
        assert {path.name for path in folder.iterdir()} & {*NAMES, "ref", "combined"} == set()


@pytest.mark.parametrize("stage", ["1-math", "2-writing", "3-refresh-math"])
def test_a_stage_folder_reloads_as_the_sum_of_its_adapters(per_stage, stage):
    folder = Path(per_stage[0].args.output_dir) / "stages" / stage
    ids = torch.arange(5, 25).reshape(2, 10)
    base = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER)
    plain = base(input_ids=ids).logits
    expected = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for part in (folder / "adapters").iterdir():
        adapter = AdapterFactors(part)
        for name in adapter.names:
            left, right = adapter.factors(name)
            expected[name] += left @ right
    base.load_state_dict(expected)
    expected = base(input_ids=ids).logits
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL_FOLDER), folder)
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 1e-2
    if stage == "3-refresh-math":
        live = per_stage[0].model
        torch.testing.assert_close(live(input_ids=ids.to(live.device)).logits.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_a_peft_model_with_a_trained_adapter_is_its_own_kl_reference(tmp_path):
    torch.manual_seed(0)
    start = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL_FOLDER), LoraConfig(**LORA))
    for name, parameter in start.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    before = {name: tensor.cpu().clone() for name, tensor in start.state_dict().items() if "lora" in name}
    trainer = SequentialGRPOTrainer(start, config(tmp_path, beta=0.1), [math_domain(), writing_domain()])
    trainer.train()
    after = weights(trainer)
    for name, tensor in before.items():
        assert torch.equal(after[name.replace(".default.", ".ref.")], tensor)
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
    kl = [entry["kl"] for entry in trainer.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-6


@pytest.mark.parametrize("peft", [False, True])
def test_the_kl_reference_follows_the_stage(tmp_path, peft):
    options = {"peft_config": LoraConfig(**LORA), "learning_rate": 1e-2} if peft else {}
    first = {}
    for reference in ("base", "stage"):
        trainer = build(tmp_path / reference, beta=0.1, kl_reference=reference, **options)
        trainer.train()
        logged = [entry for entry in trainer.log_history if "kl" in entry]
        first[reference] = [next(entry["kl"] for entry in logged if entry["stage"] == stage) for stage in (1, 2)]
    assert first["base"][0] == pytest.approx(0, abs=1e-6) and first["stage"][0] == pytest.approx(0, abs=1e-6)
    assert first["base"][1] > 1e-5 and first["stage"][1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("lora", "settings", "message"),
    [
        (None, {}, "adapter_per_stage: expected one LoRA"),
        ({"use_dora": True}, {}, "adapter_per_stage: .*use_dora=True"),
        ({}, {"kl_reference": "stage"}, "kl_reference: 'stage' is not supported with adapter_per_stage"),
    ],
)
def test_what_cannot_be_added_up_is_refused(tmp_path, lora, settings, message):
    peft_config = None if lora is None else LoraConfig(**LORA, **lora)
    with pytest.raises(ValueError, match=message):
        build(tmp_path, adapter_per_stage=True, peft_config=peft_config, **settings)
