"""The stage loop: what a run trains, keeps and goes on from."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny_runs import AskOnce, assert_same, build, math_domain, text_reward, weights, writing_domain
from transformers import AutoModelForCausalLM

from trl_interfere.lab import MODEL_FOLDER


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    trainer = build(tmp_path_factory.mktemp("run"), callbacks=[AskOnce()])
    trainer.train()
    return trainer


def test_manifest_tells_the_story(run):
    manifest = json.loads((Path(run.args.output_dir) / "stages.json").read_text())
    assert manifest["schema_version"] == 1
    stages = [(stage["kind"], stage["domain"], stage["folder"], stage["steps"]) for stage in manifest["stages"]]
    assert stages == [
        ("base", None, None, 0),
        ("train", "math", "stages/1-math", 3),
        ("train", "writing", "stages/2-writing", 3),
        ("refresh", "math", "stages/3-refresh-math", 2),
    ]
    assert [stage["seed"] for stage in manifest["stages"]] == [7, 7, 8, 9]
    for stage in manifest["stages"]:
        for name, score in stage["scores"].items():
            lines = (Path(run.args.output_dir) / score["file"]).read_text().splitlines()
            values = [json.loads(line)["score"] for line in lines]
            assert name in ("math", "writing") and score["n"] == len(values) == 16
            assert score["value"] == pytest.approx(100 * sum(values) / 16)
    steps = [(entry["stage"], entry["run_step"]) for entry in run.log_history if "loss" in entry]
    assert steps == [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6), (3, 7), (3, 8)]
    assert run.score_matrix.stages == ["0-base", "1-math", "2-writing", "3-refresh-math"]


def test_stage_folders_load_and_hold_the_weights_of_their_stage(run):
    folder = Path(run.args.output_dir) / "stages"
    last = AutoModelForCausalLM.from_pretrained(folder / "3-refresh-math").state_dict()
    assert_same({name: tensor.cpu() for name, tensor in last.items()}, weights(run))
    stages = [load_file(folder / name / "model.safetensors") for name in ("1-math", "2-writing", "3-refresh-math")]
    for first, second in zip(stages, stages[1:], strict=False):
        assert any(not torch.equal(first[name], second[name]) for name in first)
    log = json.loads((folder / "2-writing" / "log_history.json").read_text())
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3]
    assert any("rewards/writing/words_reward/mean" in entry for entry in log)
    assert not any("math" in key for entry in log for key in entry)


def test_stage_overrides_hold_for_their_stage_only(tmp_path):
    overrides = {"writing": {"learning_rate": 5e-4, "max_steps": 1, "lr_scheduler_type": "constant"}}
    trainer = build(tmp_path, order=["writing", "math"], stage_overrides=overrides)
    trainer.train()
    assert [(record.domain, record.steps) for record in trainer.run.stages[1:]] == [("writing", 1), ("math", 3)]
    rates = []
    for name in ("1-writing", "2-math"):
        log = json.loads((tmp_path / "stages" / name / "log_history.json").read_text())
        rates.append([entry["learning_rate"] for entry in log if "learning_rate" in entry])
    assert rates[0] == [5e-4]
    assert rates[1] == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    assert trainer.args.learning_rate == 1e-3 and trainer.args.output_dir == str(tmp_path)


def test_async_rewards_and_weights(tmp_path):
    async def slow_reward(completions, **kwargs):
        return [1.0 for _ in completions]

    domain = math_domain(reward_funcs=[slow_reward, text_reward], reward_weights=[2.0, 0.5])
    trainer = build(tmp_path, domains=[domain, writing_domain()], max_steps=1)
    trainer.train(max_stages=1)
    entry = next(entry for entry in trainer.log_history if "reward" in entry)
    mean = 2 * entry["rewards/math/slow_reward/mean"] + 0.5 * entry["rewards/math/text_reward/mean"]
    assert entry["reward"] == pytest.approx(mean, rel=1e-5)
    assert (trainer.score_matrix.values[0]["math"] >= 2).all()  # the weighted sum of its rewards


def test_one_adapter_through_all_stages(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    trainer = build(tmp_path, peft_config=lora, learning_rate=1e-2)
    trainer.train()
    base = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER)
    stage = PeftModel.from_pretrained(base, tmp_path / "stages" / "2-writing")
    live = {name: tensor for name, tensor in weights(trainer).items() if "lora" in name}
    assert live and any(tensor.abs().max() > 0 for name, tensor in live.items() if "lora_B" in name)
    assert_same({name: tensor.cpu() for name, tensor in stage.state_dict().items() if "lora" in name}, live)


def test_a_second_run_in_the_folder_needs_resume(run):
    folder = run.args.output_dir
    before = (Path(folder) / "stages.json").read_bytes()
    with pytest.raises(ValueError, match="holds a run"):
        build(folder, callbacks=[AskOnce()]).train()
    with pytest.raises(ValueError, match="belongs to another run") as error:
        build(folder, callbacks=[AskOnce()], learning_rate=2e-3).train(resume_from_checkpoint=True)
    assert '-  "learning_rate": 0.001' in str(error.value) and '+  "learning_rate": 0.002' in str(error.value)
    with pytest.raises(ValueError, match="expected True or False"):
        build(folder).train(resume_from_checkpoint="checkpoint-1")
    assert (Path(folder) / "stages.json").read_bytes() == before
    output = build(folder, callbacks=[AskOnce()]).train(resume_from_checkpoint=True)
    assert output.global_step == 0  # nothing left to do


def test_more_stages_can_be_asked_for_after_a_run(tmp_path):
    trainer = build(tmp_path, max_steps=1)
    trainer.train()
    trainer.add_callback(AskOnce())
    trainer.train(resume_from_checkpoint=True)
    assert [record.kind for record in trainer.run.stages] == ["base", "train", "train", "refresh"]


def test_checkpoints_of_finished_stages_go_and_completions_stay(tmp_path):
    build(tmp_path, max_steps=1, log_completions=True).train()
    kept = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.parquet")]
    assert sorted(kept) == [f"stages/{name}/completions/completions_00001.parquet" for name in ("1-math", "2-writing")]
    assert not list(tmp_path.glob("checkpoints/*"))
    # As if killed between the record of a stage and the removal of its checkpoints.
    (tmp_path / "checkpoints" / "2-writing" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "stages" / "2-writing" / "completions").rename(tmp_path / "checkpoints" / "2-writing" / "completions")
    build(tmp_path, max_steps=1, log_completions=True).train(resume_from_checkpoint=True)
    found = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.parquet")]
    assert sorted(found) == sorted(kept)
    assert not list(tmp_path.glob("checkpoints/*"))
