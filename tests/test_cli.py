"""The command line: the real thing in small, and one clear message with exit code 2 for bad input."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from trl_interfere import InterferenceReport
from trl_interfere.cli import main
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
            "use_cpu": True,
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
    for command in ("lab", "train", "analyze"):
        code, out, _ = run(command, "--help")
        assert code == 0 and "--help" in out


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
