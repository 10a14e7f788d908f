"""Terms of second order, against a dense Hessian and a dense projection."""

import numpy as np
import pytest
import torch

from trl_interfere.analysis.attribution import UpdatePath, second_order, second_order_error
from trl_interfere.analysis.conflict_subspace import (
    TOP_SHARES,
    RouteOperator,
    conflict_subspace,
    contraction,
    random_update,
    subspace_norms,
)
from trl_interfere.analysis.routes import RouteMap


SETTINGS = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 6, "head_dim": 2}
NUM_ROUTES = 12  # 6 MLP channels, 4 query heads, 2 key/value heads


def flat(tensors, names):
    return torch.cat([tensors[name].ravel() for name in names])


def columns(model, owned_slices, update):
    """δ_r of each route as a column."""
    parts = []
    for *_, owned in owned_slices(model):
        part = {name: torch.zeros_like(update[name]) for name in update}
        for name, index in owned:
            part[name][index] = update[name][index]
        parts.append(flat(part, update))
    return torch.stack(parts, dim=1)


@pytest.fixture(scope="module")
def problem(make_model, moved, sequences, make_batches, token_loss, owned_slices):
    """A path, its map of routes, its batches, the dense Hessian, and δ_r of an update as columns."""
    model, reference = make_model(**SETTINGS), make_model(**SETTINGS)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def loss(vector):
        parts = vector.split([shape.numel() for shape in shapes.values()])
        named = zip(shapes.items(), parts, strict=True)
        return token_loss(reference, sequences[:3], {name: part.view(shape) for (name, shape), part in named})

    start = flat(dict(model.named_parameters()), shapes).detach()
    hessian = torch.autograd.functional.hessian(loss, start, vectorize=True)
    path = UpdatePath(model, dict(moved(model).named_parameters()))
    parts = [make_batches(sequences[:3]), hessian, lambda update: columns(model, owned_slices, update)]
    return path, RouteMap(model.config), *parts


def test_second_order(problem):
    path, route_map, batches, hessian, split = problem
    delta, routes = flat(path.delta, path.delta), split(path.delta)
    expected = (0.5 * routes.T @ hessian @ delta).numpy()
    total = (0.5 * delta @ hessian @ delta).item()
    terms = second_order(path, batches, route_map, step=1e-3)
    np.testing.assert_allclose(terms.routes, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert terms.total == pytest.approx(total, rel=1e-4)
    # The error of the central difference falls with the square of its step, and its estimate is 4 - 1/16 times it.
    steps = 0.05, 0.025, 0.0125
    errors = [second_order(path, batches, route_map, step).total - total for step in steps]
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)
    for step, error in zip(steps, errors, strict=True):
        assert 1 < second_order_error(path, batches, route_map, step) / abs(error / total) < 6


def test_operator(problem):
    path, route_map, batches, hessian, split = problem
    expected = (split(path.delta).T @ hessian @ split(path.delta)).numpy()
    operator = RouteOperator(path, batches, route_map, path.delta, step=1e-4)
    assert operator.shape == (NUM_ROUTES, NUM_ROUTES)
    found = np.stack([operator.matvec(row) for row in np.eye(NUM_ROUTES)], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert np.array_equal(operator.matvec(np.zeros(NUM_ROUTES)), np.zeros(NUM_ROUTES))
    # The step is set by the length of the displacement, whatever the length of c.
    c = np.random.default_rng(1).normal(size=NUM_ROUTES)
    np.testing.assert_allclose(operator.matvec(1e6 * c), 1e6 * expected @ c, rtol=1e-3)


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("size", [1, 4, 11])
def test_leading_eigenpairs_and_their_shares(size, control, problem):
    path, route_map, batches, hessian, split = problem
    update = random_update(path, seed=3) if control else path.delta
    operator = (split(update).T @ hessian @ split(update)).numpy()
    values, vectors = np.linalg.eigh(operator)
    order = np.argsort(-np.abs(values))
    total = operator.sum() / 2
    spectrum, found = conflict_subspace(path, batches, route_map, size, update, step=1e-4)
    assert spectrum["converged"] and spectrum["applications"] > size
    assert conflict_subspace(path, batches, route_map, size, update, step=1e-4)[0] == spectrum
    tolerance = 2e-3 * np.abs(values).max()
    np.testing.assert_allclose(spectrum["eigenvalues"], values[order][:size], rtol=2e-3, atol=tolerance)
    assert abs(found[0] @ vectors[:, order[0]]) == pytest.approx(1, abs=1e-3)
    assert spectrum["second_order"] == pytest.approx(total, rel=1e-4)
    shares = values[order] * vectors[:, order].sum(axis=0) ** 2 / (2 * total)
    for k in range(1, size + 1):
        assert sum(spectrum["shares"][:k]) == pytest.approx(shares[:k].sum(), rel=0.02, abs=0.02)
    lead = np.abs(values[order][:size])
    assert spectrum["effective_dimension"] == pytest.approx(lead.sum() ** 2 / (lead**2).sum(), rel=1e-2)
    parts = np.sort(operator.sum(axis=1) / 2)[::-1]
    for share in TOP_SHARES if total > 0 else ():
        expected = parts[: max(1, round(share * NUM_ROUTES))].sum() / total
        assert spectrum["top_routes"][f"{share:g}"] == pytest.approx(expected, rel=1e-3)


def test_the_random_update_has_the_norms_of_the_update(problem):
    path, *_ = problem
    first, again, other = (random_update(path, seed) for seed in (0, 0, 1))
    assert list(first) == list(path.delta)
    for name, tensor in path.delta.items():
        assert first[name].shape == tensor.shape and first[name].dtype == tensor.dtype
        assert first[name].norm().item() == pytest.approx(tensor.norm().item(), rel=1e-6)
        assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])


@pytest.fixture
def random_tensors(make_model):
    model = make_model("llama")
    generator = torch.Generator().manual_seed(0)

    def draw():
        named = model.named_parameters()
        return {name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in named}

    return model, RouteMap(model.config), draw


def test_norms_against_a_dense_projection(random_tensors, owned_slices):
    model, route_map, draw = random_tensors
    delta, first, second = draw(), draw(), draw()
    directions = np.random.default_rng(0).normal(size=(3, route_map.num_routes))
    basis, _ = np.linalg.qr(columns(model, owned_slices, delta).numpy() @ directions.T)
    found = subspace_norms(route_map, delta, [delta, first, second], directions)
    expected = [np.linalg.norm(basis.T @ flat(tensors, delta).numpy()) for tensors in (delta, first, second)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_contraction_by_a_refresh(random_tensors, owned_slices):
    model, route_map, draw = random_tensors
    before, delta = draw(), draw()
    directions = np.zeros((2, route_map.num_routes))
    directions[0, 0], directions[1, 3] = 1.0, 2.0
    # The refresh takes three quarters of the update of two routes back, and nothing else.
    left = np.where(np.isin(np.arange(route_map.num_routes), [0, 3]), 0.25, 1.0)
    after = {name: before[name] + delta[name] for name in before}
    refreshed = {name: tensor.clone() for name, tensor in after.items()}
    for share, (*_, owned) in zip(left, owned_slices(model), strict=True):
        for name, index in owned:
            refreshed[name][index] = before[name][index] + share * delta[name][index]
    squares = (columns(model, owned_slices, delta) ** 2).sum(dim=0).numpy()
    found = contraction(route_map, before, after, refreshed, directions)
    assert found["directions"] == 2
    assert found["subspace"] == pytest.approx(0.25)
    assert found["routes"] == pytest.approx(((left**2 * squares).sum() / squares.sum()) ** 0.5)
    assert 0.25 < found["random"] < 1.1  # other directions are nearly left
