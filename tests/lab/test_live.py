from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from trl_interfere.evaluation.bootstrap import difference
from trl_interfere.evaluation.metrics import recovered
from trl_interfere.evaluation.scorer import Scorer
from trl_interfere.lab.build import MODEL_FOLDER
from trl_interfere.lab.domains import TASKS, lab_rows
from trl_interfere.lab.live import LiveRollback
from trl_interfere.lab.packed import load_packed
from trl_interfere.lab.verdict import verdict
from trl_interfere.repair.held import roll_back
from trl_interfere.repair.route_rollback import RouteRollback


DATA = Path(__file__).parents[2] / "space" / "data" / "lab"


@pytest.fixture(scope="module")
def bench():
    return LiveRollback(DATA, prompts=32)


def test_measured_is_what_the_rolled_back_model_scores(bench):
    result = bench.measure("damage", budget=0.1, step=1.5)
    before, model = load_packed(DATA, "2-math"), load_packed(DATA, "4-writing")
    rollback = RouteRollback(budget=0.1)
    routes = rollback.select(bench.report, bench.route_map)
    scorer = Scorer(AutoTokenizer.from_pretrained(MODEL_FOLDER), max_new_tokens=16, batch_size=128, temperature=1.0)
    prompts = [row["prompt"] for name in ("math", "code", "qa", "writing") for row in lab_rows(name, "test", 32)]

    def scores(model):
        answers = scorer.complete(model, prompts)
        values = [verdict(prompt, answer)[1] for prompt, answer in zip(prompts, answers, strict=True)]
        return np.array(values).reshape(4, 32)

    peak, damaged = scores(before), scores(model)
    roll_back(model, dict(before.named_parameters()), bench.route_map, routes, 1.5)
    repaired = scores(model)
    assert result.measured.recovered == recovered(repaired[0], damaged[0], peak[0])
    for position, name in enumerate(("code", "qa", "writing"), start=1):
        assert result.measured.collateral[name] == difference(repaired[position], damaged[position])
    assert result.measured.routes == len(routes) == result.control.routes


def test_the_model_is_left_as_it_was(bench):
    kept = {name: parameter.clone() for name, parameter in bench.model.named_parameters()}
    first = bench.measure("magnitude", budget=0.05)
    assert all(torch.equal(parameter, kept[name]) for name, parameter in bench.model.named_parameters())
    bench._kept.clear()
    second = bench.measure("magnitude", budget=0.05)
    assert (first.measured, first.control) == (second.measured, second.control)


def test_rolling_back_everything_takes_back_the_loss_that_routes_carry(bench):
    result = bench.measure("damage", budget=1.0, scope="joint", step=1.0)
    assert 0.6 < result.measured.loss < 1.3 and result.measured.loss == pytest.approx(result.control.loss, abs=1e-6)


def test_prediction_is_close_to_the_slope_at_the_end(bench):
    rollback = RouteRollback(budget=0.02)
    slope = (bench._effect(RouteRollback(budget=0.02, step=0.01)).loss) / 0.01
    predicted = bench.measure("damage", budget=rollback.budget).predicted_loss
    assert predicted == pytest.approx(slope, rel=0.35)
    assert bench.measure("damage", budget=0.02, step=2.0).predicted_loss == pytest.approx(2 * predicted)


def test_chosen_routes_beat_random_ones(bench):
    result = bench.measure("damage", budget=0.02)
    assert result.measured.loss > 3 * abs(result.control.loss)


@pytest.mark.parametrize(
    "arguments",
    [{"step": 5.0}, {"step": -1.0}, {"step": float("nan")}, {"budget": 0}, {"scope": "x"}, {"criterion": "<b>"}],
)
def test_bad_input(bench, arguments):
    with pytest.raises(ValueError, match="expected"):
        bench.measure(**arguments)
    with pytest.raises(ValueError, match="expected a packed run"):
        LiveRollback(DATA / "analysis")


def test_verdict():
    for name in TASKS:
        row = lab_rows(name, "test", 3)[2]
        assert verdict(row["prompt"], row["answer"]) == (name, 1.0)
        domain, reward = verdict(row["prompt"], " certainly not")
        assert domain == name and reward < 1
    assert verdict("Q: what? A:", "this") is None
