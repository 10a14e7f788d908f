import json

import pytest

from trl_interfere.analysis.overlap import overlaps
from trl_interfere.analysis.routes import RouteMap
from trl_interfere.analysis.stage_edits import stage_edits
from trl_interfere.analysis.weight_diff import update_statistics
from trl_interfere.checkpoint import Checkpoint


@pytest.fixture
def run(make_model, moved, tmp_path):
    model = make_model("llama")
    folders = []
    for index in range(4):
        folders.append(tmp_path / str(index))
        model.save_pretrained(folders[-1])
        model = moved(model, seed=index)
    return [Checkpoint(folder) for folder in folders]


def test_neighbours_are_compared_and_all_pairs_overlap(run):
    route_map = RouteMap(run[0].config)
    seen = []
    edits = stage_edits(run, ["code", "math", "qa"], route_map, progress=seen.append)
    assert seen == ["code", "math", "qa"]
    for domain, before, after in zip(seen, run, run[1:], strict=False):
        (expected,) = update_statistics([before, after], route_map)
        assert edits.updates[domain].to_dict() == expected.to_dict()
    assert {first: list(row) for first, row in edits.changed.items()} == {"code": ["math", "qa"], "math": ["qa"]}
    sizes = [edits.updates[domain].edit_size for domain in ("code", "qa")]
    assert edits.changed["code"]["qa"] == overlaps(*sizes, route_map)
    assert json.loads(json.dumps(edits.to_dict())) == edits.to_dict()


@pytest.mark.parametrize("domains", [["code", "math"], ["code", "math", "math"]])
def test_domains_that_do_not_fit(run, domains):
    with pytest.raises(ValueError, match="domains: expected 3 different ones for 4 checkpoints, found"):
        stage_edits(run, domains, RouteMap(run[0].config))


def test_a_stage_that_changed_nothing(run):
    with pytest.raises(ValueError, match="identical checkpoints"):
        stage_edits([run[0], run[1], run[1]], ["code", "math"], RouteMap(run[0].config))
