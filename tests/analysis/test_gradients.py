import pytest
import torch

from trl_interfere.analysis.gradients import _has_room, mean_gradient, mean_loss


@pytest.mark.parametrize("batch_size", [1, 3, 5])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_gradient_against_autograd_on_single_tokens(
    family, batch_size, make_model, sequences, make_batches, token_loss
):
    model, reference = make_model(family), make_model(family)
    loss, gradient = mean_gradient(model, make_batches(sequences, batch_size))
    expected_loss = token_loss(reference, sequences)
    expected = torch.autograd.grad(expected_loss, list(reference.parameters()))
    assert loss == pytest.approx(expected_loss.item(), rel=1e-12)
    assert mean_loss(model, make_batches(sequences)) == pytest.approx(loss, rel=1e-12)
    assert list(gradient) == [name for name, _ in reference.named_parameters()]
    torch.testing.assert_close(list(gradient.values()), list(expected), rtol=1e-9, atol=1e-12)


def test_gradients_of_earlier_calls_do_not_leak(make_model, sequences, make_batches):
    model = make_model()
    _, first = mean_gradient(model, make_batches(sequences))
    kept = {name: tensor.clone() for name, tensor in first.items()}
    _, second = mean_gradient(model, make_batches(sequences))
    assert all(parameter.grad is None for parameter in model.parameters())
    for name in kept:
        assert torch.equal(first[name], kept[name]) and torch.equal(second[name], kept[name])


@pytest.mark.parametrize(("total", "expected"), [(90, True), (84, False)])
def test_the_next_pass_must_fit_beside_the_gradient(monkeypatch, total, expected):
    # The gradient takes 10 of 30, and at its peak the pass took 44: 30 + 1.25 * 44 = 85.
    memory = {"memory_allocated": 30, "max_memory_allocated": 64, "memory_reserved": 64}
    for name, size in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - 64, total))
    assert _has_room(torch.device("cuda:0"), held=20) is expected
