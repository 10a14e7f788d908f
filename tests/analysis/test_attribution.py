import copy

import numpy as np
import pytest
import torch

from trl_interfere.analysis.attribution import (
    UpdatePath,
    attribution,
    difference_step,
    dot,
    first_order,
    norm,
    second_order,
)
from trl_interfere.analysis.routes import RouteMap


@pytest.fixture
def update(family, make_model, moved):
    """A path, its map of routes, and a second model that stays before the update."""
    model = make_model(family)
    path = UpdatePath(model, dict(moved(model).named_parameters()))
    return path, RouteMap(model.config), make_model(family)


def assert_terms(terms, products, model, dense_sums, rtol):
    """Compare with products of a dense vector and the update, element by element."""
    routes, outside = dense_sums(model, products)
    scale = np.abs(routes).max()
    np.testing.assert_allclose(terms.routes, routes, rtol=rtol, atol=rtol * scale)
    assert terms.outside == pytest.approx(outside, rel=rtol, abs=rtol * scale)
    assert terms.total == pytest.approx(sum(tensor.sum().item() for tensor in products.values()), rel=rtol)


def test_first_order(update, sequences, make_batches, token_loss, dense_sums):
    path, route_map, reference = update
    parameters = dict(reference.named_parameters())
    gradients = torch.autograd.grad(token_loss(reference, sequences), list(parameters.values()))
    products = {name: g * path.delta[name] for name, g in zip(parameters, gradients, strict=True)}
    path.move(0.7)  # the gradient is taken at the start, wherever the model is
    terms = first_order(path, make_batches(sequences), route_map)
    assert_terms(terms, products, reference, dense_sums, rtol=1e-9)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_attribution_against_midpoints(update, sequences, make_batches, token_loss, dense_sums):
    path, route_map, reference = update
    terms = {nodes: attribution(path, make_batches(sequences), route_map, nodes) for nodes in (1, 2, 4, 8)}
    start = {name: parameter.detach() for name, parameter in reference.named_parameters()}
    count = 60
    products = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    for node in range(count):
        at = {name: (start[name] + (node + 0.5) / count * path.delta[name]).requires_grad_() for name in start}
        gradients = torch.autograd.grad(token_loss(reference, sequences, at), list(at.values()))
        for name, gradient in zip(at, gradients, strict=True):
            products[name] += gradient * path.delta[name] / count
    assert_terms(terms[8], products, reference, dense_sums, rtol=2e-3)
    damage = (token_loss(reference, sequences, path.end) - token_loss(reference, sequences)).item()
    residuals = {nodes: abs(damage - found.total) for nodes, found in terms.items()}
    assert residuals[8] < residuals[2] < residuals[1]
    assert residuals[4] < 1e-3 * abs(damage) and residuals[8] < 1e-6 * abs(damage)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_update_path(dtype, make_model, moved):
    model = make_model(dtype=dtype)
    start = copy.deepcopy(model.state_dict())
    after = dict(moved(model).named_parameters())
    path = UpdatePath(model, after)
    assert all(path.end[name].data_ptr() == after[name].data_ptr() for name in after)  # only the start is copied
    assert "no.such.tensor" not in path.delta and len(path.delta) == len(after)
    with path:
        for t in (1.0, 0.3, -0.05):
            assert path.move(t) is model
            for name, parameter in model.named_parameters():
                expected = start[name].double() + t * (after[name].double() - start[name].double())
                tolerance = 4 * torch.finfo(dtype).eps
                torch.testing.assert_close(parameter.double(), expected, rtol=tolerance, atol=tolerance)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, start[name]), name


def test_products_and_norms_of_half_precision(make_model, moved, dense_sums):
    model = make_model("llama", dtype=torch.bfloat16)
    path = UpdatePath(model, dict(moved(model, scale=0.5).named_parameters()))
    exact = {name: path.delta[name].double() * path.start[name].double() for name in path.start}
    expected = dense_sums(model, exact)
    found = dot(RouteMap(model.config), path.delta, path.start)
    np.testing.assert_allclose(found.routes, expected[0], rtol=1e-5, atol=1e-5)
    assert found.outside == pytest.approx(expected[1], rel=1e-4)
    squares = sum((path.delta[name].double() ** 2).sum().item() for name in path.delta)
    assert norm(path.delta) == pytest.approx(squares**0.5, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 0.1, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_step_by_rule(dtype, scale, make_model):
    model = make_model(dtype=dtype)
    path = UpdatePath(model, {name: (1 + scale) * p.detach() for name, p in model.named_parameters()})
    size, update = (
        sum((part[n].double() ** 2).sum().item() for n in part) ** 0.5 for part in (path.start, path.delta)
    )
    if update == 0:
        with pytest.raises(ValueError, match="expected parameters that differ"):
            difference_step(path)
    else:
        rounding = {torch.bfloat16: 2**-7}.get(dtype, 2**-23)
        assert difference_step(path) == pytest.approx(min(1, (rounding * size / update) ** (1 / 3)), rel=1e-6)


# Largest relative errors that the rounding of parameters, activations and gradients costs, by data type: of the total
# of the second order (against the sum of the sizes of its parts), of these parts (Euclidean norm over routes), and of
# the parts of the attribution.
ROUNDING = {torch.float32: (1e-3, 1e-3, 1e-5), torch.bfloat16: (0.3, 0.4, 0.03)}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("seed", range(3))
def test_rounding_of_the_data_type(dtype, seed, make_model, moved, sequences, make_batches):
    model = make_model("llama", seed=seed, dtype=dtype)
    after = dict(moved(model, scale=0.01, seed=seed + 10).named_parameters())
    reference = make_model("llama", seed=seed)
    reference.load_state_dict(model.state_dict())  # the same, rounded weights
    path = UpdatePath(model, after)
    exact = UpdatePath(reference, {name: tensor.detach().double() for name, tensor in after.items()})
    route_map, batches = RouteMap(model.config), make_batches(sequences)
    expected = second_order(exact, batches, route_map, 1e-3)
    found = second_order(path, batches, route_map, difference_step(path))

    def error(found, expected):
        return np.linalg.norm(found.routes - expected.routes) / np.linalg.norm(expected.routes)

    errors = (
        abs(found.total - expected.total) / np.abs(expected.routes).sum(),
        error(found, expected),
        error(attribution(path, batches, route_map, 4), attribution(exact, batches, route_map, 4)),
    )
    assert all(found < bound for found, bound in zip(errors, ROUNDING[dtype], strict=True)), errors
