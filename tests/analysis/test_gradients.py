import numpy as np
import pytest
import torch

from trl_interfere.analysis.cosines import cosines
from trl_interfere.analysis.gradients import mean_gradient, mean_loss


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_gradient_against_autograd_on_single_tokens(family, make_model, sequences, make_batches, token_loss):
    model, reference = make_model(family), make_model(family)
    loss, gradient = mean_gradient(model, make_batches(sequences))
    expected_loss = token_loss(reference, sequences)
    expected = torch.autograd.grad(expected_loss, list(reference.parameters()))
    assert loss == pytest.approx(expected_loss.item(), rel=1e-12)
    assert mean_loss(model, make_batches(sequences)) == pytest.approx(loss, rel=1e-12)
    names = [name for name, _ in reference.named_parameters()]
    assert list(gradient) == names
    for name, tensor in zip(names, expected, strict=True):
        torch.testing.assert_close(gradient[name], tensor, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batch_size_changes_nothing(batch_size, make_model, sequences, make_batches):
    model = make_model()
    loss, gradient = mean_gradient(model, make_batches(sequences, batch_size))
    expected_loss, expected = mean_gradient(model, make_batches(sequences, 3))
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert mean_loss(model, make_batches(sequences, batch_size)) == pytest.approx(expected_loss, rel=1e-12)
    for name in expected:
        torch.testing.assert_close(gradient[name], expected[name], rtol=1e-10, atol=1e-13)


def test_gradients_of_earlier_calls_do_not_leak(make_model, sequences, make_batches):
    model = make_model()
    _, first = mean_gradient(model, make_batches(sequences))
    kept = {name: tensor.clone() for name, tensor in first.items()}
    _, second = mean_gradient(model, make_batches(sequences))
    assert all(parameter.grad is None for parameter in model.parameters())
    for name in kept:
        assert torch.equal(first[name], kept[name]) and torch.equal(second[name], kept[name])


def flat(tensors, names):
    return np.concatenate([tensors[name].numpy().ravel() for name in names])


def cosine(first, second):
    return first @ second / np.linalg.norm(first) / np.linalg.norm(second)


def test_cosines_against_flattened_vectors(make_model, sequences, make_batches):
    model = make_model("llama")
    _, first = mean_gradient(model, make_batches(sequences[:2]))
    _, second = mean_gradient(model, make_batches(sequences[2:]))
    found = cosines(first, second)
    modules = {
        "embed_tokens": ["model.embed_tokens."],
        "norm": ["model.norm."],
        "lm_head": ["lm_head."],
        **{f"layers.{layer}.attention": [f"layers.{layer}.self_attn."] for layer in range(2)},
        **{f"layers.{layer}.mlp": [f"layers.{layer}.mlp."] for layer in range(2)},
        **{
            f"layers.{layer}.norm": [f"layers.{layer}.input_layernorm", f"layers.{layer}.post_attention_layernorm"]
            for layer in range(2)
        },
    }
    assert found["global"] == pytest.approx(cosine(flat(first, first), flat(second, first)), rel=1e-9)
    assert set(found["modules"]) == set(modules)
    for module, parts in modules.items():
        names = [name for name in first if any(part in name for part in parts)]
        assert found["modules"][module] == pytest.approx(cosine(flat(first, names), flat(second, names)), rel=1e-9)
    assert set(found["tensors"]) == set(first)
    for name in first:
        expected = cosine(flat(first, [name]), flat(second, [name]))
        assert found["tensors"][name] == pytest.approx(expected, rel=1e-9)


def test_cosines_at_their_bounds(make_model, sequences, make_batches):
    _, gradient = mean_gradient(make_model(), make_batches(sequences))
    same = cosines(gradient, {name: 3 * tensor for name, tensor in gradient.items()})
    opposite = cosines(gradient, {name: -0.1 * tensor for name, tensor in gradient.items()})
    for found, value in ((same, 1.0), (opposite, -1.0)):
        assert found["global"] == pytest.approx(value)
        assert all(entry == pytest.approx(value) for entry in [*found["tensors"].values(), *found["modules"].values()])


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
