from dataclasses import replace

import numpy as np
import pytest
import torch

from trl_interfere.analysis.gradients import mean_loss
from trl_interfere.analysis.routes import RouteMap
from trl_interfere.repair.rollback import RouteRollback, rolled_back, route_parameters, search_step
from trl_interfere.repair.route_steps import RouteLoss, RouteQuadratic, WeightedLoss, solve_steps, weighted_loss


NUM_ROUTES = 36


@pytest.fixture
def update(make_model, moved):
    before = make_model("llama", dtype=torch.float64)
    return before, moved(before, scale=0.05), RouteMap(before.config)


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_quadratic_against_autograd(update, sequences, make_batches, token_loss, owned_slices):
    """Value and gradient against torch.func's Hessian in the coordinates of four routes."""
    before, after, route_map = update
    start, end, batches = parameters(before), parameters(after), make_batches(sequences)
    routes, slices = np.array([3, 20, 25, 34]), owned_slices(after)
    directions = []
    for route in routes:
        direction = {name: torch.zeros_like(tensor) for name, tensor in end.items()}
        for name, index in slices[route][3]:
            direction[name][index] = (start[name] - end[name])[index]
        directions.append(direction)

    def loss(steps):
        weights = {name: end[name] + sum(steps[i] * d[name] for i, d in enumerate(directions)) for name in end}
        return token_loss(after, sequences, weights)

    zero = torch.zeros(4, dtype=torch.float64)
    gradient, hessian = torch.func.grad(loss)(zero), torch.autograd.functional.hessian(loss, zero)
    quadratic = RouteQuadratic(after, start, route_map, routes, {"math": WeightedLoss(batches, 2.0)})
    steps = np.array([0.5, 1.0, 2.0, 0.0])
    value, slope = quadratic(steps)
    quadratic.close()
    expected = 2 * (gradient.numpy() @ steps + 0.5 * steps @ hessian.numpy() @ steps)
    assert value == pytest.approx(expected, rel=1e-3, abs=1e-8)
    # The central difference has an error of the order of the largest entry.
    np.testing.assert_allclose(slope, 2 * (gradient + hessian @ torch.tensor(steps)), atol=1e-3 * np.abs(slope).max())
    assert quadratic.passes == 3
    assert all(torch.equal(parameter, end[name]) for name, parameter in after.named_parameters())


def test_solved_steps_are_least_within_the_bound(update, sequences, make_batches):
    before, after, route_map = update
    start, batches = parameters(before), make_batches(sequences)
    routes, losses = np.arange(0, 24, 2), {"math": WeightedLoss(batches)}
    found = solve_steps(after, start, route_map, routes, losses, bound=2.0, evaluations=50)
    assert found.steps.shape == routes.shape
    assert (found.steps >= 0).all() and (found.steps <= 2).all()
    quadratic = RouteQuadratic(after, start, route_map, routes, losses)
    rng = np.random.default_rng(0)
    others = [quadratic(np.clip(found.steps + rng.normal(scale=0.3, size=12), 0, 2))[0] for _ in range(10)]
    assert quadratic(found.steps)[0] == pytest.approx(found.expected, abs=1e-9)
    quadratic.close()
    assert found.expected < min(others)
    assert found.expected < 0


def test_exact_loss_and_its_gradient(update, sequences, make_batches):
    before, after, route_map = update
    start, end, batches = parameters(before), parameters(after), make_batches(sequences)
    routes = np.array([3, 20, 25, 34])
    function = RouteLoss(after, start, route_map, routes, {"math": WeightedLoss(batches, 2.0)})
    steps = np.array([0.5, 1.0, 2.0, 0.0])

    def by_rollback(steps):
        with rolled_back(after, start, route_map, routes, steps):
            return 2 * mean_loss(after, batches)

    nothing, (value, slope) = function(np.zeros(4))[0], function(steps)
    function.close()
    assert all(torch.equal(parameter, end[name]) for name, parameter in after.named_parameters())
    assert nothing == 0 and function.passes == 2
    assert value == pytest.approx(by_rollback(steps) - by_rollback(0.0), abs=1e-12)
    for index in range(4):
        step = 1e-4 * np.eye(4)[index]
        expected = (by_rollback(steps + step) - by_rollback(steps - step)) / 2e-4
        assert slope[index] == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_exact_steps_lower_the_loss_more_than_any_common_step(update, sequences, make_batches):
    before, after, route_map = update
    start, losses, routes = parameters(before), {"math": WeightedLoss(make_batches(sequences))}, np.arange(0, 24, 2)
    found = solve_steps(after, start, route_map, routes, losses, bound=4.0, exact=True)
    lost = weighted_loss(after, losses)
    for steps in (found.steps, *np.linspace(0, 4, 9)):
        with rolled_back(after, start, route_map, routes, steps):
            change = weighted_loss(after, losses) - lost
        if steps is found.steps:
            assert change == pytest.approx(found.expected, abs=1e-9)
        assert found.expected <= change + 1e-9


def test_a_domain_with_a_weight_is_spared(update, sequences, make_batches):
    before, after, route_map = update
    start, routes = parameters(before), np.arange(24)
    mine, theirs = make_batches(sequences[:3]), make_batches(sequences[3:])
    left = {}
    for weight in (0.0, 10.0):
        losses = {"math": WeightedLoss(mine), "qa": WeightedLoss(theirs, weight)}
        steps = solve_steps(after, start, route_map, routes, losses).steps
        with rolled_back(after, start, route_map, routes, steps):
            left[weight] = mean_loss(after, theirs)
    assert left[10.0] < left[0.0]


def test_losses_are_needed(update, make_report):
    before, after, route_map = update
    with pytest.raises(ValueError, match="losses: expected at least one domain with a weight"):
        solve_steps(after, parameters(before), route_map, np.array([1]), {"math": WeightedLoss([], 0.0)})
    report = make_report(NUM_ROUTES)
    for settings, message in (({"step": "per_route"}, "step: 'per_route': needs `losses`"), ({"rounds": 2}, "rounds")):
        with pytest.raises(ValueError, match=message):
            RouteRollback(**settings).repair(report, after, before=parameters(before))


@pytest.mark.parametrize(
    "settings", [{"step": "per_route"}, {"step": "per_route_exact"}, {"step": "optimal"}, {"step": 1.5}, {"rounds": 3}]
)
def test_repair_accounts_for_itself(settings, make_model, moved, sequences, make_batches, make_report):
    before = make_model("llama", dtype=torch.float64)
    after, route_map = moved(before, scale=0.01), RouteMap(before.config)
    start, end = parameters(before), parameters(after)
    losses = {"math": WeightedLoss(make_batches(sequences))}
    damage = np.random.default_rng(0).normal(size=NUM_ROUTES)
    report = make_report(NUM_ROUTES, damage=damage)
    lost = weighted_loss(after, losses)
    repaired, found = RouteRollback(budget=0.25, **settings).repair(report, after, before=start, losses=losses)
    assert repaired is after
    assert found.achieved == pytest.approx(lost - weighted_loss(repaired, losses), abs=1e-12)
    assert len(found.routes) == 6 and sum(entry["routes"] for entry in found.layers) == 6
    assert found.carried == pytest.approx(sum(entry["damage"] for entry in found.layers))
    assert found.carried_share == pytest.approx(found.carried / (0.7 - 0.1))
    assert found.expected == pytest.approx(sum(entry["step"] * entry["damage"] for entry in found.routes))
    for entry in found.routes:
        assert route_map.locate(entry["route"]) == (entry["kind"], entry["layer"], entry["position"])
        name = f"model.layers.{entry['layer']}.mlp.up_proj.weight"
        row = end[name][entry["position"]] + entry["step"] * (start[name] - end[name])[entry["position"]]
        torch.testing.assert_close(repaired.get_parameter(name)[entry["position"]].detach(), row)
    if "rounds" not in settings:
        assert [entry["route"] for entry in found.routes] == list(np.argsort(-damage[:24])[:6])
    assert "| achieved, weighted loss |" in found.to_markdown()
    assert found.to_dict()["routes"] == found.routes
    # The quadratic model and the truth agree on a small update.
    assert found.expected_second_order == pytest.approx(found.achieved, rel=0.2, abs=2e-4)


def test_rounds_attribute_the_damage_that_is_left(update, sequences, make_batches, make_report):
    before, after, route_map = update
    start, losses = parameters(before), {"math": WeightedLoss(make_batches(sequences))}
    # The report is wrong about every route but the first one; what is left is attributed anew.
    damage = np.zeros(NUM_ROUTES)
    damage[5] = 1.0
    report = make_report(NUM_ROUTES, damage=damage)
    rollback = RouteRollback(budget=0.5, rounds=12)
    sizes = route_parameters(after, route_map)
    chosen = rollback._select_in_rounds(report, route_map, sizes, after, start, losses)
    assert chosen[0] == 5 and len(set(chosen)) == len(chosen) == 12
    blind = RouteRollback(budget=0.5).select(report, route_map)
    found = []
    for routes in (chosen, blind):
        with rolled_back(after, start, route_map, routes, 1.0):
            found.append(weighted_loss(after, losses))
    assert found[0] < found[1]


def test_rounds_weigh_the_later_domains_by_the_protection(update, sequences, make_batches, make_report):
    before, after, route_map = update
    start, sizes = parameters(before), route_parameters(after, route_map)
    report = replace(make_report(NUM_ROUTES, damage=np.arange(NUM_ROUTES) / 100), later=["qa", "writing"])
    batches, others = make_batches(sequences), make_batches([sequence[::-1] for sequence in sequences])

    def chosen(protection, weight):
        losses = {"math": WeightedLoss(batches)}
        losses |= {name: WeightedLoss(others, weight) for name in report.later}
        rollback = RouteRollback(budget=0.5, rounds=4, protection=protection)
        return rollback._select_in_rounds(report, route_map, sizes, after, start, losses).tolist()

    alone = RouteRollback(budget=0.5, rounds=4)._select_in_rounds(
        report, route_map, sizes, after, start, {"math": WeightedLoss(batches)}
    )
    assert chosen(0.0, 1.0) == chosen(0.0, 9.0) == alone.tolist()
    # Two later domains with the same references: their mean counts, whatever their weights in a search.
    one = {"math": WeightedLoss(batches), "qa": WeightedLoss(others)}
    rollback = RouteRollback(budget=0.5, rounds=4, protection=2.0)
    of_one = rollback._select_in_rounds(report, route_map, sizes, after, start, one).tolist()
    assert chosen(2.0, 1.0) == chosen(2.0, 9.0) == of_one != alone.tolist()


def test_search_is_confirmed_by_score(update):
    before, after, route_map = update
    tried = []

    def objective(model):
        tried.append(None)
        return [5.0, 1.0, 2.0, 3.0, 9.0][len(tried) - 1]

    scores = iter([0.1, 0.7, 0.3])
    steps = (0.5, 1.0, 1.5, 2.0, 3.0)
    arguments = (after, parameters(before), route_map, np.array([1]))
    step, seen = search_step(*arguments, objective, lambda _: next(scores), steps)
    assert step == 1.5
    assert [entry.get("score") for entry in seen] == [None, 0.1, 0.7, 0.3, None]


@pytest.mark.parametrize("scope", ["mlp", "attention", "joint"])
@pytest.mark.parametrize("budget", [0.01, 0.3, 0.5, 1.0])
def test_budget_of_parameters(scope, budget, make_model, make_report, owned_slices):
    model = make_model("llama")
    route_map = RouteMap(model.config)
    sizes = route_parameters(model, route_map)
    for route, (*_, owned) in enumerate(owned_slices(model)):
        assert sizes[route] == sum(model.get_parameter(name)[index].numel() for name, index in owned)
    damage = np.random.default_rng(3).normal(size=NUM_ROUTES)
    rollback = RouteRollback(budget=budget, scope=scope, budget_of="parameters")
    report = make_report(NUM_ROUTES, damage=damage)
    chosen = rollback.select(report, route_map, sizes)
    members = np.flatnonzero(route_map.scope(scope))
    ranked = sorted(members, key=lambda route: -damage[route])
    assert chosen.tolist() == ranked[: len(chosen)]
    allowed = budget * sizes[members].sum()
    assert len(chosen) == 1 or sizes[chosen].sum() <= allowed * (1 + 1e-9)
    assert len(chosen) == len(members) or sizes[ranked[: len(chosen) + 1]].sum() > allowed
    with pytest.raises(ValueError, match="budget_of: 'parameters' needs the number of parameters"):
        rollback.select(report, route_map)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"budget_of": "bytes"}, "budget_of: expected one of .*'routes'.*found 'bytes'"),
        ({"rounds": 0}, "rounds: expected a whole number, at least 1, found 0"),
        ({"rounds": 2, "criterion": "magnitude"}, "rounds: expected criterion 'damage'.*found 'magnitude'"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        RouteRollback(**settings)
