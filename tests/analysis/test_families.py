"""Every model type of the route map, against dense computation that imports nothing of the package."""

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES as DESCRIBED
from architectures import FURTHER
from safetensors.torch import load_file
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from trl_interfere.analysis.activity import route_activity
from trl_interfere.analysis.analyzer import InterferenceAnalyzer
from trl_interfere.analysis.architectures import ARCHITECTURES
from trl_interfere.analysis.config import InterferenceConfig
from trl_interfere.analysis.routes import RouteMap


FAMILIES = [*DESCRIBED, *FURTHER]
# One of each description, one with routers of each kind; the others take longer than they tell each time.
TOLD = "llama-biases qwen3-moe gpt2 phi3 gpt_oss qwen3_next gemma4_text glm4_moe opt bloom".split()
EACH = [pytest.param(family, marks=() if family in TOLD else pytest.mark.slow) for family in FAMILIES]
IDS = torch.tensor([[4, 9, 13, 5, 20, 7, 11, 3]])
# Norms over all heads let each head act on the others.
NORMS_OVER_HEADS = {"olmo2", "olmo3"}
# What these have in the place of attention, or beside it.
SCANNED = {"falcon_h1": ["mamba"], "bamba": ["mamba"], "jamba": ["mamba"], "lfm2": ["conv"]}
SETTINGS = {"quadrature_nodes": 12, "later_quadrature_nodes": 1, "batch_size": 4, "max_prompts": 3}
CONFIG = InterferenceConfig(reference="dataset", **SETTINGS)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def spread(model, route_map, routes, writes):
    """Parameters that some routes write or read through, with a mask of their slices."""
    chosen = np.zeros(route_map.num_routes)
    chosen[routes] = 1
    for name, parameter in model.named_parameters():
        cut = route_map.cut(name)
        if cut is not None and cut.writes == writes and np.isin(cut.owners, routes).any():
            yield parameter, route_map.spread(name, chosen, parameter)


@pytest.mark.parametrize("family", EACH)
def test_a_route_acts_through_what_it_writes_and_through_nothing_else(family, make_model):
    model = make_model(family)
    route_map = RouteMap(model.config)
    generator = torch.Generator().manual_seed(1)
    for kind, counts in route_map.counts.items():
        if kind in ("query", "key_value") and family in NORMS_OVER_HEADS:
            continue
        for layer in np.flatnonzero(counts):
            routes = np.flatnonzero(route_map.of_layer(kind, layer))
            for route in {routes[0], routes[len(routes) // 2], routes[-1]}:
                writers = [route]
                if kind == "key_value":  # it is read by some query heads, which write
                    queries = np.flatnonzero(route_map.of_layer("query", layer)).reshape(len(routes), -1)
                    writers = queries[route - routes[0]]
                saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                heard = logits(model)
                with torch.no_grad():
                    for parameter, mask in spread(model, route_map, writers, writes=True):
                        parameter.mul_(1 - mask)
                    muted = logits(model)
                    for parameter, mask in spread(model, route_map, [route], writes=False):
                        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                        parameter.add_(mask * noise)
                found = logits(model)
                torch.testing.assert_close(found, muted, rtol=0, atol=1e-12, msg=f"{kind} {layer} {route}")
                model.load_state_dict(saved)
                silent = "experts" in str(model) or "ReLU" in str(model)  # of other tokens, or below zero
                assert not torch.equal(heard, muted) or silent, (kind, layer, route)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_element_is_counted_once_in_memory_and_on_disk(family, make_model, tmp_path):
    model = make_model(family, seed=5)
    route_map = RouteMap(model.config)
    in_memory = {name: tensor.detach() for name, tensor in model.named_parameters()}
    model.save_pretrained(tmp_path)
    buffers = {name for name, _ in model.named_buffers()}
    on_disk = {name: value for name, value in load_file(tmp_path / "model.safetensors").items() if name not in buffers}
    route_map.check(in_memory, family, on_disk)
    ones = {name: torch.ones_like(tensor) for name, tensor in in_memory.items()}
    sums, outside = route_map.sum_by_route(ones)
    whole = sum(tensor.numel() for tensor in ones.values())
    assert sums.min() > 0 and sums.sum() + outside == whole
    shares = route_map.outside({name: tensor.shape for name, tensor in ones.items()})
    assert sum(shares.values()) == pytest.approx(outside / whole, rel=1e-12)
    assert set(SCANNED.get(family, ())) < shares.keys()
    expected, expected_outside = route_map.sum_by_route(in_memory)
    sums, outside = route_map.sum_by_route(on_disk)
    np.testing.assert_allclose(sums, expected, rtol=1e-12, atol=1e-12)
    assert outside == pytest.approx(expected_outside, rel=1e-10, abs=1e-10)


def dense_figures(before, after, sequences):
    """Loss, ∇L·δ, ½ δᵀHδ by autograd, and ∫∇L·δ by 48 nodes, over plain forward passes of single sequences."""
    start = {name: tensor.detach() for name, tensor in before.named_parameters()}
    delta = {name: tensor.detach() - start[name] for name, tensor in after.named_parameters()}

    def loss(t):
        parameters = {name: start[name] + t * delta[name] for name in start}
        terms = []
        for prompt, completion in sequences:
            with sdpa_kernel(SDPBackend.MATH):
                ids = torch.tensor([prompt + completion])
                found = (
                    functional_call(before, parameters, (), {"input_ids": ids, "use_cache": False}).logits[0].double()
                )
            for position, token in enumerate(completion, start=len(prompt)):
                terms.append(torch.logsumexp(found[position - 1], dim=0) - found[position - 1, token])
        return sum(terms) / len(terms)

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(loss(t), t, create_graph=True)[0]
    second = 0.5 * torch.autograd.grad(first, t)[0]
    with torch.no_grad():
        damage = loss(torch.ones((), dtype=torch.float64)) - loss(torch.zeros((), dtype=torch.float64))
    return first.item(), second.item(), damage.item()


@pytest.mark.parametrize("family", EACH)
def test_figures_against_autograd(family, make_model, moved, make_domain, tokenizer):
    before = make_model(family)
    after = moved(before, scale=1e-3)
    domain = make_domain("math")
    analyzer = InterferenceAnalyzer(before, after, tokenizer, config=CONFIG)
    report = analyzer.analyze(domain, make_domain("qa", prompts=["ab?"]))
    references = analyzer.references(domain, [])["math"]
    sequences = list(zip(references.prompts, references.completions, strict=True))
    first, second, damage = dense_figures(before, after, sequences)
    errors = {
        "first order": abs(report.first_order / first - 1),
        "second order": abs(report.second_order / second - 1),
        "damage": abs(report.damage / damage - 1),
        "attribution": abs(report.residual / damage),
    }
    printed = report.second_order_error / abs(second)
    assert errors.pop("second order") < max(printed, 1e-6) < 0.05
    assert max(errors.values()) < (1e-3 if "ReLU" in str(before) else 1e-4), errors  # a kink is felt by the quadrature
    assert 0 < sum(report.outside_weights.values()) < 1
    assert all(np.isfinite(values).all() for values in report.routes.values())
    assert (report.routes["edit_size"] > 0).all()


def test_every_model_type_is_tested():
    types = {settings[0] for settings in DESCRIBED.values()} | FURTHER.keys()
    nested = {"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"}  # in tests/test_models.py
    assert ARCHITECTURES.keys() - nested <= types


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "mixtral", "granitemoe"])
def test_activity_of_experts(family, make_model, make_batches, sequences):
    model = make_model(family)
    route_map = RouteMap(model.config)
    activity = route_activity(model, make_batches(sequences), route_map)
    # Muting a channel changes the output of the experts by what it writes: its mean size is the activity.
    layer = 1
    name = next(n for n, _ in model.named_parameters() if f".{layer}." in n and n.endswith("experts.down_proj"))
    experts, parameter = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name)
    cut = route_map.cut(name)
    outputs, tokens = [], 0

    def keep(module, inputs, output):
        outputs.append(output.reshape(-1, output.shape[-1]))

    handle = experts.register_forward_hook(keep)
    for expert, channel in ((0, 0), (1, 3), (2, 4)):
        total, tokens = 0.0, 0
        for prompt, completion in sequences:
            outputs.clear()
            ids = torch.tensor([prompt + completion])
            saved = parameter.detach().clone()
            with torch.no_grad():
                model(input_ids=ids)
                parameter.data.movedim(cut.axes[1], 1)[expert, channel] = 0
                model(input_ids=ids)
                parameter.copy_(saved)
            size = (outputs[0] - outputs[1]).norm(dim=-1).reshape(-1, ids.shape[1]).sum(dim=0)
            total += float(size[len(prompt) - 1 : -1].sum())
            tokens += len(completion)
        assert activity[cut.owners[expert, channel]] == pytest.approx(total / tokens, rel=1e-6, abs=1e-12)
    handle.remove()
    assert activity[route_map.of_kind("mlp")].max() > 0
