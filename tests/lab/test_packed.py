import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from space_run import DATA

from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.lab.domains import lab_rows
from trl_interfere.lab.packed import is_packed, pack, unpack
from trl_interfere.run import Run


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(DATA, folder, ignore=shutil.ignore_patterns("stages"))
    weights = load_file(MODEL_FOLDER / "model.safetensors")
    for seed, name in enumerate(("1-code", "2-math", "3-qa", "4-writing")):
        torch.manual_seed(seed)
        moved = {key: tensor + 1e-3 * torch.randn(tensor.shape) for key, tensor in weights.items()}
        (folder / "stages" / name).mkdir(parents=True)
        save_file(moved, folder / "stages" / name / "model.safetensors")
    return folder


def test_weights_come_back_and_prompts_come_in(run, tmp_path):
    target = tmp_path / "packed"
    assert pack(run, target) < 10_000_000 and is_packed(target) and not is_packed(run)
    expected = load_file(run / "stages" / "4-writing" / "model.safetensors")
    origin = load_file(MODEL_FOLDER / "model.safetensors")
    unpacked = load_file(unpack(target, "4-writing", tmp_path / "whole") / "model.safetensors")
    for name, tensor in expected.items():
        # Half a unit in the last place of bfloat16 of the difference, and rounding of float32.
        bound = 2**-8 * (tensor - origin[name]).abs() + 2**-22 * tensor.abs()
        assert ((unpacked[name] - tensor).abs() <= bound).all(), name
    # Every domain's own stage, the last of them the final one.
    assert {path.parent.name for path in target.glob("stages/*/*")} == {"1-code", "2-math", "3-qa", "4-writing"}
    packed = Run(target)
    assert packed.reports.keys() == Run(run).reports.keys() and (packed.repair / "repair.json").is_file()
    rows = packed.rows("5-heal", "math")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in lab_rows("math", "test")]
    line = json.loads((run / "scores" / "5-heal" / "math.jsonl").read_text().splitlines()[0])
    assert rows[0]["completions"] == line["completions"]


def test_bad_input(run, tmp_path):
    with pytest.raises(ValueError, match="stage"):
        unpack(DATA, "../x", tmp_path / "whole")
    shutil.rmtree(run / "stages" / "2-math")
    with pytest.raises(FileNotFoundError, match="2-math"):
        pack(run, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
