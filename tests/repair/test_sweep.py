import json

import numpy as np
import pytest
import torch

from trl_interfere.evaluation.metrics import recovered
from trl_interfere.repair.bench import RepairBench, domain_scorer
from trl_interfere.repair.measures import reference_probability
from trl_interfere.repair.rollback import RouteRollback, rolled_back
from trl_interfere.repair.sweep import Sweep, pareto, sweep
from trl_interfere.reporting.repair_plots import plot_contraction, plot_cost, plot_runs, plot_sweep


NUM_ROUTES = 36


@pytest.fixture
def bench(make_model, moved, make_report):
    """Scores fall with the distance of the MLP weights of math, and with those of attention for qa."""
    before = make_model("llama")
    after = moved(before)
    start = {name: parameter.detach().clone() for name, parameter in before.named_parameters()}
    end = {name: parameter.detach().clone() for name, parameter in after.named_parameters()}
    rng = np.random.default_rng(0)
    hard = {name: rng.uniform(0, 1, size=40) for name in ("math", "qa")}

    def kept(model, part, target):
        names = [name for name in start if part in name]
        far = sum((model.get_parameter(name) - target[name]).square().sum() for name in names)
        whole = sum((end[name] - start[name]).square().sum() for name in names)
        return float(1 - (far / whole) ** 0.5)

    calls = []

    def score(model, split):
        calls.append(split)
        back, left = kept(model, "mlp", start), kept(model, "mlp", end)
        return {
            "math": (hard["math"] < 0.3 + 0.6 * back).astype(float),
            "qa": (hard["qa"] < 0.8 * (1 if left > 0.55 else left)).astype(float),
        }

    damage = np.random.default_rng(1).uniform(0.1, 1, size=NUM_ROUTES)
    report = make_report(NUM_ROUTES, damage=damage, edit_size=np.ones(NUM_ROUTES))
    found = RepairBench(after, start, report, score)
    found.calls = calls
    return found


def test_rows_against_scores_by_hand(bench):
    rows = sweep(
        bench, ["damage"], [0.25, 1.0], steps=(0.5, 1.0), max_drop=100.0, labels={"seed": 3, "order": "x"}
    ).rows
    assert [(row["budget"], row["step_rule"]) for row in rows] == [
        (0.25, "fixed"), (0.25, "best"), (1.0, "fixed"), (1.0, "best"),
    ]  # fmt: skip
    for row in rows:
        routes = RouteRollback(budget=row["budget"]).select(bench.report, bench.route_map)
        with rolled_back(bench.model, bench.before, bench.route_map, routes, row["step"]) as model:
            scores = bench.score(model, "test")
        damaged = bench.score(bench.model, "test")
        share = recovered(scores["math"], damaged["math"], bench.peak("math"))
        assert (row["recovered"], row["low"], row["high"]) == (share.value, share.low, share.high)
        assert row["collateral"]["qa"] == pytest.approx(100 * (scores["qa"].mean() - damaged["qa"].mean()))
        assert row["worst"] == row["collateral"]["qa"]
        assert (row["seed"], row["order"], row["split"]) == (3, "x", "test")
    assert rows[2]["recovered"] == pytest.approx(1.0)


def test_the_best_step_spares_the_others(bench):
    free = sweep(bench, ["damage"], [1.0], steps=(0.25, 0.5, 1.0), max_drop=100.0, fixed=False).rows[0]
    spared = sweep(bench, ["damage"], [1.0], steps=(0.25, 0.5, 1.0), max_drop=1.0, fixed=False).rows[0]
    assert free["step"] == 1.0 and free["worst"] < -10
    assert spared["step"] == 0.25 and spared["worst"] >= -1
    assert spared["recovered"] < free["recovered"]


def test_a_row_says_where_no_step_keeps_to_the_limit(bench):
    limits = {"steps": (0.25, 1.0), "max_drop": 1.0}
    kept = sweep(bench, ["damage"], [1.0], **limits)
    assert [row.get("within_max_drop") for row in kept.rows] == [None, True]  # a fixed step is not chosen
    assert "over max_drop" not in kept.to_table()
    over = sweep(bench, ["damage"], [1.0], steps=(0.75, 1.0), max_drop=1.0, fixed=False)
    assert over.rows[0]["within_max_drop"] is False and over.rows[0]["worst"] < -1
    assert "(best, over max_drop) |" in over.to_table()
    runs = [{**row, "seed": seed} for seed, row in enumerate((kept.rows[1], over.rows[0]))]
    assert "(best, over max_drop in 1 of 2) |" in Sweep(runs).to_table()


def test_choose(bench):
    bench.damaged = {"math": 40.0, "qa": 70.0}
    candidates = [{"math": 50.0, "qa": 70.0}, {"math": 55.0, "qa": 69.5}, {"math": 80.0, "qa": 65.0}]
    assert bench.choose(candidates, 1.0) == 1
    assert bench.choose(candidates, 0.0) == 0
    assert bench.choose(candidates, 5.0) == 2
    assert bench.choose(candidates[2:] + [{"math": 40.0, "qa": 60.0}], 1.0) == 0  # none is allowed: the mean
    bench.earlier = ["math", "qa"]  # neither may pay for the other
    assert bench.choose([{"math": 50.0, "qa": 70.0}, {"math": 80.0, "qa": 65.0}], 1.0) == 0


def test_controls_are_drawn_several_times(bench):
    row = sweep(bench, ["random"], [0.25], draws=4, fixed=True).rows[0]
    assert row["draws"] == len(row["by_draw"]) == 4
    assert len(set(row["by_draw"])) > 1 or np.ptp(row["by_draw"]) == 0
    assert row["recovered"] == pytest.approx(np.mean(row["by_draw"]))


def test_a_stopped_sweep_goes_on(bench, tmp_path):
    path = tmp_path / "rows.json"
    whole = sweep(bench, ["damage", "magnitude"], [0.1, 0.5], path=path)
    content = json.loads(path.read_text())
    content["rows"] = content["rows"][:3]
    path.write_text(json.dumps(content))
    asked = []
    again = sweep(bench, ["damage", "magnitude"], [0.1, 0.5], path=path, progress=asked.append)
    assert len(asked) == len(whole.rows) - 3
    assert again.rows == whole.rows == Sweep.load(path).rows
    name = "model.layers.1.mlp.down_proj.weight"
    with torch.no_grad():
        bench.model.get_parameter(name).add_(1e-3)
    with pytest.raises(ValueError, match="holds another sweep; weights: expected"):
        sweep(bench, ["damage", "magnitude"], [0.1, 0.5], path=path)
    path.write_text('{"schema_version": 1, "rows": 3}')
    with pytest.raises(ValueError, match="expected a list of rows, found int"):
        Sweep.load(path)


def test_pareto():
    rows = [
        {"recovered": r, "worst": w} for r, w in ((0.9, -9), (0.6, -1), (0.5, -2), (0.3, 0.5), (0.1, 0.5), (None, 3))
    ]
    assert [row["recovered"] for row in pareto(rows)] == [0.9, 0.6, 0.3]


def test_several_damaged_domains(bench):
    joint = RepairBench(
        bench.model, bench.before, bench.report, bench.score, peaks={"math": bench.before, "qa": bench.before}
    )
    row = sweep(joint, ["damage"], [1.0], steps=(1.0,), fixed=False).rows[0]
    assert set(row["by_domain"]) == {"math", "qa"}
    assert row["collateral"] == {} and row["worst"] is None
    assert row["by_domain"]["qa"]["recovered"] is None  # nothing was lost
    with pytest.raises(ValueError, match="peaks: expected domains that are scored, .*found .*'code'"):
        RepairBench(bench.model, bench.before, bench.report, bench.score, peaks={"code": bench.before})


def test_settings_out_of_range(bench):
    for settings, message in (
        ({"criteria": ["random_protected"]}, "criteria: expected some of .*found 'random_protected'"),
        ({"criteria": []}, "criteria: expected at least one, found none"),
        ({"max_drop": float("nan")}, "max_drop: expected 0 or more points, found nan"),
        ({"draws": 0}, "draws: expected at least 1, found 0"),
        ({"budgets": [0.0]}, "budget: expected a share"),
        ({"scopes": ["all"]}, "scope: expected one of"),
        ({"steps": ()}, "steps: expected at least one, found none"),
        ({"steps": (0.0,)}, "steps: expected numbers above 0, found 0.0"),
        ({"protections": (-1.0,)}, "protection: expected 0 or more, found -1.0"),
        ({}, "criteria: 'route_conflict' needs a report that was made with --base"),
    ):
        with pytest.raises(ValueError, match=message):
            sweep(bench, **settings)


def test_both_splits_are_needed(make_domain):
    with pytest.raises(ValueError, match="domain 'numbers': expected a eval_dataset|expected a selection_dataset"):
        domain_scorer(None, [make_domain()])


def test_table_and_figures(bench, tmp_path):
    found = sweep(bench, ["damage", "random"], [0.1, 0.5], draws=2)
    table = found.to_table()
    assert table.count("\n") == 2 + len(found.rows)
    assert "| damage | mlp | 10% | 1 (fixed) |" in table
    for figure in (
        plot_sweep(found.rows, "title"),
        plot_sweep([]),
        plot_cost([{"method": "a", "sequences": n, "recovered": 0.1 * n, "worst": -1.0} for n in (1, 2)]),
        plot_contraction([{"label": "a", "steps": [0, 1], "inside": [2.0, 1.0], "outside": [2, 2], "rate": 0.5}]),
    ):
        figure.savefig(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 5000


def test_runs_of_one_refresh_share_a_panel():
    curves = [
        {
            "label": label,
            "steps": steps,
            "inside": [2.0 * end ** (t / 2) for t in steps],
            "outside": [3] * len(steps),
            "rate": 0.9,
        }
        for label, end, steps in (("a", 0.5, [0, 1, 2]), ("a", 0.7, [0, 2]), ("b", 0.9, [0, 2]))
    ]
    first, second = plot_contraction(curves, "command").axes
    assert (first.get_title(), second.get_title()) == ("a (2 runs)", "b (1 run)")
    means = {line.get_label(): line for line in first.lines if not line.get_label().startswith("_")}
    assert means["inside S"].get_xdata().tolist() == [0, 2]
    assert means["inside S"].get_ydata() == pytest.approx([1, 0.6])
    assert means["outside S"].get_ydata() == pytest.approx([1, 1])
    assert means["(1 - αμ)^t, fitted"].get_ydata() == pytest.approx([1, 0.81])
    assert len(first.lines) == 9 and len(second.lines) == 6


def test_every_run_is_a_point():
    rows = [
        {"criterion": name, "order": order, "step_rule": rule, "recovered": share, "worst": -1.0}
        for name in ("damage", "random")
        for order, share in (("a,b", 0.2), ("a,b", 0.6), ("b,a", None))
        for rule in ("fixed", "best")
    ]
    recovered, worst = plot_runs(rows, "command").axes
    means = [line.get_ydata() for line in recovered.lines if line.get_color() == "black"]
    assert [list(values) for values in means] == [pytest.approx([40, 40])] * 2
    points = [y for line in recovered.lines if line.get_marker() == "o" for y in line.get_ydata()]
    assert sorted(points) == pytest.approx([20, 20, 60, 60])  # where nothing was lost there is no share
    assert sum(len(line.get_ydata()) for line in worst.lines if line.get_marker() == "o") == 6


def test_reference_probability(make_model, sequences, make_batches):
    model = make_model()
    batches = make_batches(sequences)
    expected = []
    for batch in batches:
        logs = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
        for row, labels in enumerate(batch["labels"]):
            places = [place for place, label in enumerate(labels.tolist()) if label != -100]
            expected.append(np.exp(sum(float(logs[row, place - 1, labels[place]]) for place in places)))
    assert reference_probability(model, batches) == pytest.approx(np.mean(expected), rel=1e-5)
    with pytest.raises(ValueError, match="batches: expected at least one reference"):
        reference_probability(model, [])


def test_a_bench_leaves_the_model_as_it_was(bench):
    end = {name: parameter.detach().clone() for name, parameter in bench.model.named_parameters()}
    sweep(bench, ["damage"], [0.5], steps=(0.5, 2.0))
    assert all(torch.equal(parameter, end[name]) for name, parameter in bench.model.named_parameters())


def test_rows_of_other_data_are_not_continued(bench, tmp_path):
    path = tmp_path / "rows.json"
    bench.data = {"scoring": {"num_samples": 1}, "rows": {"math": {"test": "1f"}}}
    sweep(bench, ["damage"], [0.1], path=path, fixed=False)
    sweep(bench, ["damage"], [0.1], path=path, fixed=False)
    bench.data = {**bench.data, "rows": {"math": {"test": "2f"}}}
    with pytest.raises(ValueError, match="holds another sweep; data: expected .*2f.*, found .*1f"):
        sweep(bench, ["damage"], [0.1], path=path, fixed=False)


def test_several_runs_in_one_table():
    def row(seed, recovered, worst, step):
        place = {"criterion": "damage", "scope": "mlp", "budget": 0.1, "step_rule": "best", "protection": 0.0}
        known = recovered is not None
        ends = {"low": 0.0 if known else None, "high": 0.5 if known else None}
        more = {"worst": worst, "routes": 2, "asked": 4, "draws": 1, "step": step}
        return {"seed": seed, "order": None, **place, "recovered": recovered, **ends, **more}

    table = Sweep([row(0, 0.2, -1.0, 1.0), row(1, 0.4, 0.0, 2.0), row(2, None, -9.0, 2.0)]).to_table()
    assert (
        "| damage | mlp | 10%, 50% of it found | 1, 2 (best) | 30.0% [20.0, 40.0] | -0.50 | 2 of 3 | 1 | Pareto |"
        in table
    )
    assert "| 20.0% [0.0, 50.0] | -1.00 | 1 | 1 |" in Sweep([row(0, 0.2, -1.0, 1.0)]).to_table()


def test_nothing_is_compared_with_the_weights_of_another_repair(bench):
    from trl_interfere.repair.interpolation import interpolated

    with interpolated(bench.model, bench.before, 0.5) as model:
        scores = bench.score(model, "test")
        with pytest.raises(ValueError, match="model: expected it as it is after the update, found .*mlp.* changed"):
            bench.figures([scores])
    assert bench.figures([scores])["recovered"] > 0
