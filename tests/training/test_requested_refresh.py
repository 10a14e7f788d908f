import pytest

from trl_interfere.run import Run, StageRecord
from trl_interfere.training.requested_refresh import RequestedRefresh
from trl_interfere.training.schedule import Stage


def test_another_refresh_that_was_stopped_is_not_left_behind(tmp_path):
    run = Run.new(tmp_path, {})
    for index, (kind, domain) in enumerate([("base", None), ("train", "math"), ("train", "qa")]):
        run.stages.append(StageRecord(index, kind, domain, None, 1, 1.0, {}, 0, {}, {}))
    run.save()

    def requested(domain, steps=7):
        return RequestedRefresh(tmp_path, Stage(domain, "refresh", {"max_steps": steps}))

    (tmp_path / "checkpoints" / "2-qa" / "checkpoint-4").mkdir(parents=True)  # of no refresh
    (tmp_path / "checkpoints" / "3-refresh-math").mkdir()  # without a checkpoint
    assert requested("qa").wanted == 1
    (tmp_path / "checkpoints" / "3-refresh-math" / "checkpoint-4").mkdir()
    assert requested("math").wanted == 1
    with pytest.raises(ValueError, match="domain: .*3-refresh-math .*found qa"):
        requested("qa")
    # trained and not scored
    run.current = StageRecord(3, "refresh", "math", None, 1, 1.0, {}, 0, {"max_steps": 7}, {})
    run.save()
    assert requested("math").wanted == 1
    with pytest.raises(ValueError, match="max_steps: .*math with max_steps 7 was stopped.* found 8"):
        requested("math", 8)
