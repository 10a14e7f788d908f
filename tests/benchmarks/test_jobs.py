import operator
from pathlib import Path

import jobs
import pytest


@pytest.mark.parametrize("count", [1, 2])
def test_all_calls_are_made_and_a_failure_is_not_hidden(count, tmp_path):
    jobs.run_all(Path.touch, [(tmp_path / name,) for name in "abc"], count)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    with pytest.raises(ZeroDivisionError):
        jobs.run_all(operator.truediv, [(1, 1), (1, 0)], count)
