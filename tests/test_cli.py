"""The command line: one run through all commands, and one clear message with exit code 2 for bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from finished_run import settings, write

from trl_interfere import InterferenceReport, Run
from trl_interfere.cli import COMMANDS, main
from trl_interfere.evaluation.bootstrap import difference
from trl_interfere.evaluation.flips import flips
from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.lab.domains import lab_rows
from trl_interfere.repair.repair import Repair


@pytest.fixture
def run(capsys, monkeypatch):
    """Function that runs a command and returns its exit code and what it printed, as in a log."""
    monkeypatch.delenv("COLUMNS", raising=False)

    def run(*arguments) -> tuple[int, str, str]:
        try:
            main(list(map(str, arguments)))
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        output = capsys.readouterr()
        assert "Traceback" not in output.err and "\x1b" not in output.out + output.err
        return code, output.out, output.err

    return run


@pytest.fixture
def content(tmp_path) -> dict:
    return settings(tmp_path)


@pytest.fixture
def damaged(finished_run, tmp_path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(finished_run, tmp_path / "out")


def test_help_version_and_doctor(run):
    code, out, _ = run("--help")
    assert code == 0 and all(name in out for name in COMMANDS)
    for command in COMMANDS:
        code, out, _ = run(command, "--help")
        assert code == 0 and out.startswith(f"Example:\n  trl-interfere {command}"), out
    code, out, _ = run("train", "--help_options")
    assert code == 0 and "--score_samples" in out
    assert run("--version")[1].strip()[0].isdigit()
    code, out, _ = run("doctor")
    assert code == 0 and len(out.splitlines()) <= 20
    assert all(word in out for word in ("transformers", "bubblewrap", "vllm", "Hub", "disk", "Next:"))


EVALUATE = ["evaluate", "RUN", "--output_dir", "scores"]
TRAIN = ["train", "RECIPE"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trian"], "'train'"),
        (["heal"], "--final"),
        (["heal", "nowhere"], "nowhere.*stages.json"),
        (["heal", "out", "--max_dorp", "2"], "'max_drop'"),
        (["heal", "--final", "B", "--peak", "math", "--output_dir", "x"], "--peak.*'math'"),
        (["doctor", "--threads", "100000"], "--threads"),
        (["lab", "--config", "options.yaml"], "steps: "),
        (["lab", "--order", "code,chess"], "'chess'"),
        (["compare", "x", "--port", "0"], "--port"),
        (["heal", "\x1b[31mred"], "\\?\\[31mred"),
        ([*EVALUATE, "--domain", "math", "chess"], "'chess'"),
        ([*EVALUATE, "--split", "train"], "'train'"),
        ([*EVALUATE, "--num_samples", "2"], "num_samples"),
        ([*EVALUATE, "--engine", "sglang"], "engine"),
        (["evaluate", "nowhere", "--recipe", "RECIPE", "--output_dir", "scores"], "nowhere"),
        ([*TRAIN, "--learning_rat", "1e-5"], "'learning_rate'"),
        ([*TRAIN, "--per_device_train_batch_size", "6"], "divisible"),
        ([*TRAIN, "--stage_overrides", '{"math": {"temperature": 2}}'], "'temperature'"),
        ([*TRAIN, "--process-per-stage", "--max-stages", "1"], "max_stages"),
        ([*TRAIN, "--config", "x.yaml"], "train FILE"),
    ],
)
def test_bad_arguments(run, tmp_path, content, finished_run, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "options.yaml").write_text("steps: 0\noutput_dir: x\n")
    named = {"RUN": finished_run, "RECIPE": write(tmp_path, content)}
    before = sorted(tmp_path.iterdir())
    code, _, err = run(*(named.get(argument, argument) for argument in arguments))
    assert code == 2 and re.search(message, err, re.DOTALL), err
    assert sorted(tmp_path.iterdir()) == before


def test_the_lab_leaves_other_files_alone(tmp_path, run):
    (tmp_path / "thesis.txt").write_text("four years of work")
    code, _, err = run("lab", "--output-dir", tmp_path)
    assert code == 2 and str(tmp_path) in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_analyze(damaged, run, monkeypatch):
    code, out, err = run("analyze", damaged, "--threads", 1)
    assert code == 0, err
    lost, where, nats, after = out.splitlines()
    record = Run(damaged)
    peak, final = (record.scores(stage, "math") for stage in (record.stage("1-math"), record.final))
    assert f"math lost {difference(peak, final):.1f} points" in lost
    assert f"{len(flips(peak, final).lost)} were lost" in lost
    report = InterferenceReport.from_pretrained(damaged / "analysis" / "math")
    assert report.earlier == "math" and f"{report.damage:+.3f} nats" in nats and "layers" in where
    assert after.endswith(f"Next: trl-interfere heal {damaged}")
    assert (damaged / "analysis" / "math" / "figures" / "module_cosines.png").exists()
    before = (damaged / "analysis" / "math" / "report.json").read_bytes()

    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trl_interfere.reporting.plots.save_figures", full)
    code, _, err = run("analyze", damaged)
    assert code == 2 and "No space" in err  # and the analysis before is still there
    assert (damaged / "analysis" / "math" / "report.json").read_bytes() == before
    monkeypatch.undo()
    assert run("analyze", damaged)[0] == 0
    assert [path.name for path in (damaged / "analysis").iterdir()] == ["math"]

    shutil.rmtree(damaged / "analysis")
    content = json.loads((damaged / "stages.json").read_text())
    (damaged / "stages.json").write_text(json.dumps({**content, "stages": content["stages"][:1]}))
    code, out, err = run("analyze", damaged)
    assert code == 0 and out.startswith("Nothing was lost") and "--domain" in out, err
    assert not (damaged / "analysis").exists()


def test_analyze_checkpoints_from_elsewhere(finished_run, run, tmp_path):
    final, peak = finished_run / "stages" / "2-writing", f"math={MODEL_FOLDER}"
    checkpoints = ("--final", final, "--peak", peak, "--later", "writing")
    recipe = ("--recipe", finished_run.parent / "recipe.yaml")
    code, out, err = run("analyze", *checkpoints, *recipe, "--output_dir", tmp_path / "report", "--threads", 1)
    assert code == 0 and "nats" in out, err
    assert InterferenceReport.from_pretrained(tmp_path / "report").before == str(MODEL_FOLDER)
    for arguments in (checkpoints, (*checkpoints, *recipe), ("x", "--final", "y"), (finished_run, *checkpoints)):
        assert run("analyze", *arguments)[0] == 2


def test_heal_then_evaluate(damaged, run, tmp_path):
    code, out, err = run("heal", damaged, "--threads", 1, "--max_drop", 100)
    assert code == 0, err
    assert out.splitlines()[-1].endswith(f"Next: trl-interfere push {damaged} USER/REPO") and "recovered" in out
    record = json.loads((damaged / "repair" / "repair.json").read_text())
    assert Run(damaged).stages[-1].kind == "heal"

    final, peak, folder = damaged / "stages" / "2-writing", Run(damaged).weights("1-math"), tmp_path / "scores"
    arguments = ("evaluate", final, damaged, peak, "--peak", peak, "--output_dir", folder, "--threads", 1)
    code, out, err = run(*arguments)
    assert code == 0, err
    scores = json.loads((folder / "scores.json").read_text())
    first, healed, _ = scores["models"]
    assert first["changes"] == {} and scores["against"] == str(final) and scores["split"] == "test"
    assert healed["scores"]["math"]["value"] == pytest.approx(record["domains"]["math"]["healed"])
    change = healed["changes"]["math"]
    assert change["recovered"]["value"] == pytest.approx(record["domains"]["math"]["recovered"])
    assert change["flips"]["regained"] == record["domains"]["math"]["regained"]
    assert f"{change['points']['value']:.1f} [" in out and f"{change['recovered']['value']:.0%} [" in out
    rows = [json.loads(line) for line in (folder / healed["scores"]["math"]["file"]).read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in lab_rows("math", "test", 24)]
    code, _, err = run(*arguments)
    assert code == 2 and "--output_dir" in err


def test_rollback(damaged, run):
    rollback = ("rollback", damaged, "--budget", 0.1, "--max_drop", 100, "--threads", 1)
    code, _, err = run(*rollback)
    assert code == 2 and "trl-interfere analyze" in err and not (damaged / "rollback").exists()
    assert run("analyze", damaged, "--threads", 1)[0] == 0
    code, out, err = run(*rollback)
    assert code == 0 and out.splitlines()[-1].endswith(f"Next: trl-interfere heal {damaged}"), err
    repair = Repair.from_pretrained(damaged / "rollback")
    assert (repair.record["method"], repair.record["budget"]) == ("routes", 0.1)
    assert "math" in repair.record["domains"] and repair.base == str(damaged / "stages" / "2-writing")
    assert run(*rollback)[0] == 2  # the folder is not empty


def test_evaluate_gives_the_scores_of_the_run(finished_run, run, tmp_path):
    stage = finished_run / "stages" / "1-math"
    code, _, err = run("evaluate", stage, "--output_dir", tmp_path / "scores", "--threads", 1)
    assert code == 0, err
    (entry,) = json.loads((tmp_path / "scores" / "scores.json").read_text())["models"]
    record = Run(finished_run).stage("1-math")
    for domain, found in entry["scores"].items():
        kept = finished_run / record.scores[domain]["file"]
        assert (tmp_path / "scores" / found["file"]).read_bytes() == kept.read_bytes()
    sampled = ("--split", "selection", "--temperature", 1.0, "--num_samples", 4, "--domain", "math")
    models = (finished_run / "stages" / "1-math", finished_run)
    code, out, err = run("evaluate", *models, *sampled, "--max_new_tokens", 4, "--output_dir", tmp_path / "sampled")
    assert code == 0 and "by chance" in out, err
    content = json.loads((tmp_path / "sampled" / "scores.json").read_text())
    assert content["sampling"]["score_samples"] == 4 and list(content["models"][0]["scores"]) == ["math"]
    assert content["models"][0]["scores"]["math"]["n"] == 16


def test_refresh(damaged, run):
    settings = ("--steps", 1, "--learning_rate", 1e-6, "--max_drop", 100, "--threads", 1, "--keep")
    code, out, err = run("refresh", damaged, *settings)
    record = Run(damaged).stages[-1]
    overrides = {"learning_rate": 1e-6, "max_steps": 1}
    assert (record.name, record.steps, record.overrides) == ("3-refresh-math", 1, overrides), err
    change = difference(Run(damaged).scores(3, "math"), Run(damaged).scores(2, "math"))
    assert f"math by {change:+.1f} points" in out and code == (3 if change.value < 0 else 0)
    several = ("--domain", "math", "writing", "--steps", 1)  # not by rewards
    for arguments in (["--domain", "maths"], ["--step", "1"], ["--method", "sft"], several):
        assert run("refresh", damaged, *arguments)[0] == 2
    assert len(Run(damaged).stages) == 4
    code, out, err = run("refresh", damaged, *several, "--method", "distill", "--max_drop", 100, "--keep")
    record = Run(damaged).stages[-1]
    assert (record.name, record.overrides["teachers"].keys()) == ("4-refresh", {"math", "writing"}), err
    assert "math by" in out and "writing by" in out


def test_a_refresh_that_makes_things_worse_says_so_and_is_dropped(damaged, run, hub):
    worse = ("--domain", "writing", "--steps", 4, "--learning_rate", 0.05)
    worse += ("--push_to_hub", "--hub_model_id", "tester/run")
    before = Run(damaged).stages
    code, out, _ = run("refresh", damaged, *worse)
    assert code == 3 and "worse" in out and str(damaged / "stages" / "2-writing") in out
    assert Run(damaged).stages == before and not list(damaged.glob("*/3-*")) and hub.repos == {}
    assert "3-refresh" not in (damaged / "README.md").read_text()
    assert run("refresh", damaged, *worse, "--keep")[0] == 3 and Run(damaged).stages[-1].name == "3-refresh-writing"
    assert "stage-3-refresh-writing" in hub.repo("tester/run").branches  # asked for


def test_train_goes_on_after_a_dry_run(tmp_path, content, run):
    recipe = write(tmp_path, content)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run("train", recipe, "--learning_rate", 3e-5, "--max_steps", 250, "--dry-run")
    assert code == 0 and sorted(tmp_path.rglob("*")) == before, err
    assert any({"1", "math", "250", "3e-05"} <= set(re.findall(r"[\w-]+", line)) for line in out.splitlines())

    options = ("--learning-rate", 1e-4, "--max_steps", 1, "--order", "math,writing", "--threads", 1)
    code, _, err = run("train", recipe, *options, "--max_stages", 1)
    assert code == 75 and "stage 1 of 2: math, 1 step\n" in err, err
    begun = Run(tmp_path / "out")
    assert begun.identity["config"]["learning_rate"] == 1e-4 and len(begun.stages) == 2
    code, _, err = run("train", recipe, *options)
    assert code == 2 and "--resume" in err
    code, _, err = run("train", recipe, "--resume")
    assert code == 2 and '"learning_rate": 0.0001' in err
    code, out, err = run("train", tmp_path / "out", "--resume")  # the kept recipe has the options
    assert code == 0 and out.splitlines()[-1].endswith(f"Next: trl-interfere analyze {tmp_path / 'out'}"), err
    finished = Run(tmp_path / "out")
    assert [record.domain for record in finished.stages] == [None, "math", "writing"]
    assert finished.recipe_folder == tmp_path and finished.base_model == str(MODEL_FOLDER)


@pytest.mark.slow
def test_a_stage_that_fails_in_a_process_of_its_own_can_be_resumed(tmp_path, content, run, monkeypatch):
    (tmp_path / "frail.py").write_text("def reward(completions, **kwargs):\n    raise ValueError('out of order')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    metric = content["domains"][1]["reward_funcs"]
    content["domains"][1] |= {"reward_funcs": "frail.reward", "metric": metric}
    arguments = ("train", write(tmp_path, content), "--threads", 1, "--process_per_stage")
    assert run(*arguments)[0] == 2
    assert [record.domain for record in Run(tmp_path / "out").stages] == [None, "math"]
    (tmp_path / "frail.py").write_text("def reward(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    assert run(*arguments, "--resume")[0] == 0
    assert [record.domain for record in Run(tmp_path / "out").stages] == [None, "math", "writing"]


def test_threads_by_default():
    program = "from trl_interfere.cli.options import Options; print(Options().threads)"
    torchrun = {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "1"}  # set by it, and no wish
    for environment, threads in (({"OMP_NUM_THREADS": "3"}, 3), (torchrun, os.cpu_count())):
        command = [sys.executable, "-c", program]
        found = subprocess.run(command, env=os.environ | environment, capture_output=True, check=True)
        assert int(found.stdout) == threads
