"""Runs of seconds on the lab's model, for the tests of the trainer."""

import json
import os

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainerCallback

from trl_interfere import Domain, SequentialGRPOConfig, SequentialGRPOTrainer, StageCallback
from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.lab.domains import lab_rows
from trl_interfere.lab.math import math_reward
from trl_interfere.training.schedule import Stage


# `TEST_DEVICE=cuda` trains on an accelerator instead, where runs repeat to the bit only if they are asked to.
ON_CPU = os.environ.get("TEST_DEVICE", "cpu") == "cpu"
DEVICE = {"use_cpu": ON_CPU, "full_determinism": not ON_CPU}
SMALL = {"per_device_train_batch_size": 8, "num_generations": 4, "gradient_checkpointing": False, "bf16": False}
SMALL |= {**DEVICE, "report_to": [], "disable_tqdm": True}
SETTINGS = {**SMALL, "max_steps": 3, "learning_rate": 1e-3, "max_completion_length": 8, "seed": 7}
SETTINGS |= {"logging_steps": 1, "save_steps": 1}


def slow_but(names, *quick):
    """The names, of which `make test` runs the quick ones."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def text_reward(completions, **kwargs):
    """Differs between nearly any two texts, so that every step changes the weights."""
    return [sum(map(ord, completion)) % 97 / 97 for completion in completions]


def config(folder, **settings) -> SequentialGRPOConfig:
    return SequentialGRPOConfig(output_dir=str(folder), **{**SETTINGS, **settings})


def _domain(name, rows, rewards, settings) -> Domain:
    parts = {"train_dataset": Dataset.from_list(rows[:48]), "eval_dataset": Dataset.from_list(rows[48:])}
    return Domain(**{"name": name, **parts, "reward_funcs": rewards, **settings})


def math_domain(**settings) -> Domain:
    rows = lab_rows("math", "train", 64)
    return _domain("math", rows, [math_reward, text_reward], settings)


def writing_domain(**settings) -> Domain:
    # Other columns than math: a reward must only ever see rows of its own domain.
    rows = [{"prompt": row["prompt"], "words": row["words"]} for row in lab_rows("writing", "train", 64)]

    def words_reward(completions, words, **kwargs):
        assert all(" " in pair for pair in words)
        return text_reward(completions)

    return _domain("writing", rows, words_reward, settings)


def reward_model() -> LlamaForSequenceClassification:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(LlamaConfig(vocab_size=1024, num_labels=1, pad_token_id=0, **sizes))
    model.config._name_or_path = str(MODEL_FOLDER)
    return model


def scripted_domains(folder, script) -> list[Domain]:
    """Domains with the scores of a script, by the number of stages that have finished, whatever the weights say."""

    def scripted(shares):
        def metric(prompts, **kwargs):
            finished = len(json.loads((folder / "stages.json").read_text())["stages"])
            share = shares[min(finished, len(shares) - 1)]
            return [float(index < share * len(prompts)) for index, _ in enumerate(prompts)]

        return metric

    makers = {"math": math_domain, "writing": writing_domain}
    return [makers[name](metric=scripted(shares)) for name, shares in script.items()]


def build(folder, domains=None, callbacks=None, peft_config=None, **settings) -> SequentialGRPOTrainer:
    return SequentialGRPOTrainer(
        model=str(MODEL_FOLDER),
        args=config(folder, **settings),
        domains=domains or [math_domain(), writing_domain()],
        callbacks=callbacks,
        peft_config=peft_config,
    )


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


class Interrupt(TrainerCallback):
    """Stops a run as a crash would, at one step of one stage."""

    def __init__(self, domain_folder: str, step: int):
        self.domain_folder, self.step = domain_folder, step

    def on_step_begin(self, args, state, control, **kwargs):
        if args.output_dir.endswith(self.domain_folder) and state.global_step == self.step:
            raise KeyboardInterrupt


class AskOnce(StageCallback):
    """Asks for one refresh when the schedule has finished."""

    def __init__(self, stage=None):
        self.stage = stage or Stage("math", kind="refresh", overrides={"max_steps": 2})

    def request_stage(self, stages, score_matrix, schedule_finished):
        asked = any(record.kind == "refresh" for record in stages)
        return self.stage if schedule_finished and not asked else None
