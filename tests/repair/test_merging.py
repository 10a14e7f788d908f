import pytest
import torch

from trl_interfere.repair.merging import held, merge


def states(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"w": torch.randn(6, 7, generator=generator), "b": torch.randn(9, generator=generator)} for _ in range(count)
    ]


def test_task_arithmetic_by_hand():
    base, *tasks = states()
    found = merge(base, tasks, "task_arithmetic", 0.3)
    for name in base:
        expected = base[name] + 0.3 * sum(task[name] - base[name] for task in tasks)
        torch.testing.assert_close(found[name], expected)
    assert torch.equal(merge(base, tasks, "task_arithmetic", 0.0)["w"], base["w"])


@pytest.mark.parametrize("density", [0.2, 0.5])
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_ties_as_written_in_its_paper(density, scale):
    base, *tasks = states(4)
    found = merge(base, tasks, "ties", scale, density)
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


def test_held(make_model, moved):
    model = make_model()
    other = {name: parameter.detach().clone() for name, parameter in moved(model).named_parameters()}
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), held(model, other):
        assert all(torch.equal(parameter, other[name]) for name, parameter in model.named_parameters())
        raise RuntimeError("inside")
    assert all(torch.equal(parameter, kept[name]) for name, parameter in model.named_parameters())


def test_settings_out_of_range():
    base, *tasks = states()
    with pytest.raises(ValueError, match="method: expected one of .*found 'mean'"):
        merge(base, tasks, "mean", 1.0)
    with pytest.raises(ValueError, match="tasks: expected at least one checkpoint"):
        merge(base, [], "ties", 1.0)
    with pytest.raises(ValueError, match="density: expected a share above 0 and below 1, found 1"):
        merge(base, tasks, "ties", 1.0, 1.0)
