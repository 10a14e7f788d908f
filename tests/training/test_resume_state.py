"""Every way of training, interrupted in the middle of a generation block and resumed, equals itself uninterrupted."""

import json
import shutil

import pytest
from datasets import Dataset
from peft import LoraConfig
from tiny_runs import AskOnce, Interrupt, assert_same, build, math_domain, text_reward, weights, writing_domain
from transformers import TrainerCallback

from trl_interfere.lab.domains import lab_rows
from trl_interfere.training.resume import last_whole_checkpoint


LORA = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])


def stream(name: str) -> Dataset:
    return Dataset.from_list([{"prompt": row["prompt"]} for row in lab_rows(name, "train", 48)]).to_iterable_dataset()


def streamed_domains():
    return [
        math_domain(train_dataset=stream("math"), reward_funcs=text_reward),
        writing_domain(train_dataset=stream("writing"), reward_funcs=text_reward),
    ]


BLOCK = {"steps_per_generation": 4, "max_steps": 6}
SETTINGS = {
    # name: (settings, step at which the second stage is interrupted, steps between checkpoints)
    "steps per generation": ({**BLOCK}, 3, 1),
    "iterations": ({"num_iterations": 3, "max_steps": 5}, 2, 1),
    "accumulation in a block": (
        {**BLOCK, "gradient_accumulation_steps": 2, "num_iterations": 2, "per_device_train_batch_size": 4},
        3,
        1,
    ),
    "checkpoints off the block": ({**BLOCK, "logging_steps": 3}, 5, 2),
    "third pass over the prompts": ({"per_device_train_batch_size": 64, "max_steps": 8}, 7, 1),
    "passes as length": ({"per_device_train_batch_size": 64, "max_steps": -1, "num_train_epochs": 2}, 4, 1),
    "evaluation on the way": ({**BLOCK, "eval_strategy": "steps", "eval_steps": 2}, 3, 1),
    "KL to the base": ({**BLOCK, "beta": 0.1}, 3, 1),
    "KL to the stage": ({**BLOCK, "beta": 0.1, "kl_reference": "stage"}, 3, 1),
    "adaptive entropy": (
        {
            **BLOCK,
            "use_adaptive_entropy": True,
            "entropy_coef": 0.01,
            "entropy_target": 5.0,
            "entropy_coef_delta": 0.01,
        },
        3,
        1,
    ),
    "stream": ({**BLOCK, "domains": streamed_domains}, 3, 1),
    "adapter": ({**BLOCK, "peft_config": LORA, "learning_rate": 1e-2}, 3, 1),
    "adapter, KL to the stage": (
        {**BLOCK, "peft_config": LORA, "learning_rate": 1e-2, "beta": 0.1, "kl_reference": "stage"},
        3,
        1,
    ),
    "adapter per stage": ({**BLOCK, "peft_config": LORA, "learning_rate": 1e-2, "adapter_per_stage": True}, 3, 1),
    "adapter per stage, KL to the base": (
        {**BLOCK, "peft_config": LORA, "learning_rate": 1e-2, "adapter_per_stage": True, "beta": 0.1},
        3,
        1,
    ),
    "other batches in a stage": (
        {
            "stage_overrides": {
                "writing": {
                    "per_device_train_batch_size": 4,
                    "gradient_accumulation_steps": 2,
                    "steps_per_generation": 4,
                    "num_generations": 2,
                    "num_iterations": 2,
                    "max_completion_length": 5,
                    "max_steps": 6,
                }
            }
        },
        3,
        1,
    ),
}


QUICK = ("steps per generation", "adapter per stage")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS]
)
def test_resume_equals_uninterrupted(tmp_path, name):
    settings, step, save_steps = SETTINGS[name]
    settings = {**settings, "save_steps": save_steps}
    make = settings.pop("domains", lambda: None)
    whole = build(tmp_path / "whole", domains=make(), **settings)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", domains=make(), callbacks=[Interrupt("2-writing", step)], **settings).train()
    checkpoint = last_whole_checkpoint(tmp_path / "cut" / "checkpoints" / "2-writing")
    assert checkpoint is not None  # else the stage would merely be run again
    resumed = build(tmp_path / "cut", domains=make(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(whole), weights(resumed))
    timed = ("step_time", "runtime", "per_second", "flos")
    for first, second in zip(whole.log_history, resumed.log_history, strict=True):
        # the loss of the whole stage is that of the steps of its last process
        skip = {key for key in first if key == "train_loss" or any(part in key for part in timed)}
        assert {k: v for k, v in first.items() if k not in skip} == {k: v for k, v in second.items() if k not in skip}


class Kill(Exception):
    """Stands for the end of a process."""


def test_resume_in_the_middle_of_an_evaluation(tmp_path):
    calls = {"math": 0, "writing": 0}
    fail = {"now": False}

    def counted(name):
        def metric(completions, **kwargs):
            calls[name] += 1
            if fail["now"] and name == "writing" and calls["writing"] == 2:
                raise Kill
            return text_reward(completions)

        return metric

    def domains():
        return [math_domain(metric=counted("math")), writing_domain(metric=counted("writing"))]

    fail["now"] = True
    with pytest.raises(ValueError, match="Kill"):
        build(tmp_path, domains=domains()).train()
    fail["now"] = False
    manifest = json.loads((tmp_path / "stages.json").read_text())
    assert manifest["current"]["index"] == 1 and list(manifest["current"]["scores"]) == ["math"]
    calls.update(math=0, writing=0)
    trained = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            trained.append(args.output_dir.rsplit("/", 1)[-1])

    resumed = build(tmp_path, domains=domains(), callbacks=[Watch()])
    resumed.train(resume_from_checkpoint=True)
    assert trained == ["2-writing"]  # the first stage was not trained again
    assert calls == {"math": 1, "writing": 2}  # nor was math scored again after it
    whole = build(tmp_path / "whole", domains=domains())
    whole.train()
    assert_same(weights(whole), weights(resumed))


def test_a_second_train_of_one_object_after_an_interruption(tmp_path):
    whole = build(tmp_path / "whole")
    whole.train()
    interrupt = Interrupt("2-writing", 2)
    # without checkpoints the stage begins again, and must do so from its own start
    again = build(tmp_path / "again", callbacks=[interrupt], save_strategy="no")
    with pytest.raises(KeyboardInterrupt):
        again.train()
    again.remove_callback(interrupt)
    again.train(resume_from_checkpoint=True)
    assert_same(weights(whole), weights(again))


def test_the_first_stage_cannot_begin_again_in_the_same_object(tmp_path):
    trainer = build(tmp_path, callbacks=[Interrupt("1-math", 1)], save_strategy="no")
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(ValueError, match="build a new trainer"):
        trainer.train(resume_from_checkpoint=True)


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


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("trainer_state.json", cut),
        ("trainer_state.json", lambda path: path.unlink()),
        ("resume_state_0.json", lambda path: path.unlink()),
        ("model.safetensors", cut),
        ("optimizer.pt", cut),
        ("rng_state.pth", cut),
    ],
)
def test_a_half_written_checkpoint_is_skipped_with_a_warning(tmp_path, checkpoint, caplog, name, spoil):
    folder = tmp_path / "1-math"
    shutil.copytree(checkpoint, folder)
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2") and not caplog.text
    spoil(folder / "checkpoint-2" / name)
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-1")
    assert "checkpoint-2: skipped, it was not written to its end" in caplog.text and name in caplog.text
    assert last_whole_checkpoint(tmp_path / "missing") is None


def test_a_checkpoint_of_more_processes_is_refused(tmp_path, checkpoint):
    trainer = build(tmp_path)
    shutil.copytree(checkpoint / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "resume_state_0.json").unlink()
    with pytest.raises(ValueError, match="expected a checkpoint of 1 processes"):
        trainer._load_rng_state(str(tmp_path / "checkpoint-2"))


def test_buffered_completions_are_saved_only_inside_a_block(tmp_path):
    build(tmp_path, steps_per_generation=2, max_steps=2, keep_checkpoints=True).train()
    folder = tmp_path / "checkpoints" / "1-math"
    assert (folder / "checkpoint-1" / "generation_buffer_0.safetensors").exists()
    assert not (folder / "checkpoint-2" / "generation_buffer_0.safetensors").exists()
