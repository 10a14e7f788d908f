import importlib.util
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def merging():
    path = Path(__file__).parents[2] / "benchmarks" / "merging.py"
    spec = importlib.util.spec_from_file_location("merging", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def states(count=3):
    generator = torch.Generator().manual_seed(0)
    return [
        {"w": torch.randn(6, 7, generator=generator), "b": torch.randn(9, generator=generator)} for _ in range(count)
    ]


def test_task_arithmetic_by_hand(merging):
    base, *tasks = states()
    found = merging.merge(base, tasks, "task_arithmetic", 0.3)
    for name in base:
        torch.testing.assert_close(found[name], base[name] + 0.3 * sum(task[name] - base[name] for task in tasks))
    with pytest.raises(ValueError, match="method"):
        merging.merge(base, tasks, "mean", 1.0)


@pytest.mark.parametrize("density, scale", [(0.2, 1.0), (0.5, 0.5)])
def test_ties_as_written_in_its_paper(density, scale, merging):
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
