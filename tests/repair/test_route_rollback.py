import copy
import math

import numpy as np
import pytest
import torch
from peft import PeftModel
from test_models import lora

from trl_interfere.analysis.routes import RouteMap
from trl_interfere.checkpoint import Checkpoint
from trl_interfere.models import load_model
from trl_interfere.repair.route_rollback import STEPS, RouteRollback


LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "llama-biases": LLAMA,
    "qwen3": LLAMA,
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "qwen3-moe": LLAMA[:4],  # its experts are no linear layers
}


@pytest.fixture
def checkpoints(make_model, moved, tmp_path):
    """Function that writes `before` and `after` of an architecture."""

    def write(family="llama"):
        before = make_model(family, dtype=torch.float32)
        for name, model in (("before", before), ("after", moved(before))):
            model.save_pretrained(tmp_path / name)
        return tmp_path / "before", tmp_path / "after"

    return write


@pytest.fixture
def report_on(make_report):
    """Function that makes a report with random measures on two checkpoints."""

    def make(before, after, seed=0):
        rng, count = np.random.default_rng(seed), RouteMap(Checkpoint(after).config).num_routes
        measures = {name: rng.normal(size=count) for name in ("damage", "later_damage", "opposed", "second_order")}
        return make_report(count, str(before), str(after), **measures, edit_size=rng.uniform(1, 2, size=count))

    return make


@pytest.fixture
def adapters(make_model, tmp_path):
    """Function that writes a model and two random adapters of it, and returns their folders."""

    def write(family="llama", **options):
        folders = [tmp_path / name for name in ("base", "before", "after")]
        make_model(family, dtype=torch.float32).save_pretrained(folders[0])
        for seed, folder in enumerate(folders[1:]):
            torch.manual_seed(seed)
            settings = {"r": 2 + seed, "lora_alpha": 5 + seed, "target_modules": TARGETS.get(family, LLAMA)}
            lora(load_model(folders[0]), folder, task_type="CAUSAL_LM", **{**settings, **options})
        return folders

    return write


def dense(before, after, routes, step, owned_slices):
    """The rollback written out slice by slice, in float64; biases stay."""
    start, end = ({name: p.detach().double() for name, p in model.named_parameters()} for model in (before, after))
    expected, slices = {name: value.clone() for name, value in end.items()}, owned_slices(after)
    for name, index in (owned for route in routes for owned in slices[route][3]):
        if end[name].ndim > 1:
            expected[name][index] = end[name][index] - step * (end[name][index] - start[name][index])
    return expected


def test_the_adapter_is_the_edit_of_the_weights(architecture, checkpoints, report_on, owned_slices, tmp_path):
    before, after = checkpoints(architecture)
    report, start, end = report_on(before, after), load_model(before), load_model(after)
    routes = RouteRollback(budget=0.4, scope="joint").select(report, RouteMap(end.config))
    for step in (1.0, 1.7):
        RouteRollback(budget=0.4, scope="joint", step=step).fit(report).save_pretrained(tmp_path / f"{step}")
        merged = PeftModel.from_pretrained(copy.deepcopy(end), tmp_path / f"{step}").merge_and_unload()  # plain PEFT
        expected = dense(start, end, routes, step, owned_slices)
        for name, parameter in merged.named_parameters():
            torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=0, atol=3e-7, msg=name)
        assert sum(bool((value != end.get_parameter(name)).any()) for name, value in expected.items()) > 4


@pytest.mark.parametrize("family", ["gpt_oss", "bloom", "granitemoe", "deepseek_v3", "qwen3_next"])
def test_further_architectures(family, checkpoints, report_on):
    before, after = checkpoints(family)
    report, start, end = report_on(before, after), load_model(before), load_model(after)
    rollback = RouteRollback(budget=0.4, scope="joint")
    route_map, merged = RouteMap(end.config), rollback.fit(report).merge()
    shares = np.zeros(route_map.num_routes)
    shares[rollback.select(report, route_map)] = 1.0
    for name, parameter in end.named_parameters():
        share, expected = route_map.spread(name, shares, parameter), parameter
        if share is not None and parameter.ndim > 1 and not name.endswith(("bias", "conv1d.weight")):
            expected = torch.lerp(parameter, start.get_parameter(name), share)
        torch.testing.assert_close(merged.get_parameter(name), expected, rtol=0, atol=3e-7, msg=name)


@pytest.mark.parametrize("family, width, rank", [("llama", 12, 6), ("gpt2", 12, 6), ("gpt2-default-width", 64, 16)])
def test_rank_is_the_number_of_channels_up_to_the_width(family, width, rank, checkpoints, report_on):
    before, after = checkpoints(family)
    report = report_on(before, after)
    report.routes["damage"][: width // 2] = 9.0  # half of the first layer
    repair = RouteRollback(budget=0.25).fit(report)
    assert {left.shape[1] for left, _ in repair.factors.values()} == {rank}
    assert {name.split(".")[2] for name in repair.factors} == {"0"}


def test_record(checkpoints, report_on, owned_slices):
    before, after = checkpoints("llama-biases")
    report, start, end = report_on(before, after), load_model(before), load_model(after)
    report.config["quadrature_nodes"] = 6
    report.references["qa"] = {"n": 5}
    rollback = RouteRollback(budget=0.1, scope="joint", protection=0.5)
    record, routes = rollback.fit(report).record, rollback.select(report, RouteMap(end.config))
    assert sum(len(places) for layers in record["routes"].values() for places in layers.values()) == len(routes)
    assert record["carried_damage"]["nats"] == pytest.approx(report.routes["damage"][routes].sum())
    assert record["checkpoints"]["final"]["digest"] == Checkpoint(after).digest()
    assert record["checkpoints"]["peaks"]["math"]["digest"] == Checkpoint(before).digest()
    assert (record["method"], record["criterion"], record["step"]) == ("routes", "damage", 1.0)
    assert record["cost"]["sequences_backward"] == 6 * (3 + 5)
    slices, sizes = owned_slices(end), {True: 0.0, False: 0.0}  # of biases, and of the rest
    for kind, layer, position, owned in (slices[route] for route in routes):
        assert position in record["routes"][kind][str(layer)]
        for name, index in owned:
            moved = end.get_parameter(name)[index].double() - start.get_parameter(name)[index].double()
            sizes[end.get_parameter(name).ndim == 1] += moved.square().sum().item()
    assert record["left_as_it_is"]["math"] == pytest.approx(sizes[True] / sum(sizes.values()))


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("to", ["base", "before"])
def test_adapters(family, to, adapters, report_on, owned_slices, tmp_path):
    base, before, after = adapters(family)
    start = base if to == "base" else before
    scope = "attention" if family == "qwen3-moe" else "joint"
    report, rollback = report_on(start, after), RouteRollback(budget=0.5, scope=scope, step=1.3)
    rollback.fit(report).save_pretrained(tmp_path / "repair")
    models = [load_model(name, dtype="float64") for name in (start, after)]
    expected = dense(*models, rollback.select(report, RouteMap(models[1].config)), 1.3, owned_slices)
    healed = PeftModel.from_pretrained(load_model(base), tmp_path / "repair").merge_and_unload()
    for name, parameter in healed.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=2e-6, msg=name)


def test_optimal_step(checkpoints, report_on):
    report, rollback = report_on(*checkpoints("llama-biases")), RouteRollback(budget=0.3, step="optimal")
    target = RouteRollback(budget=0.3, step=3.0).fit(report).merge().state_dict()

    def distance(model):
        assert model.training is False
        return sum(float((value - target[name]).square().sum()) for name, value in model.state_dict().items())

    repair = rollback.fit(report, objective=distance)
    assert repair.record["step"] == 3.0 and distance(repair.merge()) < 1e-9
    assert [entry["step"] for entry in repair.record["searched"]] == list(STEPS)
    values = iter([math.nan, 4.0, math.inf, 3.0, *[5.0] * 4])
    assert rollback.fit(report, objective=lambda model: next(values)).record["step"] == STEPS[3]
    for objective in (lambda model: math.nan, None):
        with pytest.raises(ValueError, match="objective"):
            rollback.fit(report, objective=objective)


def test_controls(checkpoints, report_on):
    report = report_on(*checkpoints())
    route_map = RouteMap(Checkpoint(report.after).config)

    def chosen(criterion, seed=0, budget=0.25):
        return RouteRollback(criterion, budget=budget, seed=seed).select(report, route_map).tolist()

    damaged = chosen("damage")
    assert damaged == sorted(range(24), key=lambda route: -report.routes["damage"][route])[:6]
    for criterion in ("random", "random_matched"):
        assert chosen(criterion) == chosen(criterion) != chosen(criterion, seed=1)
        assert len(set(chosen(criterion))) == 6 and max(chosen(criterion)) < 24
    assert not set(chosen("random_matched")) & set(damaged)
    assert chosen("damage", budget=1e-9) == damaged[:1]
    with pytest.raises(ValueError, match="budget"):
        chosen("random_matched", budget=1.0)


@pytest.mark.parametrize(
    "settings",
    [{"criterion": "damag"}, {"budget": 0}, {"budget": 1.1}, {"scope": "all"}, {"step": "best"}, {"step": 0}]
    + [{"step": math.inf}, {"protection": -1.0}, {"protection": 1.0, "criterion": "magnitude"}],
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        RouteRollback(**settings)


def test_reports_without_a_repair(checkpoints, adapters, report_on, make_report, make_model, moved, tmp_path):
    before, after = checkpoints()
    with pytest.raises(ValueError, match="report"):
        RouteRollback().fit(make_report(7, str(before), str(after)))
    report = report_on(before, after)
    report.digests = {name: Checkpoint(tmp_path / name).digest() for name in ("before", "after")}
    assert RouteRollback().fit(report).factors
    moved(make_model("llama", dtype=torch.float32), seed=2).save_pretrained(after)  # trained again since
    with pytest.raises(ValueError, match="report"):
        RouteRollback().fit(report)
    base, _, after = adapters(target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match="scope"):
        RouteRollback(scope="mlp").fit(report_on(base, after))
