from dataclasses import replace

import numpy as np
import pytest
import torch

from trl_interfere.analysis.routes import RouteMap
from trl_interfere.repair.joint import joint_before, joint_report


NUM_ROUTES = 36


@pytest.fixture
def reports(make_report):
    rng = np.random.default_rng(0)
    found = []
    for name in ("code", "math", "qa"):
        measures = {key: rng.normal(size=NUM_ROUTES) for key in ("damage", "later_damage", "edit_size")}
        found.append(replace(make_report(NUM_ROUTES, before=f"after-{name}", **measures), earlier=name))
    return found


def test_joint_report(reports):
    report, target = joint_report(reports, {"code": 1.0, "math": 3.0, "qa": 0.0})
    weighted = np.array([1.0, 3.0])[:, None] * np.stack([entry.routes["damage"] for entry in reports[:2]])
    np.testing.assert_allclose(report.routes["damage"], weighted.sum(axis=0))
    assert target.tolist() == weighted.argmax(axis=0).tolist()
    for route in range(NUM_ROUTES):
        assert report.routes["edit_size"][route] == reports[target[route]].routes["edit_size"][route]
    assert report.damage == pytest.approx(4 * 0.6)
    assert report.earlier == "code+math"


def test_a_route_goes_back_to_the_checkpoint_of_its_domain(make_model, moved, owned_slices):
    models = [moved(make_model("llama"), seed=seed) for seed in (1, 2, 3)]
    befores = [dict(model.named_parameters()) for model in models]
    target = np.random.default_rng(0).integers(0, 3, size=NUM_ROUTES)
    route_map = RouteMap(models[0].config)
    composed = joint_before(befores, target, route_map)
    for route, (*_, owned) in enumerate(owned_slices(models[0])):
        for name, index in owned:
            assert torch.equal(composed[name][index], befores[target[route]][name][index].detach())
    for name, tensor in composed.items():
        if route_map.cut(name) is None:
            assert torch.equal(tensor, befores[0][name].detach())


def test_reports_that_do_not_fit(reports):
    with pytest.raises(ValueError, match="reports: expected at least one"):
        joint_report([])
    with pytest.raises(ValueError, match="expected one for each domain, found .*'code', 'code'"):
        joint_report([reports[0], reports[0]])
    with pytest.raises(ValueError, match="the same checkpoint `after` in all, found .*'elsewhere'"):
        joint_report([reports[0], replace(reports[1], after="elsewhere")])
    for weights in ({"writing": 1.0}, {"code": 0.0}, {"code": 1.0, "math": -1.0}):
        with pytest.raises(ValueError, match="weights: expected"):
            joint_report(reports, weights)
