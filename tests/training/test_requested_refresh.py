import pytest

from trl_interfere.run import Run, StageRecord
from trl_interfere.training.requested_refresh import RequestedRefresh
from trl_interfere.training.schedule import Stage


def requested(folder, domain, steps=10):
    return RequestedRefresh(folder, Stage(domain, "refresh", {"max_steps": steps}))


@pytest.fixture
def run(tmp_path):
    """Function that writes a run of two domains; `current` is trained and not scored."""

    def write(current=None):
        run = Run.new(tmp_path, {})
        for index, (kind, domain) in enumerate([("base", None), ("train", "math"), ("train", "qa")]):
            run.stages.append(StageRecord(index, kind, domain, None, 1, 1.0, {}, 0, {}, {}))
        run.current = current
        run.save()
        return tmp_path

    return write


def test_another_refresh_that_was_stopped_is_not_left_behind(run):
    folder = run()
    (folder / "checkpoints" / "2-qa" / "checkpoint-4").mkdir(parents=True)  # of no refresh
    (folder / "checkpoints" / "3-refresh-math").mkdir()  # without a checkpoint
    assert requested(folder, "qa").wanted == 1
    (folder / "checkpoints" / "3-refresh-math" / "checkpoint-4").mkdir()
    assert requested(folder, "math").wanted == 1
    with pytest.raises(ValueError, match="domain: .*3-refresh-math .*found qa"):
        requested(folder, "qa")


def test_one_that_was_trained_and_not_scored(run):
    folder = run(StageRecord(3, "refresh", "math", None, 1, 1.0, {}, 0, {"max_steps": 7}, {}))
    assert requested(folder, "math", 7).wanted == 1
    with pytest.raises(ValueError, match="max_steps: .*math with max_steps 7 was stopped.* found 8"):
        requested(folder, "math", 8)
