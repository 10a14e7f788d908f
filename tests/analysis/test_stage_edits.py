import itertools
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
    edits = stage_edits(run, ["code", "math", "qa"], route_map)
    updates = [update_statistics(pair, route_map)[0] for pair in itertools.pairwise(run)]
    assert edits["updates"] == dict(zip(("code", "math", "qa"), (one.to_dict() for one in updates), strict=True))
    assert {first: list(row) for first, row in edits["changed"].items()} == {"code": ["math", "qa"], "math": ["qa"]}
    found = overlaps(updates[0].edit_size, updates[2].edit_size, route_map)
    assert edits["changed"]["code"]["qa"] == {kind: entry.to_dict() for kind, entry in found.items()}
    assert json.loads(json.dumps(edits)) == edits


@pytest.mark.parametrize("domains", [["code", "math"], ["code", "math", "math"]])
def test_domains_that_do_not_fit(run, domains):
    with pytest.raises(ValueError, match="domains: expected 3 different ones for 4 checkpoints, found"):
        stage_edits(run, domains, RouteMap(run[0].config))


def test_a_stage_that_changed_nothing(run):
    with pytest.raises(ValueError, match="identical checkpoints"):
        stage_edits([run[0], run[1], run[1]], ["code", "math"], RouteMap(run[0].config))
