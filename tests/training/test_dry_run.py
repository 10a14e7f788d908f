"""The plan against what transformers counts, and against sizes written out by hand."""

import shutil

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_runs import config
from transformers import AutoModelForCausalLM

from trl_interfere import Domain, SequentialGRPOTrainer
from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.lab.domains import lab_rows
from trl_interfere.lab.math import math_reward
from trl_interfere.recipe import RunFile
from trl_interfere.training.dry_run import model_bytes, plan_run, stage_steps


SETTINGS = {"per_device_train_batch_size": 4, "save_steps": 500, "max_steps": -1}  # the last two are the defaults
WEIGHTS = 4 * sum(tensor.numel() for tensor in load_file(MODEL_FOLDER / "model.safetensors").values())


def domain(name: str, train: int, test: int = 5) -> Domain:
    rows = lab_rows("math", "train", train + test)
    parts = (Dataset.from_list(part) for part in (rows[:train], rows[train:]))
    return Domain(name, next(parts), math_reward, next(parts))


@pytest.fixture
def plan(tmp_path):
    def plan(domains=None, peft=None, model=str(MODEL_FOLDER), **settings):
        args = config(tmp_path / "out", **{**SETTINGS, **settings})
        return plan_run(RunFile(model=model, domains=domains or [domain("a", 40), domain("b", 24)], peft=peft), args)

    return plan


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 7},
        {"num_train_epochs": 1.5, "gradient_accumulation_steps": 3},
        {"num_train_epochs": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2},
        {"num_train_epochs": 1, "generation_batch_size": 16, "gradient_accumulation_steps": 3},
    ],
)
def test_steps_are_those_of_transformers(tmp_path, settings):
    args = config(tmp_path, **{**SETTINGS, **settings})
    trainer = SequentialGRPOTrainer(model=str(MODEL_FOLDER), args=args, domains=[domain("a", 23)])
    *_, expected = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    steps = stage_steps(vars(args), trainer.train_dataset)
    assert steps == (settings.get("max_steps") or expected)


def test_tokens_and_prompts(plan):
    overrides = {"b": {"max_steps": 3, "learning_rate": 2e-5, "max_completion_length": 5}}
    batches = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2}
    scoring = {"score_temperature": 1.0, "score_samples": 3, "score_max_new_tokens": 11}
    result = plan(max_steps=10, stage_overrides=overrides, **batches, **scoring)
    first, second = result.stages
    # A batch of 4 x 4 completions lasts for 8 slices, that is 4 steps.
    assert (first.steps, first.prompts, first.generated_tokens) == (10, 3 * 4, 3 * 16 * 8)
    assert first.trained_tokens == 10 * 2 * 4 * 8
    assert (second.steps, second.learning_rate, second.prompts, second.trained_tokens) == (3, 2e-5, 4, 3 * 2 * 4 * 5)
    assert (result.score_rounds, result.score_prompts, result.score_tokens) == (3, 10, 3 * 10 * 3 * 11)


@pytest.mark.parametrize(
    ("settings", "stages", "checkpoints"),
    [
        ({"save_steps": 4}, 2, 3),  # at 4, 8 and 10
        ({"save_steps": 4, "save_total_limit": 1}, 2, 2),  # a new one is written before the old one goes
        ({"save_steps": 0.5, "save_total_limit": 5}, 2, 2),
        ({"save_strategy": "no"}, 2, 0),
        ({"save_steps": 4, "keep_checkpoints": True}, 2, 3 + 3),
        ({"save_steps": 4, "keep_checkpoints": True, "save_total_limit": 1}, 2, 1 + 1 + 1),
        ({"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 3}, 2, 3),
        ({"save_steps": 4, "order": ["a", "b", "a"]}, 3, 3),
    ],
)
def test_disk(plan, settings, stages, checkpoints):
    result = plan(**{"max_steps": 10, **settings})
    folders, held, scores = result.disk.values()
    assert (folders, held) == (stages * WEIGHTS, checkpoints * 3 * WEIGHTS)
    assert scores == 4 * result.score_tokens == 4 * (stages + 1) * 10 * 8
    assert result.free == pytest.approx(shutil.disk_usage("/tmp").free, rel=0.1)


def test_bytes_of_adapters_and_data_types(plan, tmp_path):
    lora = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    args = config(tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    assert model_bytes(RunFile(str(MODEL_FOLDER), []), args) == WEIGHTS // 2
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL_FOLDER), LoraConfig(**lora))
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    adapter = 4 * sum(tensor.numel() for tensor in tensors)
    folders, held, _ = plan(peft=lora, max_steps=1).disk.values()
    assert (folders, held) == (2 * adapter, 3 * adapter)
    # The second folder holds two adapters and their sum; the checkpoint both, and the moments of the newer one.
    folders, held, _ = plan(peft=lora, max_steps=1, adapter_per_stage=True).disk.values()
    assert (folders, held) == ((2 + 4) * adapter, (2 + 2) * adapter)
    assert sum(plan(max_steps=1, save_only_model=True).disk.values()) == pytest.approx(3 * WEIGHTS, rel=1e-3)


def test_runs_that_could_not_start(plan, tmp_path):
    for settings, message in (
        ({"domains": [domain("a", 3)], "generation_batch_size": 16}, "expected at least 4 prompts.* found 3"),
        ({"model": str(tmp_path)}, "model: .* is neither a folder with a config"),
        ({"peft": {"rank": 3}}, "unknown option 'rank'"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(max_steps=1, **settings)
    shutil.copy(MODEL_FOLDER / "config.json", tmp_path)
    with pytest.raises(ValueError, match="expected safetensors weights"):
        plan(max_steps=1, model=str(tmp_path))
    assert not (tmp_path / "out").exists()
