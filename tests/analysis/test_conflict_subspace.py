import numpy as np
import pytest
import torch

from trl_interfere.analysis.attribution import UpdatePath
from trl_interfere.analysis.conflict_subspace import TOP_SHARES, RouteOperator, conflict_subspace, random_update
from trl_interfere.analysis.routes import RouteMap


SETTINGS = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 6, "head_dim": 2}
NUM_ROUTES = 12  # 6 MLP channels, 4 query heads, 2 key/value heads


@pytest.fixture(scope="module")
def problem(make_model, moved, sequences, make_batches, token_loss, owned_slices):
    """A path, its batches, the dense Hessian, and a function that gives the dense operator of an update."""
    model, reference = make_model(**SETTINGS), make_model(**SETTINGS)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def unflatten(vector):
        parts = vector.split([shape.numel() for shape in shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    start = torch.cat([parameter.detach().ravel() for parameter in model.parameters()])
    hessian = torch.autograd.functional.hessian(
        lambda vector: token_loss(reference, sequences[:3], unflatten(vector)), start, vectorize=True
    )

    def dense(update):
        columns = []
        for *_, owned in owned_slices(model):
            part = {name: torch.zeros_like(update[name]) for name in shapes}
            for name, index in owned:
                part[name][index] = update[name][index]
            columns.append(torch.cat([part[name].ravel() for name in shapes]))
        columns = torch.stack(columns, dim=1)
        return (columns.T @ hessian @ columns).numpy()

    path = UpdatePath(model, dict(moved(model).named_parameters()))
    return path, RouteMap(model.config), make_batches(sequences[:3]), dense


def test_operator_against_a_dense_hessian(problem):
    path, route_map, batches, dense = problem
    expected = dense(path.delta)
    operator = RouteOperator(path, batches, route_map, None, step=1e-4)
    assert operator.shape == (NUM_ROUTES, NUM_ROUTES)
    found = np.stack([operator.matvec(row) for row in np.eye(NUM_ROUTES)], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(found, found.T, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert np.array_equal(operator.matvec(np.zeros(NUM_ROUTES)), np.zeros(NUM_ROUTES))
    # The step is set by the length of the displacement, whatever the length of c.
    c = np.random.default_rng(1).normal(size=NUM_ROUTES)
    np.testing.assert_allclose(operator.matvec(1e6 * c), 1e6 * expected @ c, rtol=1e-3)


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("size", [1, 4, 11])
def test_leading_eigenpairs_and_their_shares(size, control, problem):
    path, route_map, batches, dense = problem
    update = random_update(path, seed=3) if control else path.delta
    operator = dense(update)
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
        assert torch.equal(first[name], again[name]) and torch.equal(first[name], first[name])
        assert not torch.equal(first[name], other[name]) and not torch.equal(first[name], tensor)


@pytest.mark.parametrize("size", [0, NUM_ROUTES])
def test_size_out_of_range(size, problem):
    path, route_map, batches, _ = problem
    with pytest.raises(ValueError, match=f"size: expected 1 to 11 for 12 routes, found {size}"):
        conflict_subspace(path, batches, route_map, size)


def test_update_that_overflows(problem):
    path, route_map, batches, _ = problem
    broken = {name: torch.full_like(tensor, torch.inf) for name, tensor in path.delta.items()}
    with pytest.raises(ValueError, match="update: expected finite tensors, found a norm of inf"):
        conflict_subspace(path, batches, route_map, 2, broken)
