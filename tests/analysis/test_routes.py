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


def test_what_routes_write_adds_up_to_the_output_of_the_module(architecture, make_model, contributions):
    model = make_model(architecture)
    written, outputs = contributions(model, [4, 9, 13, 5, 20, 7])
    assert len(written) == 4
    for key, parts in written.items():
        bias = getattr(WRITER.get(model.config.model_type, _llama_writer)(model, *key), "bias", None)
        torch.testing.assert_close(parts.sum(dim=0) + (0 if bias is None else bias), outputs[key])


def _llama_writer(model, kind, layer):
    block = model.get_decoder().layers[layer]
    return block.self_attn.o_proj if kind == "query" else getattr(block.mlp, "down_proj", None)


def _gpt_writer(model, kind, layer):
    block = model.transformer.h[layer]
    return block.attn.c_proj if kind == "query" else block.mlp.c_proj


WRITER = {"gpt2": _gpt_writer}


@pytest.mark.parametrize("family, layer, routed", [("qwen3-moe", 0, 3), ("qwen3-moe-every-second", 1, 4)])
def test_number_of_experts_that_the_tokens_above_are_routed_to(family, layer, routed, make_model, contributions):
    written, _ = contributions(make_model(family), [4, 9, 13, 5, 20, 7, 11, 3])
    experts = make_model(family).config.num_experts
    assert (written["mlp", layer].reshape(experts, -1).abs().sum(dim=1) > 0).sum() == routed


@pytest.mark.parametrize(
    "family, name, other",
    [
        ("gpt2", "h.1.attn.c_attn.weight", "transformer.h.1.attn.c_attn.weight"),
        (
            "gemma3",
            "language_model.model.layers.1.mlp.up_proj.weight",
            "model.language_model.layers.1.mlp.up_proj.weight",
        ),
        ("gemma3", "model.layers.1.mlp.up_proj.weight", "model.language_model.layers.1.mlp.up_proj.weight"),
        ("llama", "layers.1.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight"),
        ("llama", "base_model.model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("llama", "module.model.layers.0.mlp.up_proj.weight", "_orig_mod.model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_other_names_of_the_same_tensor(family, name, other, make_model):
    route_map = RouteMap(make_model(family).config)
    first, second = route_map.cut(name), route_map.cut(other)
    assert first.axes == second.axes and np.array_equal(first.owners, second.owners)


@pytest.mark.parametrize(
    "family, name",
    [
        ("gpt2", "h.0.attn.bias"),  # the causal mask in the files of GPT-2
        ("gemma3", "vision_tower.encoder.layers.0.self_attn.q_proj.weight"),
        ("gemma3", "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"),
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
    experts = [RouteMap(make_model(f"qwen3-moe{family}").config).experts for family in ("", "-every-second")]
    assert experts == [(3, 0), (0, 5)]
    counts = {family: RouteMap(make_model(family).config).counts["mlp"] for family in ("llama", "qwen3-moe", "gpt2")}
    assert counts == {"llama": (12, 12), "qwen3-moe": (15, 12), "gpt2": (12, 12)}
    assert RouteMap(make_model("qwen3-moe-every-second").config).counts["mlp"] == (12, 15)
    assert RouteMap(make_model("gpt2-default-width").config).counts["mlp"] == (64, 64)


def test_multi_head_attention_without_a_number_of_key_value_heads():
    config = AutoConfig.for_model("llama", hidden_size=16, num_attention_heads=4, num_key_value_heads=None)
    assert set(RouteMap(config).counts["key_value"]) == {4}


def test_unknown_model_type():
    message = (
        r"no route map for model type 'xglm', expected one of .*'gpt2'.*'qwen3_moe'.*; "
        r"describe it with `RouteMap\(config, description=Architecture\(\.\.\.\)\)`"
    )
    with pytest.raises(ValueError, match=message):
        RouteMap(AutoConfig.for_model("xglm"))


@pytest.mark.parametrize(
    "family, name, shape, message",
    [
        (
            "llama",
            "model.layers.0.mlp.up_proj.weight",
            (13, 16),
            r"tensor model.layers.0.mlp.up_proj.weight: expected axis 0 to hold 12 equal blocks, found .*\(13, 16\)",
        ),
        ("llama", "model.layers.0.mlp.down_proj.weight", (12,), r"expected axis 1 to hold 12 equal blocks"),
        ("llama", "model.layers.2.mlp.up_proj.weight", (12, 16), r"layers.2.*expected a layer below 2, found 2"),
        ("qwen3-moe", "model.layers.0.mlp.experts.3.up_proj.weight", (5, 16), r"expected an expert of 3 in layer 0"),
        ("qwen3-moe", "model.layers.1.mlp.experts.down_proj", (3, 16, 5), r"expected an expert of 0 in layer 1"),
        ("qwen3-moe", "model.layers.0.mlp.gate_proj.weight", (12, 16), r"expected axis 0 to hold 15 equal blocks"),
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


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, "mlp"), r"kinds: expected a tuple of some of \('mlp', .*\), found 'mlp'"),
        ((0, ("value",)), r"found \('value',\)"),
        ((0, ()), r"found \(\)"),
        ((1, ("mlp",), False, 1), r"experts_axis: expected an axis before 1, found 1"),
    ],
)
def test_slices_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Slices(*arguments)


def test_kinds_of_unequal_number_cannot_take_turns(make_model):
    tensors = {"a": Slices(0, ("query", "key_value"), interleaved=True)}
    with pytest.raises(ValueError, match=r"tensor layers.0.a: .* found \['4 query', '2 key_value'\]"):
        RouteMap(make_model("llama").config, Architecture(tensors)).cut("layers.0.a")


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


@pytest.mark.parametrize(
    "family, name, module",
    [
        ("llama", "model.layers.1.self_attn.q_proj.weight", "layers.1.attention"),
        ("llama", "model.layers.0.post_attention_layernorm.weight", "layers.0.norm"),
        ("llama", "model.embed_tokens.weight", "embed_tokens"),
        ("llama", "model.norm.weight", "norm"),
        ("llama", "lm_head.weight", "lm_head"),
        ("qwen3", "model.layers.1.self_attn.k_norm.weight", "layers.1.attention"),
        ("qwen3-moe", "model.layers.0.mlp.experts.gate_up_proj", "layers.0.mlp"),
        ("qwen3-moe", "model.layers.0.mlp.gate.weight", "layers.0.mlp"),
        ("gemma3", "model.language_model.layers.1.pre_feedforward_layernorm.weight", "layers.1.norm"),
        ("gemma3", "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", "vision_tower"),
        ("gemma3", "model.multi_modal_projector.mm_soft_emb_norm.weight", "multi_modal_projector"),
        ("gpt2", "transformer.h.1.attn.c_attn.bias", "layers.1.attention"),
        ("gpt2", "transformer.h.1.ln_1.bias", "layers.1.norm"),
        ("gpt2", "transformer.wte.weight", "wte"),
        ("opt", "model.decoder.layers.1.fc1.weight", "layers.1.mlp"),
        ("bloom", "transformer.h.0.self_attention.dense.bias", "layers.0.attention"),
        ("falcon_h1", "model.layers.0.feed_forward.up_proj.weight", "layers.0.mlp"),
        ("falcon_h1", "model.layers.0.mamba.A_log", "layers.0.other"),
        ("jamba", "model.layers.1.feed_forward.experts.down_proj", "layers.1.mlp"),
        ("bamba", "model.layers.0.feed_forward.down_proj.weight", "layers.0.mlp"),
        ("lfm2", "model.layers.0.conv.in_proj.weight", "layers.0.other"),
        ("granitemoe", "model.layers.0.block_sparse_moe.router.weight", "layers.0.mlp"),
        ("qwen3_5_text", "model.layers.0.linear_attn.A_log", "layers.0.linear_attention"),
        ("mpt", "transformer.blocks.1.ffn.up_proj.weight", "layers.1.mlp"),
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
