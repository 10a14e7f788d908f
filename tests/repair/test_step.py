import numpy as np
import pytest
import torch

from trl_interfere.analysis.routes import RouteMap
from trl_interfere.repair.rollback import roll_back, rolled_back
from trl_interfere.repair.step import move_back, route_steps


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def values(dtype, seed, shape=(7, 33)):
    generator = torch.Generator().manual_seed(seed)
    most = 3 if dtype == torch.float16 else 6
    exponents = torch.randint(-most, most, shape, generator=generator)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0**exponents).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_at_0_and_at_1(dtype):
    after, before = values(dtype, 0), values(dtype, 1)
    moved = move_back(after, before, np.array([0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0]))
    for row, expected in enumerate([after, before, before, after, before, after, before]):
        assert torch.equal(moved[row], expected[row])
    assert moved.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_once(dtype):
    steps = np.array([0.3, 0.7, 1.3, 2.1, 4.0, -0.6, 0.5])
    after = values(dtype, 0)
    before = (after.double() * (1 + 0.1 * torch.rand(after.shape, dtype=torch.float64))).to(dtype)
    expected = after.double() - torch.as_tensor(steps)[:, None] * (after.double() - before.double())
    moved = move_back(after, before, steps)
    if dtype in (torch.bfloat16, torch.float16):  # computed in float32: the same but for ties
        assert (moved == expected.to(dtype)).double().mean() > 0.99
    spacing = torch.finfo(dtype).eps * expected.abs() * (1 if dtype in (torch.bfloat16, torch.float16) else 4)
    assert ((moved.double() - expected).abs() <= spacing + torch.finfo(dtype).tiny).all()


def test_does_not_depend_on_shape_or_layout():
    after, before = values(torch.float32, 0, (64, 64)), values(torch.float32, 1, (64, 64))
    steps = np.linspace(-1, 3, 64)
    whole = move_back(after, before, steps)
    for row in range(0, 64, 5):
        for columns in (slice(0, 1), slice(3, 20), slice(0, 64, 7)):
            part = move_back(after[row : row + 1, columns], before[row : row + 1, columns], steps[row : row + 1])
            assert torch.equal(part[0], whole[row, columns])
    assert torch.equal(move_back(after.T.contiguous().T, before, steps), whole)


def test_steps_of_routes(make_model):
    route_map = RouteMap(make_model("llama").config)
    steps = route_steps(route_map, np.array([5, 2, 35]), np.array([0.5, 2.0, -1.0]))
    assert steps.shape == (36,) and steps[[5, 2, 35]].tolist() == [0.5, 2.0, -1.0] and np.count_nonzero(steps) == 3
    assert np.array_equal(route_steps(route_map, np.array([5, 2]), 3.0).nonzero()[0], [2, 5])


@pytest.mark.parametrize("architecture", ["llama-biases", "qwen3-moe", "phi3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_step_for_each_route_of_a_live_model(architecture, dtype, make_model, moved, expected_rollback):
    before = make_model(architecture, dtype=dtype)
    after, route_map = moved(before), RouteMap(before.config)
    start = {name: parameter.detach().clone() for name, parameter in before.named_parameters()}
    end = {name: parameter.detach().clone() for name, parameter in after.named_parameters()}
    routes = np.random.default_rng(0).permutation(route_map.num_routes)[:11]
    steps = np.linspace(-0.7, 3.1, 11)
    expected = expected_rollback(before, after, routes, steps)
    with rolled_back(after, start, route_map, routes, steps):
        for name, parameter in after.named_parameters():
            if dtype == torch.bfloat16:
                found = (parameter == expected[name].to(dtype)).double().mean()
                assert found > 0.98, name
            else:
                torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-13, atol=1e-15)
    assert all(torch.equal(parameter, end[name]) for name, parameter in after.named_parameters())
    roll_back(after, start, route_map, routes[::-1], steps[::-1])
    again = {name: parameter.detach().clone() for name, parameter in after.named_parameters()}
    with torch.no_grad():
        for name, parameter in after.named_parameters():
            parameter.copy_(end[name])
    roll_back(after, start, route_map, routes, steps)
    assert all(torch.equal(parameter, again[name]) for name, parameter in after.named_parameters())
