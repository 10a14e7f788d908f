from dataclasses import replace

import numpy as np
import pytest
import torch

from trl_interfere import RouteRollback
from trl_interfere.analysis.routes import RouteMap
from trl_interfere.models import load_model
from trl_interfere.repair.folder import roll_back_folder, undo_rollback
from trl_interfere.repair.joint import joint_before, joint_report
from trl_interfere.repair.rollback import roll_back


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
    weighted = np.array([0.5, 1.5])[:, None] * np.stack([entry.routes["damage"] for entry in reports[:2]])
    np.testing.assert_allclose(report.routes["damage"], weighted.sum(axis=0))
    assert target.tolist() == weighted.argmax(axis=0).tolist()
    for route in range(NUM_ROUTES):
        assert report.routes["edit_size"][route] == reports[target[route]].routes["edit_size"][route]
    assert report.damage == pytest.approx(2 * 0.6)
    assert report.earlier == "code+math" and "qa" in report.later


def test_only_the_ratios_of_the_weights_count(reports, make_model):
    route_map, chosen = RouteMap(make_model("llama").config), []
    for scale in (0.1, 1.0, 30.0):
        report, target = joint_report(reports, {"code": scale, "math": 2 * scale, "qa": 0.0})
        routes = RouteRollback(budget=0.3, protection=0.7).select(report, route_map)
        chosen.append((routes.tolist(), target.tolist(), report.damage))
    assert chosen[0] == chosen[1] == chosen[2]
    # With weights of 1 a protection means what it does for one domain.
    report, target = joint_report(reports)
    scores = sum(entry.routes["damage"] for entry in reports)
    scores += 0.7 * np.stack([entry.routes["later_damage"] for entry in reports])[target, np.arange(NUM_ROUTES)]
    candidates = np.flatnonzero(route_map.scope("joint"))
    best = candidates[np.argsort(-scores[candidates], kind="stable")][:5]
    assert (
        RouteRollback(budget=5 / 36, scope="joint", protection=0.7).select(report, route_map).tolist() == best.tolist()
    )


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


def test_a_live_model_needs_the_parameters_that_were_put_together(reports, make_model, moved):
    report, target = joint_report(reports)
    assert report.before is None
    after = moved(make_model("llama"))
    with pytest.raises(ValueError, match="before: a report of several domains goes back to several checkpoints"):
        RouteRollback().apply(report, after)
    befores = [dict(moved(make_model("llama"), seed=seed).named_parameters()) for seed in (1, 2, 3)]
    composed = joint_before(befores, target, RouteMap(after.config))
    repaired = RouteRollback(budget=1.0, scope="joint").apply(report, after, before=composed)
    route_map = RouteMap(after.config)
    for name, parameter in repaired.named_parameters():
        if route_map.cut(name) is not None:
            assert torch.equal(parameter, composed[name])


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "gpt2"])
def test_a_folder_goes_back_to_several_checkpoints(family, checkpoints, make_model, moved, contents, tmp_path):
    first, after, route_map = checkpoints(family)
    second = tmp_path / "second"
    moved(make_model(family, dtype=torch.float32), seed=7).save_pretrained(second)
    rng = np.random.default_rng(0)
    target = rng.integers(0, 2, size=route_map.num_routes)
    routes = np.sort(rng.choice(route_map.num_routes, size=12, replace=False))
    record = roll_back_folder([first, second], after, tmp_path / "out", routes, 1.5, target=target)
    assert record["before"] == ["/".join(path.parts[-2:]) for path in (first, second)]
    assert record["targets"] == target[routes].tolist()
    model, befores = load_model(after), [dict(load_model(place).named_parameters()) for place in (first, second)]
    roll_back(model, joint_before(befores, target, route_map), route_map, routes, 1.5)
    found = load_model(tmp_path / "out")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, found.get_parameter(name)), name
    original = contents(after)
    undo_rollback(tmp_path / "out")
    assert contents(tmp_path / "out") == original


@pytest.mark.parametrize("target", [None, np.zeros(3, dtype=int), np.full(NUM_ROUTES, 2)])
def test_targets_that_do_not_fit(target, checkpoints, tmp_path):
    before, after, _ = checkpoints()
    with pytest.raises(ValueError, match="target: expected for each of 36 routes a position in `before`, from 0 to 1"):
        roll_back_folder([before, before], after, tmp_path / "out", np.array([1]), target=target)
    assert not (tmp_path / "out").exists()
