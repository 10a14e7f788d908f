import json
import re

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


def rewrite(path, change):
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def quantise(path):
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | {"quantization_config": {"quant_method": "bitsandbytes"}}))


def truncate(path):
    content = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(content[: len(content) // 2])


def lose_shard(path):
    next(iter(sorted(path.glob("model-*.safetensors")))).unlink()


def name_elsewhere(path):
    names = json.loads((path / INDEX).read_text())["weight_map"]
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "../other.safetensors")}))


def put(name, value):
    return lambda path: rewrite(path, lambda tensors: tensors.__setitem__(name, value(tensors.get(name))))


def pickle(path):
    (path / WEIGHTS).rename(path / "pytorch_model.bin")


INFINITE = put(DOWN, lambda tensor: tensor.index_fill(0, torch.tensor([3]), float("-inf")))
FP8 = put(DOWN, lambda tensor: tensor.to(torch.float8_e4m3fn))
BROKEN = {
    "architecture": ({"family": "mistral"}, None, ["after/config.json", "model_type 'llama'", "'mistral'"]),
    "shape": ({"intermediate_size": 8}, None, [f"after/{WEIGHTS}", "down_proj.weight", "(16, 12)", "(16, 8)"]),
    "missing": ({}, lambda path: rewrite(path, lambda t: t.pop(DOWN)), ["after: tensor " + DOWN, "found none"]),
    "truncated": ({}, truncate, [f"after/{WEIGHTS}", "expected a whole safetensors file"]),
    "lost shard": ({"shards": "3KB"}, lose_shard, ["after/model-00001-of-", "expected a whole safetensors file"]),
    "index": ({"shards": "3KB"}, lambda path: (path / INDEX).write_text("{"), [f"after/{INDEX}", "weight_map"]),
    "index elsewhere": ({"shards": "3KB"}, name_elsewhere, ["beside it, found '../other.safetensors'"]),
    "infinity": ({}, INFINITE, [f"after/{WEIGHTS}", f"tensor {DOWN}", "found 12 NaN or infinity"]),
    "quantised by name": ({}, quantise, ["after/config.json", "quantization_config"]),
    "fp8": ({}, FP8, [f"after/{WEIGHTS}", f"tensor {DOWN}", "found F8_E4M3"]),
    "pickle": ({}, pickle, [f"after: expected {WEIGHTS}", "only pytorch_model.bin", "pickle"]),
    "empty": ({}, lambda path: (path / WEIGHTS).unlink(), [f"after: expected {WEIGHTS}", "found neither"]),
    "no configuration": ({}, lambda path: (path / "config.json").unlink(), ["after/config.json: expected"]),
    "identical": (None, None, ["after: expected an update", "before", "identical", "lm_head.weight", "to the bit"]),
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


def test_an_output_layer_that_one_side_ties_or_stores_beside_the_embeddings(folder):
    embeddings, head = "model.embed_tokens.weight", "lm_head.weight"
    before, after = folder("before", "qwen3"), folder("after", "qwen3", seed=1)
    rewrite(after, lambda tensors: tensors.__setitem__(head, tensors[embeddings] + 1))
    for other in (after, folder("untied", "qwen3", seed=1, tie_word_embeddings=False)):
        (update,) = update_statistics([Checkpoint(before), Checkpoint(other)])
        difference = load_file(other / WEIGHTS)[head] - load_file(before / WEIGHTS)[embeddings]
        expected = (difference.double() ** 2).sum().item()
        assert update.tensors.squared_norm[head] == pytest.approx(expected, rel=1e-5)
    assert torch.equal(load_model(after).lm_head.weight, load_file(after / WEIGHTS)[head])  # as transformers has it


def test_an_adapter_of_another_model(folder, tmp_path):
    model = get_peft_model(load_model(folder("two")), LoraConfig(target_modules=["down_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=re.escape(f"tensor {DOWN}: expected one of ")):
        Checkpoint(tmp_path / "adapter", base=folder("one", num_hidden_layers=1))
    assert Checkpoint(tmp_path / "adapter").folder == tmp_path / "two"
