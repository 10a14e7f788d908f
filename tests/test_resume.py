"""A run that is killed with SIGKILL, at any point, goes on to the same bits. `make test-resume` tries more points."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


POINTS = os.environ.get("RESUME_POINTS")
SLOW = [("full", 12), ("adapter", 6), ("adapters", 6), ("distill", 4)]
PHASES = {"generation", "optimizer", "checkpoint", "evaluation", "between", "refresh"}


@pytest.mark.parametrize(
    ("setting", "points"),
    [*([] if POINTS else [("full", 3)]), *(pytest.param(*slow, marks=pytest.mark.slow) for slow in SLOW)],
)
def test_killed_and_resumed(tmp_path, setting, points):
    points = POINTS or str(points)
    seed = os.environ.get("RESUME_SEED", "0")
    script = Path(__file__).with_name("kill_and_resume.py")
    done = subprocess.run(
        [sys.executable, script, "--setting", setting, "--points", points, "--seed", seed, "--folder", tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and rows, done.stdout + done.stderr
    *rows, summary = rows
    print(summary)
    assert summary["failed"] == 0 and summary["points"] == len(rows) == min(int(points), summary["of"])
    phases = {"refresh"} if setting == "distill" else PHASES
    assert {row["phase"] for row in rows} >= (phases if int(points) >= len(phases) else set())
    assert summary["tensors"] >= 48 and summary["score_files"] == 8  # what was compared
    assert len({row["killed_at"][0] for row in rows}) == len(rows)
