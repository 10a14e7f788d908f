import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from trl_interfere.analysis.weight_diff import update_statistics
from trl_interfere.checkpoint import Checkpoint, check_comparable
from trl_interfere.models import load_model


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path, make_model):
    """Function that saves a random model and returns its folder."""

    def save(name, family="llama", shards="5GB", **settings):
        model = make_model(family, dtype=torch.float32, **settings)
        model.save_pretrained(tmp_path / name, max_shard_size=shards)
        return tmp_path / name

    return save


def rewrite(path, change, file=WEIGHTS):
    tensors = load_file(path / file)
    change(tensors)
    save_file(tensors, path / file)


def quantise(path):
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | {"quantization_config": {"quant_method": "bitsandbytes"}}))


def truncate(path):
    content = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(content[: len(content) // 2])


def lose_shard(path):
    next(iter(sorted(path.glob("model-*.safetensors")))).unlink()


def lose_from_shard(path):
    file = json.loads((path / INDEX).read_text())["weight_map"][DOWN]
    rewrite(path, lambda tensors: tensors.pop(DOWN), file)


def name_elsewhere(path):
    names = json.loads((path / INDEX).read_text())["weight_map"]
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "../other.safetensors")}))


def put(name, value):
    return lambda path: rewrite(path, lambda tensors: tensors.__setitem__(name, value(tensors.get(name))))


def with_value(number):
    return put(DOWN, lambda tensor: tensor.index_fill(0, torch.tensor([3]), number))


def as_type(dtype):
    return put(DOWN, lambda tensor: tensor.to(dtype))


BROKEN = {
    "architecture": ({"family": "mistral"}, None, ["after/config.json", "model_type 'llama'", "'mistral'"]),
    "shape": ({"intermediate_size": 8}, None, [f"after/{WEIGHTS}", "down_proj.weight", "(16, 12)", "(16, 8)"]),
    "missing": ({}, lambda path: rewrite(path, lambda t: t.pop(DOWN)), ["after: tensor " + DOWN, "found none"]),
    "extra": ({}, put("model.extra", lambda _: torch.ones(2)), ["before: tensor model.extra", f"after/{WEIGHTS}"]),
    "layers": ({"num_hidden_layers": 1}, None, ["after: tensor model.layers.1.", "9 are missing"]),
    "truncated": ({}, truncate, [f"after/{WEIGHTS}", "expected a whole safetensors file"]),
    "lost shard": ({"shards": "3KB"}, lose_shard, ["after/model-00001-of-", "expected a whole safetensors file"]),
    "lost from shard": ({"shards": "3KB"}, lose_from_shard, ["after/model-0", f"tensor {DOWN}", "found none"]),
    "index": ({"shards": "3KB"}, lambda path: (path / INDEX).write_text("{"), [f"after/{INDEX}", "weight_map"]),
    "index elsewhere": ({"shards": "3KB"}, name_elsewhere, ["beside it, found '../other.safetensors'"]),
    "NaN": ({}, with_value(float("nan")), [f"after/{WEIGHTS}", f"tensor {DOWN}", "found 12 NaN or infinity"]),
    "infinity": ({}, with_value(float("-inf")), [f"after/{WEIGHTS}", f"tensor {DOWN}", "12 NaN or infinity"]),
    "quantised by name": ({}, quantise, ["after/config.json", "quantization_config"]),
    "uint8": ({}, as_type(torch.uint8), [f"after/{WEIGHTS}", f"tensor {DOWN}", "found U8"]),
    "fp8": ({}, as_type(torch.float8_e4m3fn), [f"after/{WEIGHTS}", f"tensor {DOWN}", "found F8_E4M3"]),
    "pickle": (
        {},
        lambda path: (path / WEIGHTS).rename(path / "pytorch_model.bin"),
        [f"after: expected {WEIGHTS}", "only pytorch_model.bin", "pickle"],
    ),
    "empty": ({}, lambda path: (path / WEIGHTS).unlink(), [f"after: expected {WEIGHTS}", "found neither"]),
    "no configuration": ({}, lambda path: (path / "config.json").unlink(), ["after/config.json: expected"]),
    "identical": (None, None, ["after: expected an update", "before", "identical", "lm_head.weight", "to the bit"]),
    "no such folder": ({}, shutil.rmtree, ["after: expected a folder or the id of a Hub repository"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_checkpoints(folder, tmp_path, case):
    settings, damage, parts = BROKEN[case]
    before = folder("before", shards=(settings or {}).get("shards", "5GB"))
    after = folder("after", **({} if settings is None else {"seed": 1, **settings}))
    if damage is not None:
        damage(after)
    with pytest.raises(ValueError) as error:
        update_statistics([Checkpoint(before), Checkpoint(after)])
    for part in parts:
        assert part in str(error.value)


def test_nan_that_both_have(folder):
    folders = [folder("before"), folder("after", seed=1)]
    for path in folders:
        rewrite(path, lambda tensors: tensors[DOWN].fill_(float("nan")))
    with pytest.raises(ValueError, match=re.escape(f"before/{WEIGHTS}: tensor {DOWN}: expected finite values")):
        update_statistics([Checkpoint(path) for path in folders])


@pytest.mark.parametrize("stored", ["neither", "before", "after", "only the output layer"])
def test_a_tied_output_layer_is_not_missing(folder, stored):
    before, after = folder("before", "qwen3"), folder("after", "qwen3", seed=1)
    embeddings, head = "model.embed_tokens.weight", "lm_head.weight"
    if stored in ("before", "after"):
        rewrite({"before": before, "after": after}[stored], lambda t: t.__setitem__(head, t[embeddings].clone()))
    elif stored == "only the output layer":
        rewrite(after, lambda tensors: tensors.__setitem__(head, tensors.pop(embeddings)))
    checkpoints = [Checkpoint(before), Checkpoint(after)]
    assert head not in check_comparable(*checkpoints)
    (update,) = update_statistics(checkpoints)
    assert update.tensors.elements[embeddings] == 25 * 16
    tensors = load_file(before / WEIGHTS)
    tensors.pop(head, None)
    assert update.tensors.elements.sum() == sum(tensor.numel() for tensor in tensors.values())


def test_an_output_layer_that_one_side_ties(folder):
    tied, untied = folder("tied", "qwen3"), folder("untied", "qwen3", seed=1, tie_word_embeddings=False)
    (update,) = update_statistics([Checkpoint(tied), Checkpoint(untied)])
    before = load_file(tied / WEIGHTS)["model.embed_tokens.weight"]
    after = load_file(untied / WEIGHTS)["lm_head.weight"]
    expected = ((after - before).double() ** 2).sum().item()
    assert update.tensors.squared_norm["lm_head.weight"] == pytest.approx(expected, rel=1e-5)


def test_an_adapter_of_another_model(folder, tmp_path):
    model = get_peft_model(load_model(folder("two")), LoraConfig(target_modules=["down_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    one = folder("one", num_hidden_layers=1)
    with pytest.raises(ValueError, match=re.escape(f"tensor {DOWN}: expected one of {one}, found none")):
        Checkpoint(tmp_path / "adapter", base=one)
    assert Checkpoint(tmp_path / "adapter").folder == tmp_path / "two"


def test_an_output_layer_that_is_stored_beside_the_embeddings_that_it_is_tied_to(folder):
    before, after = folder("before", "qwen3"), folder("after", "qwen3", seed=1)
    embeddings, head = "model.embed_tokens.weight", "lm_head.weight"
    rewrite(after, lambda tensors: tensors.__setitem__(head, tensors[embeddings] + 1))
    (update,) = update_statistics([Checkpoint(before), Checkpoint(after)])
    expected = load_file(after / WEIGHTS)[head] - load_file(before / WEIGHTS)[embeddings]
    assert update.tensors.squared_norm[head] == pytest.approx((expected.double() ** 2).sum().item(), rel=1e-5)
    loaded = load_model(after)
    assert torch.equal(loaded.lm_head.weight, load_file(after / WEIGHTS)[head])  # as transformers has it
