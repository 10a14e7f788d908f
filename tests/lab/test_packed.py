import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trl_interfere.lab.build import MODEL_FOLDER
from trl_interfere.lab.packed import load_packed, pack, packed_stages


DATA = Path(__file__).parents[2] / "space" / "data" / "lab"


@pytest.fixture
def run(tmp_path):
    """A finished run whose stages differ from the lab's model by a little."""
    folder = tmp_path / "run"
    shutil.copytree(DATA, folder, ignore=shutil.ignore_patterns("stages"))
    weights = load_file(MODEL_FOLDER / "model.safetensors")
    for seed, name in enumerate(("2-math", "4-writing")):
        generator = torch.Generator().manual_seed(seed)
        moved = {
            key: tensor + 1e-3 * torch.randn(tensor.shape, generator=generator) for key, tensor in weights.items()
        }
        (folder / "stages" / name).mkdir(parents=True)
        save_file(moved, folder / "stages" / name / "model.safetensors")
    return folder


def test_weights_come_back(run, tmp_path):
    size = pack(run, tmp_path / "packed")
    assert size < 5_000_000 and packed_stages(tmp_path / "packed") == ["2-math", "4-writing"]
    expected = load_file(run / "stages" / "4-writing" / "model.safetensors")
    origin = load_file(MODEL_FOLDER / "model.safetensors")
    parameters = dict(load_packed(tmp_path / "packed", "4-writing").named_parameters())
    for name, tensor in expected.items():
        # Half a unit in the last place of bfloat16 of the difference, and rounding of float32.
        bound = 2**-8 * (tensor - origin[name]).abs() + 2**-22 * tensor.abs()
        assert ((parameters[name] - tensor).abs() <= bound).all(), name
    start = dict(load_packed(tmp_path / "packed").named_parameters())
    assert all(torch.equal(start[name], tensor) for name, tensor in origin.items())


def test_packed_run_is_whole(run, tmp_path):
    pack(run, tmp_path / "packed", scores=False)
    files = {path.relative_to(tmp_path / "packed").as_posix() for path in (tmp_path / "packed").rglob("*.*")}
    assert {"results.json", "report.md", "stages.json"} < files
    assert any(name.startswith("analysis/0-math-after") for name in files)
    assert not any(name.startswith("scores") or name.endswith("model.safetensors") for name in files)


def test_bad_input(run, tmp_path):
    with pytest.raises(ValueError, match="expected the weights of stage '3-qa', found none"):
        pack(run, tmp_path / "packed", stages=["3-qa"])
    with pytest.raises(ValueError, match=r"expected one of the stages \['2-math', '4-writing'\], found '../x'"):
        load_packed(DATA, "../x")
    (run / "results.json").unlink()
    with pytest.raises(ValueError, match="expected a finished run of the lab with results.json"):
        pack(run, tmp_path / "other")
