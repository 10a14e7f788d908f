import json
import os
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_interfere.analysis.routes import RouteMap
from trl_interfere.models import load_model
from trl_interfere.repair import folder as folder_module
from trl_interfere.repair.delta import RollbackDelta
from trl_interfere.repair.folder import apply_delta, roll_back_folder, undo_rollback
from trl_interfere.repair.rollback import roll_back


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
FORMS = {
    "float32": {},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "sharded": {"shards": "3KB"},
    "sharded bfloat16": {"shards": "2KB", "dtype": torch.bfloat16},
    "tied": {"family": "qwen3"},
}
IDS = torch.tensor([[4, 9, 13, 5, 20, 7, 11, 3]])


def chosen(route_map, seed=0, share=0.3):
    rng = np.random.default_rng(seed)
    routes = rng.permutation(route_map.num_routes)[: round(share * route_map.num_routes)]
    return routes, rng.choice([0.3, 0.5, 1.0, 1.7, 4.0, -0.5], len(routes))


def logits(model):
    if model.config.model_type == "qwen3_moe":
        model.set_experts_implementation("eager")  # the others want larger experts
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("form", FORMS)
def test_roll_back_then_undo_gives_the_same_files(form, checkpoints, contents, tmp_path):
    before, after, route_map = checkpoints(**FORMS[form])
    (after / "README.md").write_text("# Model")
    original = contents(after)
    routes, steps = chosen(route_map)
    record = roll_back_folder(before, after, tmp_path / "out", routes, steps)
    repaired = contents(tmp_path / "out")
    assert contents(after) == original
    weights = {name for name in original if name.endswith(".safetensors")}
    assert {name for name in original if repaired[name] != original[name]} <= weights
    assert any(repaired[name] != original[name] for name in weights)
    assert repaired.keys() - original.keys() == {"rollback.json", record["file"]}

    undo_rollback(tmp_path / "out", tmp_path / "undone")
    assert contents(tmp_path / "undone") == original
    assert contents(tmp_path / "out") == repaired
    assert undo_rollback(tmp_path / "out")["id"] == record["id"]
    assert contents(tmp_path / "out") == original
    assert not any(path.name.startswith(".") for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rolled_back_folder_is_the_rollback_in_memory(architecture, dtype, checkpoints, tmp_path):
    before, after, route_map = checkpoints(architecture, dtype=dtype, shards="4KB")
    routes, steps = chosen(route_map)
    roll_back_folder(before, after, tmp_path / "out", routes, steps)
    start, model, found = (load_model(folder, dtype=dtype) for folder in (before, after, tmp_path / "out"))
    roll_back(model, dict(start.named_parameters()), route_map, routes, steps)
    for name, parameter in model.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter), name
    assert found.config.dtype == dtype
    if architecture != "gemma3":  # it wants an image processor
        assert torch.equal(logits(found), logits(model))
        assert not torch.equal(logits(found), logits(load_model(after, dtype=dtype)))


@pytest.mark.parametrize("family", ["llama-biases", "qwen3-moe", "phi3", "gpt2", "gemma2"])
def test_against_slices_written_out_by_hand(family, checkpoints, expected_rollback, tmp_path):
    before, after, route_map = checkpoints(family)
    routes, steps = chosen(route_map, seed=3)
    roll_back_folder(before, after, tmp_path / "out", routes, steps)
    start, end, found = (load_model(folder) for folder in (before, after, tmp_path / "out"))
    for name, tensor in expected_rollback(start, end, routes, steps).items():
        untouched = tensor == end.get_parameter(name).double()
        assert torch.equal(found.get_parameter(name)[untouched], end.get_parameter(name)[untouched]), name
        torch.testing.assert_close(found.get_parameter(name).double(), tensor, rtol=1e-6, atol=1e-7)


def test_step_1_on_all_routes_brings_the_earlier_tensors_back(checkpoints, tmp_path):
    before, after, route_map = checkpoints(dtype=torch.bfloat16)
    roll_back_folder(before, after, tmp_path / "out", np.arange(route_map.num_routes))
    start, end, found = (load_file(folder / WEIGHTS) for folder in (before, after, tmp_path / "out"))
    for name, tensor in found.items():
        assert torch.equal(tensor, end[name] if route_map.cut(name) is None else start[name]), name


def test_what_the_record_says(checkpoints, tmp_path):
    before, after, route_map = checkpoints(dtype=torch.bfloat16, scale=1e-3)
    routes = np.array([3, 0, 25, 33])
    settings = {"criterion": "magnitude", "seed": 4}
    returned = roll_back_folder(before, after, tmp_path / "out", routes, 1.5, settings=settings)
    content = json.loads((tmp_path / "out" / "rollback.json").read_text())
    (record,) = content["rollbacks"]
    assert record == json.loads(json.dumps(returned)) and content["schema_version"] == 1
    assert (record["criterion"], record["seed"], record["step"], record["routes"]) == (
        "magnitude",
        4,
        1.5,
        [3, 0, 25, 33],
    )
    names = ["/".join(path.parts[-2:]) for path in (before, after)]
    assert [record["before"], record["after"], record["model_type"]] == [*names, "llama"]
    assert record["routes_by_layer"] == {"mlp": {"0": 2}, "query": {"0": 1}, "key_value": {"0": 1}}
    assert set(record["versions"]) == {"trl_interfere", "torch", "safetensors"}
    old, new = (load_file(folder / WEIGHTS)[UP] for folder in (after, tmp_path / "out"))
    entry = record["tensors"][UP]
    assert entry["elements"] == 2 * 16 and entry["changed"] == (old != new).sum() < 32
    assert entry["dtype"] == "bfloat16" and entry["shape"] == [12, 16]


def test_routes_that_the_update_left_alone_are_not_written(checkpoints, tmp_path):
    before, after, _ = checkpoints()
    shutil.copy(before / WEIGHTS, after / WEIGHTS)
    tensors = load_file(after / WEIGHTS)
    tensors[UP][3] += 1
    save_file(tensors, after / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="after: expected an update from .*before on the chosen routes, found none"):
        roll_back_folder(before, after, tmp_path / "out", np.array([4, 5]))
    assert not (tmp_path / "out").exists()
    record = roll_back_folder(before, after, tmp_path / "out", np.array([3, 4]))
    assert list(record["tensors"]) == [UP]


def test_one_rollback_after_another(checkpoints, contents, tmp_path):
    before, after, _ = checkpoints(shards="3KB")
    folders = [after, tmp_path / "first", tmp_path / "second"]
    roll_back_folder(before, folders[0], folders[1], np.array([3, 20]), 2.0)
    roll_back_folder(before, folders[1], folders[2], np.array([3, 30]), 0.5)
    states = [contents(folder) for folder in folders]
    assert [len(json.loads((path / "rollback.json").read_text())["rollbacks"]) for path in folders[1:]] == [1, 2]
    first = folders[2] / "rollback" / "0.safetensors"
    with pytest.raises(
        ValueError, match="second: .*0.safetensors is not the last rollback in rollback.json: undo the"
    ):
        folder_module.revert_delta(first, folders[2])
    for expected in reversed(states[:2]):
        undo_rollback(folders[2])
        assert contents(folders[2]) == expected
    with pytest.raises(ValueError, match="second: expected rollback.json, found none: .* or it is undone already"):
        undo_rollback(folders[2])


def test_what_is_carried_over_and_what_is_not(checkpoints, tokenizer, tmp_path):
    before, after, _ = checkpoints()
    kept = ["README.md", "vocab.txt", "additional_chat_templates/tool.jinja", "modeling_own.py"]
    left = [
        *("pytorch_model.bin", "training_args.bin", "optimizer.pt", "trainer_state.json", "model.gguf"),
        *("consolidated.safetensors", "original/consolidated.00.pth", "checkpoint-3/model.safetensors", ".cache/lock"),
        *("adapters/default/adapter_config.json", "adapters/default/adapter_model.safetensors"),
        "pytorch_model.bin.index.json",
    ]  # fmt: skip
    for name in (*kept, *left):
        (after / name).parent.mkdir(exist_ok=True, parents=True)
        (after / name).write_text(name)
    AutoModelForCausalLM.from_pretrained(before).generation_config.save_pretrained(after)
    roll_back_folder(before, after, tmp_path / "out", np.array([3]))
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {
        *kept, WEIGHTS, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "rollback.json", "rollback/0.safetensors",
    }  # fmt: skip
    assert (tmp_path / "out" / "README.md").read_text() == "README.md"
    messages = [{"role": "user", "content": "1+2"}]
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == {"default": tokenizer.chat_template, "tool": kept[2]}
    assert loaded.apply_chat_template(messages, tokenize=False) == "1+2"


def test_headers_and_index_stay(checkpoints, tmp_path):
    before, after, _ = checkpoints(shards="3KB")
    roll_back_folder(before, after, tmp_path / "out", np.arange(24), 2.0)
    assert (tmp_path / "out" / INDEX).read_bytes() == (after / INDEX).read_bytes()
    for path in after.glob("*.safetensors"):
        contents = [folder.joinpath(path.name).read_bytes() for folder in (after, tmp_path / "out")]
        end = 8 + int.from_bytes(contents[0][:8], "little")
        assert contents[0][:end] == contents[1][:end] and len(contents[0]) == len(contents[1])


def test_shards_that_are_cut_differently(checkpoints, contents, tmp_path):
    before, after, route_map = checkpoints(shards="3KB")
    routes, steps = chosen(route_map)
    roll_back_folder(before, after, tmp_path / "out", routes, steps)
    load_model(before).save_pretrained(tmp_path / "whole")
    roll_back_folder(tmp_path / "whole", after, tmp_path / "other", routes, steps)
    found = [contents(tmp_path / name) for name in ("out", "other")]
    for content in found:
        content.pop("rollback.json")  # it names the folder
        content.pop("rollback/0.safetensors")
    assert found[0] == found[1]


def test_checkpoints_of_different_precision(checkpoints, expected_rollback, tmp_path):
    before, after, route_map = checkpoints()
    load_model(after, dtype="bfloat16").save_pretrained(tmp_path / "low")
    routes, steps = chosen(route_map)
    roll_back_folder(before, tmp_path / "low", tmp_path / "out", routes, steps)
    start, end = load_model(before), load_model(tmp_path / "low")
    found = load_file(tmp_path / "out" / WEIGHTS)
    for name, tensor in expected_rollback(start, end, routes, steps).items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], tensor.float().bfloat16()), name


def test_an_output_layer_in_a_shard_of_its_own(checkpoints, contents, tmp_path):
    before, after, _ = checkpoints("qwen3")
    tensors = load_file(after / WEIGHTS)
    (after / WEIGHTS).unlink()
    parts = {
        "a.safetensors": tensors,
        "b.safetensors": {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
    }
    for file, part in parts.items():
        save_file(part, after / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (after / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    original = contents(after)
    roll_back_folder(before, after, tmp_path / "out", np.array([3, 30]), 2.0)
    assert contents(tmp_path / "out")["b.safetensors"] == original["b.safetensors"]
    undo_rollback(tmp_path / "out")
    assert contents(tmp_path / "out") == original


@pytest.mark.parametrize("wanted", ["new", "old"])
@pytest.mark.parametrize("done", [0, 1, 2])
def test_an_interrupted_change_in_place_is_finished_by_the_next(
    wanted, done, checkpoints, contents, tmp_path, monkeypatch
):
    before, after, route_map = checkpoints(shards="3KB")
    original = contents(after)
    record = roll_back_folder(before, after, tmp_path / "out", np.arange(20))
    repaired = contents(tmp_path / "out")
    delta = shutil.copy(tmp_path / "out" / record["file"], tmp_path / "delta.safetensors")
    folder, change, expected = tmp_path / "out", lambda: undo_rollback(tmp_path / "out"), original
    if wanted == "new":
        folder, change, expected = after, lambda: apply_delta(delta, after), repaired
    rewrite, left = folder_module.rewrite_file, iter(range(done))

    def interrupted(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        rewrite(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "rewrite_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            change()
    if wanted == "new" and done == 2:  # or turned back
        undo_rollback(after)
        assert contents(after) == original
        change()
    else:
        change()
    weights = [name for name in expected if not name.startswith("rollback")]
    assert {name: contents(folder)[name] for name in weights} == {name: expected[name] for name in weights}
    assert (folder / "rollback.json").exists() == (wanted == "new")
    assert not list(folder.glob(".*"))


def test_a_rollback_that_is_interrupted_leaves_nothing(checkpoints, contents, tmp_path, monkeypatch):
    before, after, _ = checkpoints(shards="3KB")
    original = contents(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        roll_back_folder(before, after, tmp_path / "out", np.arange(20))
    assert contents(tmp_path) == original
    leftover = tmp_path / ".out.123.rollback"
    leftover.mkdir()
    (leftover / WEIGHTS).write_text("half")
    roll_back_folder(before, after, tmp_path / "out", np.arange(20))
    assert not leftover.exists()


def test_a_hub_id_from_the_local_cache(checkpoints, contents, tmp_path, monkeypatch):
    before, after, _ = checkpoints()
    commit, repository = "0" * 40, tmp_path / "hub" / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    (repository / "snapshots" / commit).mkdir(parents=True)
    for path in after.iterdir():
        shutil.copy(path, repository / "blobs" / path.name)
        (repository / "snapshots" / commit / path.name).symlink_to(repository / "blobs" / path.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    original = contents(tmp_path / "hub")
    record = roll_back_folder(before, "someone/model", tmp_path / "out", np.array([3]))
    assert record["after"] == "someone/model"
    delta = tmp_path / "out" / record["file"]
    apply_delta(delta, "someone/model", tmp_path / "applied")
    assert contents(tmp_path / "applied")[WEIGHTS] == contents(tmp_path / "out")[WEIGHTS]
    assert not (tmp_path / "applied" / WEIGHTS).is_symlink()
    with pytest.raises(
        ValueError, match="someone/model: expected a folder to change in place, or else an output folder"
    ):
        apply_delta(delta, "someone/model")
    with pytest.raises(ValueError, match="expected a file, found a link, as in a cache: choose an output folder"):
        apply_delta(delta, repository / "snapshots" / commit)
    assert contents(tmp_path / "hub").items() >= original.items()


def test_memory_holds_two_tensors(checkpoints, tmp_path, monkeypatch):
    before, after, route_map = checkpoints()
    alive, most = [], []

    def counted(stored):
        bits = folder_module_read(stored)
        alive.append(bits.data_ptr())
        most.append(stored.name)
        return bits

    folder_module_read = folder_module.read_bits
    monkeypatch.setattr(folder_module, "read_bits", counted)
    monkeypatch.setattr("trl_interfere.repair.streaming.read_bits", counted)
    roll_back_folder(before, after, tmp_path / "out", np.array([3]))
    touched = [name for name in load_file(after / WEIGHTS) if "layers.0.mlp" in name]
    assert sorted(most) == sorted(2 * touched)  # untouched tensors are never held, the others one by one


def rewrite(path, change, file=WEIGHTS):
    tensors = load_file(path / file)
    change(tensors)
    save_file(tensors, path / file, metadata={"format": "pt"})


def truncate(path):
    file = next(iter(sorted(path.glob("model*.safetensors"))))
    file.write_bytes(file.read_bytes()[:-20])


def quantise(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))


def outside(path):
    index = json.loads((path / INDEX).read_text())
    (path / INDEX).write_text(json.dumps(index).replace("model-00001", "../after/model-00001"))


BROKEN = {
    "missing tensor": ({}, lambda path: rewrite(path, lambda t: t.pop(DOWN)), ["after: tensor " + DOWN, "found none"]),
    "shape": (
        {},
        lambda path: rewrite(path, lambda t: t.__setitem__(DOWN, t[DOWN][:, :8].clone())),
        [f"after/{WEIGHTS}: tensor {DOWN}: expected shape (16, 12)", "found (16, 8)"],
    ),
    "truncated": ({}, truncate, [f"after/{WEIGHTS}", "expected a whole safetensors file"]),
    "truncated shard": ({"shards": "3KB"}, truncate, ["after/model-00001-of-", "expected a whole safetensors file"]),
    "shard elsewhere": ({"shards": "3KB"}, outside, [INDEX, "expected files of the same folder", "'../after/model"]),
    "pickle": ({}, lambda path: (path / WEIGHTS).rename(path / "pytorch_model.bin"), ["only pytorch_model.bin"]),
    "quantised": ({}, quantise, ["after/config.json", "found a quantization_config"]),
    "int8": (
        {},
        lambda path: rewrite(path, lambda t: t.__setitem__(DOWN, t[DOWN].to(torch.int8))),
        [DOWN, "unquantised", "found I8"],
    ),
    "NaN": (
        {},
        lambda path: rewrite(path, lambda t: t[DOWN].fill_(torch.nan)),
        [f"after: tensor {DOWN}", "found NaN"],
    ),
    "no configuration": ({}, lambda path: (path / "config.json").unlink(), ["after: expected config.json"]),
    "no folder": ({}, shutil.rmtree, ["after: expected a folder or the id of a Hub repository"]),
    "history": ({}, lambda path: (path / "rollback.json").write_text("{"), ["after/rollback.json: expected JSON"]),
    "history version": (
        {},
        lambda path: (path / "rollback.json").write_text('{"schema_version": 9}'),
        ["after/rollback.json: expected schema_version 1, found 9"],
    ),
    "history of another folder": (
        {},
        lambda path: (path / "rollback.json").write_text(
            json.dumps({"schema_version": 1, "rollbacks": [{"file": "rollback/../../before", "id": "", "kind": ""}]})
        ),
        ["after/rollback.json: expected a file in rollback/, found 'rollback/../../before'"],
    ),
    "history without its delta": (
        {},
        lambda path: (path / "rollback.json").write_text(
            json.dumps({"schema_version": 1, "rollbacks": [{"file": "rollback/0.safetensors", "id": "", "kind": ""}]})
        ),
        ["after/rollback.json: names rollback/0.safetensors, which is missing: the rollback cannot be undone"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_bad_checkpoints(case, checkpoints, tmp_path):
    settings, damage, parts = BROKEN[case]
    before, after, route_map = checkpoints(**settings)
    damage(after)
    with pytest.raises(ValueError) as error:
        roll_back_folder(before, after, tmp_path / "out", np.arange(route_map.num_routes))
    for part in parts:
        assert part in str(error.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_another_architecture(checkpoints, make_model, tmp_path):
    before, after, _ = checkpoints()
    make_model("mistral", dtype=torch.float32).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="after/config.json: expected model_type 'mistral' .*found 'llama'"):
        roll_back_folder(tmp_path / "other", after, tmp_path / "out", np.array([1]))


def test_overflow_of_a_large_step(checkpoints, tmp_path):
    before, after, _ = checkpoints(dtype=torch.float16)
    with pytest.raises(
        ValueError, match=r"after: tensor model.layers.0.mlp.*: expected finite .* too large for float16\?"
    ):
        roll_back_folder(before, after, tmp_path / "out", np.array([1]), 1e7)


@pytest.mark.parametrize(
    "routes, step, message",
    [
        ([36], 1.0, "routes: expected indices from 0 to 35, found 36"),
        ([-1], 1.0, "routes: expected indices from 0 to 35, found -1"),
        ([3, 4, 3], 1.0, "routes: expected each route once"),
        ([0.5], 1.0, "routes: expected a list of indices, found .* of float64"),
        ([[1, 2]], 1.0, r"routes: expected a list of indices, found shape \(1, 2\)"),
        ([], 1.0, "routes: expected at least one with a step other than 0, found none"),
        ([1, 2], 0.0, "routes: expected at least one with a step other than 0, found none"),
        ([1, 2], [1.0], r"step: expected a number or one for each of 2 routes, found shape \(1,\)"),
        ([1, 2], [1.0, np.nan], "step: expected finite numbers, found nan"),
        ([1, 2], np.inf, "step: expected finite numbers, found inf"),
    ],
)
def test_routes_and_steps_that_cannot_be(routes, step, message, checkpoints, tmp_path, make_model):
    before, after, route_map = checkpoints()
    with pytest.raises(ValueError, match=message):
        roll_back_folder(before, after, tmp_path / "out", np.array(routes), step)
    if routes and step != 0.0:
        model = make_model("llama")
        with pytest.raises(ValueError, match=message):
            roll_back(model, dict(model.named_parameters()), route_map, np.array(routes), step)


def test_output_folder_that_is_taken(checkpoints, tmp_path):
    before, after, _ = checkpoints()
    for path in (after, after / "config.json"):
        with pytest.raises(ValueError, match=f"{path}: expected an empty or a new folder"):
            roll_back_folder(before, after, path, np.array([1]))
    (tmp_path / "empty").mkdir()
    roll_back_folder(before, after, tmp_path / "empty", np.array([1]))
    assert (tmp_path / "empty" / WEIGHTS).exists()
    with pytest.raises(ValueError, match="expected an empty or a new folder"):
        undo_rollback(tmp_path / "empty", after)


def test_weights_that_changed_after_the_rollback(checkpoints, contents, tmp_path):
    before, after, _ = checkpoints()
    roll_back_folder(before, after, tmp_path / "out", np.array([3, 30]))
    rewrite(tmp_path / "out", lambda tensors: tensors[UP].add_(1))
    changed = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=f"out: tensor {UP}: expected the touched slices .* found others"):
        undo_rollback(tmp_path / "out")
    assert contents(tmp_path / "out") == changed
    with pytest.raises(ValueError, match="nowhere: expected the folder of a rollback"):
        undo_rollback(tmp_path / "nowhere")


def test_an_architecture_of_ones_own(make_model, moved, tmp_path):
    from trl_interfere.analysis.architectures import Architecture, Slices

    before = make_model("llama", dtype=torch.float32)
    for name, model in (("before", before), ("after", moved(before))):
        model.save_pretrained(tmp_path / name)
    description = Architecture(
        {"mlp.up_proj.weight": Slices(0, ("mlp",))}, counts={"mlp": "intermediate_size", "query": lambda *_: 0}
    )
    record = roll_back_folder(
        tmp_path / "before", tmp_path / "after", tmp_path / "out", np.array([0, 13]), description=description
    )
    assert sorted(record["tensors"]) == [UP, UP.replace(".0.", ".1.")]
    assert RouteMap(before.config, description).num_routes == 24


@pytest.mark.parametrize("part", ["old", "new", "mask"])
def test_a_damaged_delta_is_not_written(part, checkpoints, contents, tmp_path):
    before, after, route_map = checkpoints()
    record = roll_back_folder(before, after, tmp_path / "out", *chosen(route_map))
    file = tmp_path / "out" / record["file"]
    damaged = bytearray(file.read_bytes())
    length = int.from_bytes(damaged[:8], "little")
    start, _ = json.loads(damaged[8 : 8 + length])[f"{UP}:{part}"]["data_offsets"]
    damaged[8 + length + start] ^= 1
    file.write_bytes(damaged)
    shutil.copyfile(file, tmp_path / "delta.safetensors")
    shutil.copytree(after, tmp_path / "model")
    model = load_model(after)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = {name: contents(tmp_path / name) for name in ("out", "model")}
    message = rf"safetensors: tensor {UP}: expected the slices whose digest is in the file, found others"
    if part != "new":
        with pytest.raises(ValueError, match=message):
            undo_rollback(tmp_path / "out")
    if part != "old":
        with pytest.raises(ValueError, match=message):
            apply_delta(tmp_path / "delta.safetensors", tmp_path / "model")
        with pytest.raises(ValueError, match=message):
            RollbackDelta(tmp_path / "delta.safetensors").apply(model)
    assert {name: contents(tmp_path / name) for name in found} == found
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
