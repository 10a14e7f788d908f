import merging
import pytest
import torch

from trl_interfere.analysis.references import References
from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.models import load_model


def states(count=3):
    torch.manual_seed(0)
    return [{"w": torch.randn(6, 7), "b": torch.randn(9)} for _ in range(count)]


def test_task_arithmetic_by_hand():
    base, *tasks = states()
    found = merging.merge(base, tasks, "task_arithmetic", 0.3)
    for name in base:
        torch.testing.assert_close(found[name], base[name] + 0.3 * sum(task[name] - base[name] for task in tasks))
    with pytest.raises(ValueError, match="method"):
        merging.merge(base, tasks, "mean", 1.0)


@pytest.mark.parametrize("density, scale", [(0.2, 1.0), (0.5, 0.5)])
def test_ties_as_written_in_its_paper(density, scale):
    base, *tasks = states(4)
    found = merging.merge(base, tasks, "ties", scale, density)
    for name in base:
        deltas = torch.stack([task[name] - base[name] for task in tasks]).flatten(1)
        trimmed = torch.zeros_like(deltas)
        for row, delta in enumerate(deltas):  # trim
            kept = delta.abs().argsort(descending=True)[: int(density * delta.numel())]
            trimmed[row, kept] = delta[kept]
        expected = []
        for column in trimmed.T:  # elect a sign by mass, then the mean of those that agree
            sign = 1.0 if column.sum() >= 0 else -1.0
            agreeing = [value for value in column.tolist() if value * sign > 0]
            expected.append(scale * sum(agreeing) / len(agreeing) if agreeing else 0.0)
        torch.testing.assert_close(found[name], base[name] + torch.tensor(expected).reshape(base[name].shape))


def test_fisher_merging_weighs_each_element():
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    start = [{name: p.detach().clone() for name, p in model.named_parameters()} for model in models]
    weights = [{name: torch.rand_like(tensor) for name, tensor in own.items()} for own in start]
    means = [torch.cat([tensor.flatten() for tensor in own.values()]).mean() for own in weights]
    merged = merging.fisher(models, weights)
    for name, parameter in merged.named_parameters():
        first, second = (own[name] / mean for own, mean in zip(weights, means, strict=True))
        expected = (first * start[0][name] + second * start[1][name]) / (first + second)
        torch.testing.assert_close(parameter, expected)


def test_squared_gradients_are_those_of_each_sample():
    model = load_model(MODEL_FOLDER)
    references = References("math", [[3, 4], [5, 6, 7]], [[8, 9], [10]], 2)
    found = merging.squared_gradients(model, references)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for prompt, completion in zip(references.prompts, references.completions, strict=True):
        model.zero_grad()
        log_probs = model(torch.tensor([prompt + completion])).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        log_probs[range(len(completion)), completion].sum().backward()
        for name, parameter in model.named_parameters():
            expected[name] += parameter.grad**2 / 2
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-8)
