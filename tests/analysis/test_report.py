import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from trl_interfere.analysis.cosines import GradientProducts
from trl_interfere.analysis.report import InterferenceReport, top_share
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
    for field in dataclasses.fields(InterferenceReport):
        if field.name not in ("routes", "directions"):
            assert getattr(loaded, field.name) == getattr(report, field.name), field.name
    assert loaded.routes.keys() == report.routes.keys()
    for name, values in report.routes.items():
        assert loaded.routes[name].dtype == values.dtype and np.array_equal(loaded.routes[name], values), name
    assert loaded.to_dict() == report.to_dict()


def test_damage_and_residual(report):
    assert report.damage == pytest.approx(0.7 - 0.1)
    assert report.residual == pytest.approx(0.7 - 0.1 - 0.5 - 0.05)
    content = report.to_dict()
    assert content["schema_version"] == 3 and content["residual"] == report.residual and "routes" not in content


@pytest.mark.parametrize("found", [0, 2, 4, "3", None])
def test_other_schema_versions_are_refused(report, tmp_path, found):
    report.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    content["schema_version"] = found
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"report.json: expected schema_version 3, found {found!r}"):
        InterferenceReport.from_pretrained(tmp_path)


@pytest.mark.parametrize("missing", ["report.json", "routes.safetensors"])
def test_missing_files(report, tmp_path, missing):
    report.save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=f"{tmp_path}: expected a report with {missing}, found none"):
        InterferenceReport.from_pretrained(tmp_path)


def test_broken_json(report, tmp_path):
    report.save_pretrained(tmp_path)
    (tmp_path / "report.json").write_text('{"schema_version": 3, ')
    with pytest.raises(ValueError, match="report.json: expected JSON"):
        InterferenceReport.from_pretrained(tmp_path)


def test_fields_that_are_missing_or_unknown(report, tmp_path):
    report.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    del content["earlier"]
    (tmp_path / "report.json").write_text(json.dumps({**content, "latest": 1}))
    message = r"report.json: expected all fields of a report and .* found \['earlier'\] missing and \['latest'\] unk"
    with pytest.raises(ValueError, match=message):
        InterferenceReport.from_pretrained(tmp_path)


def test_undefined_cosine_stays_valid_json(report, tmp_path):
    zero, one = ({"model.norm.weight": torch.full((3,), value)} for value in (0.0, 1.0))
    found = GradientProducts({"math": [zero], "qa": [one]}, RouteMap(AutoConfig.for_model("llama")))
    report.cosines = found.figures("math", ["qa"])
    report.save_pretrained(tmp_path)

    def refuse(constant):
        raise AssertionError(f"report.json holds {constant}, which is not JSON")

    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert content["cosines"]["global"] is None and content["cosines"]["by_domain"]["qa"]["global"] is None
    assert InterferenceReport.from_pretrained(tmp_path).cosines == report.cosines
    page = (tmp_path / "report.md").read_text()
    assert "| gradient cosine, whole model | undefined |" in page
    assert "| most conflicting module | none (undefined) |" in page
    assert "| most synergistic module | none (undefined) |" in page


def test_extreme_modules(report):
    assert report.extreme_module(conflicting=True) == {"module": "layers.0.mlp", "cosine": -0.5}
    assert report.extreme_module(conflicting=False) == {"module": "layers.0.attention", "cosine": 0.75}
    report.cosines["modules"] = {}
    for conflicting in (True, False):
        assert report.extreme_module(conflicting) == {"module": "none", "cosine": None}


@pytest.mark.parametrize(
    "share, expected", [(0.001, 5 / 8), (0.2, 5 / 8), (0.4, 9 / 8), (0.6, 10 / 8), (0.8, 10 / 8), (1.0, 1.0)]
)
def test_top_share(share, expected):
    assert top_share(np.array([0.0, 5.0, -2.0, 1.0, 4.0]), share) == pytest.approx(expected)


def test_markdown_shows_the_figures(report, tmp_path):
    report.routes["damage"] = np.array([3.0, *[0.125] * 8, *[0.0] * 41])
    report.save_pretrained(tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert page.startswith("# Interference: qa, writing on math\n")
    rows = dict(line.strip("| ").split(" | ") for line in page.partition("\n## ")[0].splitlines() if line[:2] == "| ")
    assert rows["loss before, after"] == "0.1000, 0.7000 nats per token"
    assert rows["damage"] == "+0.6000"
    assert rows["first order ∇L·δ"] == "+0.3000"
    assert rows["second order ½ δᵀHδ"] == "+0.2500"
    assert rows["attributed to routes"] == "+0.5000"
    assert rows["outside routes"] == "+0.0500"
    assert float(rows["residual of the quadrature"]) == pytest.approx(0.05)
    assert rows["damage in the top 2% of routes"].startswith("75.0% ")
    assert rows["gradient cosine, whole model"] == "-0.125"
    assert rows["most conflicting module"] == "layers.0.mlp (-0.500)"
    assert rows["most synergistic module"] == "layers.0.attention (+0.750)"
    assert rows["references"] == "math: 3 of 4 prompts, 17 tokens (correct)"
    assert rows["stored dtype"] == "float32"


def test_markdown_shows_what_was_asked_for(report, tmp_path):
    report.second_order_error, report.difference_step = 0.00123, 0.0167
    report.cosines["by_domain"]["qa"] |= {"interval": [-0.25, 0.75], "ceiling": 0.875}
    spectrum = {
        "eigenvalues": [4.0, -1.0],
        "shares": [0.5, 0.125],
        "effective_dimension": 1.47,
        "second_order": 0.25,
        "top_routes": {"0.02": 0.3},
        "applications": 9,
        "converged": True,
    }
    none = {**spectrum, "shares": [], "top_routes": {}, "effective_dimension": 1.9}
    report.subspace = {"update": spectrum, "random": none, "references": 8, "seed": 0}
    page = report.to_markdown()
    rows = dict(line.strip("| ").split(" | ") for line in page.partition("\n## ")[0].splitlines() if line[:2] == "| ")
    assert rows["second order ½ δᵀHδ"] == "+0.2500 ± 1.2e-03 (step 0.017 δ)"
    assert rows["gradient cosine, math and qa"] == "+0.500 [-0.250, +0.750], noise allows ±0.875"
    assert rows["second order in the top 2 directions (random update)"] == "62.5% (undefined)"
    assert rows["second order in the top 2% of routes (random update)"] == "30.0% (undefined)"
    assert rows["effective dimension of 2 eigenvalues (random update)"] == "1.47 (1.90)"
    report.save_pretrained(tmp_path)
    assert InterferenceReport.from_pretrained(tmp_path).to_dict() == report.to_dict()


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


def test_unknown_figure(report):
    with pytest.raises(ValueError, match="kind: expected one of .*'module_cosines'.*found 'cosines'"):
        report.plot("cosines")


def test_figures_of_what_is_there(report, tmp_path):
    names = {path.stem for path in report.save_figures(tmp_path / "figures")}
    assert names == {"module_cosines", "damage_concentration"} == {path.stem for path in tmp_path.rglob("*.png")}
    report.route_counts = {"mlp": [10, 10], "query": [0, 0], "key_value": [0, 0]}
    assert "damage_by_layer" in {path.stem for path in report.save_figures(tmp_path)}


def test_directions_are_kept_beside_the_routes(report, tmp_path):
    report.directions = np.random.default_rng(1).normal(size=(2, 20))
    report.save_pretrained(tmp_path)
    loaded = InterferenceReport.from_pretrained(tmp_path)
    np.testing.assert_array_equal(loaded.directions, report.directions)
    assert loaded.routes.keys() == report.routes.keys()
