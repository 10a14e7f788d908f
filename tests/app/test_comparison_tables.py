import pytest

from trl_interfere.app import tables
from trl_interfere.app.stored_run import StoredRun
from trl_interfere.app.story import tell


@pytest.fixture
def run(save_run, tmp_path):
    return StoredRun.read(save_run(tmp_path / "run"), "mine")


def test_scores(run):
    table = tables.score_table([run, run])
    assert len(table) == 12 and list(table.columns) == tables.SCORE_COLUMNS
    assert table.iloc[2].tolist() == ["mine", "1-math", "math", 80, 78, 83, 50]


def test_damage(make_report):
    table = tables.damage_table([("a", make_report(4))])
    expected = [
        "a",
        "math",
        "qa, writing",
        0.6,
        0.3,
        0.25,
        0.5,
        0.05,
        -0.125,
        "layers.0.mlp",
        -0.5,
        "layers.0.attention",
        0.75,
    ]
    assert table.iloc[0].tolist() == expected


def test_damage_without_cosines(make_report):
    report = make_report(4)
    report.cosines.update({"global": None, "modules": {}})
    assert tables.damage_table([("a", report)]).iloc[0, 8:].isna().all()


def test_repairs(run):
    run.results["rollback"][0].update(recovered=None, low=None, high=None)
    table = tables.repair_table([run])
    assert len(table) == 6 and table.iloc[0][["recovered %", "low"]].isna().all()
    assert table.iloc[1].tolist() == ["mine", "random", "mlp", 2.0, 1.0, 5.0, -5.0, 25.0, -1.5, 50, 5]
    last = table.iloc[5]
    assert (last["repair"], last["recovered %"], last["worst collateral"]) == ("refresh, 2 steps", 80.0, 0.5)


def test_story(run):
    report = run.report("0-math-after-qa")
    trained, broke, where, repaired = tell(run, report)
    assert trained.figure == "2 skills" and "math and qa" in trained.answer and "7 optimizer steps" in trained.detail
    assert broke.figure == "−25 points" and "80 of 100 after its own stage and 55 after qa" in broke.answer
    assert "95% intervals 78 to 83 and 53 to 58, 50 unseen prompts" in broke.detail
    assert "2% of the network" in where.answer and "cosine -0.12" in where.detail
    assert repaired.figure == "70% back" and "interval 60 to 90%" in repaired.detail
    assert "2 steps of new training instead: 80%" in repaired.detail and "qa -1.5 points" in repaired.detail


def test_story_of_a_run_without_losses_or_repairs(run):
    run.results.update(rollback=[], refresh=None)
    run.stages[2]["scores"]["math"]["value"] = 85
    assert [(one.question, one.figure) for one in tell(run)] == [
        ("What was trained", "2 skills"),
        ("What broke", "nothing"),
    ]
    run.stages = []
    assert tell(run) == []
