"""The command line: the real thing in small, and one clear message with exit code 2 for bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_runs import DEVICE

from trl_interfere import InterferenceReport
from trl_interfere.cli import main
from trl_interfere.evaluation.bootstrap import difference
from trl_interfere.lab.build import MODEL_FOLDER
from trl_interfere.lab.domains import lab_rows


def raising_reward(completions, **kwargs):
    raise RuntimeError("out of paper")


def short_reward(completions, **kwargs):
    return [0.0]


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trl-interfere", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def content(tmp_path) -> dict:
    """Settings of a small run, with its data beside the file."""
    for name in ("math", "writing"):
        for split in ("train", "test"):
            lines = (json.dumps(row) for row in lab_rows(name, split, 24))
            (tmp_path / f"{name}_{split}.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "model": str(MODEL_FOLDER),
        "training": {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 12,
            "bf16": False,
            **DEVICE,
            "gradient_checkpointing": False,
            "report_to": [],
            "disable_tqdm": True,
        },
        "analysis": {"reference": "dataset", "reference_column": "answer", "max_prompts": 16},
        "domains": [
            {"name": "math", "train": "math_train.jsonl", "eval": "math_test.jsonl", "rewards": "lab_math"},
            {
                "name": "writing",
                "train": {"path": "writing_train.jsonl", "limit": 16},
                "eval": "writing_test.jsonl",
                "rewards": ["trl_interfere.lab.writing.writing_reward"],
                "settings": {"max_steps": 1, "learning_rate": 1e-4},
            },
        ],
    }


def write(tmp_path: Path, content: dict) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_train_then_analyze(tmp_path, content, run):
    config = write(tmp_path, content)
    code, out, _ = run("train", "--config", config, "--threads", 1)
    assert code == 0 and "2-writing" in out
    manifest = json.loads((tmp_path / "out" / "stages.json").read_text())
    assert [(stage["domain"], stage["steps"]) for stage in manifest["stages"][1:]] == [("math", 2), ("writing", 1)]

    code, _, err = run("train", "--config", config)
    assert code == 2 and "holds a run" in err and "--resume" in err
    assert run("train", "--config", config, "--resume")[0] == 0

    stages = tmp_path / "out" / "stages"
    arguments = ("analyze", "--config", config, "--before", stages / "1-math", "--after", stages / "2-writing",
                 "--earlier", "math", "--later", "writing", "--output-dir", tmp_path / "report")  # fmt: skip
    code, out, _ = run(*arguments, "--base", MODEL_FOLDER)
    assert code == 0 and "gradient cosine" in out
    report = InterferenceReport.from_pretrained(tmp_path / "report")
    assert report.earlier == "math" and report.references["math"]["n"] == 16 and "opposed" in report.routes
    assert (tmp_path / "report" / "figures" / "module_cosines.png").exists()
    code, _, err = run(*arguments)
    assert code == 2 and "expected an empty or a new folder" in err


def test_extending_nothing_else_the_identity_of_a_run_is_kept(tmp_path, content, run):
    config = write(tmp_path, content)
    assert run("train", "--config", config)[0] == 0
    before = (tmp_path / "out" / "stages.json").read_bytes()
    content["training"]["learning_rate"] = 0.5
    code, _, err = run("train", "--config", write(tmp_path, content), "--resume")
    assert code == 2 and "belongs to another run" in err and '"learning_rate": 0.5' in err
    assert (tmp_path / "out" / "stages.json").read_bytes() == before


def test_help_names_every_option(run):
    for command in ("lab", "train", "evaluate", "analyze", "sweep", "refresh"):
        code, out, _ = run(command, "--help")
        assert code == 0 and "--help" in out
    code, out, _ = run("train", "--help-options")
    assert code == 0 and "--score_samples" in out


def change(path: str, value):
    def apply(content: dict, folder: Path) -> None:
        *parents, last = path.split(".")
        for key in parents:
            content = content[int(key)] if key.isdigit() else content[key]
        content[last] = value

    return apply


def without_weights(content: dict, folder: Path) -> None:
    shutil.copytree(MODEL_FOLDER, folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    content["model"] = "model"


BAD_FILES = {
    "unknown option": (change("modle", "x"), r"unknown option 'modle', did you mean 'model'\?"),
    "unknown training option": (
        change("training.learning_rat", 1.0),
        r"training: unknown option 'learning_rat', did you mean 'learning_rate'\?",
    ),
    "no domains": (change("domains", []), "domains: expected a list of domains"),
    "unknown domain in order": (change("training.order", ["math", "chess"]), "unknown domain 'chess'"),
    "option fixed at construction": (
        change("domains.1.settings", {"temperature": 2.0}),
        "'temperature' cannot differ between stages",
    ),
    "missing file": (change("domains.0.train", "gone.jsonl"), "'gone.jsonl' is neither a local file or folder nor"),
    "missing column": (change("domains.0.train", {"path": "math_train.jsonl", "columns": {"prompt": "question"}}),
                       "expected a column 'question', found"),
    "no prompt column": (change("domains.0.train", "no_prompt.jsonl"), "expected a column 'prompt', found"),
    "empty dataset": (
        change("domains.0.train", {"path": "math_train.jsonl", "limit": 0}),
        "expected at least one row",
    ),
    "unknown reward": (change("domains.0.rewards", "exact_mtach"), "'exact_mtach' is neither a built-in reward"),
    "missing reward module": (change("domains.0.rewards", "nowhere.reward"), "cannot import 'nowhere.reward'"),
    "reward without its column": (
        change("domains.0.rewards", "lab_code"),
        "domain 'math', code_reward: expected a column",
    ),
    "reward that raises": (
        change("domains.0.rewards", f"{__name__}.raising_reward"),
        "domain 'math', raising_reward: raised RuntimeError: out of paper",
    ),
    "reward that returns too few": (
        change("domains.0.rewards", f"{__name__}.short_reward"),
        "domain 'math', short_reward: expected 24 values, one per completion, found 1",
    ),
    "model without weights": (without_weights, "model: .*model.* is neither a folder with a config and safetensors"),
    "batch not divisible by generations": (change("training.per_device_train_batch_size", 6), "divisible"),
    "refresh option": (change("refresh", {"max_step": 3}), r"unknown option 'max_step', did you mean 'max_steps'\?"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_run_files(tmp_path, content, run, case):
    (tmp_path / "no_prompt.jsonl").write_text('{"question": "1+1"}\n')
    apply, message = BAD_FILES[case]
    apply(content, tmp_path)
    code, _, err = run("train", "--config", write(tmp_path, content))
    assert code == 2, err
    assert "Traceback" not in err and re.search(message, err, re.DOTALL), err
    assert not list((tmp_path / "out").glob("stages/*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("model: [unclosed", "expected YAML"),
        ("- a\n- list\n", "expected settings by name, found list"),
        ("model: x\n", "expected the option 'domains'"),
    ],
)
def test_unreadable_run_files(tmp_path, run, text, message):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    code, _, err = run("train", "--config", path)
    assert code == 2 and message in err and str(path) in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--order", "code,chess"], "unknown domain 'chess'"),
        (["--order", "code,code"], "expected at least two different domains"),
        (["--order", "math"], "expected at least two different domains"),
        (["--steps", "0"], "greater than or equal to 1"),
        (["--prompts", "513"], "less than or equal to 512"),
        (["--seed", "x"], "as an integer"),
    ],
)
def test_bad_arguments_of_the_lab(tmp_path, run, arguments, message):
    code, _, err = run("lab", "--output-dir", tmp_path / "lab", *arguments)
    assert code == 2 and message in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "lab").exists()


def test_the_lab_leaves_other_files_alone(tmp_path, run):
    (tmp_path / "thesis.txt").write_text("four years of work")
    code, _, err = run("lab", "--output-dir", tmp_path)
    assert code == 2 and "holds files that are not of a lab run" in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_command_line_goes_over_the_file(tmp_path, content, run):
    content["training"] |= {"learning_rate": 1e-3, "output_dir": str(tmp_path / "unused")}
    content["model"] = str(tmp_path / "nowhere")
    overrides = json.dumps({"writing": {"learning_rate": 2e-3}})
    code, _, err = run("train", "--config", write(tmp_path, content), "--output_dir", tmp_path / "out", "--threads", 1,
                       "--model", MODEL_FOLDER, "--learning-rate", 1e-4, "--max_steps", 1, "--order", "math,writing",
                       "--stage_overrides", overrides, "--max_stages", 1)  # fmt: skip
    assert code == 75, err
    manifest = json.loads((tmp_path / "out" / "stages.json").read_text())
    assert manifest["run"]["config"]["learning_rate"] == 1e-4
    assert [(stage["domain"], stage["overrides"]) for stage in manifest["run"]["schedule"]] == [
        ("math", {}), ("writing", {"learning_rate": 2e-3})
    ]  # fmt: skip
    assert [(stage["kind"], stage["steps"]) for stage in manifest["stages"]] == [("base", 0), ("train", 1)]
    assert "stage 1 of 2: math, 1 step\n" in err and "after 1-math: math" in err and "%|" not in err
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1e-5"], "unknown option 'learning_rat', did you mean 'learning_rate'?"),
        (["--proces-per-stage"], "unknown option 'proces_per_stage', did you mean 'process_per_stage'?"),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--per_device_train_batch_size", "6"], "divisible"),
        (["--stage_overrides", '{"math": {"temperature": 2}}'], "'temperature' cannot differ between stages"),
        (["--process-per-stage", "--max-stages", "1"], "--max-stages: expected without --process-per-stage"),
    ],
)
def test_bad_arguments_of_train(tmp_path, content, run, arguments, message):
    for further in ([], ["--dry-run"]):
        if "--process-per-stage" in arguments and further:
            continue
        code, _, err = run("train", "--config", write(tmp_path, content), *arguments, *further)
        assert code == 2 and message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--dry-run", "--dry_run"])
def test_dry_run(tmp_path, content, run, monkeypatch, option):
    monkeypatch.setenv("COLUMNS", "80")
    before = sorted(tmp_path.rglob("*"))
    config = write(tmp_path, content)
    code, out, err = run("train", "--config", config, "--learning_rate", 3e-5, "--max_steps", 250, option)
    assert code == 0, err
    rows = [line.split() for line in out.splitlines()]
    weights = 4 * sum(tensor.numel() for tensor in load_file(MODEL_FOLDER / "model.safetensors").values())
    tokens = 8 * 12  # of a step
    assert ["1", "train", "math", "250", "3e-05", "500", f"{250 * tokens:,}", f"{250 * tokens:,}"] in rows
    assert ["2", "train", "writing", "1", "0.0001", "2", "96", "96"] in rows
    assert ["to", "do", "251", "502", f"{251 * tokens:,}", f"{251 * tokens:,}"] in rows
    assert f"48 prompts, 3 times over, at most {3 * 48 * 12:,} tokens" in " ".join(out.split())
    assert ["stage", "folders:", "2", f"{2 * weights / 1e6:.1f}", "MB"] in rows
    assert ["checkpoints", "at", "a", "time:", "1", f"{3 * weights / 1e6:.1f}", "MB"] in rows
    assert sorted(tmp_path.rglob("*")) == sorted([*before, config])


def test_dry_run_of_a_run_that_has_begun(tmp_path, content, run, monkeypatch):
    config = write(tmp_path, content)
    assert run("train", "--config", config, "--max-stages", 1)[0] == 75
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    code, out, _ = run("train", "--config", config, "--dry-run")
    assert code == 0 and "1 done" in out and "2 done" not in out and "1 of 2 stages to do" in out
    assert "Finished: 0-base, 1-math." in " ".join(out.split()) and "48 prompts, 1 times over" in out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == files


@pytest.mark.parametrize(
    ("peft", "bf16"), [(None, False), ({"r": 4, "target_modules": ["q_proj", "v_proj"]}, False), (None, True)]
)
def test_evaluate(tmp_path, content, run, peft, bf16):
    content["peft"] = peft
    content["training"]["bf16"] = bf16
    content["training"]["learning_rate"] = 1e-2
    content["domains"][0]["selection"] = {"path": "math_test.jsonl", "limit": 6}
    config = write(tmp_path, content)
    assert run("train", "--config", config, "--threads", 1, "--max-stages", 1)[0] == 75
    stage = tmp_path / "out" / "stages" / "1-math"
    assert (stage / "adapter_config.json").exists() == (peft is not None)

    folder = tmp_path / "scores"
    arguments = ("evaluate", "--config", config, "--threads", 1, "--output_dir", folder)
    code, out, err = run(*arguments, "--model", MODEL_FOLDER, "--model", stage)
    assert code == 0, err
    scores = json.loads((folder / "scores.json").read_text())
    manifest = json.loads((tmp_path / "out" / "stages.json").read_text())
    values = []
    for entry, record in zip(scores["models"], manifest["stages"], strict=True):
        values.append({})
        for domain, expected in record["scores"].items():
            found = entry["scores"][domain]
            written = [path.read_text() for path in (folder / found["file"], tmp_path / "out" / expected["file"])]
            assert written[0] == written[1]
            values[-1][domain] = np.array([json.loads(line)["score"] for line in written[0].splitlines()])
            assert f"{found['value']:.1f} [{found['low']:.1f}, {found['high']:.1f}]" in " ".join(out.split())
            assert found["n"] == expected["n"] and found["value"] == pytest.approx(100 * values[-1][domain].mean())
    change = scores["models"][1]["difference_from_first"]["math"]
    assert change == difference(values[1]["math"], values[0]["math"]).to_dict() and change["value"] != 0
    assert scores["schema_version"] == 1 and f"{change['value']:.1f} [{change['low']:.1f}" in out

    before = (folder / "scores.json").read_bytes()
    code, _, err = run(*arguments)
    assert code == 2 and "expected an empty or a new folder" in err
    assert (folder / "scores.json").read_bytes() == before

    arguments = (*arguments[:-1], tmp_path / "selection", "--split", "selection")
    code, _, err = run(*arguments, "--temperature", 1.0, "--num_samples", 2, "--max_new_tokens", 4, "--model", stage)
    assert code == 0, err
    scores = json.loads((tmp_path / "selection" / "scores.json").read_text())
    assert scores["sampling"] == {"temperature": 1.0, "num_samples": 2, "batch_size": 64, "max_new_tokens": 4}
    assert list(scores["models"][0]["scores"]) == ["math"] and scores["models"][0]["scores"]["math"]["n"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--domains", "math,chess"], "unknown domain 'chess', expected some of ['math', 'writing']"),
        (["--domains", "writing", "--split", "selection"], "domain 'writing' has no selection prompts"),
        (["--split", "selection"], "expected at least one with selection prompts"),
        (["--model", "nowhere"], "nowhere: expected the folder or Hub id of a model or an adapter"),
        (["--num_samples", "2"], "num_samples: expected 1 with temperature 0"),
        (["--split", "test"], "'test' is not one of"),
    ],
)
def test_bad_arguments_of_evaluate(tmp_path, content, run, arguments, message):
    folder = tmp_path / "scores"
    code, _, err = run("evaluate", "--config", write(tmp_path, content), "--output-dir", folder, *arguments)
    assert code == 2 and message in " ".join(err.replace("│", " ").split()), err
    assert not folder.exists()


FRAIL = """
from pathlib import Path

def frail_reward(completions, **kwargs):
    if Path(__file__).with_name("broken").exists():
        raise RuntimeError("out of order")
    return [sum(map(ord, completion)) % 97 / 97 for completion in completions]
"""


def test_a_process_per_stage_gives_the_same_run(tmp_path, content, run, monkeypatch):
    (tmp_path / "frail.py").write_text(FRAIL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    content["training"]["learning_rate"] = 1e-3
    content["domains"][1] |= {"rewards": "frail.frail_reward", "metric": "lab_math", "eval": "math_test.jsonl"}
    config = write(tmp_path, content)
    assert run("train", "--config", config, "--threads", 1)[0] == 0

    arguments = ("train", "--config", config, "--threads", 1, "--process_per_stage", "--output-dir", tmp_path / "each")
    (tmp_path / "broken").touch()
    assert run(*arguments)[0] == 2
    manifest = json.loads((tmp_path / "each" / "stages.json").read_text())
    assert [stage["domain"] for stage in manifest["stages"]] == [None, "math"]
    (tmp_path / "broken").unlink()
    assert run(*arguments, "--resume")[0] == 0

    for name in ("1-math", "2-writing"):
        first, second = (load_file(tmp_path / run / "stages" / name / "model.safetensors") for run in ("out", "each"))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    for path in (tmp_path / "out" / "scores").rglob("*.jsonl"):
        assert path.read_bytes() == (tmp_path / "each" / path.relative_to(tmp_path / "out")).read_bytes()


def test_refresh_of_a_finished_run(tmp_path, content, run):
    content["training"]["stage_overrides"] = {"math": {"learning_rate": 3e-4}}
    config = write(tmp_path, content)
    refresh = ("refresh", "--config", config, "--domain", "math", "--steps", 2)
    code, _, errors = run(*refresh)
    assert code == 2 and "expected the folder of a training run with stages.json, found none" in errors
    assert not (tmp_path / "out").exists()
    assert run("train", "--config", config, "--max-stages", 1)[0] == 75
    code, _, errors = run(*refresh)
    assert code == 2 and "expected a finished run, found stages left; run `train --resume` first" in errors
    assert run("train", "--config", config, "--resume")[0] == 0
    code, output, errors = run(*refresh, "--learning_rate", 1e-4)
    assert code == 0, errors
    out = tmp_path / "out"
    assert "3-refresh-math" in output
    stages = json.loads((out / "stages.json").read_text())["stages"]
    assert [(record["kind"], record["steps"]) for record in stages[-2:]] == [("train", 1), ("refresh", 2)]
    assert stages[-1]["overrides"] == {"learning_rate": 1e-4, "max_steps": 2}
    before, after = (
        load_file(out / "stages" / name / "model.safetensors") for name in ("2-writing", "3-refresh-math")
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)
    # Another one is added to it; what was there stays.
    assert run(*refresh[:-1], 1)[0] == 0
    again = json.loads((out / "stages.json").read_text())["stages"]
    assert again[:-1] == stages and again[-1]["folder"] == "stages/4-refresh-math" and again[-1]["steps"] == 1
    assert again[-1]["overrides"] == {"learning_rate": 3e-4, "max_steps": 1}  # those of the domain's own stage
    code, _, errors = run("refresh", "--config", config, "--domain", "maths")
    assert (
        code == 2 and "--domain: expected a domain with a train_dataset, ['math', 'writing'], found 'maths'" in errors
    )


def test_a_refresh_that_was_stopped_goes_on(tmp_path, content, run, monkeypatch):
    content["training"] |= {"save_strategy": "steps", "save_steps": 1}
    config = write(tmp_path, content)
    assert run("train", "--config", config)[0] == 0
    refresh = ("refresh", "--config", config, "--domain", "math", "--steps", 1)
    with monkeypatch.context() as patch:
        patch.setattr("trl_interfere.training.trainer.SequentialGRPOTrainer._finish_stage", _stop)
        assert run(*refresh)[0] != 0
    code, _, errors = run("refresh", "--config", config, "--domain", "writing", "--steps", 1)
    message = "domain: a refresh of math with 1 steps was stopped in "
    assert code == 2 and message in errors.replace("\n", " "), errors
    code, _, errors = run(*refresh, "--learning-rate", 1e-4)
    message = "settings that the stage was stopped with, learning_rate unset, found 0.0001"
    assert code == 2 and message in errors.replace("\n", " "), errors
    # Trained and saved, but not scored: what a process leaves that is killed between the two.
    with monkeypatch.context() as patch:
        patch.setattr("trl_interfere.training.trainer.SequentialGRPOTrainer._score_stage", _stop)
        assert run(*refresh)[0] != 0
    assert json.loads((tmp_path / "out" / "stages.json").read_text())["current"]["kind"] == "refresh"
    code, _, errors = run(*refresh, "--learning-rate", 1e-4)
    assert code == 2 and "learning_rate: a refresh of math with learning_rate unset was stopped" in errors
    assert run(*refresh)[0] == 0
    content = json.loads((tmp_path / "out" / "stages.json").read_text())
    assert [record["kind"] for record in content["stages"]] == ["base", "train", "train", "refresh"]
    assert content["current"] is None


def _stop(self, *args, **kwargs):
    raise KeyboardInterrupt


def test_sweep_of_a_report(tmp_path, content, run):
    for domain in content["domains"]:
        (tmp_path / f"{domain['name']}_selection.jsonl").write_text(
            "\n".join(json.dumps(row) for row in lab_rows(domain["name"], "selection", 24)) + "\n"
        )
        domain["selection"] = f"{domain['name']}_selection.jsonl"
    content["training"]["learning_rate"] = 3e-3
    config, out = write(tmp_path, content), tmp_path / "out"
    assert run("train", "--config", config)[0] == 0
    checkpoints = ("--before", out / "stages" / "1-math", "--after", out / "stages" / "2-writing")
    arguments = ("analyze", "--config", config, *checkpoints, "--base", MODEL_FOLDER, "--earlier", "math")
    assert run(*arguments, "--later", "writing", "--output-dir", tmp_path / "report")[0] == 0
    sweep = ("sweep", "--config", config, "--report", tmp_path / "report", "--output-dir", tmp_path / "sweep")
    some = ("--criteria", "damage,random", "--budgets", "0.1", "--draws", 2)
    code, output, errors = run(*sweep, *some)
    assert code == 0, errors
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"]
    assert [(row["criterion"], row["step_rule"]) for row in rows] == [
        (name, rule) for name in ("damage", "random") for rule in ("fixed", "best")
    ]
    assert (tmp_path / "sweep" / "sweep.png").stat().st_size > 5000
    assert "damage" in (tmp_path / "sweep" / "sweep.md").read_text()
    code, _, errors = run(*sweep, *some)  # goes on where it stopped: nothing is left to do
    assert code == 0 and "best step" not in errors
    several = (*sweep[:-1], tmp_path / "runs", "--report", tmp_path / "report", "--criteria", "magnitude")
    code, output, errors = run(*several, "--budgets", "0.1", "--steps", "1,2")
    assert code == 0, errors
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "sweep-0.json", "sweep-1.json", "sweep.md", "sweep.png"
    }  # fmt: skip
    lines = [line for line in (tmp_path / "runs" / "sweep.md").read_text().splitlines() if "magnitude" in line]
    assert len(lines) == 2 and all("| 2 | 1 |" in line for line in lines)
    for options, message in (
        (("--report", tmp_path / "report", "--after", "x"), "--before, --after: expected one --report with them"),
        (("--steps", "0,1"), "steps: expected numbers above 0, found 0"),
        (("--budgets", "0.1,a"), "--budgets: expected numbers separated by commas, found '0.1,a'"),
        (("--criteria", "damages"), "criteria: expected some of"),
        (("--after", MODEL_FOLDER / "nothing"), "nothing: expected a folder or the id of a Hub repository"),
        (("--after", out / "stages" / "1-math"), "that the report of math is about, found another one"),
    ):
        code, _, errors = run(*sweep, *options)
        assert code == 2 and message in errors.replace("\n", " "), errors


@pytest.mark.parametrize(
    "settings, threads",
    [
        ({}, os.cpu_count()),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "2,1"}, os.cpu_count()),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(os.cpu_count())}, 1),
        ({"OMP_NUM_THREADS": "3", "LOCAL_WORLD_SIZE": "1"}, os.cpu_count()),  # torchrun's 1 would not be a wish either
    ],
)
def test_threads_by_default(settings, threads):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE")
    }
    program = "from trl_interfere import cli; print(cli._THREADS)"
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, env=environment | settings, capture_output=True, text=True, check=True)
    assert int(found.stdout) == threads
