import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trl_interfere.models import load_model
from trl_interfere.repair.delta import RollbackDelta, digest, to_bits
from trl_interfere.repair.folder import apply_delta, revert_delta, roll_back_folder, undo_rollback


WEIGHTS = "model.safetensors"
UP = "model.layers.0.mlp.up_proj.weight"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def make_delta(checkpoints, tmp_path):
    """Function that rolls a checkpoint back and returns folders before, after and rolled back, and the delta file."""

    def make(family="llama", routes=(3, 20, 25, 31, 34), step=2.0, **settings):
        before, after, _ = checkpoints(family, **settings)
        record = roll_back_folder(before, after, tmp_path / "out", np.array(routes), step)
        delta = shutil.copy(tmp_path / "out" / record["file"], tmp_path / "delta.safetensors")
        return before, after, tmp_path / "out", delta

    return make


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("shards", ["5GB", "3KB"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_and_revert_on_another_machine(dtype, shards, make_delta, contents, tmp_path):
    before, after, out, delta = make_delta(dtype=dtype, shards=shards)
    original, repaired = contents(after), contents(out)
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(after, tmp_path / "elsewhere" / "model")
    for folder in (before, after, out):
        shutil.rmtree(folder)
    model = tmp_path / "elsewhere" / "model"
    record = apply_delta(delta, model)
    assert contents(model).keys() == repaired.keys()
    differing = {name for name in repaired if contents(model)[name] != repaired[name]}
    assert differing <= {"rollback.json"}
    revert_delta(delta, model, tmp_path / "reverted")
    assert contents(tmp_path / "reverted") == original
    undo_rollback(model)
    assert contents(model) == original
    assert record["routes"] == [3, 20, 25, 31, 34] and record["step"] == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_and_revert_in_memory(architecture, dtype, checkpoints, tmp_path):
    before, after, route_map = checkpoints(architecture, dtype=dtype)
    routes = np.arange(0, route_map.num_routes, 3)
    record = roll_back_folder(before, after, tmp_path / "out", routes, np.linspace(0.2, 3, len(routes)))
    delta = RollbackDelta(tmp_path / "out" / record["file"])
    for loaded_in in {dtype, torch.float32}:
        model = load_model(after, dtype=loaded_in)
        original, expected = weights(model), weights(load_model(tmp_path / "out", dtype=loaded_in))
        delta.apply(model)
        assert_same(weights(model), expected)
        with pytest.raises(ValueError, match="0.safetensors is already applied"):
            delta.apply(model)
        delta.revert(model)
        assert_same(weights(model), original)
        with pytest.raises(ValueError, match="0.safetensors is already reverted, or never applied"):
            delta.revert(model)


def test_size_is_that_of_the_changed_elements(checkpoints, tmp_path):
    before, after, _ = checkpoints(dtype=torch.bfloat16, hidden_size=256, intermediate_size=64, scale=0.0)
    tensors = load_file(after / WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():  # one element in ten, as RL leaves bfloat16 weights
        tensor[torch.rand(tensor.shape, generator=generator) < 0.1] *= 1.25
        tensors[name] = tensor
    save_file(tensors, after / WEIGHTS, metadata={"format": "pt"})
    record = roll_back_folder(before, after, tmp_path / "out", np.arange(0, 128, 2))
    path = tmp_path / "out" / record["file"]
    entries = record["tensors"].values()
    touched, changed = (sum(entry[key] for entry in entries) for key in ("elements", "changed"))
    assert touched == 64 * 3 * 256 and 0.08 < changed / touched < 0.12
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    # Two values of two bytes for each changed element, a bit for each touched one, an index for each block.
    assert path.stat().st_size - header == 4 * changed + touched // 8 + 8 * 64 * 3


def test_what_stands_in_the_file(make_delta):
    before, after, out, path = make_delta(dtype=torch.bfloat16)
    delta, old, new = RollbackDelta(path), load_file(after / WEIGHTS)[UP], load_file(out / WEIGHTS)[UP]
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor(f"{UP}:old").dtype == torch.bfloat16
        assert json.loads(file.metadata()["trl_interfere_rollback"])["schema_version"] == 1
    slices = delta.slices(UP)
    assert slices.blocks.index.tolist() == [3] and slices.blocks.axes == (0,) and slices.blocks.counts == (12,)
    changed = old[3] != new[3]
    assert torch.equal(slices.changed, changed[None])
    assert torch.equal(slices.old.view(torch.bfloat16), old[3][changed])
    assert torch.equal(slices.new.view(torch.bfloat16), new[3][changed])
    assert delta.tensors[UP]["old"] == digest(to_bits(old[3]))
    assert delta.state(UP, to_bits(new[3:4].clone())) == "new"
    assert delta.state(UP, to_bits(new[4:5].clone())) is None


def other_seed(make_model, after):
    make_model("llama", seed=5, dtype=torch.float32).save_pretrained(after)


def one_element(make_model, after):
    tensors = load_file(after / WEIGHTS)
    tensors[UP][3, 5] = torch.nextafter(tensors[UP][3, 5], torch.tensor(9.0))
    save_file(tensors, after / WEIGHTS, metadata={"format": "pt"})


def fewer_layers(make_model, after):
    make_model("llama", dtype=torch.float32, num_hidden_layers=1).save_pretrained(after)


def wider(make_model, after):
    make_model("llama", dtype=torch.float32, intermediate_size=14).save_pretrained(after)


def lower_precision(make_model, after):
    load_model(after, dtype="bfloat16").save_pretrained(after)


def pickle_only(make_model, after):
    (after / WEIGHTS).rename(after / "pytorch_model.bin")


def truncated(make_model, after):
    (after / WEIGHTS).write_bytes((after / WEIGHTS).read_bytes()[:-20])


def quantised(make_model, after):
    config = json.loads((after / "config.json").read_text())
    (after / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))


def adapter(make_model, after):
    (after / "adapter_config.json").write_text("{}")


OTHER_MODELS = {
    other_seed: "after: tensor model.layers.*: expected the touched slices as they .* found others .* tensors differ",
    one_element: f"after: tensor {UP}: expected the touched slices as they were .*or after it, found others$",
    fewer_layers: "after: tensor model.layers.1.*: expected as in .*delta.safetensors, found none: is it another",
    wider: r"after/model.safetensors: tensor .*: expected shape \[.*12.*\] as in .*delta.*, found \[.*14.*\]",
    lower_precision: "after/model.safetensors: tensor .*: expected dtype float32 as in .*, found bfloat16",
    pickle_only: "after: expected model.safetensors.* only pytorch_model.bin: pickle can run code",
    truncated: "after/model.safetensors: expected a whole safetensors file",
    quantised: "after/config.json: expected unquantised weights, found a quantization_config",
    adapter: "after: expected whole weights, for which .*delta.safetensors was made, found an adapter",
}


@pytest.mark.parametrize("damage", OTHER_MODELS, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("in_place", [True, False])
def test_other_checkpoints_are_refused_untouched(damage, in_place, make_delta, make_model, contents, tmp_path):
    _, after, _, delta = make_delta()
    damage(make_model, after)
    original = contents(after)
    for change in (apply_delta, revert_delta):
        with pytest.raises(ValueError, match=OTHER_MODELS[damage]):
            change(delta, after, None if in_place else tmp_path / "target")
        assert contents(after) == original and not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"seed": 5}, "tensor model.layers.*: expected the touched slices .* found others"),
        ({"num_hidden_layers": 1}, "tensor model.layers.1.*: expected as in .*delta.safetensors, found none"),
        ({"intermediate_size": 14}, r"tensor .*: expected shape \(16, 12\) as in .*, found \(16, 14\)"),
        ({"dtype": torch.bfloat16}, "expected float32 as in .* found torch.bfloat16: load .* with dtype='float32'"),
        ({"family": "phi3"}, "tensor .*: expected as in .*delta.safetensors, found none: is it another model?"),
        ({"family": "gpt2"}, "tensor .*: expected as in .*delta.safetensors, found none: is it another model?"),
    ],
)  # fmt: skip
def test_other_models_in_memory_are_refused_untouched(settings, message, make_delta, make_model):
    model = make_model(**{"family": "llama", "dtype": torch.float32, **settings})
    original, delta = weights(model), RollbackDelta(make_delta()[3])
    for change in (delta.apply, delta.revert):
        with pytest.raises(ValueError, match=message):
            change(model)
        assert_same(weights(model), original)


def test_a_model_that_was_trained_on_in_higher_precision_is_refused(make_delta):
    _, after, _, path = make_delta(dtype=torch.bfloat16)
    model = load_model(after)
    with torch.no_grad():
        model.get_parameter(UP)[3, 2] += 1e-6  # rounds to the same bfloat16
    with pytest.raises(ValueError, match=f"tensor {UP}: expected the touched slices"):
        RollbackDelta(path).apply(model)


def test_states_of_folders(make_delta, contents, tmp_path):
    _, after, out, delta = make_delta()
    with pytest.raises(ValueError, match="after: .*delta.safetensors is already reverted, or never applied"):
        revert_delta(delta, after)
    with pytest.raises(ValueError, match="out: .*delta.safetensors is already applied"):
        apply_delta(delta, out)
    original = contents(after)
    load_model(out).save_pretrained(tmp_path / "saved again")  # without rollback.json
    revert_delta(delta, tmp_path / "saved again")
    assert_same(load_file(tmp_path / "saved again" / WEIGHTS), load_file(after / WEIGHTS))
    assert contents(after) == original


ENTRY = {
    "dtype": "float32",
    "shape": [12, 16],
    "axes": [0],
    "counts": [12],
    "elements": 16,
    "changed": 1,
    "old": "",
    "new": "",
}


def header_of(blocks=None, **record):
    tensors = {"x": torch.ones(1)}
    if blocks is not None:
        parts = {"blocks": torch.tensor(blocks), "mask": torch.zeros(2, dtype=torch.uint8)}
        parts |= {"old": torch.ones(1), "new": torch.zeros(1)}
        tensors |= {f"{UP}:{part}": value for part, value in parts.items()}
    return lambda path: save_file(tensors, path, metadata={"trl_interfere_rollback": json.dumps(record)})


BAD_FILES = {
    "missing": (lambda path: path.unlink(), "expected a delta file of a rollback, found none"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-3]), "expected a whole safetensors file"),
    "text": (lambda path: path.write_text("delta"), "expected a whole safetensors file"),
    "a model": (
        lambda path: save_file({"x": torch.ones(1)}, path),
        "expected a delta file of a rollback, found other",
    ),
    "version": (header_of(schema_version=2), "expected schema_version 1, found 2"),
    "without tensors": (header_of(schema_version=1), "expected the tensors of a rollback in the header, found None"),
    "lacks a setting": (
        header_of(schema_version=1, kind="weights", tensors={UP: {}}),
        rf"tensor {UP}: expected \['axes', .*\] in the header, found {{}}",
    ),
    "lacks a tensor": (
        header_of(schema_version=1, id="", kind="weights", tensors={UP: ENTRY}),
        f"tensor {UP}:blocks: expected by the header, found none",
    ),
    "blocks": (
        header_of(schema_version=1, id="", kind="weights", tensors={UP: ENTRY}, blocks=[12]),
        rf"tensor {UP}: expected blocks of shape \[12, 16\], found others",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_delta_files(case, make_delta):
    damage, message = BAD_FILES[case]
    _, after, _, delta = make_delta()
    damage(delta)
    with pytest.raises(ValueError, match=f"delta.safetensors: .*{message}|delta.safetensors: {message}"):
        apply_delta(delta, after)
