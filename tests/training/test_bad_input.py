"""Bad input of every kind: one clear message, and nothing lost that a run has earned."""

import contextlib
import hashlib
import json
import resource
import shutil
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from datasets import Dataset
from tiny_runs import (
    SETTINGS,
    Interrupt,
    assert_same,
    build,
    config,
    math_domain,
    text_reward,
    weights,
    writing_domain,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_interfere import Domain, SequentialGRPOTrainer
from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.training.recipe_trainer import build_trainer


# With a constant rate one step too many would change the weights.
RUN = {"max_steps": 8, "lr_scheduler_type": "constant", "stage_overrides": {"math": {"max_steps": 1}}, "save_steps": 3}
MEGABYTE = 2**20
WRITING = r"stage 2-writing, step {}, domain 'writing': reward function 'words_reward' "


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


def state(folder) -> dict[str, str]:
    """Digest of what a run has earned: its finished stages, their weights and scores."""
    digests = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in ("stages/*/*", "scores/[01]-*/*")
        for path in folder.glob(pattern)
        if path.is_file() and not path.parent.name.startswith(".")
    }
    with contextlib.suppress(ValueError, OSError):
        content = json.loads((folder / "stages.json").read_text())
        digests["stages.json"] = json.dumps([content.get("run"), content.get("stages")])
    return digests


def fail(completions):
    raise RuntimeError("out of paper")


class FullDisk(TrainerCallback):
    """From one step of the second stage on, or from its end, files cannot grow beyond a size."""

    def __init__(self, size, step=None):
        self.size, self.step = size, step

    def _fill(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def on_step_begin(self, args, state, control, **kwargs):
        if args.output_dir.endswith("2-writing") and state.global_step + 1 == self.step:
            self._fill()

    def on_train_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith("2-writing") and self.step is None:
            self._fill()


def on_a_full_disk(size, step, folder):
    try:
        go_on(folder, callbacks=[FullDisk(size, step)])
    finally:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def without_a_manifest(folder):
    class Fill(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            sync.side_effect = OSError(28, "No space left on device")

    with patch("trl_interfere.io.os.fsync") as sync:
        go_on(folder, callbacks=[Fill()])


def without_weights(folder):
    shutil.copytree(MODEL_FOLDER, folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    SequentialGRPOTrainer(str(folder / "model"), config(folder / "new"), domains())


def in_a_file(folder):
    (folder / "new").write_text("notes")
    build(folder / "new", domains=domains())


def without_template(folder):
    rows = [{"prompt": [{"role": "user", "content": "1+1="}]}] * 16
    build(folder / "new", domains=domains(train_dataset=Dataset.from_list(rows)))


def from_yaml(folder, **changes):
    content = {
        "model": str(MODEL_FOLDER),
        "training": {**SETTINGS, "output_dir": str(folder / "new")},
        "domains": [{"name": "math", "train_dataset": "math.jsonl", "reward_funcs": "exact_match"}],
        **changes,
    }
    (folder / "math.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n' * 8)
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    build_trainer(folder / "run.yaml")


def too_short(folder):
    build(
        folder / "new", domains=domains(in_step(1, lambda completions: [None] * len(completions))), max_steps=2
    ).train()


def nan_model(folder):
    class Model(torch.nn.Module):
        config = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER).config

        def forward(self, input_ids, **kwargs):
            output = type("Output", (), {})()
            output.logits = torch.full((len(input_ids), 1), torch.nan)
            return output

    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    own = [math_domain(reward_funcs=[Model()], metric=text_reward)]
    SequentialGRPOTrainer(
        str(MODEL_FOLDER), config(folder / "new"), own, reward_processing_classes=[tokenizer]
    ).train()


def of_two_processes(folder):
    with contextlib.suppress(KeyboardInterrupt):
        go_on(folder, callbacks=[Interrupt("2-writing", 4)])
    for checkpoint in (folder / "checkpoints" / "2-writing").glob("checkpoint-*"):
        shutil.copy(checkpoint / "resume_state_0.json", checkpoint / "resume_state_1.json")


def edited(edit, folder):
    path = folder / "stages.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def damaged(name, damage, folder):
    damage(folder / name)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(path, value):
    def apply(content):
        *parents, last = path.split(".")
        for key in parents:
            content = content[int(key)] if key.isdigit() else content[key]
        content[last] = value

    return apply


def new(folder, domain=None, **settings):
    build(folder / "new", domains=domains(**(domain or {})), **settings)


def dataset(n, **columns):
    return Dataset.from_dict({"prompt": ["1+1="] * n, **{name: ["2"] * n for name in columns}})


def bare_reward(completions):
    return [0.0 for _ in completions]


def answer_metric(completions, answer, **kwargs):
    return [0.0 for _ in completions]


def both(**settings):
    return lambda folder: build(folder / "new", domains=domains(), **settings)


# name: (what happens to a folder with one finished stage, the message then or, for the last, on resume)
BEFORE_THE_START = {
    "no domains": (
        lambda folder: SequentialGRPOTrainer("model", config(folder / "new"), []),
        "^domains: .*found none",
    ),
    "empty dataset": (lambda folder: Domain("math", dataset(0), text_reward), "'math', train_dataset: .*one row"),
    "no prompt column": (
        lambda folder: Domain("math", Dataset.from_dict({"question": ["1+1="]}), text_reward),
        r"'math', train_dataset: .*'prompt', found \['question'\]",
    ),
    "fewer prompts than a batch": (
        partial(new, domain={"train_dataset": dataset(1)}),
        "'writing', train_dataset: expected at least 2 prompts, .*found 1",
    ),
    "nothing to train on": (
        partial(new, domain={"train_dataset": None}, order=["writing"]),
        "'writing' has no train_dataset",
    ),
    "missing column of a reward": (
        partial(new, domain={"reward_funcs": answer_metric}),
        r"'writing', answer_metric: expected a column 'answer' in train_dataset",
    ),
    "reward without **kwargs": (
        partial(new, domain={"reward_funcs": bare_reward}),
        "bare_reward: .*kwargs",
    ),
    "duplicate domains": (
        lambda folder: build(folder / "new", domains=[math_domain(), math_domain()]),
        r"^domains: .*unique.*\['math', 'math'\]",
    ),
    "domain named like a refresh": (lambda folder: math_domain(name="refresh-math"), "domain name 'refresh-math'"),
    "unknown domain in order": (both(order=["math", "chess"]), "^order: .*'chess'"),
    "unknown option of a stage": (
        both(stage_overrides={"math": {"max_step": 3}}),
        r"stage_overrides\['math'\].*'max_step', did you mean 'max_steps'",
    ),
    "option of no stage": (both(stage_overrides={"math": {"temperature": 2.0}}), r"stage_overrides.*'temperature'"),
    "stage option of the wrong type": (
        both(stage_overrides={"math": {"max_steps": "many"}}),
        r"stage_overrides\['math'\], max_steps: .*'many'",
    ),
    "stage option out of range": (
        both(stage_overrides={"math": {"learning_rate": -1}}),
        r"stage_overrides\['math'\], learning_rate: .*-1",
    ),
    "batch not divisible": (both(per_device_train_batch_size=6), r"\(6\) must be divisible by num_generations \(4\)"),
    "batch of a stage not divisible": (
        both(stage_overrides={"writing": {"num_generations": 3}}),
        r"stage_overrides\['writing'\]: .*num_generations=3",
    ),
    "evaluation without a dataset": (
        partial(new, eval_strategy="steps", eval_steps=1, domain={"eval_dataset": None}),
        "^eval_strategy: .*'writing', found none",
    ),
    "reward model without a metric": (
        partial(new, domain={"reward_funcs": torch.nn.Linear(1, 1), "metric": None}),
        "'writing': .*`metric`",
    ),
    "refused option": (both(data_seed=1), "^data_seed: 1 is not supported"),
    "model without weights": (without_weights, r"model\.safetensors.*found in directory .*/model"),
    "output_dir is a file": (in_a_file, "/new: cannot be written to"),
    "no chat template": (without_template, "'writing', train_dataset: .*chat template"),
    "unknown option in YAML": (
        partial(from_yaml, training={"learning_rat": 1.0}),
        r"run\.yaml, training: .*'learning_rat', did you mean 'learning_rate'",
    ),
    "a second run in the folder": (
        lambda folder: build(folder, domains=domains(), **RUN).train(),
        r"stages\.json: this folder holds a run.*resume_from_checkpoint=True",
    ),
    "rewards None for all of a short stage": (too_short, r"stage 2-writing, step 3, .*None.*words_reward"),
    "reward model that returns NaN": (nan_model, "stage 1-math, step 1, domain 'math': reward model .*nan"),
}
IN_THE_SECOND_STAGE = {
    "manifest of another run": (
        partial(go_on, learning_rate=2e-3),
        r'stages\.json: .*another run.*-  "learning_rate": 0\.001.*\+  "learning_rate": 0\.002',
    ),
    "reward returns NaN": (
        partial(go_on, reward=in_step(7, lambda completions: [0.5, float("nan")] * 4)),
        WRITING.format(7) + "returned nan for completion 1",
    ),
    "rewards None for all": (
        partial(go_on, reward=in_step(4, lambda completions: [None] * len(completions))),
        r"stage 2-writing, step 6, domain 'writing': .*words_reward.* 3 generation batches in a row",
    ),
    "reward of the wrong length": (
        partial(go_on, reward=in_step(7, lambda completions: [0.0])),
        WRITING.format(7) + "returned 1 rewards, expected 8",
    ),
    "reward returns words": (
        partial(go_on, reward=in_step(7, lambda completions: ["good"] * len(completions))),
        WRITING.format(7) + "returned 'good' for completion 0",
    ),
    "reward returns nothing": (
        partial(go_on, reward=in_step(7, lambda completions: None)),
        WRITING.format(7) + "returned NoneType",
    ),
    "reward raises": (
        partial(go_on, reward=in_step(7, fail)),
        WRITING.format(7) + "raised RuntimeError: out of paper",
    ),
    "metric raises": (
        partial(go_on, domain={"metric": lambda completions, **kwargs: fail(completions)}),
        "stage 2-writing, scores after step 8, domain 'writing', <lambda>: raised RuntimeError: out of paper",
    ),
    "disk full in the weights of a checkpoint": (
        partial(on_a_full_disk, MEGABYTE, 4),
        r"2-writing/checkpoint-6: cannot be written \(.*File too large",
    ),
    "disk full in a stage": (
        partial(on_a_full_disk, MEGABYTE, None),
        r"stages/2-writing: cannot be written \(.*File too large",
    ),
    "disk full in the manifest": (without_a_manifest, r"stages\.json: cannot be written \(.*No space left on device"),
}
STAGE = "stages/1-math/model.safetensors"
IN_THE_FOLDER = {
    "checkpoint of fewer processes": (of_two_processes, "expected a checkpoint of 1 processes"),
    "weights of a stage deleted": (partial(damaged, STAGE, Path.unlink), "stages/1-math: .*cannot be read"),
    "weights of a stage cut off": (partial(damaged, STAGE, cut), "stages/1-math: .*cannot be read"),
    "scores of a stage cut off": (
        partial(damaged, "scores/1-math/writing.jsonl", cut),
        r"scores/1-math/writing.jsonl: expected",
    ),
    "manifest edited: domain": (
        partial(edited, change("stages.1.domain", "chess")),
        r"stages\.json: stage 1, domain: expected 'math' .*found 'chess'",
    ),
    "manifest edited: folder": (
        partial(edited, change("stages.1.folder", "scores")),
        r"stages\.json: stage 1, folder: expected 'stages/1-math' .*found 'scores'",
    ),
}
CASES = {**BEFORE_THE_START, **IN_THE_SECOND_STAGE, **IN_THE_FOLDER}


QUICK = {*BEFORE_THE_START, "reward raises", "disk full in a stage", "manifest edited: domain"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
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
    if name in IN_THE_FOLDER:
        assert state(folder) == before
    else:
        content = json.loads((folder / "stages.json").read_text())
        after = {**state(folder), "stages.json": json.dumps([content["run"], content["stages"]])}
        assert before.items() <= after.items()
    if name in IN_THE_SECOND_STAGE:
        assert_same(weights(go_on(folder)), request.getfixturevalue("whole"))
        assert json.loads((folder / "stages.json").read_text())["stages"][2]["steps"] == 8


def test_a_tokenizer_without_a_pad_token_works(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    tokenizer.pad_token = None
    trainer = SequentialGRPOTrainer(
        str(MODEL_FOLDER), config(tmp_path, max_steps=1), domains(), processing_class=tokenizer
    )
    trainer.train()
    assert tokenizer.pad_token == tokenizer.eos_token  # TRL's way
    assert trainer.score_matrix.stages == ["0-base", "1-math", "2-writing"]
