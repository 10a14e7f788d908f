"""The lab as a user runs it: one process, killed and started again, with the same results."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest


def start(folder: Path, seed: int = 3) -> subprocess.Popen:
    options = f"--steps 5 --prompts 24 --threads 1 --seed {seed}".split()
    command = [sys.executable, "-m", "trl_interfere", "lab", "--output-dir", str(folder), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(folder: Path, seed: int = 3, code: int = 0) -> str:
    process = start(folder, seed)
    output, _ = process.communicate(timeout=540)
    assert process.returncode == code, output
    return output


def kill_when(folder: Path, condition) -> None:
    process = start(folder)
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, "the lab ended before it could be killed:\n" + process.communicate()[0]
        assert time.monotonic() < deadline, "the lab did not come to the point at which it is killed"
        time.sleep(0.005)
    process.kill()
    process.communicate()


def read(folder: Path, ignored: str = "nothing") -> dict:
    def kept(pairs):
        return {key: value for key, value in pairs if ignored not in key}

    return json.loads((folder / "results.json").read_text(), object_pairs_hook=kept)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lab") / "run"
    output = finish(folder)
    assert "Score after each stage" in output and "Repair" in output
    return folder


def test_results_report_and_figures(finished):
    results = read(finished)
    assert results["schema_version"] == 2 and results["seed"] == 3
    assert results["order"] == ["code", "math", "qa", "writing"]
    stages = results["stages"]
    trained = [(stage["kind"], stage["domain"], stage["steps"]) for stage in stages[:5]]
    assert trained == [("base", None, 0), *(("train", name, 5) for name in results["order"])]
    for stage in stages:
        assert list(stage["scores"]) == results["order"]
        for score in stage["scores"].values():
            assert 0 <= score["low"] <= score["value"] <= score["high"] <= 100 and score["n"] == 24
    pairs = results["pairs"]
    assert [(pair["earlier"], pair["later"]) for pair in pairs] == [("math", ["qa", "writing"]), ("math", ["qa"])]
    for pair in pairs:  # the attribution is complete
        damage = pair["loss_after"] - pair["loss_before"]
        assert pair["attributed"] + pair["outside_routes"] == pytest.approx(damage, rel=0.02)
    routes = [(row["criterion"], row["budget"]) for row in results["rivals"] if row["arm"] == "routes"]
    assert routes == [("damage", 0.02), ("route_conflict", 0.02), ("random", 0.02), ("damage", 0.32)]
    assert [row["arm"] for row in results["rivals"][4:]] == ["interpolation", "refresh"]
    for row in filter(None, [*results["rivals"], results["healed"]]):
        assert set(row["domains"]) == set(results["order"])
        assert row["worst"] == min(found["change"]["value"] for found in row["domains"].values())
    assert all(seconds >= 0 for seconds in results["seconds"].values())
    report = (finished / "report.md").read_text()
    for name in ("scores", "module_cosines", "damage_concentration", "pareto"):
        assert (finished / "figures" / f"{name}.png").stat().st_size > 5000
        assert f"figures/{name}.png" in report
    assert "nan" not in report.split("## What broke")[0]
    assert not [path for path in finished.rglob("*") if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]


def test_commands_take_a_run_of_the_lab(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    command = [sys.executable, "-m", "trl_interfere", "heal", str(folder), "--domain", "math", "--max_drop", "100"]
    result = subprocess.run([*command, "--threads", "1"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert json.loads((folder / "repair" / "repair.json").read_text())["domains"]["math"]["n"] == 24


@pytest.mark.slow
def test_killed_and_started_again_ends_with_the_same_results(finished, tmp_path):
    folder = tmp_path / "run"
    stages, checkpoint = folder / "stages.json", folder / "checkpoints" / "2-math" / "checkpoint-3"
    points = {
        "in the middle of a stage": (checkpoint / "trainer_state.json").exists,
        "between stages": lambda: stages.exists() and '"stages/2-math"' in stages.read_text(),
        "in the analysis": lambda: (folder / "stages" / "4-writing").exists() and any(folder.glob("analysis/math/*")),
        "between the repairs": (folder / "rivals.json").exists,
    }
    for point, condition in points.items():
        assert not condition(), f"{point}: a kill before it came too late"
        kill_when(folder, condition)
        assert not (folder / "results.json").exists()
    finish(folder)
    assert read(folder, "seconds") == read(finished, "seconds")
    for weights in sorted(finished.glob("stages/*/model.safetensors")):
        assert weights.read_bytes() == (folder / weights.relative_to(finished)).read_bytes(), weights
    started_again = read(folder)
    finish(folder)  # a finished run is left as it is
    assert read(folder) == started_again


def test_a_folder_of_another_run_is_refused_and_left_alone(finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    output = finish(finished, seed=4, code=2)
    assert "belongs to another run" in output and '"seed": 3' in output and '"seed": 4' in output
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
