import asyncio
import copy
import json
import os
import random
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import GenerationConfig
from trl import GRPOConfig, GRPOTrainer

from trl_interfere.domain import Domain
from trl_interfere.evaluation.checkpoints import scorer_of
from trl_interfere.evaluation.scorer import Scorer, apply_metric
from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.models import load_model, load_tokenizer
from trl_interfere.training.config import SequentialGRPOConfig


PROMPTS = ["1+2=", "a", "ff 00 12?", "3=", "9999999999", "h?", "8+8+8=", "cd"]


def plain_greedy(model, ids, max_new_tokens, end_ids):
    """One prompt, one token at a time, without padding and without a cache."""
    new = []
    while len(new) < max_new_tokens and (not new or new[-1] not in end_ids):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1]
        new.append(max(range(len(logits)), key=lambda token: logits[token].item()))
    return new


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("pad_token", ["<pad>", None])
def test_greedy_against_a_plain_loop(family, batch_size, pad_token, make_model, tokenizer):
    model, tokenizer = make_model(family, seed=4), copy.deepcopy(tokenizer)
    tokenizer.pad_token = pad_token
    scorer = Scorer(tokenizer, max_new_tokens=12, batch_size=batch_size)
    found = scorer.complete_ids(model, PROMPTS)
    encoded = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert found == [plain_greedy(model, ids, 12, {tokenizer.eos_token_id}) for ids in encoded]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
    assert scorer.complete(model, PROMPTS) == texts
    assert len(set(texts)) > len(PROMPTS) / 2


def test_completes_in_the_precision_of_the_training(make_model, tokenizer):
    defaults = {field.name: field.default for field in fields(SequentialGRPOConfig)}
    model, seen = make_model("llama").float(), set()
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    for fp16, bf16, dtype in (
        (False, None, torch.bfloat16),  # TRL's default
        (False, False, torch.float32),
        (True, None, torch.float16),
    ):
        seen.clear()
        scorer_of(tokenizer, {**defaults, "fp16": fp16, "bf16": bf16}).complete_ids(model, PROMPTS[:2])
        assert seen == {dtype}


def test_ends_at_any_end_token(make_model, tokenizer):
    model = make_model("llama", seed=4)
    free = Scorer(tokenizer, max_new_tokens=12).complete_ids(model, PROMPTS)
    end = max(range(3, 25), key=lambda token: sum(token in ids[1:-1] for ids in free))
    model.generation_config.eos_token_id = [end]
    found = Scorer(tokenizer, max_new_tokens=12, batch_size=3).complete_ids(model, PROMPTS)
    ends = {end, tokenizer.eos_token_id}
    assert found == [plain_greedy(model, tokenizer(prompt)["input_ids"], 12, ends) for prompt in PROMPTS]
    lengths = {len(ids) for ids in found if ids[-1] == end}
    assert len(lengths) > 1 and max(lengths) < 12  # some ended early, at different places


def test_conversational_prompts_go_through_the_chat_template(make_model, tokenizer):
    model = make_model()
    messages = [
        [{"role": "system", "content": "ab"}, {"role": "user", "content": "1+1"}],
        [{"role": "user", "content": "c"}],
    ]
    scorer = Scorer(tokenizer, max_new_tokens=6)
    assert scorer.complete(model, messages) == scorer.complete(model, ["ab1+1=", "c="])
    scorer.chat_template_kwargs = {"chat_template": "{{ messages[0].content }}{{ ending }}", "ending": "h"}
    assert scorer.encode_prompt(messages[1]) == tokenizer("ch")["input_ids"]


def test_greedy_whatever_the_generation_config_of_the_model(make_model, tokenizer):
    scorer, model = Scorer(tokenizer, max_new_tokens=12), make_model(seed=4)
    expected = scorer.complete_ids(model, PROMPTS)
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}
    changes = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "min_new_tokens": 12, "num_beams": 3}
    for name, value in {**changes, "min_length": 24}.items():
        model.generation_config = GenerationConfig(**{name: value}, **sampling)
        assert scorer.complete_ids(model, PROMPTS) == expected, name
        assert getattr(model.generation_config, name) == value  # it is put back


@pytest.mark.parametrize("temperature", [0.7, 2.0])
@pytest.mark.parametrize("setting", [{}, {"top_p": 0.3, "top_k": 2, "min_p": 0.5, "do_sample": True}])
def test_sampling_follows_the_softmax(temperature, setting, make_model, tokenizer):
    model = make_model(seed=2)
    model.generation_config.update(**setting)
    ids = tokenizer("1+2=")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
    chances = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    scorer = Scorer(tokenizer, max_new_tokens=1, batch_size=500, temperature=temperature)
    tokens = [new[0] for new in scorer.complete_ids(model, ["1+2="] * 2000)]
    found = np.bincount(tokens, minlength=len(chances)) / 2000
    assert (np.abs(found - chances) < 4.5 * np.sqrt(chances * (1 - chances) / 2000) + 1e-3).all()


def states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def test_sampling_is_reproducible_and_leaves_no_trace(make_model, tokenizer, make_domain):
    model, domain = make_model("llama", attention_dropout=0.9).train(), make_domain()
    domain.metric = lambda prompts, completions, **kwargs: [len(completion) / 8 for completion in completions]
    scorer = Scorer(tokenizer, max_new_tokens=8, batch_size=3, temperature=1.0, num_samples=3, seed=7)
    torch.manual_seed(0)
    before = states()
    first = scorer.score(model, domain, domain.selection_dataset)
    assert states() == before and model.training
    torch.manual_seed(1)
    second = scorer.score(model.eval(), domain, domain.selection_dataset)  # dropout is off in either mode
    assert not model.training
    assert first.completions == second.completions and np.array_equal(first.values, second.values)
    scorer.seed = 8
    assert scorer.score(model, domain, domain.selection_dataset).completions != first.completions
    # Three completions of each prompt, side by side, averaged by hand.
    groups = [first.completions[start : start + 3] for start in range(0, 15, 3)]
    assert len(groups) == 5 and any(len(set(group)) > 1 for group in groups)
    expected = [sum(len(completion) for completion in group) / 24 for group in groups]
    np.testing.assert_allclose(first.values, expected)
    assert first.samples.shape == (5, 3) and first.prompts == domain.selection_dataset["prompt"][:]


def test_settings_out_of_range(tokenizer):
    outside = {"max_new_tokens": 0, "batch_size": -1, "num_samples": 4, "temperature": float("nan")}
    for name, value in outside.items():  # four samples of a greedy model are one
        with pytest.raises(ValueError, match=name):
            Scorer(tokenizer, **{name: value})


def lengths(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


async def later(completions, **kwargs):
    return np.array([10.0, 20.0, 30.0], dtype=np.float32)


def sparse(completions, **kwargs):
    return [None, torch.tensor(2), None]


ROWS = [{"prompt": "1"}, {"prompt": "2"}, {"prompt": "3"}]


def test_weighted_rewards():
    domain = Domain("numbers", reward_funcs=[lengths, sparse, later], reward_weights=[1.0, 0.5, -0.1])

    async def notebook():  # an event loop runs already
        return apply_metric(domain, ROWS, ["a", "bb", ""])

    for values in (apply_metric(domain, ROWS, ["a", "bb", ""]), asyncio.run(notebook())):
        np.testing.assert_allclose(values, [1 + 0 - 1, 2 + 1 - 2, 0 + 0 - 3])
    domain.metric = lambda **kwargs: torch.tensor([1.0, 0.5, 2.0], dtype=torch.bfloat16, requires_grad=True)
    assert apply_metric(domain, ROWS, ["a", "bb", ""]).tolist() == [1, 0.5, 2]


def test_functions_get_what_trl_gives_them(tmp_path):
    """Arguments of a reward function in a training step of TRL, but for the trainer's own state."""
    seen = []

    def reward(**kwargs):
        kwargs["log_extra"]("answer", kwargs["answer"])
        kwargs["log_metric"]("share", 0.5)
        seen.append(kwargs)
        return [float(len(ids)) for ids in kwargs["completion_ids"]]

    columns = {"answer": ["x", "y"], "completion": ["p", "q"], "completion_ids": [[9], [9]]}
    domain = Domain("numbers", Dataset.from_dict({"prompt": ["1", "2"], **columns}), reward_funcs=reward)
    sizes = {"max_steps": 1, "per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 2}
    quiet = {"report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    args = GRPOConfig(str(tmp_path), **sizes, **quiet)
    GRPOTrainer(str(MODEL_FOLDER), reward, args=args, train_dataset=domain.train_dataset).train()
    model, scorer = load_model(MODEL_FOLDER), Scorer(load_tokenizer(MODEL_FOLDER), max_new_tokens=7, batch_size=1)
    scores = scorer.score(model, domain, domain.train_dataset)
    assert seen[0].keys() == seen[-1].keys() and len(seen) == 2
    lists = [{name for name, value in kwargs.items() if isinstance(value, list)} for kwargs in seen]
    assert lists[0] == lists[1] == {"prompts", "completions", "completion_ids", "answer", "domain"}
    assert seen[1]["completion_ids"] == scorer.complete_ids(model, ["1", "2"])
    assert seen[1]["completions"] == scores.completions and seen[1]["answer"] == ["x", "y"]
    assert scores.values.tolist() == [len(ids) for ids in seen[1]["completion_ids"]]


def test_completions_of_conversations_are_messages():
    def metric(completions, **kwargs):
        return [completion == [{"role": "assistant", "content": "a"}] for completion in completions]

    rows = [{"prompt": [{"role": "user", "content": "1"}]}] * 2
    assert apply_metric(Domain("numbers", metric=metric), rows, ["a", "b"]).tolist() == [1.0, 0.0]


def broken(completions, **kwargs):
    raise KeyError("answer")


def of_environments(completions, environments, **kwargs):
    return [1.0] * len(completions)


def test_broken_metrics():
    for function, message in (
        (lambda **kwargs: [1.0] * 2, "3 finite values"),
        (lambda **kwargs: [0.0, 1.0, float("nan")], "3 finite values"),
        (lambda **kwargs: ["good"] * 3, "one number per completion"),
        (broken, ", broken: .*KeyError: 'answer'"),
        (torch.nn.Linear(1, 1), "a reward model"),
        ("some/reward-model", "a reward model"),
        (of_environments, "environments.*metric"),
    ):
        with pytest.raises(ValueError, match=f"domain 'numbers'.*{message}"):
            apply_metric(Domain("numbers", reward_funcs=function), ROWS, ["a", "b", "c"])
    with_metric = Domain("numbers", reward_funcs=of_environments, metric=lengths)
    assert apply_metric(with_metric, ROWS, ["a", "bb", ""]).tolist() == [1, 2, 0]


def score_numbers(accelerator=None):
    """Scores of five prompts and of one, how often the metric was called, and what a broken one raises."""
    calls, generated = [], []

    def length(completions, **kwargs):
        calls.append(len(completions))
        return [len(text) / 8 for text in completions]

    model, scorer = load_model(MODEL_FOLDER, dtype="float64"), Scorer(load_tokenizer(MODEL_FOLDER), max_new_tokens=6)
    complete_ids = scorer.complete_ids
    scorer.complete_ids = lambda model, prompts: generated.append(len(prompts)) or complete_ids(model, prompts)
    rows = Dataset.from_dict({"prompt": PROMPTS[:5]})
    found = [scorer.score(model, Domain("numbers", metric=length), rows.select(range(n)), accelerator) for n in (5, 1)]
    with pytest.raises(ValueError) as error:
        scorer.score(model, Domain("numbers", metric=broken), rows, accelerator)
    scores = [[part.values.tolist(), part.completions] for part in found]
    return {"scores": scores, "error": str(error.value), "calls": calls, "generated": generated}


def test_two_processes_get_the_scores_of_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path)], env=environment, timeout=120, check=True)
    expected = score_numbers()
    assert expected["calls"] == expected.pop("generated")[:2] == [5, 1]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.pop("generated") == [3, 1, 3]  # every process takes part, where there are fewer prompts too
        assert found == {**expected, "calls": [[5, 1], []][rank]}  # the main one alone calls the metric


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    Path(sys.argv[1], f"{accelerator.process_index}.json").write_text(json.dumps(score_numbers(accelerator)))
