import json
import shutil

import numpy as np
import pytest
from space_run import DATA, HOSTILE

from trl_interfere.app import html
from trl_interfere.app.scored import Scored
from trl_interfere.app.views import arms_of, flips_table, repairs_of, where_figure
from trl_interfere.evaluation.bootstrap import score
from trl_interfere.evaluation.flips import flips
from trl_interfere.run import Run, StageRecord


@pytest.fixture(scope="module")
def lab():
    return Scored("lab", DATA)


def test_a_healed_run(lab):
    repair = json.loads((DATA / "repair" / "repair.json").read_text())
    assert lab.verdict.startswith("math lost 25.0 of 63.5 points") and lab.pair() == ("4-writing", "5-heal")
    rows = lab.prompts("math", "4-writing", "5-heal")
    scores = {model: np.array([row["score"] for row in lab.rows(model, "math")]) for model in lab.models}
    peak, before, after = (scores[name] >= 0.5 for name in ("2-math", "4-writing", "5-heal"))
    expected = {
        "regained": (peak & ~before & after).sum(),
        "newly lost": (before & ~after).sum(),
        "lost": (peak & ~before & ~after).sum(),
        "kept": (before & after).sum(),
        "gained": (~peak & ~before & after).sum(),
        "wrong in both": (~peak & ~before & ~after).sum(),
    }
    became = [row[1] for row in rows]
    assert {kind: became.count(kind) for kind in expected} == expected and len(rows) == 512
    change = repair["domains"]["math"]["change"]
    shown = f"{change['value']:+.1f} [{change['low']:+.1f}, {change['high']:+.1f}]"
    assert shown in flips_table(lab, "4-writing", "5-heal")


def test_what_chance_alone_flips(lab, evaluation):
    """One sample bounds it, several samples give it (see below), and greedy answers flip by none."""
    right = sum(row["score"] >= 0.5 for row in lab.rows("4-writing", "math"))
    most = right * (512 - right) / 512
    chance = lab.by_chance("math", "4-writing", "5-heal")
    assert chance["newly_lost"] == chance["regained"] == f"≤ {most:.0f}" and chance["kept"] == f"≥ {right - most:.0f}"
    assert f"({chance['lost']})" in flips_table(lab, "4-writing", "5-heal")
    greedy = Scored("strangers", evaluation)
    assert greedy.by_chance("sums", *greedy.pair()) == {"kept": "2", "lost": "0", "regained": "0", "newly_lost": "0"}


def test_samples_are_kept_and_read(tmp_path):
    run = Run.new(tmp_path, {})
    samples = np.array([[1, 0, 0], [1, 1, 0]], dtype=float)
    for index, values in enumerate((samples, 1 - samples)):
        kind, domain = ("train", "sums") if index else ("base", None)
        record = StageRecord(index, kind, domain, None, 0, 0.0, {}, 0, {}, {})
        file = run.write_scores(record.name, "sums", values, list("uvwxyz"))
        record.scores["sums"] = {**score(values.mean(axis=1)).to_dict(), "file": file}
        run.append(record)
    scored = Scored("run", tmp_path)
    assert np.array_equal(scored.samples("0-base", "sums"), samples)
    expected = flips(samples, 1 - samples, 1 - samples if scored.peak("sums") == "1-sums" else samples).expected
    assert scored.by_chance("sums", "0-base", "1-sums") == {kind: f"{count:.0f}" for kind, count in expected.items()}


def test_arms(lab, tmp_path):
    (heal,) = lab.arms()
    repair = json.loads((DATA / "repair" / "repair.json").read_text())
    assert heal["recovered"] == repair["recovered_all"]["value"] and heal["worst"] == repair["worst"]
    assert heal["sequences"] == 512 + 256  # forward, and sampled
    folder = shutil.copytree(DATA, tmp_path / "refreshed", ignore=shutil.ignore_patterns("stages", "analysis"))
    content = json.loads((folder / "stages.json").read_text())
    content["stages"][-1].update(kind="refresh", domain="math", steps=10)
    (folder / "stages.json").write_text(json.dumps(content))
    routes = {"arm": "routes", "budget": 0.02, "scope": "mlp", "criterion": "damage", "cost": None, "worst": -1.0}
    routes["recovered_all"] = {"value": None, "low": None, "high": None}
    (folder / "rivals.json").write_text(json.dumps({"schema_version": 2, "rows": [routes]}))
    refreshed = Scored("other", folder)
    _, refresh, routes = refreshed.arms()
    # Only math has lost more than chance explains.
    assert refresh["recovered"] == pytest.approx(repair["domains"]["math"]["recovered"])
    assert refresh["worst"] == pytest.approx(repair["worst"])
    assert refresh["sequences"] == 4 * 128 * 10 and routes["name"] == "2% of mlp by damage"
    names = [arm["name"] for arm in arms_of([lab, refreshed])]
    assert names[0] == "lab: heal, subspace of rank 64" and names[2] == "other: refresh of math, 10 steps"
    shown = repairs_of([routes])
    assert "2% of mlp by damage</th><td>—</td><td>— to —</td><td>-1.0</td><td>—</td>" in shown and "<svg" in shown


def test_where(lab):
    axes = [axes for axes in where_figure(lab, next(iter(lab.reports))).axes if axes.get_title()]
    titles = ["gradient cosine", "damage", "output that the correction changes"]
    titles += ["effective dimension of the correction", "the same of a random change"]
    assert [one.get_title().split(" (")[0] for one in axes] == titles
    report = lab.report(next(iter(lab.reports)))
    assert axes[1].images[0].get_array().sum() == pytest.approx(report.routes["damage"].sum())
    first = lab.repair["layers"][0]
    assert axes[3].images[0].get_array()[first["block"], 0] == first["effective_dimension"]
    with pytest.raises(ValueError, match="reports"):
        where_figure(lab, "../x")


def test_checkpoints_from_elsewhere(evaluation):
    scored = Scored("strangers", evaluation)
    assert scored.models == ["0-m0", "1-m1"] and scored.pair() == ("0-m0", "1-m1")
    assert scored.verdict == "From 0-m0 to 1-m1: sums: 1 prompts lost and 1 gained."
    became = [row[1] for row in scored.prompts("sums", *scored.pair())]
    assert became == ["newly lost", "regained", "kept", "wrong in both"]
    assert scored.answers("sums", 0)[1][1] == {"model": "1-m1", "text": "1: 0", "score": 0, "reason": "not a number"}
    assert scored.arms() == [] and where_figure(scored, None) is None


def test_text_of_a_run_is_escaped(hostile):
    scored = Scored(HOSTILE, hostile)
    answers = html.answers(HOSTILE, 0, *scored.answers(HOSTILE, 0))
    table = flips_table(scored, "4-writing", "5-heal")
    for part in (html.verdicts([(HOSTILE, scored.verdict)]), answers, table, html.notice(HOSTILE)):
        assert "<script" not in part and "<img" not in part and "&lt;script&gt;" in part
