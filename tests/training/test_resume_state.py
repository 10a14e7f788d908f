"""Every way of training, interrupted in the middle of a generation block and resumed, equals itself uninterrupted."""

import json
import shutil

import pytest
from datasets import Dataset
from peft import LoraConfig
from tiny_runs import (
    AskOnce,
    Interrupt,
    assert_same,
    build,
    math_domain,
    slow_but,
    text_reward,
    weights,
    writing_domain,
)

from trl_interfere.lab.domains import lab_rows
from trl_interfere.training.refresh import distillation
from trl_interfere.training.resume import last_whole_checkpoint
from trl_interfere.training.schedule import Stage


LORA = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])


def streamed_domains():
    made = []
    for make, name in ((math_domain, "math"), (writing_domain, "writing")):
        rows = Dataset.from_list([{"prompt": row["prompt"]} for row in lab_rows(name, "train", 48)])
        made.append(make(train_dataset=rows.to_iterable_dataset(), reward_funcs=text_reward))
    return made


BLOCK = {"steps_per_generation": 4, "max_steps": 6}
ADAPTER = {"peft_config": LORA, "learning_rate": 1e-2}
ACCUMULATED = {"gradient_accumulation_steps": 2}
FOURS = {"per_device_train_batch_size": 4}
LARGE = {"per_device_train_batch_size": 64}
KL = {"beta": 0.1}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "reward", "greater_is_better": True}
BEST |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 64}
IN_THE_SECOND = ("2-writing", 3)
TAUGHT = distillation({"math": "1-math", "writing": "0-base"}, {"max_steps": 3}, 0.5)
OTHER_BATCHES = {**BLOCK, **ACCUMULATED, **FOURS, "num_generations": 2, "num_iterations": 2}
OTHER_BATCHES |= {"max_completion_length": 5}
ENTROPY = {"use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_target": 5.0, "entropy_coef_delta": 0.01}
SETTINGS = {
    # name: (settings, stage and step at which it is interrupted)
    "steps per generation": (BLOCK, IN_THE_SECOND),
    "the first stage": ({}, ("1-math", 2)),
    "the beginning of a stage": ({}, ("2-writing", 0)),
    "a refresh": ({"ask": Stage("math", "refresh", {"max_steps": 2})}, ("3-refresh-math", 1)),
    "a refresh by distillation": ({**BLOCK, **ACCUMULATED, "max_steps": 2, "ask": TAUGHT}, ("3-refresh", 1)),
    "iterations": ({"num_iterations": 3, "max_steps": 5}, ("2-writing", 2)),
    "accumulation in a block": ({**BLOCK, **ACCUMULATED, **FOURS, "num_iterations": 2}, IN_THE_SECOND),
    "checkpoints off the block": ({**BLOCK, "logging_steps": 3, "save_steps": 2}, ("2-writing", 5)),
    "third pass over the prompts": ({**LARGE, "max_steps": 8}, ("2-writing", 7)),
    "passes as length": ({**LARGE, "max_steps": -1, "num_train_epochs": 2}, ("2-writing", 4)),
    "evaluation on the way": ({**BLOCK, "eval_strategy": "steps", "eval_steps": 2}, IN_THE_SECOND),
    "evaluation at the start": ({"eval_on_start": True}, ("2-writing", 2)),
    "KL to the base": ({**BLOCK, **KL}, IN_THE_SECOND),
    "KL to the stage": ({**BLOCK, **KL, "kl_reference": "stage"}, IN_THE_SECOND),
    "adaptive entropy": ({**BLOCK, **ENTROPY}, IN_THE_SECOND),
    "stream": ({**BLOCK, "domains": streamed_domains}, IN_THE_SECOND),
    "noise": ({"neftune_noise_alpha": 5.0}, ("2-writing", 2)),
    "models only": ({"save_only_model": True}, ("2-writing", 2)),
    "best at the end, one checkpoint": ({**BEST, "save_total_limit": 1}, ("2-writing", 2)),
    "best checkpoints only": ({**BEST, "save_strategy": "best"}, ("2-writing", 2)),
    "adapter": ({**BLOCK, **ADAPTER}, IN_THE_SECOND),
    "adapter, KL to the stage": ({**BLOCK, **ADAPTER, **KL, "kl_reference": "stage"}, IN_THE_SECOND),
    "adapter per stage": ({**BLOCK, **ADAPTER, "adapter_per_stage": True}, IN_THE_SECOND),
    "adapter per stage, KL to the base": ({**BLOCK, **ADAPTER, **KL, "adapter_per_stage": True}, IN_THE_SECOND),
    "adapter per stage, best": ({**BEST, **ADAPTER, "adapter_per_stage": True}, ("2-writing", 2)),
    "other batches in a stage": ({"stage_overrides": {"writing": OTHER_BATCHES}}, IN_THE_SECOND),
}
QUICK = ("steps per generation", "adapter per stage", "a refresh by distillation", "the first stage")
# A stage without a whole checkpoint is run again.
FROM_ITS_START = ("the beginning of a stage", "models only")


@pytest.mark.parametrize("name", slow_but(SETTINGS, *QUICK))
def test_resume_equals_uninterrupted(tmp_path, name):
    settings, (stage, step) = SETTINGS[name]

    def run(folder, *callbacks):
        own = {"domains": lambda: None, **settings}
        asks = [AskOnce(own.pop("ask"))] if "ask" in own else []
        return build(tmp_path / folder, **{**own, "domains": own["domains"]()}, callbacks=[*asks, *callbacks])

    whole, cut = run("whole"), run("cut", Interrupt(stage, step))
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    checkpoint = last_whole_checkpoint(tmp_path / "cut" / "checkpoints" / stage)
    assert (checkpoint is None) == (name in FROM_ITS_START)
    resumed = run("cut")
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(whole), weights(resumed))
    for domain, values in whole.score_matrix.values[-1].items():
        assert values.tolist() == resumed.score_matrix.values[-1][domain].tolist()
    timed = ("step_time", "runtime", "per_second", "flos")
    for first, second in zip(whole.log_history, resumed.log_history, strict=True):
        # the loss of the whole stage is that of the steps of its last process
        skip = {key for key in first if key == "train_loss" or any(part in key for part in timed)}
        assert {k: v for k, v in first.items() if k not in skip} == {k: v for k, v in second.items() if k not in skip}


def test_a_refresh_goes_on_with_its_own_settings_only(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, callbacks=[AskOnce(TAUGHT), Interrupt("3-refresh", 1)], max_steps=1).train()
    other = distillation(TAUGHT.overrides["teachers"], {"max_steps": 3})
    with pytest.raises(ValueError, match="reward_weight 0.5, found 0.0"):
        build(tmp_path, callbacks=[AskOnce(other)], max_steps=1).train(resume_from_checkpoint=True)


def test_resume_in_the_middle_of_an_evaluation(tmp_path):
    calls = []

    def domains(fails_at=None):
        def counted(name):
            def metric(completions, **kwargs):
                calls.append(name)
                if len(calls) == fails_at:
                    raise RuntimeError("stands for the end of a process")
                return text_reward(completions)

            return metric

        return [math_domain(metric=counted("math")), writing_domain(metric=counted("writing"))]

    with pytest.raises(ValueError, match="end of a process"):
        build(tmp_path, domains=domains(fails_at=4)).train()
    manifest = json.loads((tmp_path / "stages.json").read_text())
    assert manifest["current"]["index"] == 1 and list(manifest["current"]["scores"]) == ["math"]
    calls.clear()
    resumed = build(tmp_path, domains=domains(), callbacks=[Interrupt("1-math", 0)])
    resumed.train(resume_from_checkpoint=True)  # the first stage is not trained again
    assert calls == ["writing", "math", "writing"]  # nor was math scored again after it
    whole = build(tmp_path / "whole", domains=domains())
    whole.train()
    assert_same(weights(whole), weights(resumed))


def test_a_second_train_of_one_object_after_an_interruption(tmp_path):
    whole = build(tmp_path / "whole")
    whole.train()
    # without checkpoints the stage begins again, and must do so from its own start
    callbacks = [Interrupt("1-math", 1), Interrupt("2-writing", 2)]
    first, second = (build(tmp_path / f.domain_folder, callbacks=[f], save_strategy="no") for f in callbacks)
    for trainer, interrupt in zip((first, second), callbacks, strict=True):
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.remove_callback(interrupt)
    second.train(resume_from_checkpoint=True)
    assert_same(weights(whole), weights(second))
    with pytest.raises(ValueError, match="build a new trainer"):
        first.train(resume_from_checkpoint=True)


def test_a_run_is_extended(tmp_path):
    whole = build(tmp_path / "whole", order=["math", "writing", "math"], callbacks=[AskOnce()])
    whole.train()
    build(tmp_path / "grown", domains=[math_domain()]).train()
    with pytest.raises(ValueError, match="belongs to another run"):
        build(tmp_path / "grown", order=["writing", "math"]).train(resume_from_checkpoint=True)
    grown = build(tmp_path / "grown", order=["math", "writing", "math"], callbacks=[AskOnce()])
    grown.train(resume_from_checkpoint=True)
    assert_same(weights(whole), weights(grown))
    assert [record.name for record in grown.run.stages] == [record.name for record in whole.run.stages]
    assert list(grown.run.stages[0].scores) == ["math"]  # there was no other domain yet


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    build(folder, keep_checkpoints=True, max_steps=2).train()
    return folder / "checkpoints" / "1-math"


@pytest.mark.parametrize("name", ["trainer_state.json", "resume_state_0.json", "model.safetensors", "optimizer.pt"])
def test_a_half_written_checkpoint_is_skipped_with_a_warning(tmp_path, checkpoint, caplog, name):
    folder = tmp_path / "1-math"
    shutil.copytree(checkpoint, folder)
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2") and not caplog.text
    path = folder / "checkpoint-2" / name
    content = path.read_bytes()
    path.unlink()
    if name != "resume_state_0.json":
        path.write_bytes(content[: len(content) // 2])
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-1")
    assert "checkpoint-2: skipped, it was not written to its end" in caplog.text and name in caplog.text
    assert last_whole_checkpoint(tmp_path / "missing") is None
