import numpy as np
import pytest

from trl_interfere.analysis.routes import RouteMap
from trl_interfere.repair.criteria import matched_routes, route_scores


# The tiny model: 2 x 12 MLP channels, 2 x 4 query heads, 2 x 2 key/value heads.
NUM_ROUTES = 36


@pytest.fixture
def route_map(make_model):
    return RouteMap(make_model("llama").config)


@pytest.fixture
def report(make_report):
    rng = np.random.default_rng(0)
    names = ("damage", "first_order", "second_order", "later_damage", "opposed")
    measures = {name: rng.normal(size=NUM_ROUTES) for name in names}
    sizes = ("edit_size", "activity_earlier", "activity_later", "earlier_edit_size")
    return make_report(NUM_ROUTES, **measures, **{name: rng.uniform(1, 2, size=NUM_ROUTES) for name in sizes})


@pytest.mark.parametrize("criterion", ["damage", "second_order", "first_order"])
def test_protection_subtracts_what_later_domains_owe_a_route(criterion, report, route_map):
    # The update raised the loss of the earlier domain through both routes and lowered that of the later one through 3.
    report.routes[criterion][[3, 7]] = [2.0, 1.5]
    report.routes["later_damage"][[3, 7]] = [-4.0, 0.0]
    assert np.array_equal(route_scores(criterion, report, route_map), report.routes[criterion])
    assert np.array_equal(route_scores("magnitude", report, route_map), report.routes["edit_size"])
    assert route_scores(criterion, report, route_map, protection=0.25)[[3, 7]].tolist() == [1.0, 1.5]


def test_route_conflict_by_hand(report, route_map):
    scores = route_scores("route_conflict", report, route_map)
    kinds = [slice(0, 24), slice(24, 32), slice(32, 36)]
    active = np.ones(NUM_ROUTES, dtype=bool)
    for name in ("activity_earlier", "activity_later"):
        for kind in kinds:  # the more active half of each kind, by counting
            values = report.routes[name][kind]
            ranks = np.array([(values > value).sum() for value in values])
            active[kind] &= ranks < len(values) / 2
    assert 0 < active.sum() < NUM_ROUTES / 2
    assert np.array_equal(scores[active], report.routes["opposed"][active])
    assert (scores[~active] < 0).all()
    del report.routes["opposed"]
    with pytest.raises(ValueError, match="base"):
        route_scores("route_conflict", report, route_map)


def test_random_is_reproducible_and_uniform(report, route_map):
    def draw(seed):
        return route_scores("random", report, route_map, seed=seed)

    assert np.array_equal(draw(3), draw(3)) and not np.array_equal(draw(3), draw(4))
    counts = np.bincount([draw(seed).argmax() for seed in range(50 * NUM_ROUTES)], minlength=NUM_ROUTES)
    assert np.sum((counts - 50) ** 2 / 50) < 67  # chi-square with 35 degrees of freedom, p = 0.001


def test_matched_routes(report, route_map):
    place = [route_map.locate(route)[:2] for route in range(NUM_ROUTES)]
    for seed in range(5):
        chosen = np.random.default_rng(seed).permutation(NUM_ROUTES)[:12]
        matched = matched_routes(chosen, report, route_map, seed=seed)
        assert not set(matched) & set(chosen) and len(set(matched)) == len(matched)
        for kind_and_layer in set(place):
            members = {route for route in range(NUM_ROUTES) if place[route] == kind_and_layer}
            here, there = members & set(chosen), members & set(matched)
            assert len(there) == min(len(here), len(members) - len(here))
    assert matched_routes(np.arange(12), report, route_map).tolist() == []


def test_matched_routes_are_of_like_size(report, route_map):
    size = report.routes["edit_size"]
    size[:12] = [5, 1, 5.1, 2, 5.2, 3, 9, 9, 9, 9, 9, 9]
    for seed in range(5):
        assert matched_routes(np.array([0]), report, route_map, seed=seed, neighbours=1).tolist() == [2]
        assert matched_routes(np.array([0, 2]), report, route_map, seed=seed, neighbours=1).tolist() == [4, 5]
    picks = {matched_routes(np.array([0]), report, route_map, seed=seed, neighbours=3)[0] for seed in range(40)}
    assert picks == {2, 4, 5}
