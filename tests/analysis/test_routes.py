import numpy as np
import pytest
import torch
from transformers import AutoConfig, GPT2Config

from trl_interfere.analysis.routes import KINDS, SCOPES, RouteMap, module_of


OUTSIDE = ("norm", "embed_tokens", "lm_head", "o_proj.bias", "down_proj.bias")


def lies_outside(name):
    return any(part in name for part in OUTSIDE)


def test_each_element_has_one_owner_or_none(family, make_model, owned_slices):
    model = make_model(family)
    route_map = RouteMap(model.config)
    owners = {name: torch.full(tensor.shape, -1.0) for name, tensor in model.named_parameters()}
    for route, (*_, owned) in enumerate(owned_slices(model)):
        for name, index in owned:
            assert (owners[name][index] == -1).all(), f"{name} {index} has two owners"
            owners[name][index] = route
    assert route_map.num_routes == route + 1
    for name, owner in owners.items():
        spread = route_map.spread(name, np.arange(route_map.num_routes), owner)
        if lies_outside(name):
            assert (owner == -1).all() and spread is None and route_map.cut(name) is None
        else:
            assert torch.equal(spread.expand_as(owner), owner), name


def test_biases_and_norms_are_there_to_be_assigned(make_model):
    def names(family):
        return {name.split("layers.0.")[-1] for name, _ in make_model(family).named_parameters()}

    assert {"self_attn.q_norm.weight", "self_attn.k_norm.weight", "input_layernorm.weight"} <= names("qwen3")
    assert {"self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"} <= names("qwen2")
    assert {"mlp.gate_proj.bias", "mlp.down_proj.bias", "self_attn.o_proj.bias"} <= names("llama-biases")
    assert "lm_head.weight" in names("llama") - names("qwen3")


def test_sums_of_ones_count_every_element_once(family, make_model, owned_slices):
    model = make_model(family)
    parameters = dict(model.named_parameters())
    ones = {name: torch.ones_like(tensor) for name, tensor in parameters.items()}
    sums, outside = RouteMap(model.config).sum_by_route(ones)
    counts = [sum(parameters[name][index].numel() for name, index in owned) for *_, owned in owned_slices(model)]
    assert sums.tolist() == counts
    assert outside == sum(tensor.numel() for name, tensor in parameters.items() if lies_outside(name))
    assert sums.sum() + outside == sum(tensor.numel() for tensor in parameters.values())


def test_sum_by_route_against_written_out_slices(family, make_model, dense_sums):
    model = make_model(family, seed=3)
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    sums, outside = RouteMap(model.config).sum_by_route(tensors)
    expected, expected_outside = dense_sums(model, tensors)
    np.testing.assert_allclose(sums, expected, rtol=1e-12, atol=1e-12)
    assert outside == pytest.approx(expected_outside, rel=1e-10, abs=1e-10)


def contributions(model, ids):
    """What each channel and each query head writes into the residual stream: `{(kind, layer): (routes, ...)}`."""
    written, handles = {}, []
    for layer, block in enumerate(model.model.layers):
        for kind, module, count in (
            ("mlp", block.mlp.down_proj, model.config.intermediate_size),
            ("query", block.self_attn.o_proj, model.config.num_attention_heads),
        ):

            def keep(module, inputs, key=(kind, layer), count=count):
                hidden = inputs[0].unflatten(-1, (count, -1))
                columns = module.weight.unflatten(-1, (count, -1))
                written[key] = torch.einsum("btca,oca->cbto", hidden, columns)

            handles.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return written


def perturb(model, route_map, route, seed=0):
    generator = torch.Generator().manual_seed(seed)
    chosen = np.zeros(route_map.num_routes)
    chosen[route] = 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = route_map.spread(name, chosen, parameter)
            if spread is not None:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(spread * noise)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("kind, position", [("mlp", 0), ("mlp", 7), ("query", 1), ("query", 3), ("key_value", 1)])
@pytest.mark.parametrize("layer", [0, 1])
def test_noise_on_one_route_changes_what_this_route_writes(family, kind, position, layer, make_model):
    model, changed_model = make_model(family), make_model(family)
    route_map = RouteMap(model.config)
    route = np.flatnonzero(route_map.of_layer(kind, layer))[position]
    perturb(changed_model, route_map, route)
    ids = torch.tensor([[4, 9, 13, 5, 20, 7]])
    before, after = contributions(model, ids), contributions(changed_model, ids)
    # Four query heads read two key/value heads: a key/value head changes what its pair of query heads writes.
    expected = [2 * position, 2 * position + 1] if kind == "key_value" else [position]
    key = ("query" if kind == "key_value" else kind, layer)
    changed = [index for index in range(len(before[key])) if not torch.equal(before[key][index], after[key][index])]
    assert changed == expected
    for other in before:  # the attention of a layer comes before its MLP
        if (other[1], other[0] == "mlp") < (key[1], key[0] == "mlp"):
            assert torch.equal(before[other], after[other]), other


def test_locate_and_masks_agree(family, make_model, owned_slices):
    route_map = RouteMap(make_model(family).config)
    slices = owned_slices(make_model(family))
    assert [route_map.locate(route) for route in range(route_map.num_routes)] == [entry[:3] for entry in slices]
    kinds = np.array([entry[0] for entry in slices])
    layers = np.array([entry[1] for entry in slices])
    for kind in KINDS:
        assert np.array_equal(np.arange(route_map.num_routes)[route_map.of_kind(kind)], np.flatnonzero(kinds == kind))
        for layer in range(2):
            assert np.array_equal(route_map.of_layer(kind, layer), (kinds == kind) & (layers == layer))
    assert np.array_equal(route_map.scope("mlp"), kinds == "mlp")
    assert np.array_equal(route_map.scope("attention"), kinds != "mlp")
    assert route_map.scope("joint").all()


def test_multi_head_attention_without_a_number_of_key_value_heads():
    config = AutoConfig.for_model("llama", hidden_size=16, num_attention_heads=4, num_key_value_heads=None)
    assert RouteMap(config).counts["key_value"] == 4


def test_unknown_model_type():
    with pytest.raises(ValueError, match=r"no route map for model type 'gpt2', expected one of .*'llama'.*'qwen3'"):
        RouteMap(GPT2Config())


def test_unknown_scope(make_model):
    with pytest.raises(ValueError, match=r"scope: expected one of \['attention', 'joint', 'mlp'\], found 'heads'"):
        RouteMap(make_model().config).scope("heads")
    assert set(SCOPES) == {"attention", "joint", "mlp"}


@pytest.mark.parametrize(
    "name, module",
    [
        ("model.layers.3.self_attn.q_proj.weight", "layers.3.attention"),
        ("model.layers.3.self_attn.k_norm.weight", "layers.3.attention"),
        ("model.layers.11.mlp.down_proj.weight", "layers.11.mlp"),
        ("model.layers.0.post_attention_layernorm.weight", "layers.0.norm"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("model.norm.weight", "norm"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_module_of(name, module):
    assert module_of(name) == module
