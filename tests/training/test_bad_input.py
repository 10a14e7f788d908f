"""Bad input of every kind: one clear message, and nothing lost that a run has earned."""

import contextlib
import json
import resource
import shutil
from functools import partial
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset
from tiny_runs import (
    Interrupt,
    assert_same,
    build,
    config,
    math_domain,
    reward_model,
    slow_but,
    text_reward,
    weights,
    writing_domain,
)
from transformers import TrainerCallback

from trl_interfere import SequentialGRPOTrainer


# With a constant rate one step too many would change the weights.
RUN = {"max_steps": 8, "lr_scheduler_type": "constant", "stage_overrides": {"math": {"max_steps": 1}}, "save_steps": 3}
WRITING = r"stage 2-writing, step 7, domain 'writing': reward function 'words_reward' "


def words_reward(completions, **kwargs):
    return text_reward(completions)


def in_step(step, act):
    """The reward of the second domain, with another end in one step; a user mends it under the same name."""

    def words_reward(completions, trainer_state, **kwargs):
        at = trainer_state is not None and trainer_state.global_step + 1 >= step
        return act(completions) if at else text_reward(completions)

    return words_reward


def domains(reward=words_reward, **settings):
    return [math_domain(), writing_domain(**{"reward_funcs": reward, "metric": text_reward, **settings})]


def go_on(folder, reward=words_reward, callbacks=None, domain=None, **settings):
    own = domains(reward, **(domain or {}))
    trainer = build(folder, domains=own, callbacks=callbacks, **{**RUN, **settings})
    trainer.train(resume_from_checkpoint=True)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights after a run that nothing happened to."""
    trainer = build(tmp_path_factory.mktemp("whole"), domains=domains(), **RUN)
    trainer.train()
    return weights(trainer)


@pytest.fixture(scope="module")
def earned(tmp_path_factory):
    """A run of which the first stage is done."""
    folder = tmp_path_factory.mktemp("earned")
    build(folder, domains=domains(), **RUN).train(max_stages=1)
    return folder


def state(folder) -> dict:
    """What a run has earned: its finished stages, their weights and scores."""
    files = [
        path for pattern in ("stages/1-*/*", "scores/[01]-*/*") for path in folder.glob(pattern) if path.is_file()
    ]
    content = json.loads((folder / "stages.json").read_text())
    return {**{path: path.read_bytes() for path in files}, "run": content["run"], "stages": content["stages"][:2]}


def fail(completions):
    raise RuntimeError("out of paper")


class At(TrainerCallback):
    """Does something at a step of the second stage, or at its end."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if args.output_dir.endswith("2-writing") and state.global_step + 1 == self.step:
            self.act()

    def on_train_end(self, args, state, control, **kwargs):
        if self.step is None:
            self.act()


def on_a_full_disk(step, folder):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        go_on(folder, callbacks=[At(step, fill)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def without_a_manifest(folder):
    with patch("trl_interfere.io.os.fsync") as sync:
        fill = partial(setattr, sync, "side_effect", OSError(28, "No space left on device"))
        go_on(folder, callbacks=[At(None, fill)])


def without_template(folder):
    rows = [{"prompt": [{"role": "user", "content": "1+1="}]}] * 16
    build(folder / "new", domains=domains(train_dataset=Dataset.from_list(rows)))


def nan_model(folder):
    model = reward_model()
    torch.nn.init.constant_(model.score.weight, torch.nan)
    build(folder / "new", [math_domain(reward_funcs=[model], metric=text_reward)]).train()


def of_two_processes(folder):
    with contextlib.suppress(KeyboardInterrupt):
        go_on(folder, callbacks=[Interrupt("2-writing", 4)])
    for checkpoint in (folder / "checkpoints" / "2-writing").glob("checkpoint-*"):
        shutil.copy(checkpoint / "resume_state_0.json", checkpoint / "resume_state_1.json")


def cut(name, folder):
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def new(folder, domain=None, **settings):
    build(folder / "new", domains=domains(**(domain or {})), **settings)


def bare_reward(completions):
    return [0.0 for _ in completions]


def answer_metric(completions, answer, **kwargs):
    return [0.0 for _ in completions]


def of_math(**settings):
    return partial(new, stage_overrides={"math": settings})


UNSCORED = {"eval_dataset": None}
MODEL_ALONE = {"reward_funcs": torch.nn.Linear(1, 1), "metric": None}
# name: (what happens to a folder with one finished stage, the message then or, for the last, on resume)
BEFORE_THE_START = {
    "no domains": (lambda folder: SequentialGRPOTrainer("model", config(folder / "new"), []), "^domains: .*none"),
    "missing column": (partial(new, domain={"reward_funcs": answer_metric}), "'writing', answer_metric: .*'answer'"),
    "reward without **kwargs": (partial(new, domain={"reward_funcs": bare_reward}), "bare_reward: .*kwargs"),
    "duplicate domains": (lambda folder: build(folder / "new", [math_domain()] * 2), "^domains: .*'math', 'math'"),
    "domain named like a refresh": (lambda folder: math_domain(name="refresh-math"), "domain name 'refresh-math'"),
    "stage option of another type": (of_math(max_steps="many"), r"stage_overrides\['math'\], max_steps: .*'many'"),
    "stage option out of range": (of_math(learning_rate=-1), r"stage_overrides\['math'\], learning_rate: .*-1"),
    "batch of a stage not divisible": (of_math(num_generations=3), r"stage_overrides\['math'\]: .*num_generations=3"),
    "evaluation without a dataset": (partial(new, eval_on_start=True, domain=UNSCORED), "^eval_strategy.*'writing'"),
    "reward model without a metric": (partial(new, domain=MODEL_ALONE), "'writing': .*`metric`"),
    "no chat template": (without_template, "'writing', train_dataset: .*chat template"),
    "reward model that returns NaN": (nan_model, "stage 1-math, step 1, domain 'math': reward model .*nan"),
}


# What a reward does from step 7 of the second stage on, and what is said of it.
REWARDS = {
    "NaN": (lambda completions: [0.5, float("nan")] * 4, "returned nan for completion 1"),
    "another number of rewards": (lambda completions: [0.0], "returned 1 rewards, expected 8"),
    "words": (lambda completions: ["good"] * len(completions), "returned 'good' for completion 0"),
    "nothing": (lambda completions: None, "returned NoneType"),
    "reward raises": (fail, "raised RuntimeError: out of paper"),
}
IN_THE_SECOND_STAGE = {
    **{name: (partial(go_on, reward=in_step(7, act)), WRITING + message) for name, (act, message) in REWARDS.items()},
    "None for all": (
        partial(go_on, reward=in_step(4, lambda completions: [None] * len(completions))),
        r"stage 2-writing, step 6, domain 'writing': .*words_reward.* 3 generation batches in a row",
    ),
    "metric raises": (
        partial(go_on, domain={"metric": lambda completions, **kwargs: fail(completions)}),
        "stage 2-writing, scores after step 8, domain 'writing', <lambda>: raised RuntimeError: out of paper",
    ),
    "disk full in a checkpoint": (partial(on_a_full_disk, 4), "2-writing/checkpoint-6: cannot .*File too large"),
    "disk full in a stage": (partial(on_a_full_disk, None), "stages/2-writing: cannot be written .*File too large"),
    "disk full in the manifest": (without_a_manifest, r"stages\.json: cannot be written \(.*No space left on device"),
}
IN_THE_FOLDER = {
    "checkpoint of fewer processes": (of_two_processes, "expected a checkpoint of 1 processes"),
    "weights of a stage cut off": (partial(cut, "stages/1-math/model.safetensors"), "stages/1-math: .*cannot be read"),
    "scores of a stage cut off": (partial(cut, "scores/1-math/writing.jsonl"), "1-math/writing.jsonl: expected"),
}
CASES = {**BEFORE_THE_START, **IN_THE_SECOND_STAGE, **IN_THE_FOLDER}


QUICK = (*BEFORE_THE_START, "reward raises", "disk full in a stage", "weights of a stage cut off")


@pytest.mark.parametrize("name", slow_but(CASES, *QUICK))
def test_bad_input(tmp_path, earned, request, name):
    happen, message = CASES[name]
    folder = tmp_path / "run"
    shutil.copytree(earned, folder)
    if name in IN_THE_FOLDER:
        happen(folder)
        happen = go_on
    before = state(folder)
    with pytest.raises((ValueError, OSError), match=f"(?s){message}"):
        happen(folder)
    assert state(folder) == before
    if name in IN_THE_SECOND_STAGE:
        assert_same(weights(go_on(folder)), request.getfixturevalue("whole"))
        assert json.loads((folder / "stages.json").read_text())["stages"][2]["steps"] == 8
