import numpy as np
import pytest
import torch
from transformers import AutoConfig

from trl_interfere.analysis.architectures import LLAMA, Architecture, Slices
from trl_interfere.analysis.routes import RouteMap


KINDS = ("mlp", "query", "key_value")


def test_sum_by_route_against_written_out_slices(architecture, make_model, dense_sums):
    model = make_model(architecture, seed=3)
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    sums, outside = RouteMap(model.config).sum_by_route(tensors)
    expected, expected_outside = dense_sums(model, tensors)
    np.testing.assert_allclose(sums, expected, rtol=1e-12, atol=1e-12)
    assert outside == pytest.approx(expected_outside, rel=1e-10, abs=1e-10)


def test_what_routes_write_adds_up_to_the_output_of_the_module(architecture, make_model, contributions, owned_slices):
    model = make_model(architecture)
    written, outputs = contributions(model, [4, 9, 13, 5, 20, 7])
    assert len(written) == 4
    writers = {(kind, layer): owned[-1][0] for kind, layer, _, owned in owned_slices(model)}
    for key, parts in written.items():
        bias = getattr(model.get_submodule(writers[key].rpartition(".")[0]), "bias", None)
        torch.testing.assert_close(parts.sum(dim=0) + (0 if bias is None else bias), outputs[key])


@pytest.mark.parametrize(
    "family, name, layers",
    [
        ("gpt2", "h.1.attn.c_attn.weight", "transformer.h."),
        ("gemma3", "language_model.model.layers.1.mlp.up_proj.weight", "model.language_model.layers."),
        ("llama", "layers.1.self_attn.o_proj.weight", "model.layers."),
        ("llama", "base_model.model.model.layers.1.mlp.up_proj.weight", "_orig_mod.model.layers."),
        ("llama", "module.model.layers.1.mlp.up_proj.weight", "model.layers."),
    ],
)
def test_other_names_of_the_same_tensor(family, name, layers, make_model):
    route_map = RouteMap(make_model(family).config)
    first, second = route_map.cut(name), route_map.cut(layers + name[name.index("1.") :])
    assert first.axes == second.axes and np.array_equal(first.owners, second.owners)


@pytest.mark.parametrize(
    "family, name",
    [
        ("gpt2", "h.0.attn.bias"),  # the causal mask in the files of GPT-2
        ("gemma3", "vision_tower.encoder.layers.0.self_attn.q_proj.weight"),
        ("qwen3-moe", "model.layers.0.mlp.gate.weight"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ],
)
def test_tensors_outside(family, name, make_model):
    assert RouteMap(make_model(family).config).cut(name) is None


def test_locate_and_masks_agree(architecture, make_model, owned_slices):
    model = make_model(architecture)
    route_map, slices = RouteMap(model.config), owned_slices(model)
    assert [route_map.locate(route) for route in range(route_map.num_routes)] == [entry[:3] for entry in slices]
    kinds = np.array([entry[0] for entry in slices])
    layers = np.array([entry[1] for entry in slices])
    for kind in KINDS:
        assert np.array_equal(np.arange(route_map.num_routes)[route_map.of_kind(kind)], np.flatnonzero(kinds == kind))
        for layer in range(2):
            assert np.array_equal(route_map.of_layer(kind, layer), (kinds == kind) & (layers == layer))
            assert route_map.counts[kind][layer] == route_map.of_layer(kind, layer).sum()
    assert np.array_equal(route_map.scope("mlp"), kinds == "mlp")
    assert np.array_equal(route_map.scope("attention"), kinds != "mlp")
    assert route_map.scope("joint").all()


def test_counts_by_layer(make_model):
    maps = {name: RouteMap(make_model(name).config) for name in ("qwen3-moe-every-second", "gpt2-default-width")}
    assert maps["qwen3-moe-every-second"].experts == (0, 5)
    assert maps["qwen3-moe-every-second"].counts["mlp"] == (12, 15)
    assert maps["gpt2-default-width"].counts["mlp"] == (64, 64)
    config = make_model("qwen3_next", mlp_only_layers=[0], shared_expert_intermediate_size=6).config
    assert RouteMap(config).counts["mlp"] == (12, 3 * 5 + 6)  # a dense layer has a width of its own
    config = AutoConfig.for_model("llama", hidden_size=16, num_attention_heads=4, num_key_value_heads=None)
    assert set(RouteMap(config).counts["key_value"]) == {4}


@pytest.mark.parametrize(
    "family, name, shape, message",
    [
        ("llama", "model.layers.0.mlp.up_proj.weight", (13, 16), r"up_proj.weight: .* axis 0 .* found .*\(13, 16\)"),
        ("llama", "model.layers.0.mlp.down_proj.weight", (12,), r"expected axis 1 to hold 12 equal blocks"),
        ("llama", "model.layers.2.mlp.up_proj.weight", (12, 16), r"layers.2.*expected a layer below 2, found 2"),
        ("qwen3-moe", "model.layers.0.mlp.experts.3.up_proj.weight", (5, 16), r"expected an expert of 3 in layer 0"),
        ("qwen3-moe", "model.layers.1.mlp.experts.down_proj", (3, 16, 5), r"expected an expert of 0 in layer 1"),
    ],
)
def test_tensors_that_do_not_fit_the_configuration(family, name, shape, message, make_model):
    route_map = RouteMap(make_model(family).config)
    with pytest.raises(ValueError, match=message):
        route_map.sum_by_route({name: torch.ones(shape)})
    with pytest.raises(ValueError, match=message):
        route_map.spread(name, np.ones(route_map.num_routes), torch.ones(shape))


def test_description_that_names_a_setting_that_the_configuration_lacks():
    description = Architecture(LLAMA.tensors, counts={"mlp": "n_inner", "query": "num_attention_heads"})
    with pytest.raises(
        ValueError, match=r"counts\['mlp'\]: expected a setting of .* 'llama' or a function, found 'n_in"
    ):
        RouteMap(AutoConfig.for_model("llama"), description=description)


@pytest.mark.parametrize("arguments, message", [((0, "mlp"), "kinds"), ((1, ("mlp",), False, 1), "experts_axis")])
def test_slices_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Slices(*arguments)


def test_kinds_that_take_turns():
    config = AutoConfig.for_model("llama", num_hidden_layers=1, num_attention_heads=2, intermediate_size=3)
    tensors = {
        "a": Slices(0, ("query", "key_value", "key_value"), interleaved=True),
        "b": Slices(2, ("mlp", "mlp"), interleaved=True, experts_axis=0),
    }
    counts = {"mlp": lambda config, layer: 4, "query": "num_attention_heads"}
    route_map = RouteMap(config, Architecture(tensors, counts, experts=lambda config, layer: 2))
    assert route_map.cut("layers.0.a").owners.tolist() == [4, 6, 6, 5, 7, 7]
    assert route_map.cut("layers.0.b").owners.tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]
    tensors = {"a": Slices(0, ("mlp", "query"), interleaved=True)}
    with pytest.raises(ValueError, match=r"tensor layers.0.a: .* found \['3 mlp', '2 query'\]"):
        RouteMap(config, Architecture(tensors)).cut("layers.0.a")


@pytest.mark.parametrize(
    "family, name, module",
    [
        ("llama", "model.layers.1.self_attn.q_proj.weight", "layers.1.attention"),
        ("llama", "model.layers.0.post_attention_layernorm.weight", "layers.0.norm"),
        ("llama", "model.norm.weight", "norm"),
        ("qwen3", "model.layers.1.self_attn.k_norm.weight", "layers.1.attention"),
        ("qwen3-moe", "model.layers.0.mlp.experts.gate_up_proj", "layers.0.mlp"),
        ("qwen3-moe", "model.layers.0.mlp.gate.weight", "layers.0.mlp"),
        ("gemma3", "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", "vision_tower"),
        ("gpt2", "transformer.h.1.ln_1.bias", "layers.1.norm"),
        ("gpt2", "transformer.wte.weight", "wte"),
        ("falcon_h1", "model.layers.0.mamba.A_log", "layers.0.other"),
        ("granitemoe", "model.layers.0.block_sparse_moe.router.weight", "layers.0.mlp"),
        ("qwen3_5_text", "model.layers.0.linear_attn.A_log", "layers.0.linear_attention"),
        ("gemma4_text", "model.layers.0.layer_scalar", "layers.0.other"),
    ],
)
def test_modules(family, name, module, make_model):
    model = make_model(family)
    shapes = {key: tuple(tensor.shape) for key, tensor in [*model.named_parameters(), *model.named_buffers()]}
    modules = RouteMap(model.config).modules(shapes | ({name: (2, 2)} if name not in shapes else {}))
    assert modules[name] == module
    kinds = {value.split(".")[2] for value in modules.values() if value.startswith("layers.")}
    assert kinds <= {"attention", "mlp", "norm", "linear_attention", "other"}
