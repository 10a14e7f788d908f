import pytest
import torch

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
