import numpy as np
import pytest
import torch

from trl_interfere.analysis.contraction import contraction, subspace_norms
from trl_interfere.analysis.routes import RouteMap


def test_against_a_dense_projection(make_model, owned_slices):
    model = make_model("llama")
    route_map = RouteMap(model.config)
    generator = torch.Generator().manual_seed(0)
    names = dict(model.named_parameters())
    delta, first, second = (
        {name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in names.items()}
        for _ in range(3)
    )
    directions = np.random.default_rng(0).normal(size=(3, route_map.num_routes))

    def flat(tensors):
        return torch.cat([tensors[name].ravel() for name in names]).numpy()

    columns = []
    for *_, owned in owned_slices(model):
        part = {name: torch.zeros_like(delta[name]) for name in names}
        for name, index in owned:
            part[name][index] = delta[name][index]
        columns.append(flat(part))
    basis, _ = np.linalg.qr(np.stack(columns, axis=1) @ directions.T)
    found = subspace_norms(route_map, delta, [delta, first, second], directions)
    expected = [np.linalg.norm(basis.T @ flat(tensors)) for tensors in (delta, first, second)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_contraction_by_a_refresh(make_model, owned_slices):
    model = make_model("llama")
    route_map = RouteMap(model.config)
    generator = torch.Generator().manual_seed(0)
    before = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    after = {name: p + torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in before.items()}
    directions = np.zeros((2, route_map.num_routes))
    directions[0, 0], directions[1, 3] = 1.0, 2.0
    # The refresh takes three quarters of the update of two routes back, and nothing else.
    refreshed = {name: tensor.clone() for name, tensor in after.items()}
    taken = {0, 3}
    squares = [0.0, 0.0]
    for route, (*_, owned) in enumerate(owned_slices(model)):
        for name, index in owned:
            update = after[name][index] - before[name][index]
            share = 0.25 if route in taken else 1.0
            refreshed[name][index] = before[name][index] + share * update
            squares[0] += float((update**2).sum())
            squares[1] += float(((share * update) ** 2).sum())
    found = contraction(route_map, before, after, refreshed, directions)
    assert found["directions"] == 2
    assert found["subspace"] == pytest.approx(0.25)
    assert found["routes"] == pytest.approx((squares[1] / squares[0]) ** 0.5)
    assert 0.25 < found["random"] <= 1
