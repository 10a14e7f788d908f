import itertools
import re

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from trl_interfere.analysis.cosines import GradientProducts
from trl_interfere.analysis.gradients import mean_gradient
from trl_interfere.analysis.routes import RouteMap


LLAMA = RouteMap(AutoConfig.for_model("llama", num_hidden_layers=2))


def cosines(first, second):
    return GradientProducts({"first": [first], "second": [second]}, LLAMA).cosines("first", "second")


def flat(tensors, names):
    return np.concatenate([tensors[name].numpy().ravel() for name in names])


def cosine(first, second):
    return first @ second / np.linalg.norm(first) / np.linalg.norm(second)


def test_cosines_against_flattened_vectors(make_model, sequences, make_batches):
    model = make_model("llama")
    _, first = mean_gradient(model, make_batches(sequences[:2]))
    _, second = mean_gradient(model, make_batches(sequences[2:]))
    found = cosines(first, second)
    parts = {"attention": "self_attn", "mlp": "mlp", "norm": "(input|post_attention)_layernorm"}
    modules = {f"layers.{layer}.{label}": f"layers.{layer}.{part}" for layer in "01" for label, part in parts.items()}
    patterns = {
        "modules": {**modules, "embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"},
        "layers": {f"layers.{layer}": f"layers.{layer}." for layer in "01"},
        "tensors": {name: name for name in first},
    }
    assert found["global"] == pytest.approx(cosine(flat(first, first), flat(second, first)), rel=1e-9)
    for level, by_key in patterns.items():
        assert found[level].keys() == by_key.keys()
        for key, pattern in by_key.items():
            names = [name for name in first if re.search(pattern, name)]
            assert found[level][key] == pytest.approx(cosine(flat(first, names), flat(second, names)), rel=1e-9)


def test_zero_gradients_have_no_cosine():
    first = {
        "model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2),
        "model.layers.0.mlp.gate_proj.weight": torch.tensor([[1.0, 0.0]]),
        "model.layers.1.mlp.up_proj.weight": torch.zeros(3),
        "model.norm.weight": torch.tensor([1.0, 1.0]),
    }
    second = {name: torch.ones_like(tensor) for name, tensor in first.items()}
    found = cosines(first, second)
    assert set(found["tensors"]) == {"model.layers.0.mlp.gate_proj.weight", "model.norm.weight"}
    assert set(found["modules"]) == {"layers.0.mlp", "norm"}
    # The zero tensor has no part in the inner product, but the ones opposite to it count in the norm.
    assert found["modules"]["layers.0.mlp"] == pytest.approx(1 / np.sqrt(6))
    assert found["global"] == pytest.approx(3 / np.sqrt(3 * 11))
    nothing = cosines({name: torch.zeros_like(tensor) for name, tensor in first.items()}, second)
    assert nothing["tensors"] == {} and nothing["modules"] == {} and nothing["global"] is None


NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight")
ZERO = {name: np.zeros((7, 3)) for name in NAMES}


def noisy(mean, scale, rng):
    return {name: torch.tensor(mean[name] + scale * rng.normal(size=mean[name].shape)) for name in NAMES}


@pytest.mark.parametrize("chunk", [5, 2**20])
def test_all_pairs_from_one_gradient_per_domain(chunk, monkeypatch):
    monkeypatch.setattr("trl_interfere.analysis.cosines._CHUNK", chunk)
    rng = np.random.default_rng(0)
    halves = {domain: [noisy(ZERO, 1, rng), noisy(ZERO, 1, rng)] for domain in "abcd"}
    products = GradientProducts(halves, LLAMA)
    whole = {domain: sum(flat(half, NAMES) for half in pair) for domain, pair in halves.items()}
    matrix = products.pairs()
    assert [(first, second) for first, row in matrix.items() for second in row] == [*itertools.combinations("abcd", 2)]
    for first, second in itertools.combinations("abcd", 2):
        expected = cosine(whole[first], whole[second])
        assert matrix[first][second] == pytest.approx(expected, rel=1e-10)
        assert products.cosines(second, first)["global"] == pytest.approx(expected, rel=1e-10)
    expected = cosine(whole["a"], (whole["b"] + whole["c"]) / 2)
    assert products.cosines("a", ["b", "c"])["global"] == pytest.approx(expected, rel=1e-10)


def test_half_precision_is_summed_in_float64():
    first = {name: torch.full((300,), 1 + 2**-7, dtype=torch.bfloat16) for name in NAMES}
    second = {name: torch.cat([torch.full((299,), 1.0), torch.tensor([-1.0])]).bfloat16() for name in NAMES}
    assert cosines(first, second)["global"] == pytest.approx(298 / 300, rel=1e-12)


@pytest.mark.parametrize("truth", [0.0, 0.5, -0.8])
def test_interval_covers_the_true_cosine(truth):
    rng = np.random.default_rng(1)
    shape, covered, widths = (20, 10), 0, []
    for _ in range(100):
        u, v = ({name: rng.normal(size=shape) for name in NAMES} for _ in range(2))
        inner = sum((u[name] * v[name]).sum() for name in NAMES)
        square = sum((u[name] ** 2).sum() for name in NAMES)
        v = {name: v[name] - inner / square * u[name] for name in NAMES}
        scale = np.sqrt(square / sum((v[name] ** 2).sum() for name in NAMES))
        v = {name: truth * u[name] + np.sqrt(1 - truth**2) * scale * v[name] for name in NAMES}
        products = GradientProducts(
            {"a": [noisy(u, 0.2, rng) for _ in "12"], "b": [noisy(v, 0.2, rng) for _ in "12"]}, LLAMA
        )
        low, high = products.interval("a", "b")
        covered += low <= truth <= high
        widths.append(high - low)
    assert covered >= 90
    assert np.median(widths) < 0.5


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_reliability_is_that_of_as_many_other_references(noise):
    rng = np.random.default_rng(2)
    mean = {name: rng.normal(size=(60, 50)) for name in NAMES}
    products = GradientProducts({name: [noisy(mean, noise, rng) for _ in "12"] for name in "ab"}, LLAMA)
    # Two wholes, each the sum of two halves with this noise: half of the variance of the mean.
    expected = 1 / (1 + noise**2 / 2)
    assert products.reliability("a") == pytest.approx(expected, abs=0.02)
    assert products.ceiling("a", "b") == pytest.approx(expected, abs=0.02)
    assert products.cosines("a", "b")["global"] == pytest.approx(products.ceiling("a", "b"), abs=0.03)


def test_without_halves_there_is_no_interval():
    rng = np.random.default_rng(0)
    halves, empty = [noisy(ZERO, 1, rng), noisy(ZERO, 1, rng)], {name: torch.zeros(7, 3) for name in NAMES}
    products = GradientProducts({"a": halves[:1], "b": halves, "c": [empty, empty]}, LLAMA)
    assert products.cosines("a", "b")["global"] is not None and products.ceiling("a", "b") is None
    for domain in "ac":
        assert products.interval(domain, "b") is None and products.reliability(domain) is None
    assert products.interval("b", "b", module="layers.0.mlp") is not None
