"""
TRL's own tests of GRPOTrainer in our words: one domain, the lab's model, and a GRPOTrainer that ends with the same
weights. docs/trainer.md has what is left out; test_grpo_options compares settings.
"""

from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_runs import SETTINGS, assert_same, config, reward_model, slow_but, text_reward, weights
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from trl_interfere import Domain, SequentialGRPOTrainer
from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.lab.domains import lab_rows


LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
ROWS = [{"prompt": row["prompt"], "answer": str(row["answer"])} for row in lab_rows("math", "train", 32)]
TALK = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
DONE = "Done"


def standard(completions, **kwargs):
    return text_reward(completions)


def conversational(completions, **kwargs):
    return text_reward([completion[-1].get("content") or "" for completion in completions])


async def later(completions, **kwargs):
    return [len(completion) / 9 for completion in completions]


def at_times(completions, **kwargs):
    return [None if number % 2 else value for number, value in enumerate(text_reward(completions))]


def never(completions, **kwargs):
    return [None] * len(completions)


def with_column(completions, answer, **kwargs):
    return [float(len(text) + int(expected) % 7) for text, expected in zip(completions, answer, strict=True)]


def with_state(completions, trainer_state, **kwargs):
    return [value + trainer_state.global_step for value in text_reward(completions)]


def logging(completions, log_extra, log_metric, **kwargs):
    log_extra("text", list(completions))
    log_metric("half", 0.5)
    return text_reward(completions)


def multiply(a: int, b: int) -> int:
    return a * b


async def multiply_later(a: int, b: int) -> int:
    return a * b


class Game:
    """Owns its prompt and its reward."""

    times = 1.0

    def reset(self, **kwargs):
        self.counter = 0
        return "Count."

    def multiply(self, a: int, b: int) -> int:
        self.counter += a * b
        return self.counter

    def get_reward(self) -> float:
        return self.times * self.counter


class Other(Game):
    times = 2.0


for tool in (multiply, multiply_later, Game.multiply):
    tool.__doc__ = "Multiply.\n\nArgs:\n    a: A factor.\n    b: A factor."


def tokenizer():
    """The lab's, with a template that TRL knows how to find calls of tools in."""
    made = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    made.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    return made


def adapted():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL_FOLDER), LORA)


def plays(name):
    """Generation of a good call, one with a wrong argument, and words; once the calls have returned, of words."""
    words = tokenizer()
    calls = [f'<tool_call>\n{{"name": "{name}", "arguments": {{"a": 3, "{key}": 4}}}}\n</tool_call>' for key in "bc"]

    def generate(input_ids, **kwargs):
        texts = [*calls, DONE, DONE] if len(input_ids) % 4 == 0 else [DONE]
        ids = [words(text)["input_ids"] + [words.eos_token_id] for text in texts]
        padded = [row + [words.pad_token_id] * (max(map(len, ids)) - len(row)) for row in ids]
        batch = torch.tensor([padded[number % len(padded)] for number in range(len(input_ids))])
        return torch.cat([input_ids, batch.to(input_ids.device)], dim=1)

    return generate


TEMPLATE = {"processing_class": tokenizer()}
EVAL = {"eval_strategy": "steps"}
GAMES = {"game": Game, "other": Other}
PLAYED = [{"environment": name} for name in [*GAMES] * 16]
# name: rewards, rows, settings, arguments of the trainer, and what generates in place of the model
CASES = {
    "standard prompts": (standard, ROWS, {}, {}),
    "conversational prompts": (conversational, TALK, {"chat_template_kwargs": {"enable_thinking": False}}, TEMPLATE),
    "a stream": (standard, "stream", {}, {}),
    "workers": (standard, ROWS, {"dataloader_num_workers": 2}, {}),
    "a column": (with_column, ROWS, {}, {}),
    "sync and async": ([standard, later], ROWS, {}, {}),
    "None at times": ([at_times, with_column], ROWS, {}, {}),
    "weights": ([standard, with_column], ROWS, {"reward_weights": [0.7, 0.3]}, {}),
    "the state": (with_state, ROWS, {}, {}),
    "what a reward logs": (logging, ROWS, {"log_completions": True}, {}),
    "a reward model": ("model", ROWS, {}, {}),
    "a reward model and a function": (["model", standard], ROWS, {}, {}),
    "processing classes": (["model", standard], ROWS, {}, {"reward_processing_classes": [tokenizer(), None]}),
    "evaluation": (standard, ROWS, {**EVAL, "eval_steps": 1, "num_generations_eval": 2}, {}),
    "evaluation at the start": (standard, ROWS, {**EVAL, "eval_steps": 2, "eval_on_start": True}, {}),
    "an adapter": (standard, ROWS, {"learning_rate": 1e-2}, {"peft_config": LORA}),
    "an adapter with a penalty": (standard, ROWS, {"learning_rate": 1e-2, "beta": 0.1}, {"peft_config": LORA}),
    "an adapter, checkpointed": (standard, ROWS, {"gradient_checkpointing": True}, {"peft_config": LORA}),
    "a PEFT model": (standard, ROWS, {"learning_rate": 1e-2}, {"model": adapted}),
    "more generations than a batch": (standard, ROWS, {"num_generations": 16, "gradient_accumulation_steps": 2}, {}),
    "tools": (conversational, TALK, {}, {"tools": [multiply], "plays": "multiply"}),
    "async tools": (conversational, TALK, {}, {"tools": [multiply_later], "plays": "multiply_later"}),
    "malformed calls": (conversational, TALK, {}, {"tools": [multiply], "plays": 'multiply", "x'}),
    "an environment with its reward": (None, None, {}, {"environment_factory": Game, "plays": "multiply"}),
    "an environment beside a reward": (conversational, TALK, {}, {"environment_factory": Game, "plays": "multiply"}),
    "two environments": (None, PLAYED, {}, {"environment_factory": GAMES, "plays": "multiply"}),
}


@pytest.mark.parametrize("name", slow_but(CASES, "standard prompts", "tools"))
@pytest.mark.filterwarnings("ignore")
def test_ends_with_the_weights_of_grpo_trainer(tmp_path, name):
    rewards, rows, settings, extras = CASES[name]
    settings = {**SETTINGS, "max_steps": 2, "max_completion_length": 64 if "plays" in extras else 8, **settings}
    ours, plain = (
        train(tmp_path / side, side == "ours", rewards, rows, settings, extras) for side in ("ours", "plain")
    )
    assert_same(weights(ours), weights(plain))
    logged = [entry for entry in ours.log_history if "step" in entry]
    for entry in plain.state.log_history:
        own = {key: value for key, value in entry.items() if key in LOGGED or key.startswith("completions/")}
        assert any(own.items() <= other.items() for other in logged), entry
    start = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER).state_dict()
    last = {key: tensor.cpu() for key, tensor in weights(ours).items()}
    assert any(
        last[key].any() if "lora_B" in key else not torch.equal(last[key], start.get(key, last[key])) for key in last
    )
    if "tools" in extras:
        calls = next(entry for entry in logged if "tools/call_frequency" in entry)
        expected = (0.0, 0.0) if name == "malformed calls" else (0.5, 0.5)
        assert (calls["tools/call_frequency"], calls["tools/failure_frequency"]) == expected


LOGGED = ("loss", "reward", "grad_norm", "kl", "entropy", "eval_reward", "half")


def train(folder, ours, rewards, rows, settings, extras):
    extras, settings = dict(extras), dict(settings)
    generate = extras.pop("plays", None)
    if generate:
        extras["processing_class"] = tokenizer()
    model = extras.pop("model", lambda: str(MODEL_FOLDER))()
    data = None if rows is None else Dataset.from_list(ROWS if rows == "stream" else rows)
    held = data if "eval_strategy" in settings else None
    data = data.to_iterable_dataset() if rows == "stream" else data
    rewards = rewards if isinstance(rewards, list) else [] if rewards is None else [rewards]
    rewards = [reward_model() if reward == "model" else reward for reward in rewards]
    if ours:
        own_weights = settings.pop("reward_weights", None)
        domain = Domain("only", data, rewards, held, metric=standard, reward_weights=own_weights)
        trainer = SequentialGRPOTrainer(model, config(folder, **settings), [domain], **extras)
    else:
        trainer = GRPOTrainer(model, rewards or None, GRPOConfig(str(folder), **settings), data, held, **extras)
    with patch.object(trainer.model, "generate", side_effect=plays(generate)) if generate else nullcontext():
        trainer.train()
    return trainer


def test_no_learning_signal_changes_nothing(tmp_path):
    domain = Domain("only", Dataset.from_list(ROWS), standard)
    settings = {"mask_truncated_completions": True, "loss_type": "dapo", "max_completion_length": 1, "max_steps": 1}
    trainer = SequentialGRPOTrainer(str(MODEL_FOLDER), config(tmp_path, **settings), [domain])
    before = weights(trainer)
    trainer.train()
    assert trainer.log_history[1]["loss"] == pytest.approx(0.0)
    assert_same(before, weights(trainer))


def test_batches_hold_groups_and_are_used_again(tmp_path):
    seen = []
    settings = {"steps_per_generation": 4, "num_generations": 4, "per_device_train_batch_size": 6, "num_iterations": 2}
    domain = Domain("only", Dataset.from_list(ROWS), standard)
    args = config(tmp_path, shuffle_dataset=False, gradient_accumulation_steps=4, max_steps=3, **settings)
    trainer = SequentialGRPOTrainer(str(MODEL_FOLDER), args, [domain])
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: (seen.append(inputs), step(model, inputs, *rest))[1]
    trainer.train()
    prompts = [[row["prompt"] for row in inputs] for inputs in seen]
    groups = [[row["prompt"] for row in ROWS[start : start + 6] for _ in range(4)] for start in (0, 6)]
    assert prompts == [groups[0]] * 8 + [groups[1]] * 4


REFUSED = {
    "no reward": ({"reward_funcs": None}, {}, "only.*reward"),
    "no data": ({"train_dataset": None, "reward_funcs": None}, {}, "order"),
    "data without a length": ({"train_dataset": None}, {"environment_factory": Game, "max_steps": -1}, "max_steps"),
    "environments without data": ({"train_dataset": None}, {"environment_factory": GAMES}, "order"),
    "processing classes": ({}, {"reward_processing_classes": [None, None]}, "reward processing classes"),
    "rewards that are never given": ({"reward_funcs": [never]}, {}, "only.*None.*never"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(tmp_path, name):
    fields, extras, message = REFUSED[name]
    extras = dict(extras)
    args = config(tmp_path, max_steps=extras.pop("max_steps", 1))
    domain = Domain("only", **{"train_dataset": Dataset.from_list(ROWS), "reward_funcs": [standard], **fields})
    with pytest.raises(ValueError, match=message):
        SequentialGRPOTrainer(str(MODEL_FOLDER), args, [domain], **extras).train()
