"""The evaluate modules, loaded from their folders without network, against the functions of the package."""

import doctest
import re
from pathlib import Path

import evaluate
import numpy as np
import pytest
from huggingface_hub import RepoCard

from trl_interfere.analysis.overlap import overlaps
from trl_interfere.analysis.routes import RouteMap
from trl_interfere.evaluation.metrics import forgetting, recovered
from trl_interfere.evaluation.score_matrix import ScoreMatrix


METRICS = Path(__file__).parents[2] / "metrics"
NAMES = ("forgetting", "recovery", "route_overlap")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")

    def load(name):
        return evaluate.load(str(METRICS / name), cache_dir=str(folder))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_MODULES_CACHE", str(folder / "modules"))
        yield load


@pytest.mark.parametrize("name", NAMES)
def test_examples(load, name, monkeypatch):
    metric = load(name)
    monkeypatch.chdir(METRICS.parent)
    examples = doctest.DocTestParser().get_doctest(metric.inputs_description, {}, name, None, 0)
    runner = doctest.DocTestRunner()
    runner.run(examples)
    assert runner.tries >= 4 and runner.failures == 0
    card = (METRICS / name / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    expected = re.search(r"print\(.*\)  # (.*)", code)[1]
    output = []
    exec(code, {"print": lambda *values: output.append(" ".join(map(str, values)))})
    assert output == [expected]


@pytest.mark.parametrize("name", NAMES)
def test_cards(hub, name):
    RepoCard.load(METRICS / name / "README.md").validate(repo_type="space")
    assert {"evaluate", "metric"} <= set(RepoCard.load(METRICS / name / "README.md").data.to_dict()["tags"])


def test_forgetting(load):
    rng = np.random.default_rng(0)
    matrix = ScoreMatrix(["code", "math", "qa"])
    for stage in ("0-base", "1-code", "2-math", "3-refresh-code", "4-qa"):
        matrix.append(stage, {name: rng.random(20) for name in matrix.domains})
    rows = [(s, d, v) for s, values in zip(matrix.stages, matrix.values, strict=True) for d, v in values.items()]
    stages, domains, scores = zip(*rows, strict=True)
    found = load("forgetting").compute(stages=stages, domains=domains, scores=[list(values) for values in scores])
    assert {name: found[name] for name in ("low", "high", "n")} | {"value": found["forgetting"]} == forgetting(
        matrix
    ).to_dict()
    assert found["by_domain"] == {name: forgetting(matrix, name).to_dict() for name in ("code", "math")}


def test_recovery(load):
    rng = np.random.default_rng(1)
    damaged, repaired, peak = rng.random(30) * 0.5, rng.random(30), 0.5 + rng.random(30) * 0.5
    found = load("recovery").compute(repaired=repaired, damaged=damaged, peak=peak)
    expected = recovered(repaired, damaged, peak)
    assert found == {"recovered": expected.value, "low": expected.low, "high": expected.high, "n": 30}
    assert np.isnan(load("recovery").compute(repaired=[1.0], damaged=[1.0], peak=[1.0])["recovered"])


def test_route_overlap(load, make_model):
    route_map = RouteMap(make_model().config)
    rng = np.random.default_rng(2)
    first, second = rng.random(route_map.num_routes), rng.random(route_map.num_routes)
    kinds, layers = zip(*(route_map.locate(route)[:2] for route in range(route_map.num_routes)), strict=True)
    metric = load("route_overlap")
    found = metric.compute(first=first, second=second, kinds=kinds, layers=layers, share=0.3)
    expected = overlaps(first, second, route_map, share=0.3)
    assert found["by_kind"] == expected
    assert found["overlap"] == expected["all"]["value"] and found["chance"] == expected["all"]["chance"]
    with pytest.raises(ValueError, match="sorted by kind"):
        metric.compute(first=first, second=second, kinds=kinds[::-1], layers=layers)
    with pytest.raises(ValueError, match="found \\['neuron'\\]"):
        metric.compute(first=[1.0], second=[1.0], kinds=["neuron"], layers=[0])
