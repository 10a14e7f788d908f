"""What a user of TRL expects of a GRPOTrainer, over several domains."""

import ast
import inspect
import textwrap
from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset
from tiny_runs import (
    SETTINGS,
    assert_same,
    build,
    config,
    math_domain,
    reward_model,
    text_reward,
    weights,
    writing_domain,
)
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import GRPOConfig, GRPOTrainer

from trl_interfere import Domain, SequentialGRPOTrainer
from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.lab.math import math_reward
from trl_interfere.training.rehearsal import rehearse
from trl_interfere.training.stage_state import StageTrainer


# What `GRPOTrainer` assigns outside `__init__` and a stage does not reset, with the reason.
KEPT_BY_TRL = {
    "_batch_environments": "set anew with each batch",
    "environments": "set anew with each batch",
    "_sync_tool_dicts": "set anew with each batch",
    "_async_tool_dicts": "set anew with each batch",
    "_signature_columns": "the same for every domain",
    "_total_train_tokens": "num_tokens counts over the whole run",
}


def test_every_attribute_that_trl_changes_is_reset_or_known():
    """A new version of TRL that keeps something else from step to step fails here."""

    def assigned(function):
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            for target in targets if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) else []:
                for part in getattr(target, "elts", [target]):
                    part = part.value if isinstance(part, ast.Subscript) else part
                    if isinstance(part, ast.Attribute) and getattr(part.value, "id", "") == "self":
                        yield part.attr

    changed = set()
    for name, function in vars(GRPOTrainer).items():
        if inspect.isfunction(function) and name != "__init__":
            changed |= set(assigned(function))
    reset = set(assigned(StageTrainer._reset)) | set(assigned(StageTrainer.sync_weights))
    assert {"_step", "_buffered_inputs", "_last_loaded_step"} <= changed & reset
    assert changed - reset == changed & set(KEPT_BY_TRL)


def test_three_rewards_beside_another_domain_are_plain_grpo_to_the_bit(tmp_path):
    def third(completions, **kwargs):
        return [len(completion) / 7 for completion in completions]

    rewards, reward_weights = [math_reward, text_reward, third], [0.3, 0.7, 0.1]
    math = math_domain(reward_funcs=rewards, reward_weights=reward_weights)
    others = writing_domain(reward_funcs=[text_reward] * 6)
    trainer = build(tmp_path / "ours", domains=[others, math], order=["math"])
    trainer.train()
    args = GRPOConfig(str(tmp_path / "plain"), **SETTINGS, reward_weights=reward_weights)
    expected = GRPOTrainer(str(MODEL_FOLDER), rewards, args, math.train_dataset)
    expected.train()
    assert_same(weights(trainer), weights(expected))


class Tracker(TrainerCallback):
    """Writes down what TensorBoard's callback would: where, at which step, and when it ends."""

    def __init__(self):
        self.logging_dir, self.seen, self.ended = None, [], 0
        type(self).made = self

    def on_train_begin(self, args, state, control, **kwargs):
        self.logging_dir = self.logging_dir or args.output_dir

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((self.logging_dir, state.global_step, sorted(name for name in logs if "score" in name)))

    def on_train_end(self, args, state, control, **kwargs):
        self.ended += 1


def test_a_tracker_has_one_folder_and_one_axis(tmp_path, monkeypatch):
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    monkeypatch.setattr(
        "transformers.integrations.integration_utils.get_available_reporting_integrations", lambda: ["tensorboard"]
    )

    class Writes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            Path(args.output_dir, "mine.txt").touch()

    trainer = build(tmp_path, report_to=["tensorboard"], max_steps=2, callbacks=[Writes()])
    trainer.train()
    tracker = Tracker.made
    assert {folder for folder, _, _ in tracker.seen} == {str(tmp_path / "runs")}
    steps = [step for _, step, _ in tracker.seen]
    assert steps == sorted(steps) and [step for _, step, scores in tracker.seen if scores] == [0, 2, 4]
    assert tracker.ended == 1
    assert [entry["step"] for entry in trainer.state.log_history] == [1, 2, 2]  # transformers' own are of the stage
    assert sorted(path.parent.name for path in tmp_path.glob("checkpoints/*/mine.txt")) == ["1-math", "2-writing"]
    assert not list(tmp_path.glob("checkpoints/*/checkpoint-*"))


class Budget(TrainerCallback):
    """Stops the run, not only the stage, after a number of steps."""

    def __init__(self, steps):
        self.left = steps

    def on_step_end(self, args, state, control, **kwargs):
        self.left -= 1
        control.should_training_stop |= self.left <= 0


@pytest.mark.parametrize("steps, save", [(4, {"save_steps": 100}), (2, {"save_strategy": "no"})])
def test_a_callback_that_stops_the_training_ends_the_run(tmp_path, steps, save):
    whole = build(tmp_path / "whole", **save)
    whole.train()
    trainer = build(tmp_path / "run", callbacks=[Budget(steps)], **save)
    trainer.train()
    assert [record.name for record in trainer.run.stages] == ["0-base", "1-math"][: 1 + (steps > 3)]
    resumed = build(tmp_path / "run", **save)
    resumed.train(resume_from_checkpoint=True)
    assert [record.steps for record in resumed.run.stages] == [0, 3, 3]
    assert_same(weights(resumed), weights(whole))


def rollout(prompts, trainer):
    ids = [[5, 6, 7]] * len(prompts)
    return {"prompt_ids": ids, "completion_ids": ids, "logprobs": [[0.0] * 3] * len(prompts), "extra": prompts}


@pytest.mark.parametrize("turns", [{"tools": [text_reward]}, {"rollout_func": rollout}, {"environment_factory": dict}])
def test_a_task_that_scoring_does_not_play_needs_a_metric(tmp_path, turns):
    with pytest.raises(ValueError, match=f"math.*metric.*{next(iter(turns))}"):
        SequentialGRPOTrainer(str(MODEL_FOLDER), config(tmp_path), [math_domain()], **turns)


def test_a_rollout_function_with_a_metric(tmp_path):
    def reward(completions, extra, **kwargs):
        assert len(extra) == len(completions)
        return [float(index) for index, _ in enumerate(completions)]

    domain = math_domain(reward_funcs=reward, metric=text_reward)
    trainer = SequentialGRPOTrainer(str(MODEL_FOLDER), config(tmp_path, max_steps=1), [domain], rollout_func=rollout)
    trainer.train()
    assert [record.steps for record in trainer.run.stages] == [0, 1]


def test_rewards_and_extra_columns_of_rehearsed_domains(tmp_path):
    def logs(column, at_times=False):
        def reward(completions, log_extra, **kwargs):
            if not at_times or len(completions) % 8 == 0:
                log_extra(column, [f"{column} {completion}" for completion in completions])
            log_extra("both", completions)
            return text_reward(completions)

        return reward

    math, writing = math_domain(reward_funcs=logs("a")), writing_domain(reward_funcs=logs("b", at_times=True))
    mixed = rehearse(writing, [math], share=0.5)
    build(tmp_path, domains=[math, mixed], order=["writing"], log_completions=True, num_generations=8).train()
    (*_, last) = sorted(tmp_path.rglob("*.parquet"))
    table = pd.concat([pd.read_parquet(path) for path in sorted(tmp_path.rglob("*.parquet"))])
    assert len(pd.read_parquet(last)) == 8 and list(table["both"]) == list(table["completion"])
    for column, domain in (("a", math), ("b", writing)):
        own = table[table[f"{domain.name}/reward"].notna()]  # each row is rewarded by its own domain
        assert len(own) and set(own["prompt"]) <= set(domain.train_dataset["prompt"])
        logged = own[own[column].notna()]
        assert list(logged[column]) == [f"{column} {text}" for text in logged["completion"]]


def test_evaluation_of_any_dataset(tmp_path):
    seen = []

    def counted(name):
        def reward(completions, **kwargs):
            seen.append(name)
            return [1.0 if name == "math" else 0.5] * len(completions)

        return reward

    domains = [math_domain(reward_funcs=counted("math")), writing_domain(reward_funcs=counted("writing"))]
    trainer = build(tmp_path, domains=domains, max_steps=1, per_device_eval_batch_size=16)
    foreign = Dataset.from_list([{"prompt": "1+1=", "words": "a b"}] * 4)
    assert trainer.evaluate(foreign)["eval_reward"] == 1.0  # of the domain that is trained first
    trainer.train()
    for call, value, names in (
        (lambda: trainer.evaluate(foreign), 0.5, {"writing"}),
        (lambda: trainer.evaluate("math"), 1.0, {"math"}),
        (lambda: trainer.evaluate({"one": foreign, "two": domains[0].eval_dataset}), None, {"math", "writing"}),
        (lambda: trainer.predict(foreign).metrics, None, {"writing"}),
    ):
        seen.clear()
        metrics = call()
        assert set(seen) == names
        if value is not None:
            assert metrics["eval_reward"] == value


def test_reward_models_of_other_domains_do_not_run(tmp_path):
    calls, model = [], reward_model()
    model.register_forward_hook(lambda *_: calls.append(1))
    domains = [math_domain(), writing_domain(reward_funcs=[model], metric=text_reward)]
    trainer = build(tmp_path, domains=domains, max_steps=1)
    trainer.train(max_stages=1)
    assert not calls
    trainer.train(resume_from_checkpoint=True)
    assert calls


@pytest.mark.parametrize("column", ["prompts", "trainer_state", "log_extra", "environments"])
def test_columns_with_the_names_of_arguments(column):
    rows = Dataset.from_dict({"prompt": ["a"] * 8, column: ["x"] * 8})
    with pytest.raises(ValueError, match=f"'a', train_dataset.*'{column}'"):
        Domain("a", rows, text_reward)
    stream = rows.to_iterable_dataset().map(dict, features=None)  # the columns are unknown until rows are read
    with pytest.raises(ValueError, match=f"'a', train_dataset.*'{column}'"):
        next(iter(Domain("a", stream, text_reward).train_dataset))


def test_an_output_folder_that_cannot_be_written_is_named_before_the_model_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match="file"):
            SequentialGRPOTrainer("no/such-model", config(folder), [math_domain()])
