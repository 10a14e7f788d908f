"""Checkpoints that this package did not train: the example of docs/heal.md, on the lab's model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from trl_interfere import InterferenceReport
from trl_interfere.cli import main
from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.run import read_json


SCRIPT = Path(__file__).parents[1] / "recipes" / "sft_stages.py"


@pytest.mark.slow
def test_supervised_stages_are_scored_analysed_and_healed(tmp_path):
    out = tmp_path / "sft"
    script = [sys.executable, SCRIPT, MODEL_FOLDER, "--output_dir", out]
    subprocess.run([*script, "--steps", "100", "100", "60", "--learning_rate", "2e-3"], check=True)
    recipe = ["--recipe", str(out / "domains.yaml"), "--output_dir"]
    sums, reverse, final = (str(out / stage) for stage in ("0-sums", "1-reverse", "2-spell"))

    main(["evaluate", reverse, final, *recipe, str(out / "scores")])
    given = ["--final", final, "--peak", f"reverse={reverse}"]
    main(["analyze", *given, "--later", "spell", *recipe, str(out / "report")])
    with pytest.raises(SystemExit) as stop:  # dearer than a point, in a model of this size
        main(["heal", *given, f"sums={sums}", *recipe, str(out / "repair")])
    assert stop.value.code == 3

    before, after = (
        model["scores"]["reverse"]["value"] for model in read_json(out / "scores" / "scores.json", 2)["models"]
    )
    assert before > 60 and after < 10
    assert InterferenceReport.from_pretrained(out / "report").damage > 1
    healed = json.loads((out / "repair" / "repair.json").read_text())["domains"]["reverse"]
    assert (healed["peak"], healed["final"]) == (before, after)
    assert healed["low"] > 0.2 and healed["intervals"]["healed"][0] > after
