import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl_interfere.analysis.checkpoint import Checkpoint
from trl_interfere.repair.folder import roll_back_folder
from trl_interfere.repair.joint import joint_report
from trl_interfere.repair.staleness import check_not_stale


@pytest.fixture
def sizes(owned_slices):
    """Function of two models: the size of the edit of each route, slice by slice."""

    def of(before, after):
        start, end = (
            {name: parameter.detach().double() for name, parameter in model.named_parameters()}
            for model in (before, after)
        )
        return np.array(
            [
                sum((end[name][index] - start[name][index]).square().sum().item() for name, index in entry[3]) ** 0.5
                for entry in owned_slices(after)
            ]
        )

    return of


@pytest.fixture
def case(checkpoints, make_report, sizes, make_model, moved):
    """Both checkpoints of a model in bfloat16 and a report on them."""
    before, after, route_map = checkpoints(dtype=torch.bfloat16)
    first = make_model("llama", dtype=torch.bfloat16)
    last = moved(first)
    report = make_report(route_map.num_routes, str(before), str(after), edit_size=sizes(first, last))
    return report, route_map, before, after, first, last


def test_the_checkpoints_of_the_report_pass(case):
    report, route_map, before, after, *_ = case
    check_not_stale(report, route_map, Checkpoint(before), Checkpoint(after))


@pytest.mark.parametrize("which", ["before", "after"])
def test_a_checkpoint_trained_again_is_named(which, case, moved, tmp_path):
    report, route_map, before, after, first, _ = case
    moved(first, seed=5).save_pretrained(tmp_path / which)
    with pytest.raises(ValueError, match=rf"{after}: expected the update from {before} that the report of math"):
        check_not_stale(report, route_map, Checkpoint(before), Checkpoint(after))


def test_another_model_is_named(case, make_model, tmp_path):
    report, route_map, before, after, *_ = case
    make_model("llama", intermediate_size=24).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="expected shape"):
        check_not_stale(report, route_map, Checkpoint(before), Checkpoint(tmp_path / "other"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_analysis_in_low_precision_passes(dtype, checkpoints, make_model, moved, make_report, sizes):
    before, after, route_map = checkpoints()
    first = make_model("llama", dtype=torch.float32)
    rounded = [model.to(dtype) for model in (first, moved(first))]
    report = make_report(route_map.num_routes, edit_size=sizes(*rounded))
    check_not_stale(report, route_map, Checkpoint(before), Checkpoint(after))


def test_routes_that_were_rolled_back_since_may_differ(case, tmp_path):
    report, route_map, before, after, *_ = case
    routes = np.flatnonzero(route_map.of_layer("mlp", 0) | (np.arange(route_map.num_routes) % 3 == 0))
    roll_back_folder(before, after, tmp_path / "repaired", routes, step=1.0)
    check_not_stale(report, route_map, Checkpoint(before), Checkpoint(tmp_path / "repaired"))
    (tmp_path / "repaired" / "rollback.json").unlink()
    with pytest.raises(ValueError, match="another one"):
        check_not_stale(report, route_map, Checkpoint(before), Checkpoint(tmp_path / "repaired"))


def test_each_route_is_compared_with_the_checkpoint_that_it_goes_back_to(case, moved, make_report, sizes, tmp_path):
    report, route_map, before, after, first, last = case
    second = moved(first, seed=5)
    second.save_pretrained(tmp_path / "second")
    damage = np.where(np.arange(route_map.num_routes) % 2, 3.0, 1.0)
    reports = [
        make_report(route_map.num_routes, edit_size=report.routes["edit_size"]),
        make_report(route_map.num_routes, edit_size=sizes(second, last), damage=damage),
    ]
    reports[0].routes["damage"] = np.full(route_map.num_routes, 2.0)
    reports[1].earlier = "code"
    joint, target = joint_report(reports)
    assert set(target) == {0, 1}
    places = [Checkpoint(before), Checkpoint(tmp_path / "second")]
    check_not_stale(joint, route_map, places, Checkpoint(after), target)
    with pytest.raises(ValueError, match=rf"from {before} or {tmp_path / 'second'} "):
        check_not_stale(joint, route_map, places, Checkpoint(after), 1 - target)


def test_adapters(checkpoints, make_report, make_model, sizes, tmp_path):
    before, _, route_map = checkpoints()
    base, merged = make_model("llama", dtype=torch.float32), make_model("llama", dtype=torch.float32)
    adapted = get_peft_model(merged, LoraConfig(r=2, target_modules=["up_proj", "down_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(before)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    report = make_report(route_map.num_routes, edit_size=sizes(base, adapted.merge_and_unload()))
    check_not_stale(report, route_map, Checkpoint(before), Checkpoint(tmp_path / "adapter"))
    report.routes["edit_size"] = report.routes["edit_size"] * 1.02
    with pytest.raises(ValueError, match="MLP channels of layer"):
        check_not_stale(report, route_map, Checkpoint(before), Checkpoint(tmp_path / "adapter"))
