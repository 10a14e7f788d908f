import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trl_interfere.analysis.rank_profile import rank_profiles
from trl_interfere.checkpoint import Checkpoint


def test_against_a_dense_decomposition(tmp_path, make_model, moved):
    model = make_model("llama", dtype=torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    later = moved(model)
    with torch.no_grad():  # one matrix whose update has two directions, and one without an update
        later.get_parameter(name).copy_(model.get_parameter(name) + torch.randn(12, 2) @ torch.randn(2, 16))
        later.lm_head.weight.copy_(model.lm_head.weight)
    folders = [tmp_path / "before", tmp_path / "after"]
    for folder, saved in zip(folders, (model, later), strict=True):
        saved.save_pretrained(folder)
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    seen = []
    profiles = rank_profiles(
        *map(Checkpoint, folders), counts=(1, 2, 99), progress=lambda done, total: seen.append((done, total))
    )
    assert profiles.keys() == {name for name, tensor in first.items() if tensor.ndim == 2}
    assert seen[-1] == (len(profiles), len(profiles))
    for label, profile in profiles.items():
        values = np.linalg.svd((second[label] - first[label]).double().numpy(), compute_uv=False)
        if label == "lm_head.weight":
            assert profile.effective_rank == 0 and np.isnan(profile.energy[1])
            continue
        shares = values / values.sum()
        assert profile.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
        assert profile.energy[1] == pytest.approx(values[0] ** 2 / (values**2).sum(), rel=1e-4)
        assert profile.energy[99] == pytest.approx(1)
    assert profiles[name].effective_rank < 2.01 and profiles[name].energy[2] > 0.999
    assert profiles[name].to_dict()["shape"] == [12, 16]
    chosen = rank_profiles(*map(Checkpoint, folders), select=lambda label: label == name)
    assert chosen.keys() == {name}
