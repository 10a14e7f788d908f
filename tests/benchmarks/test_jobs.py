import importlib.util
import operator
from pathlib import Path

import pytest


spec = importlib.util.spec_from_file_location("jobs", Path(__file__).parents[2] / "benchmarks" / "jobs.py")
jobs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(jobs)


@pytest.mark.parametrize("count", [1, 2])
def test_all_calls_are_made(count, tmp_path):
    jobs.run_all(Path.touch, [(tmp_path / name,) for name in "abc"], count)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize("count", [1, 2])
def test_a_failure_is_not_hidden(count):
    with pytest.raises(ZeroDivisionError):
        jobs.run_all(operator.truediv, [(1, 1), (1, 0)], count)
