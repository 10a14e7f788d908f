"""A small run on the lab's model that loses math, made by the command line."""

import json
from pathlib import Path

import yaml
from tiny_runs import SMALL

from trl_interfere.cli import main
from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.lab.domains import lab_rows


def settings(folder: Path, **training) -> dict:
    """Settings of a small run, with its data beside the file."""
    for name in ("math", "writing"):
        for split, count in (("train", 24), ("test", 24), ("selection", 16)):
            lines = (json.dumps(row) for row in lab_rows(name, split, count))
            (folder / f"{name}_{split}.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "model": str(MODEL_FOLDER),
        "training": SMALL
        | {"output_dir": str(folder / "out"), "max_steps": 2, "max_completion_length": 12}
        | training,
        "analysis": {"reference": "dataset", "reference_column": "answer", "max_prompts": 8},
        "domains": [
            {
                "name": name,
                "train_dataset": f"{name}_train.jsonl",
                "eval_dataset": f"{name}_test.jsonl",
                "selection_dataset": f"{name}_selection.jsonl",
                "reward_funcs": f"lab_{name}",
            }
            for name in ("math", "writing")
        ],
    }


def write(folder: Path, content: dict) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def make(folder: Path) -> Path:
    """Train the run, and return its folder: math hardly changes, then writing takes all of it."""
    content = settings(folder, learning_rate=1e-6, max_steps=3)
    content["domains"][1]["settings"] = {"learning_rate": 2e-3, "max_steps": 4}
    main(["train", str(write(folder, content)), "--threads", "1"])
    return folder / "out"
