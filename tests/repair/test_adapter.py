import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from trl_interfere.analysis.routes import RouteMap
from trl_interfere.models import load_model
from trl_interfere.repair.adapter import check_adapter
from trl_interfere.repair.folder import apply_delta, revert_delta, roll_back_folder, undo_rollback
from trl_interfere.repair.rollback import roll_back


ADAPTER = "adapter_model.safetensors"
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "llama": LLAMA,
    "llama-biases": LLAMA,
    "qwen3": LLAMA,
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "qwen3-moe": ["q_proj", "k_proj", "v_proj", "o_proj"],  # its experts are no linear layers
}
IDS = torch.tensor([[4, 9, 13, 5, 20, 7, 11, 3]])


@pytest.fixture
def base(make_model, tmp_path):
    """Function that writes the model under the adapters."""

    def write(family="llama"):
        make_model(family, dtype=torch.float32).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return write


@pytest.fixture
def make_adapter(base, tmp_path):
    """Function that writes a random adapter of a model."""

    def write(name, family="llama", seed=0, dtype=torch.float32, **options):
        if not (tmp_path / "base").exists():
            base(family)
        options = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[family], **options}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = get_peft_model(load_model(tmp_path / "base"), LoraConfig(task_type="CAUSAL_LM", **options))
            for parameter_name, parameter in model.named_parameters():
                if "lora_" in parameter_name:
                    torch.nn.init.normal_(parameter, std=0.2)
        if dtype != torch.float32:
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    module.lora_A.to(dtype)
                    module.lora_B.to(dtype)
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "README.md").write_text(name)
        return tmp_path / name

    return write


def merged(folder, base):
    """The model with an adapter, merged by peft in float64."""
    model = load_model(base, dtype="float64")
    if model.config.model_type == "qwen3_moe":
        model.set_experts_implementation("eager")  # the others know no float64
    if folder is None:
        return model
    return PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).double().merge_and_unload().eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def route_map_of(base):
    return RouteMap(load_model(base).config)


def check_against_merging(before, after, base, routes, steps, folder, rtol):
    """The adapter as peft loads it against a rollback of merged weights, both in float64."""
    expected = merged(after, base)
    roll_back(expected, dict(merged(before, base).named_parameters()), route_map_of(base), routes, steps)
    found = merged(folder, base)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, rtol=rtol, atol=rtol, msg=name)
    torch.testing.assert_close(logits(found), logits(expected), rtol=100 * rtol, atol=100 * rtol)
    assert not torch.allclose(logits(found), logits(merged(after, base)), rtol=1e-3, atol=1e-3)
    if found.config.model_type != "qwen3_moe":
        unmerged = PeftModel.from_pretrained(load_model(base, dtype="float64"), folder, autocast_adapter_dtype=False)
        torch.testing.assert_close(logits(unmerged.double().eval()), logits(found), rtol=1e-6, atol=1e-6)


def chosen(base, seed=0, share=0.4):
    rng = np.random.default_rng(seed)
    count = route_map_of(base).num_routes
    routes = rng.permutation(count)[: round(share * count)]
    return routes, rng.choice([0.3, 1.0, 1.7, 2.5], len(routes))


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("restore", [True, False])
def test_to_the_model_under_it(family, restore, make_adapter, tmp_path):
    after, base = make_adapter("after", family), tmp_path / "base"
    routes, steps = chosen(base)
    record = roll_back_folder(None, after, tmp_path / "out", routes, 1.0 if restore else steps)
    assert record["kind"] == "adapter" and record["before"] == "/".join(base.parts[-2:])
    check_against_merging(
        None, after, base, routes, 1.0 if restore else steps, tmp_path / "out", 1e-12 if restore else 1e-6
    )
    for name in ("adapter_config.json", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (after / name).read_bytes()
    assert {name: tensor.shape for name, tensor in load_file(after / ADAPTER).items()} == {
        name: tensor.shape for name, tensor in load_file(tmp_path / "out" / ADAPTER).items()
    }


def test_rows_of_b_and_columns_of_a(make_adapter, tmp_path):
    after = make_adapter("after")
    roll_back_folder(tmp_path / "base", after, tmp_path / "out", np.array([5, 26]))  # a channel and a query head
    old, new = load_file(after / ADAPTER), load_file(tmp_path / "out" / ADAPTER)
    prefix = "base_model.model.model.layers.0"
    zeros = {
        f"{prefix}.mlp.gate_proj.lora_B.weight": np.s_[5],
        f"{prefix}.mlp.up_proj.lora_B.weight": np.s_[5],
        f"{prefix}.mlp.down_proj.lora_A.weight": np.s_[:, 5],
        f"{prefix}.self_attn.q_proj.lora_B.weight": np.s_[8:12],
        f"{prefix}.self_attn.o_proj.lora_A.weight": np.s_[:, 8:12],
    }
    for name, tensor in old.items():
        if name in zeros:
            tensor[zeros[name]] = 0
        assert torch.equal(new[name], tensor), name


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("restore", [True, False])
def test_to_an_earlier_adapter(family, restore, make_adapter, tmp_path):
    before, after, base = make_adapter("before", family, seed=1), make_adapter("after", family), tmp_path / "base"
    routes, steps = chosen(base)
    steps = 1.0 if restore else steps
    record = roll_back_folder(before, after, tmp_path / "out", routes, steps)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert record["kind"] == "adapter-concatenation" and record["rank"] == config["r"] == 6
    assert config["lora_alpha"] == 10 and not config["alpha_pattern"]
    # With equal scales nothing is rounded: rows and columns are copied or zero.
    check_against_merging(before, after, base, routes, steps, tmp_path / "out", 1e-12 if restore else 1e-6)


OPTIONS = {
    "ranks": ({"r": 2}, {"r": 4}),
    "scales": ({"lora_alpha": 3}, {"lora_alpha": 7}),
    "rank-stabilised": ({"use_rslora": True}, {"r": 2, "use_rslora": True}),
    "one rank-stabilised": ({"use_rslora": True, "r": 7}, {}),
    "patterns": (
        {"rank_pattern": {"q_proj": 1, "up_proj": 5}, "alpha_pattern": {"layers.1.mlp.down_proj": 11}},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3, "layers.0.mlp.up_proj": 9}},
    ),
    "other modules": (
        {"target_modules": ["q_proj", "up_proj", "o_proj"]},
        {"target_modules": ["down_proj", "up_proj", "v_proj"]},
    ),
    "modules by expression": ({}, {"target_modules": r".*\.1\.mlp\.(up|down)_proj"}),
    "layers": ({}, {"layers_to_transform": [0], "layers_pattern": "layers"}),
    "odd scale": ({"lora_alpha": 7, "r": 3}, {"lora_alpha": 11, "r": 7}),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_adapters_of_different_settings(case, make_adapter, contents, tmp_path):
    settings = OPTIONS[case]
    before, after = make_adapter("before", seed=1, **settings[0]), make_adapter("after", **settings[1])
    base, original = tmp_path / "base", contents(after)
    routes, steps = chosen(base, seed=2)
    roll_back_folder(before, after, tmp_path / "out", routes, steps)
    check_against_merging(before, after, base, routes, steps, tmp_path / "out", 1e-6)
    scales = [
        {
            name: layer.scaling["default"]
            for name, layer in PeftModel.from_pretrained(load_model(base), folder).named_modules()
            if isinstance(layer, LoraLayer)
        }
        for folder in (before, after, tmp_path / "out")
    ]
    assert scales[2].items() >= scales[1].items()  # to the bit
    undo_rollback(tmp_path / "out")
    assert contents(tmp_path / "out") == original


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("to_earlier", [True, False])
def test_roll_back_then_undo_gives_the_same_files(dtype, to_earlier, make_adapter, contents, tmp_path):
    before, after = make_adapter("before", seed=1, dtype=dtype), make_adapter("after", dtype=dtype)
    original = contents(after)
    routes, steps = chosen(tmp_path / "base")
    roll_back_folder(before if to_earlier else None, after, tmp_path / "out", routes, steps)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / ADAPTER).values()} == {dtype}
    repaired = contents(tmp_path / "out")
    undo_rollback(tmp_path / "out", tmp_path / "undone")
    assert contents(tmp_path / "undone") == original and contents(tmp_path / "out") == repaired
    undo_rollback(tmp_path / "out")
    assert contents(tmp_path / "out") == original
    with pytest.raises(ValueError, match="out: expected rollback.json, found none"):
        undo_rollback(tmp_path / "out")


def test_delta_of_an_adapter(make_adapter, contents, tmp_path):
    after = make_adapter("after")
    record = roll_back_folder(None, after, tmp_path / "out", np.array([5, 26, 34]), 2.0)
    delta = shutil.copy(tmp_path / "out" / record["file"], tmp_path / "delta.safetensors")
    original, repaired = contents(after), contents(tmp_path / "out")
    apply_delta(delta, after)
    assert contents(after)[ADAPTER] == repaired[ADAPTER]
    revert_delta(delta, after)
    assert contents(after) == original
    other = make_adapter("other", seed=3)
    with pytest.raises(ValueError, match="other: tensor base_model.*: expected the touched slices .* found others"):
        apply_delta(delta, other)
    with pytest.raises(ValueError, match="base: expected an adapter, for which .*delta.safetensors was made"):
        apply_delta(delta, tmp_path / "base")
    from trl_interfere.repair.delta import RollbackDelta

    with pytest.raises(ValueError, match="is a delta of an adapter: apply it to the folder of the adapter"):
        RollbackDelta(delta).apply(load_model(tmp_path / "base"))


def test_an_adapter_that_changed_after_the_rollback(make_adapter, contents, tmp_path):
    before, after = make_adapter("before", seed=1), make_adapter("after")
    roll_back_folder(before, after, tmp_path / "out", np.array([5, 26]))
    tensors = load_file(tmp_path / "out" / ADAPTER)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, tmp_path / "out" / ADAPTER)
    changed = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="out/adapter_model.safetensors: expected the file as the rollback wrote it"):
        undo_rollback(tmp_path / "out")
    assert contents(tmp_path / "out") == changed


def test_a_model_that_has_moved(make_adapter, tmp_path):
    after = make_adapter("after")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="base: expected a folder or the id of a Hub repository"):
        roll_back_folder(None, after, tmp_path / "out", np.array([5]))
    assert not (tmp_path / "out").exists()
    roll_back_folder(None, after, tmp_path / "out", np.array([5]), base=tmp_path / "moved")
    roll_back_folder(tmp_path / "moved", after, tmp_path / "same", np.array([5]), base=tmp_path / "moved")
    assert (tmp_path / "out" / ADAPTER).read_bytes() == (tmp_path / "same" / ADAPTER).read_bytes()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"use_dora": True}, "found use_dora=True: it cannot be rolled back exactly; merge it"),
        ({"modules_to_save": ["lm_head"]}, r"found modules_to_save=\['lm_head'\]"),
        ({"bias": "all"}, "found bias='all'"),
        ({"lora_bias": True}, "found lora_bias=True"),
        ({"trainable_token_indices": [3]}, r"found trainable_token_indices=\{?.*3"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, r"found target_parameters=\['mlp.experts.down_proj'\]"),
        ({"init_lora_weights": "pissa"}, "found init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "found init_lora_weights='olora'"),
        ({"peft_type": "IA3"}, "expected a LoRA adapter, found .*IA3"),
        ({"peft_type": "unheard of"}, "expected the configuration of an adapter"),
    ],
)
def test_kinds_of_adapters_that_are_refused(settings, message, make_adapter, tmp_path):
    after = make_adapter("after")
    path = after / "adapter_config.json"
    config = json.loads(path.read_text())
    if settings.get("peft_type") == "IA3":
        config = {"base_model_name_or_path": config["base_model_name_or_path"]}
    path.write_text(json.dumps(config | settings))
    with pytest.raises(ValueError, match=f"after/adapter_config.json: .*{message}"):
        check_adapter(after)
    for before in (None, tmp_path / "base", after):
        with pytest.raises(ValueError, match=message):
            roll_back_folder(before, after, tmp_path / "out", np.array([1]))
    assert not (tmp_path / "out").exists()


def test_embeddings_in_an_adapter_are_refused(make_adapter, tmp_path):
    after = make_adapter("after", target_modules=["embed_tokens", "up_proj"])
    with pytest.raises(ValueError, match="expected matrices lora_A and lora_B of linear layers, found .*embed_tokens"):
        roll_back_folder(None, after, tmp_path / "out", np.array([1]))


def test_what_an_adapter_cannot_be_rolled_back_to(make_adapter, make_model, tmp_path):
    after = make_adapter("after")
    make_model("llama", seed=7, dtype=torch.float32).save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match="other: expected the model .*base of the adapter .*after, or another adapter"
    ):
        roll_back_folder(tmp_path / "other", after, tmp_path / "out", np.array([1]))
    with pytest.raises(
        ValueError, match="after: expected whole weights as in .*other, found an adapter: merge it first"
    ):
        roll_back_folder(after, tmp_path / "other", tmp_path / "out", np.array([1]))
    with pytest.raises(ValueError, match="before: expected a checkpoint, since .*other is no adapter"):
        roll_back_folder(None, tmp_path / "other", tmp_path / "out", np.array([1]))
    before = make_adapter("before", seed=1)
    config = json.loads((before / "adapter_config.json").read_text())
    (before / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(tmp_path / "other")})
    )
    with pytest.raises(ValueError, match="before: expected an adapter of .*base, found one of .*other"):
        roll_back_folder(before, after, tmp_path / "out", np.array([1]))
    with pytest.raises(ValueError, match="expected an update from .*base on the chosen routes, found none"):
        only_mlp = make_adapter("mlp", target_modules=["up_proj"])
        roll_back_folder(None, only_mlp, tmp_path / "out", np.array([26]))
    assert not (tmp_path / "out").exists()
