import copy

import numpy as np
import pytest
import torch
from datasets import Dataset

from trl_interfere.analysis.config import InterferenceConfig
from trl_interfere.analysis.gradients import _has_room, checkpointed, mean_gradient, mean_loss
from trl_interfere.analysis.objectives import ForwardKL, grpo
from trl_interfere.analysis.references import References, collect_rollouts
from trl_interfere.domain import Domain


def log_probabilities(model, prompt, completion):
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)


def test_grpo_against_single_completions(make_model, sequences):
    model, reference = make_model(), make_model()
    advantages = [1.5, -0.5, 0.0, -2.0, 0.25]
    prompts, completions = (list(part) for part in zip(*sequences, strict=True))
    batches = References("numbers", prompts, completions, 5, advantages).batches(2, 0, torch.device("cpu"))
    loss, gradient = mean_gradient(model, batches, grpo)
    terms, tokens = [], 0
    for advantage, (prompt, completion) in zip(advantages, sequences, strict=True):
        chosen = log_probabilities(reference, prompt, completion)[range(len(completion)), completion]
        terms.append(-advantage * chosen.sum())
        tokens += len(completion)
    expected = sum(terms) / tokens
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    expected = torch.autograd.grad(expected, list(reference.parameters()))
    torch.testing.assert_close(list(gradient.values()), list(expected), rtol=1e-6, atol=1e-8)


def test_kl_against_single_tokens(make_model, moved, sequences, make_batches):
    base = make_model("llama")
    model = moved(base, scale=0.1)
    other = copy.deepcopy(model)
    loss, gradient = mean_gradient(model, make_batches(sequences), ForwardKL(base))
    terms = []
    for prompt, completion in sequences:
        with torch.no_grad():
            expected = log_probabilities(base, prompt, completion)
        found = log_probabilities(other, prompt, completion)
        terms += (expected.exp() * (expected - found)).sum(dim=-1)
    expected = sum(terms) / len(terms)
    assert loss == pytest.approx(expected.item(), rel=1e-9) and loss > 0
    assert mean_loss(model, make_batches(sequences), ForwardKL(base)) == pytest.approx(loss, rel=1e-9)
    expected = torch.autograd.grad(expected, list(other.parameters()))
    torch.testing.assert_close(list(gradient.values()), list(expected), rtol=1e-8, atol=1e-11)
    assert all(parameter.grad is None for parameter in base.parameters())


def test_gradient_checkpointing_changes_nothing(make_model, sequences, make_batches):
    model, batches = make_model("llama", attention_dropout=0.5), make_batches(sequences)
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    loss, expected = mean_gradient(model, batches)
    plain = len(calls)
    with checkpointed(model):
        found_loss, found = mean_gradient(model, batches)
    assert len(calls) - plain == 2 * plain  # activations were computed again
    assert found_loss == loss
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not any(module.training for module in model.modules())


@pytest.fixture
def rollouts(make_model, tokenizer):
    def sample(seed=0, **settings):
        def shortness(completions, **kwargs):
            return [1.0 / (1 + len(completion)) + completion.count("a") for completion in completions]

        domain = Domain(
            "numbers",
            selection_dataset=Dataset.from_dict({"prompt": ["1+1=", "22?", "abc"]}),
            reward_funcs=shortness,
            metric=lambda completions, **kwargs: [0.0] * len(completions),  # rewards count, not the metric
        )
        config = InterferenceConfig(objective="grpo", num_generations=4, max_new_tokens=6, seed=seed, **settings)
        return collect_rollouts(make_model(), tokenizer, domain, config), shortness

    return sample


def test_rollouts(rollouts, tokenizer):
    references, reward = rollouts()
    assert references.considered == 3 and references.group_size == 4 and len(references.completions) == 12
    expected = [tokenizer(prompt)["input_ids"] for prompt in ("1+1=", "22?", "abc") for _ in range(4)]
    assert references.prompts == expected
    rewards = np.reshape(reward(tokenizer.batch_decode(references.completions, skip_special_tokens=True)), (3, 4))
    for group, advantages in zip(rewards, np.reshape(references.advantages, (3, 4)), strict=True):
        np.testing.assert_allclose(advantages, (group - group.mean()) / (np.std(group, ddof=1) + 1e-4))
    assert rollouts()[0] == references
    assert rollouts(seed=1)[0].completions != references.completions
    (batch,) = references.batches(12, 0, torch.device("cpu"))
    completions = [row[row != -100].tolist() for row in batch["labels"]]
    expected = zip(references.completions, np.float32(references.advantages).tolist(), strict=True)
    assert sorted(zip(completions, batch["advantages"].tolist(), strict=True)) == sorted(expected)


def test_halves_keep_groups_together(rollouts):
    references, _ = rollouts()
    halves = references.halves()
    assert [len(half.prompts) for half in halves] == [8, 4] and [half.considered for half in halves] == [2, 1]
    groups = {tuple(half.prompts[index]) for half in halves[:1] for index in range(8)}
    assert groups.isdisjoint(map(tuple, halves[1].prompts))
    assert sorted(halves[0].advantages + halves[1].advantages) == sorted(references.advantages)
    single = references.take([0, 1, 2, 3])
    assert single.halves() == [single]


def test_equal_rewards(make_model, make_domain, tokenizer):
    config = InterferenceConfig(num_generations=3, max_new_tokens=2)
    with pytest.raises(ValueError, match="'numbers': the 3 completions of each of 5 prompts have equal rewards"):
        collect_rollouts(make_model(), tokenizer, make_domain(), config)


@pytest.mark.parametrize("batch_size", [1, 3, 5])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_gradient_against_autograd_on_single_tokens(
    family, batch_size, make_model, sequences, make_batches, token_loss
):
    model, reference = make_model(family), make_model(family)
    _, first = mean_gradient(model, make_batches(sequences, batch_size))
    loss, second = mean_gradient(model, make_batches(sequences, batch_size))  # that of an earlier call does not leak
    expected_loss = token_loss(reference, sequences)
    expected = torch.autograd.grad(expected_loss, list(reference.parameters()))
    assert loss == pytest.approx(expected_loss.item(), rel=1e-12)
    assert mean_loss(model, make_batches(sequences)) == pytest.approx(loss, rel=1e-12)
    for gradient in (first, second):
        assert list(gradient) == [name for name, _ in reference.named_parameters()]
        torch.testing.assert_close(list(gradient.values()), list(expected), rtol=1e-9, atol=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("total", "expected"), [(90, True), (84, False)])
def test_the_next_pass_must_fit_beside_the_gradient(monkeypatch, total, expected):
    # The gradient takes 10 of 30, and at its peak the pass took 44: 30 + 1.25 * 44 = 85.
    memory = {"memory_allocated": 30, "max_memory_allocated": 64, "memory_reserved": 64}
    for name, size in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - 64, total))
    assert _has_room(torch.device("cuda:0"), held=20) is expected
