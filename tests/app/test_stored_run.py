import json

import numpy as np
import pytest

from trl_interfere.analysis.report import InterferenceReport
from trl_interfere.app.stored_run import MAX_JSON_BYTES, StoredRun, read_report


def rewrite(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def test_report_is_the_one_that_was_saved(save_report, tmp_path):
    expected = InterferenceReport.from_pretrained(save_report(tmp_path))
    found = read_report(tmp_path)
    assert found.to_dict() == expected.to_dict()
    assert set(found.routes) == set(expected.routes)
    for name, values in expected.routes.items():
        np.testing.assert_array_equal(found.routes[name], values)
    for kind, values in expected.by_layer("damage").items():
        np.testing.assert_array_equal(found.by_layer("damage")[kind], values)


def test_arrays_are_read_when_they_are_asked_for(save_report, tmp_path):
    save_report(tmp_path)
    (tmp_path / "routes.safetensors").write_bytes(b"no safetensors")
    report = read_report(tmp_path)
    assert report.damage == pytest.approx(0.6)
    with pytest.raises(ValueError, match="routes.safetensors: expected the measures of the routes"):
        report.routes["damage"]
    (tmp_path / "routes.safetensors").unlink()
    with pytest.raises(ValueError, match="expected routes.safetensors beside report.json, found none"):
        read_report(tmp_path).by_layer("damage")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 4}, "expected schema_version 3, found 4"),
        ({"schema_version": None}, "expected schema_version 3, found None"),
        ({"loss_after": "0.7"}, "loss_after: expected int or float, found '0.7'"),
        ({"loss_after": float("inf")}, "loss_after: expected int or float, found 'inf'"),
        ({"loss_after": 10**400}, "loss_after: expected int or float"),
        ({"first_order": True}, "first_order: expected int or float, found 'True'"),
        ({"earlier": 5}, "earlier: expected str"),
        ({"later": []}, "later: expected 1 to 64 names"),
        ({"later": ["x"] * 65}, "later: expected 1 to 64 names"),
        ({"cosines": {"global": 0.1}}, "cosines.modules: expected dict"),
        ({"cosines": {"global": 0.1, "modules": {"layers.0.mlp": "high"}}}, "layers.0.mlp: expected int"),
        ({"route_counts": {"mlp": [1] * 1025}}, "route_counts, 'mlp': expected at most 1024"),
        ({"route_counts": {"mlp": [-1]}}, "route_counts, 'mlp'"),
        ({"overlaps": {"active": {"a": {"b": 1}}}}, "overlaps: expected dict, found '1'"),
        ({"something": 1}, "unknown field 'something'"),
    ],
)
def test_foreign_content(save_report, tmp_path, changes, message):
    save_report(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        read_report(tmp_path)


def test_missing_fields(save_report, tmp_path):
    save_report(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    del content["cosines"], content["loss_after"]
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"expected the fields \['loss_after', 'cosines'\]"):
        read_report(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\xff", "[" * 100_000], ids=repr)
def test_no_json(tmp_path, text):
    (tmp_path / "report.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="report.json: expected"):
        read_report(tmp_path)


def test_errors_do_not_tell_where_the_file_lies(save_report, tmp_path):
    save_report(tmp_path, schema_version=9)
    with pytest.raises(ValueError) as caught:
        read_report(tmp_path)
    assert str(tmp_path) not in str(caught.value)


def test_json_that_is_too_large(tmp_path):
    with open(tmp_path / "report.json", "wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(ValueError, match="expected at most 64 MB"):
        read_report(tmp_path)


def test_measure_that_is_not_finite(save_report, tmp_path):
    from safetensors.numpy import save_file

    save_report(tmp_path)
    save_file({"damage": np.array([1.0, np.nan])}, tmp_path / "routes.safetensors")
    with pytest.raises(ValueError, match="expected finite values for 'damage'"):
        read_report(tmp_path).routes["damage"]


def test_run(save_run, tmp_path):
    run = StoredRun.read(save_run(tmp_path / "run"), "mine")
    assert run.domains == ["math", "qa"] and run.stage_names == ["0-base", "1-math", "2-qa"]
    assert list(run.reports) == ["0-math-after-qa"]
    assert run.report("0-math-after-qa").earlier == "math"
    assert len(run.results["rollback"]) == 5 and run.results["refresh"]["steps"] == 2
    assert run.read_card() == "# A card\n"
    with pytest.raises(ValueError, match="expected one of the reports"):
        run.report("../../secret")


def test_manifest_without_results(save_run, tmp_path):
    folder = save_run(tmp_path / "run")
    stages = json.loads((folder / "results.json").read_text())["stages"]
    (folder / "results.json").unlink()
    (folder / "stages.json").write_text(json.dumps({"schema_version": 1, "stages": stages}))
    run = StoredRun.read(folder, "mine")
    assert run.stage_names == ["0-base", "1-math", "2-qa"] and run.results["rollback"] == []


def test_pushed_repository(save_run, save_report, tmp_path):
    save_run(tmp_path / "repo" / "interference")
    save_report(tmp_path / "repo" / "interference", seed=1)
    (tmp_path / "repo" / "README.md").write_text("# The card of the repository\n")
    run = StoredRun.read(tmp_path / "repo", "user/repo")
    assert list(run.reports) == ["report", "0-math-after-qa"] and run.stages
    assert run.read_card().startswith("# The card of the repository")


@pytest.mark.parametrize(
    "changes",
    [
        {"stages": {}},
        {"stages": [{"index": 0}]},
        {"stages": [{"index": 0, "kind": "base", "domain": None, "scores": {"math": {"value": "<b>"}}}]},
        {"rollback": [{"criterion": "damage"}]},
        {"refresh": {"steps": "many"}},
        {"edits": {"changed": {"a": {"b": {"mlp": {"value": "x"}}}}}},
    ],
)
def test_foreign_results(save_run, tmp_path, changes):
    with pytest.raises(ValueError, match="expected"):
        StoredRun.read(save_run(tmp_path, **changes), "mine")


def test_links_out_of_the_folder_are_not_followed(save_run, save_report, tmp_path):
    secret = save_report(tmp_path / "secret")
    (secret / "README.md").write_text("secret")
    folder = save_run(tmp_path / "run")
    (folder / "report.md").unlink()
    (folder / "README.md").symlink_to(secret / "README.md")
    (folder / "linked").symlink_to(secret)
    run = StoredRun.read(folder, "mine")
    assert list(run.reports) == ["0-math-after-qa"] and run.read_card() == "This run has no card."


def test_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match="mine: expected a run or a report"):
        StoredRun.read(tmp_path, "mine")
