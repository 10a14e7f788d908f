import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from trl_interfere.analysis.cosines import GradientProducts
from trl_interfere.analysis.report import InterferenceReport
from trl_interfere.analysis.routes import RouteMap


@pytest.fixture
def report(make_report):
    rng = np.random.default_rng(0)
    names = ("damage", "first_order", "second_order", "later_damage", "edit_size", "opposed", "earlier_edit_size")
    return make_report(20, **{name: rng.normal(size=20) for name in names})


def test_round_trip(report, tmp_path):
    report.routes["damage"] = report.routes["damage"][::-1]  # not contiguous
    report.save_pretrained(tmp_path / "new" / "folder")
    loaded = InterferenceReport.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.routes.keys() == report.routes.keys()
    for name, values in report.routes.items():
        assert loaded.routes[name].dtype == values.dtype and np.array_equal(loaded.routes[name], values), name
    assert loaded.to_dict() == report.to_dict()
    assert report.damage == pytest.approx(0.7 - 0.1)
    assert report.residual == report.to_dict()["residual"] == pytest.approx(0.7 - 0.1 - 0.5 - 0.05)


def test_undefined_figures_stay_valid_json(report, tmp_path):
    zero, one = ({"model.norm.weight": torch.full((3,), value)} for value in (0.0, 1.0))
    found = GradientProducts({"math": [zero], "qa": [one]}, RouteMap(AutoConfig.for_model("llama")))
    report.cosines = found.figures("math", ["qa"])
    report.overlaps = {"changed": {"query": {"value": float("nan"), "first": 0}}}
    report.save_pretrained(tmp_path)

    def refuse(constant):
        raise AssertionError(f"report.json holds {constant}, which is not JSON")

    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert content["cosines"]["global"] is None and content["cosines"]["by_domain"]["qa"]["global"] is None
    assert content["overlaps"]["changed"]["query"]["value"] is None
    loaded = InterferenceReport.from_pretrained(tmp_path)
    assert loaded.cosines == report.cosines and np.isnan(loaded.overlaps["changed"]["query"]["value"])


def test_sums_by_layer(report):
    report.route_counts = {"mlp": [3, 5], "query": [4, 4], "key_value": [2, 2]}
    sums = report.by_layer("damage")
    damage = report.routes["damage"]
    np.testing.assert_allclose(sums["mlp"], [damage[:3].sum(), damage[3:8].sum()])
    np.testing.assert_allclose(sums["key_value"], [damage[16:18].sum(), damage[18:].sum()])
    with pytest.raises(ValueError, match="measure: expected one of .*'damage'.*found 'harm'"):
        report.by_layer("harm")


def test_concentration(report):
    report.routes["damage"] = np.array([1.0, 0.5, *[0.0] * 18])
    assert report.concentration == {"0.01": 2 / 3, "0.02": 2 / 3, "0.05": 2 / 3, "0.1": 1.0, "0.32": 1.0}
    report.routes["damage"] -= 1
    assert report.concentration == {}


def test_repr_and_table(report):
    report.computed_in, report.route_counts = "float32", {"mlp": [3, 5], "query": [4, 4], "key_value": [2, 2]}
    assert repr(report) == (
        "InterferenceReport(qa, writing on math: damage +0.6000 nats per token, 83% of it through routes; 25% of "
        "the weights outside routes; computed in float32)"
    )
    table = report.to_pandas()
    assert list(table.loc[4, ["kind", "layer", "position"]]) == ["mlp", 1, 1]
    np.testing.assert_array_equal(table["damage"], report.routes["damage"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "expected schema_version 3, found 2"),
        ({"latest": 1}, "expected all fields of a report and no others"),
        ({"loss_before": float("nan")}, "loss_before: expected"),
        ({"first_order": True}, "first_order: expected"),
        ({"later": "qa"}, "later: expected"),
        ({"references": {"math": {"n": float("nan")}}}, "references: expected"),
        ({"route_counts": {"mlp": 3}}, "route_counts: expected"),
    ],
)
def test_content_that_is_none(report, tmp_path, change, message):
    report.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=f"report.json: {message}"):
        InterferenceReport.from_pretrained(tmp_path)


def test_files_that_are_none(report, tmp_path):
    report.routes["damage"][3] = np.nan
    report.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="routes.safetensors: damage: expected finite numbers"):
        InterferenceReport.from_pretrained(tmp_path)
    (tmp_path / "report.json").write_text('{"schema_version": 3, ')
    with pytest.raises(ValueError, match="report.json: expected JSON"):
        InterferenceReport.from_pretrained(tmp_path)
    for missing in ("routes.safetensors", "report.json"):
        (tmp_path / missing).unlink()
        with pytest.raises(ValueError, match=f"{tmp_path}: expected a report with {missing}, found none"):
            InterferenceReport.from_pretrained(tmp_path)
