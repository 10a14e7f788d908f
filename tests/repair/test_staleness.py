import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl_interfere.analysis.routes import RouteMap
from trl_interfere.checkpoint import Checkpoint
from trl_interfere.repair.folder import roll_back_folder
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
    report.dtype = "bfloat16"
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
    other = Checkpoint(tmp_path / "other")
    with pytest.raises(ValueError, match="other: expected a model of 36 routes as in the report, found 60"):
        check_not_stale(report, RouteMap(other.config), Checkpoint(before), other)
    with pytest.raises(ValueError, match="expected shape"):
        check_not_stale(report, route_map, Checkpoint(before), other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_analysis_in_low_precision_passes(dtype, checkpoints, make_model, moved, make_report, sizes):
    before, after, route_map = checkpoints()
    first = make_model("llama", dtype=torch.float32)
    rounded = [model.to(dtype) for model in (first, moved(first))]
    report = make_report(route_map.num_routes, edit_size=sizes(*rounded))
    check_not_stale(report, route_map, Checkpoint(before), Checkpoint(after))


def test_routes_that_were_rolled_back_since_may_differ(case, tmp_path):
    report, route_map, before, after, *_ = case
    routes = np.flatnonzero(np.arange(route_map.num_routes) % 3 < 2)
    roll_back_folder(before, after, tmp_path / "repaired", routes, step=1.0)
    check_not_stale(report, route_map, Checkpoint(before), Checkpoint(tmp_path / "repaired"))
    (tmp_path / "repaired" / "rollback.json").unlink()
    with pytest.raises(ValueError, match="another one"):
        check_not_stale(report, route_map, Checkpoint(before), Checkpoint(tmp_path / "repaired"))


def test_a_layer_in_which_nothing_was_trained_tells_nothing(case, sizes, tmp_path):
    """Only the query heads of the last layer were trained; trained again they differ, and all else is 0 in both."""
    report, route_map, before, after, first, last = case
    names = [name for name, _ in last.named_parameters() if "layers.1" not in name or "q_proj" not in name]
    with torch.no_grad():
        for name in names:
            last.get_parameter(name).copy_(first.get_parameter(name))
    last.save_pretrained(after)
    report.routes["edit_size"] = sizes(first, last)
    assert (report.routes["edit_size"] > 0).sum() == 4
    check_not_stale(report, route_map, Checkpoint(before), Checkpoint(after))
    with torch.no_grad():
        last.get_parameter("model.layers.1.self_attn.q_proj.weight").add_(0.05)
    last.save_pretrained(after)
    with pytest.raises(ValueError, match="4 of 4 query routes of layer 1 have another size"):
        check_not_stale(report, route_map, Checkpoint(before), Checkpoint(after))


def test_one_layer_that_was_repaired_elsewhere_is_not_enough(case, tmp_path):
    report, route_map, before, after, *_ = case
    routes = np.flatnonzero(route_map.of_layer("mlp", 0))
    roll_back_folder(before, after, tmp_path / "repaired", routes[:9], step=1.0)
    (tmp_path / "repaired" / "rollback.json").unlink()  # as by `RouteRollback.apply` and `save_pretrained`
    check_not_stale(report, route_map, Checkpoint(before), Checkpoint(tmp_path / "repaired"))


def test_a_copy_in_another_data_type_is_not_compared(case, tmp_path):
    report, route_map, before, _, _, last = case
    last.to(torch.float16).save_pretrained(tmp_path / "copy")
    check_not_stale(report, route_map, Checkpoint(before), Checkpoint(tmp_path / "copy"))


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
    with pytest.raises(ValueError, match="mlp routes of layer"):
        check_not_stale(report, route_map, Checkpoint(before), Checkpoint(tmp_path / "adapter"))
