import json
import shutil

import pytest

from trl_interfere.run import Run, StageRecord
from trl_interfere.training.requested_refresh import RequestedRefresh
from trl_interfere.training.schedule import Stage


def requested(folder, domain, steps):
    return RequestedRefresh(folder, Stage(domain, "refresh", {"max_steps": steps}))


def record(index, kind, domain, overrides=None):
    return StageRecord(index, kind, domain, None, 1, 1.0, {}, 0, overrides or {}, {})


@pytest.fixture
def run(tmp_path):
    """Function that writes a run of two domains."""

    def write(current=None):
        run = Run.new(tmp_path, {})
        run.stages = [record(0, "base", None), record(1, "train", "math"), record(2, "train", "qa")]
        run.current = current
        run.save()
        return tmp_path

    return write


def checkpoint(folder, name, step, steps):
    path = folder / "checkpoints" / name / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": steps}))


def test_a_stopped_refresh_goes_on_with_its_own_steps(run):
    folder = run()
    checkpoint(folder, "3-refresh-math", 4, 10)
    assert requested(folder, "math", 10).wanted == 1
    with pytest.raises(ValueError, match="a refresh of math with 10 steps was stopped in .*; expected 10, .*found 5"):
        requested(folder, "math", 5)
    with pytest.raises(ValueError, match="a refresh of math with 10 .*expected math, .*found qa.*give it up"):
        requested(folder, "qa", 5)  # it would be left behind
    shutil.rmtree(folder / "checkpoints" / "3-refresh-math")
    requested(folder, "qa", 5)


def test_a_half_written_state_is_skipped(run):
    folder = run()
    checkpoint(folder, "3-refresh-math", 4, 10)
    (folder / "checkpoints/3-refresh-math/checkpoint-4/trainer_state.json").write_text('{"max_st')
    assert requested(folder, "math", 5).wanted == 1


def test_checkpoints_of_other_stages_do_not_count(run):
    folder = run()
    checkpoint(folder, "2-qa", 4, 10)
    requested(folder, "math", 5)


def test_one_that_was_trained_and_not_scored(run):
    folder = run(current=record(3, "refresh", "math", overrides={"max_steps": 7}))
    assert requested(folder, "math", 7).wanted == 1
    with pytest.raises(ValueError, match="math with 7 steps was stopped"):
        requested(folder, "math", 8)


def test_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="stages.json"):
        requested(tmp_path, "math", 5)
