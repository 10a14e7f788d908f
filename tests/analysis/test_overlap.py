from itertools import combinations

import numpy as np
import pytest
from transformers import AutoConfig

from trl_interfere.analysis.overlap import _chance, overlaps, top_routes
from trl_interfere.analysis.routes import RouteMap


KINDS = ("mlp", "query", "key_value")


@pytest.fixture(scope="module")
def route_map():
    sizes = {"hidden_size": 64, "intermediate_size": 200, "num_hidden_layers": 5}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return RouteMap(AutoConfig.for_model("llama", **sizes, **heads))


def jaccard(first, second):
    return (first & second).sum() / (first | second).sum()


@pytest.mark.parametrize("share", [0.1, 0.35])
def test_against_python_sets(route_map, share):
    rng = np.random.default_rng(0)
    first = rng.exponential(size=route_map.num_routes)
    second = first * rng.exponential(size=route_map.num_routes)
    results = overlaps(first, second, route_map, share=share)
    assert list(results) == [*KINDS, "all"]
    common = union = 0
    for kind in KINDS:
        routes = route_map.of_kind(kind)
        size = round(share * (routes.stop - routes.start))
        a, b = (set(np.argsort(-measure[routes])[:size]) for measure in (first, second))
        assert results[kind]["value"] == len(a & b) / len(a | b)
        assert results[kind]["routes"] == routes.stop - routes.start
        assert results[kind]["first"] == results[kind]["second"] == round(share * results[kind]["routes"])
        common += results[kind]["common"]
        union += 2 * results[kind]["first"] - results[kind]["common"]
    assert results["all"]["value"] == common / union
    for result in results.values():
        assert result["over"] == "layers" and result["units"] == 5
        assert result["low"] <= result["value"] <= result["high"]
        assert result["chance"] < result["value"]
    assert overlaps(second, first, route_map, share=share)["mlp"]["value"] == results["mlp"]["value"]


def test_chance_level():
    top = np.arange(100_000) < 10_000
    mean, low, high = _chance(top, top, np.zeros(100_000, dtype=int))
    assert mean == pytest.approx(0.0526, abs=1e-4) and low < 0.0526 < high
    a = np.array([1, 1, 1, 0, 0, 0, 0], dtype=bool)
    subsets = [np.isin(np.arange(7), chosen) for chosen in combinations(range(7), 2)]
    expected = np.mean([jaccard(a, subset) for subset in subsets])
    assert _chance(a, subsets[0], np.zeros(7, dtype=int))[0] == pytest.approx(expected)


def test_shuffles_within_layers_against_drawn_ones(route_map):
    rng = np.random.default_rng(1)
    # Both updates are larger in late layers, and have nothing else in common.
    depth = np.array([route_map.locate(route)[1] for route in range(route_map.num_routes)])
    first, second = (rng.exponential(size=route_map.num_routes) * (1 + depth) ** 2 for _ in range(2))
    results = overlaps(first, second, route_map)
    kinds = {kind: route_map.of_kind(kind) for kind in KINDS}
    drawn = {kind: [] for kind in [*KINDS, "all"]}
    for _ in range(800):
        shuffled = second.copy()
        for kind in KINDS:
            for layer in range(5):
                routes = np.flatnonzero(route_map.of_layer(kind, layer))
                shuffled[routes] = second[rng.permutation(routes)]
        a, b = top_routes(first, kinds), top_routes(shuffled, kinds)
        for kind, routes in kinds.items():
            drawn[kind].append(jaccard(a[routes], b[routes]))
        drawn["all"].append(jaccard(a, b))
    for kind, values in drawn.items():
        result, error = results[kind], np.std(values) / np.sqrt(800)
        assert result["shuffled"] == pytest.approx(np.mean(values), abs=4 * error + 1e-12), kind
        # The distribution is discrete: the ends lie on one of its points or on the next one.
        assert result["shuffled_low"] == pytest.approx(
            np.quantile(values, 0.025), abs=0.02 if kind != "query" else 0.15
        )
    assert results["mlp"]["shuffled"] > 2 * results["mlp"]["chance"]
    assert results["mlp"]["shuffled_low"] <= results["mlp"]["value"] <= results["mlp"]["shuffled_high"]


def test_routes_that_did_not_change_are_no_top_routes(route_map):
    first, second = np.zeros((2, route_map.num_routes))
    first[[3, 7]] = second[[7, 9]] = 1
    results = overlaps(first, second, route_map)
    assert (results["mlp"]["first"], results["mlp"]["second"], results["mlp"]["common"]) == (2, 2, 1)
    assert results["mlp"]["value"] == pytest.approx(1 / 3)
    assert np.isnan([results["query"]["value"], results["query"]["chance"], results["query"]["low"]]).all()
    ties = np.array([1.0, 2.0, 2.0, 2.0, 0.5, 0, 0, 0, 0, 0])
    assert np.flatnonzero(top_routes(ties, {"mlp": slice(0, 10)}, 0.2)).tolist() == [1, 2]  # the lower index


@pytest.mark.parametrize(
    "change, message",
    [
        ({"first": np.ones(3)}, r"first: expected shape \(1060,\), .* found \(3,\)"),
        ({"second": np.full(1060, -1.0)}, "second: expected values of 0 and above, found NaN or negative"),
        ({"share": 1.0}, "share: expected a share between 0 and 1, found 1.0"),
    ],
)
def test_bad_input(route_map, change, message):
    with pytest.raises(ValueError, match=message):
        overlaps(**{"first": np.ones(1060), "second": np.ones(1060), "route_map": route_map} | change)
