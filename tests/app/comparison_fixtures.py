"""Reports and runs on disk."""

import json
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def save_report(make_report):
    """Function that writes a report of two layers of 10 MLP channels and 2 + 1 heads, with changes to its JSON."""

    def save(folder: Path, seed: int = 0, **changes) -> Path:
        rng = np.random.default_rng(seed)
        report = make_report(26, damage=rng.normal(0.1, 1, size=26))
        report.route_counts = {"mlp": [10, 10], "query": [2, 2], "key_value": [1, 1]}
        report.save_pretrained(folder)
        content = json.loads((folder / "report.json").read_text())
        content.update(changes)
        (folder / "report.json").write_text(json.dumps(content))
        return folder

    return save


@pytest.fixture
def save_run(save_report):
    """Function that writes a run as the lab leaves it: results, a report, a card."""

    def save(folder: Path, **changes) -> Path:
        save_report(folder / "analysis" / "0-math-after-qa")
        (folder / "results.json").write_text(json.dumps({**results(), **changes}))
        (folder / "report.md").write_text("# A card\n")
        return folder

    return save


def results() -> dict:
    def scores(math: float, qa: float) -> dict:
        return {
            name: {"value": value, "low": value - 2, "high": value + 3, "n": 50}
            for name, value in (("math", math), ("qa", qa))
        }

    def repair(criterion: str, recovered: float, **other) -> dict:
        return {
            "pair": 0,
            "criterion": criterion,
            "scope": "mlp",
            "budget": 0.02,
            "step": 1.0,
            "step_rule": "fixed",
            "recovered": recovered,
            "low": recovered - 0.1,
            "high": recovered + 0.2,
            "n": 50,
            "draws": 1,
            "collateral": {"qa": -1.5},
            **other,
        }

    return {
        "schema_version": 1,
        "seed": 0,
        "stages": [
            {"index": 0, "kind": "base", "domain": None, "steps": 0, "scores": scores(30, 20)},
            {"index": 1, "kind": "train", "domain": "math", "steps": 7, "scores": scores(80, 25)},
            {"index": 2, "kind": "train", "domain": "qa", "steps": 7, "scores": scores(55, 90)},
        ],
        "rollback": [
            repair("damage", 0.6),
            repair("random", 0.05, draws=5),
            repair("damage", 0.7, step_rule="optimal", step=1.5),
            repair("damage", 0.9, step_rule="optimal", budget=0.08),
            repair("interpolation", 0.5, scope="all", budget=1.0, step=0.3),
        ],
        "refresh": {
            "domain": "math",
            "steps": 2,
            "recovered": 0.8,
            "low": 0.6,
            "high": 1.0,
            "n": 50,
            "collateral": {"qa": 0.5},
        },
    }
