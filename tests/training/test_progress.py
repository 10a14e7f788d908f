"""What is said about stages, without a terminal and with one."""

import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from trl_interfere.evaluation.score_matrix import ScoreMatrix
from trl_interfere.training.progress import StageProgress
from trl_interfere.training.schedule import Stage


def stage_record(index, kind, domain=None):
    return SimpleNamespace(kind=kind, domain=domain, name=f"{index}-{domain or kind}")


@pytest.mark.parametrize("terminal", [False, True])
def test_stages_and_scores(terminal):
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, soft_wrap=True, highlight=False)
    progress = StageProgress([5, 3, 1], console=console)
    clock = iter(range(10_000))
    progress.bars.get_time = progress.bars.tasks[0]._get_time = lambda: next(clock)
    stages = [(Stage("math"), 3), (Stage("qa"), 1), (Stage("math", kind="refresh"), 2)]
    records = [stage_record(0, "base"), stage_record(1, "train", "code"), stage_record(2, "refresh", "code")]
    for stage, steps in stages:
        progress.request_stage(records, None, schedule_finished=False)
        progress.on_stage_begin(len(records), stage)
        state = SimpleNamespace(max_steps=steps, global_step=0)
        progress.on_train_begin(None, state, None)
        for state.global_step in range(1, steps + 1):
            progress.on_step_end(None, state, None)
            progress.on_log(None, state, None, logs={"reward": 0.25})
        progress.on_train_end(None, state, None)
        records.append(stage_record(len(records), stage.kind, stage.domain))
        matrix = ScoreMatrix(["math"], [records[-1].name], [{"math": np.array([0.0, 1.0])}])
        progress.on_stage_end(records[-1], matrix)
    for line in ("stage 2 of 3: math, 3 steps", "stage 3 of 3: qa, 1 step", "refresh: math, 2 steps"):
        assert line in text.getvalue()
    assert progress.bars.tasks[0].total == 6  # of this process
    assert "after 3-math: math 50.0 [0.0, 100.0]" in text.getvalue()
    assert ("━" in text.getvalue()) == terminal
    if not terminal:
        lines = text.getvalue().splitlines()
        assert len(lines) == 6 + 6  # a stage has a line, each of its logs, and its scores
        # Two of the four steps of the schedule are left, and the clock ticks once or twice in a step.
        assert re.search(r"math, reward 0.25, step 2 of 3, 0:00:0\d left of the run", lines[2]), lines
