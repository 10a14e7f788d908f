import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_models import lora

from trl_interfere import checkpoint
from trl_interfere.analysis.overlap import overlaps
from trl_interfere.analysis.routes import RouteMap
from trl_interfere.analysis.weight_diff import stage_edits, update_statistics
from trl_interfere.checkpoint import Checkpoint
from trl_interfere.models import load_model


def edited(model, seed=1, share=0.3):
    """Changes some elements by small, by large and by no amounts, among them an element of 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter[0, 0] = 0
            chosen = torch.rand(parameter.shape, generator=generator) < share
            scale = 10 ** (-9 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64))
            parameter.add_((chosen * scale).to(parameter.dtype))
    return model


@pytest.fixture
def saved(tmp_path, make_model):
    """Function that saves a random model, edited or not, and returns its folder."""

    def save(name, family="qwen3", seed=None, dtype=torch.bfloat16, max_shard_size="5GB", **overrides):
        model = make_model(family, dtype=dtype, **overrides)
        if seed is not None:
            edited(model, seed)
        model.save_pretrained(tmp_path / name, max_shard_size=max_shard_size)
        return tmp_path / name

    return save


def loaded(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def dense(before, after):
    """Sparsity of one tensor by numpy, written out."""
    a, b = (tensor.double().numpy() for tensor in (before, after))
    delta = np.abs((b - a).astype(np.float32))
    return [
        a.size,
        int((delta < np.float32(1e-7)).sum()),
        int((delta <= np.float32(1e-3) * np.abs(a).astype(np.float32)).sum()),
        int(np.equal(*(part.view(torch.uint8).reshape(a.size, -1).numpy() for part in (before, after))).all(1).sum()),
        ((b - a) ** 2).sum(),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shards", ["5GB", "3KB"])
@pytest.mark.parametrize("read", [2**20, 200])
def test_against_numpy_on_loaded_tensors(saved, monkeypatch, dtype, shards, read):
    monkeypatch.setattr(checkpoint, "READ_BYTES", read)
    before = saved("before", dtype=dtype, max_shard_size=shards)
    after = saved("after", dtype=dtype, seed=1)
    (update,) = update_statistics([Checkpoint(before), Checkpoint(after)])
    first, second = loaded(before), loaded(after)
    assert set(update.tensors.index) == first.keys()
    name = str(dtype).removeprefix("torch.")
    expected = {tensor: dense(first[tensor], second[tensor]) for tensor in first}
    for tensor, (kind, *found) in update.tensors.T.items():
        assert kind == name and found[:-1] == expected[tensor][:-1], tensor
        assert found[-1] == pytest.approx(expected[tensor][-1], rel=1e-5)
    figures, total = update.to_dict(), np.sum(list(expected.values()), axis=0)
    assert figures["dtypes"] == [name] and list(figures["by_layer"]) == ["0", "1", "outside"]
    assert {"mlp.down_proj.weight", "embed_tokens.weight", "norm.weight"} <= figures["by_kind"].keys()
    for groups in ([figures["whole"]], figures["by_kind"].values(), figures["by_layer"].values()):
        assert sum(part["elements"] for part in groups) == total[0]
        assert sum(part["identical"] * part["elements"] for part in groups) == pytest.approx(total[3])
        assert sum(part["norm"] ** 2 for part in groups) == pytest.approx(total[4], rel=1e-5)
    assert 0 < figures["whole"]["identical"] < 1


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss", "qwen3-moe", "gpt2", "qwen3_next"])
@pytest.mark.parametrize("read", [2**20, 100])
def test_edit_size_of_each_route(saved, monkeypatch, family, read):
    """Of plain, stacked and fused tensors; the sums by route are compared with written-out slices in test_routes."""
    monkeypatch.setattr(checkpoint, "READ_BYTES", read)
    folders = [saved("before", family, dtype=torch.float32), saved("after", family, seed=1, dtype=torch.float32)]
    checkpoints = [Checkpoint(folder) for folder in folders]
    route_map = RouteMap(checkpoints[0].config)
    (update,) = update_statistics(checkpoints, route_map)
    first, second = (loaded(folder) for folder in folders)
    delta = {name: second[name].double() - first[name].double() for name in first}
    sums, outside = route_map.sum_by_route({name: tensor**2 for name, tensor in delta.items()})
    np.testing.assert_allclose(update.edit_size**2, sums, rtol=1e-5, atol=1e-24)
    assert update.outside**2 == pytest.approx(outside, rel=1e-5)


def test_three_checkpoints_read_the_middle_one_once(saved):
    base, before, after = (Checkpoint(saved(name, seed=seed)) for name, seed in (("a", None), ("b", 1), ("c", 2)))
    route_map, seen = RouteMap(base.config), []
    both = update_statistics([base, before, after], route_map, progress=lambda done, total: seen.append((done, total)))
    alone = [update_statistics(pair, route_map)[0] for pair in ([base, before], [before, after])]
    for together, single in zip(both, alone, strict=True):
        assert together.to_dict() == single.to_dict()
        assert np.array_equal(together.edit_size, single.edit_size)
    assert seen[-1] == (3 * base.nbytes, 3 * base.nbytes) and len(seen) == len(base.tensors)


def test_adapters_are_compared_without_being_merged(saved, tmp_path):
    base, folders = saved("base", dtype=torch.bfloat16), [tmp_path / "adapter-0", tmp_path / "adapter-1"]
    start, deltas = dict(load_model(base, dtype="float64").named_parameters()), []
    for folder in folders:
        merged = lora(load_model(base, dtype="float64"), folder, target_modules=["q_proj", "down_proj"])
        changed = {n: p.detach() - start[n].detach() for n, p in merged.named_parameters()}
        deltas.append({name: delta for name, delta in changed.items() if "q_proj" in name or "down_proj" in name})
    route_map = RouteMap(Checkpoint(base).config)
    stages = [Checkpoint(base), Checkpoint(folders[0]), Checkpoint(folders[1], base=base)]
    earlier, later = update_statistics(stages, route_map)
    for update, expected in ((earlier, deltas[0]), (later, {n: deltas[1][n] - deltas[0][n] for n in deltas[0]})):
        sums, _ = route_map.sum_by_route({name: delta**2 for name, delta in expected.items()})
        np.testing.assert_allclose(update.edit_size, np.sqrt(sums), rtol=1e-4, atol=1e-12)
        assert update.outside == 0
        for name, entry in update.tensors.iterrows():
            if name in expected:
                assert entry["dtype"] == "bfloat16 + adapter"
                assert entry.below_absolute == int((expected[name].abs() < 1e-7).sum())
                assert entry.squared_norm == pytest.approx((expected[name] ** 2).sum().item(), rel=1e-4)
            else:
                assert entry.identical == entry.below_relative == entry.elements and entry["dtype"] == "bfloat16"


def test_stages_are_compared_and_all_pairs_overlap(saved):
    run = [Checkpoint(saved(str(index), seed=index)) for index in range(4)]
    route_map = RouteMap(run[0].config)
    edits = stage_edits(run, ["code", "math", "qa"], route_map)
    updates = [update_statistics(pair, route_map)[0] for pair in itertools.pairwise(run)]
    assert edits["updates"] == dict(zip(("code", "math", "qa"), (one.to_dict() for one in updates), strict=True))
    assert {first: list(row) for first, row in edits["changed"].items()} == {"code": ["math", "qa"], "math": ["qa"]}
    assert edits["changed"]["code"]["qa"] == overlaps(updates[0].edit_size, updates[2].edit_size, route_map)
    with pytest.raises(ValueError, match="identical checkpoints"):
        stage_edits([run[0], run[1], run[1]], ["code", "math"], route_map)
