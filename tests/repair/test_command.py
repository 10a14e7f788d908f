"""`trl-interfere rollback`, as it is typed."""

import json
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from trl_interfere import InterferenceReport, RouteRollback
from trl_interfere.analysis.routes import RouteMap
from trl_interfere.cli import main
from trl_interfere.models import load_model
from trl_interfere.repair.choice import locate_checkpoint
from trl_interfere.repair.joint import joint_before, joint_report
from trl_interfere.repair.rollback import STEPS, roll_back


NUM_ROUTES = 36
WEIGHTS = "model.safetensors"


def constant_reward(completions, **kwargs):
    return [0.5] * len(completions)


def shrinking_reward(completions, **kwargs):
    shrinking_reward.value -= 0.01
    return [shrinking_reward.value] * len(completions)


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trl-interfere", "rollback", "--threads", "1", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def project(checkpoints, make_report, edit_size, tmp_path):
    """Folders of a project: two checkpoints, and a report that names them by paths relative to the project."""
    before, after, route_map = checkpoints()
    damage = np.random.default_rng(2).normal(size=NUM_ROUTES)
    report = make_report(NUM_ROUTES, "before", "after", damage=damage, edit_size=edit_size(before, after))
    report.save_pretrained(tmp_path / "analysis" / "math")
    return before, after, tmp_path / "analysis" / "math"


def test_from_a_report(project, run, contents, tmp_path, monkeypatch):
    before, after, report = project
    original = contents(after)
    monkeypatch.chdir(tmp_path)
    code, out, err = run("--report", "analysis/math", "--output-dir", "out", "--budget", 0.25, "--scope", "joint",
                         "--step", 2.0, "--delta", "math.safetensors")  # fmt: skip
    assert code == 0, err
    saved = InterferenceReport.from_pretrained(report)
    routes = RouteRollback(budget=0.25, scope="joint").select(saved, RouteMap(load_model(after).config))
    model = load_model(after)
    roll_back(model, dict(load_model(before).named_parameters()), RouteMap(model.config), routes, 2.0)
    found = load_model(tmp_path / "out")
    assert all(torch.equal(parameter, found.get_parameter(name)) for name, parameter in model.named_parameters())
    (record,) = json.loads((tmp_path / "out" / "rollback.json").read_text())["rollbacks"]
    settings = {"criterion": "damage", "budget": 0.25, "scope": "joint", "step": 2.0, "earlier": "math", "seed": 0}
    assert record.items() >= {**settings, "later": ["qa", "writing"], "routes": routes.tolist()}.items()
    assert record["share_of_damage"] == pytest.approx(saved.routes["damage"][routes].sum() / saved.damage)
    assert "9 (" in out and "damage, joint" in out and "math.safetensors" in out

    for option, expected in (("--apply-delta", contents(tmp_path / "out")), ("--revert-delta", original)):
        code, _, err = run(option, "math.safetensors", "--model", "after")
        assert code == 0, err
        assert contents(after)[WEIGHTS] == expected[WEIGHTS]
    assert contents(after) == original
    code, out, err = run("--undo", "out", "--output-dir", "undone")
    assert code == 0 and contents(tmp_path / "undone") == original, err
    assert run("--undo", "out")[0] == 0
    assert contents(tmp_path / "out") == original
    code, _, err = run("--undo", "out")
    assert code == 2 and "out: expected rollback.json, found none" in err


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_straight_from_checkpoints(criterion, project, run, tmp_path):
    before, after, _ = project
    arguments = ("--before", before, "--after", after, "--criterion", criterion, "--budget", 0.25, "--seed", 3)
    for name in ("one", "two"):
        code, _, err = run(*arguments, "--output-dir", tmp_path / name)
        assert code == 0, err
    records = [json.loads((tmp_path / name / "rollback.json").read_text())["rollbacks"][0] for name in ("one", "two")]
    assert records[0]["routes"] == records[1]["routes"]
    start, end = load_file(before / WEIGHTS), load_file(after / WEIGHTS)
    size = [0.0] * 24
    for layer in range(2):
        for channel in range(12):
            prefix = f"model.layers.{layer}.mlp"
            for name, index in (("gate", channel), ("up", channel), ("down", np.s_[:, channel])):
                change = end[f"{prefix}.{name}_proj.weight"][index] - start[f"{prefix}.{name}_proj.weight"][index]
                size[12 * layer + channel] += change.double().square().sum().item()
    ranked = sorted(range(24), key=lambda route: -size[route])[:6]
    assert (records[0]["routes"] == ranked) == (criterion == "magnitude")


def test_adapters_straight_from_checkpoints(project, run, tmp_path):
    from peft import LoraConfig, get_peft_model

    before, _, _ = project
    torch.manual_seed(0)
    for name in ("first", "second"):
        model = get_peft_model(load_model(before), LoraConfig(r=2, target_modules=["up_proj", "down_proj"]))
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(tmp_path / name)
    arguments = ("--after", tmp_path / "second", "--criterion", "magnitude")
    code, out, err = run(*arguments, "--output-dir", tmp_path / "to base", "--delta", tmp_path / "delta.safetensors")
    assert code == 0 and (tmp_path / "delta.safetensors").exists(), err
    code, out, err = run(*arguments, "--before", tmp_path / "first", "--output-dir", tmp_path / "to first")
    assert code == 0 and "rank of the new adapter" in out and "4" in out, err
    code, _, err = run(
        *arguments, "--before", tmp_path / "first", "--output-dir", tmp_path / "more", "--delta", "d.safetensors"
    )
    assert code == 2 and "has another rank and no delta file" in err and not (tmp_path / "more").exists()


@pytest.fixture
def config(tmp_path):
    """Function that writes a YAML file of a training with the domains of the report."""
    rng = np.random.default_rng(0)
    for name in ("math", "qa", "writing"):
        rows = [
            {
                "prompt": "".join(rng.choice(list("0123456789+"), 4)) + "=",
                "completion": "".join(rng.choice(list("abc"), 3)),
            }
            for _ in range(6)
        ]
        Dataset.from_list(rows).to_json(tmp_path / f"{name}.jsonl")

    def write(reward="constant_reward", selection=True, names=("math", "qa", "writing")):
        domains = []
        for name in names:
            splits = {"train": f"{name}.jsonl", **({"selection": f"{name}.jsonl"} if selection else {})}
            domains.append({"name": name, **splits, "rewards": f"{__name__}.{reward}"})
        content = {
            "model": str(tmp_path / "before"),
            "training": {"output_dir": "out", "max_completion_length": 4},
            "analysis": {"reference": "dataset"},
            "domains": domains,
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "run.yaml"

    return write


@pytest.mark.parametrize("step", ["optimal", "per_route", "per_route_exact"])
def test_a_searched_step(step, project, config, run, tmp_path):
    before, after, report = project
    code, out, err = run(
        "--report", report, "--config", config(), "--step", step, "--budget", 0.2, "--output-dir", tmp_path / "out"
    )
    assert code == 0, err
    (record,) = json.loads((tmp_path / "out" / "rollback.json").read_text())["rollbacks"]
    search = record["search"]
    assert record["step_rule"] == step and search["split"] == "selection"
    assert {name: entry["n"] for name, entry in search["references"].items()} == {"math": 6, "qa": 6, "writing": 6}
    assert {name: entry["difference"]["value"] for name, entry in search["scores"].items()} == dict.fromkeys(
        ("math", "qa", "writing"), 0.0
    )
    assert "math, selection split (n=6)" in out
    if step == "optimal":
        lowest = sorted(search["tried"], key=lambda entry: entry["objective"])[:3]
        assert [entry["step"] for entry in search["tried"]] == list(STEPS)
        assert record["step"] in [entry["step"] for entry in lowest]
        assert sorted(entry["step"] for entry in search["tried"] if "score" in entry) == sorted(
            entry["step"] for entry in lowest
        )
    else:
        assert len(set(record["step"])) > 1
    model = load_model(after)
    roll_back(
        model,
        dict(load_model(before).named_parameters()),
        RouteMap(model.config),
        np.array(record["routes"]),
        np.array(record["step"]),
    )
    found = load_model(tmp_path / "out")
    assert all(torch.equal(parameter, found.get_parameter(name)) for name, parameter in model.named_parameters())


def test_a_step_that_costs_later_domains_too_much(project, config, run, tmp_path):
    arguments = (
        "--report",
        project[2],
        "--step",
        "per_route_exact",
        "--later-weight",
        0.1,
        "--output-dir",
        tmp_path / "out",
    )
    shrinking_reward.value = 1.0
    code, _, err = run(*arguments, "--config", config("shrinking_reward"), "--max-drop", 0.5)
    assert code == 2 and "max_drop: expected a step that costs no domain more than 0.5 points on the sel" in err
    assert re.search(r"\((math|qa|writing) -", err) and "nothing is written" in err
    assert not (tmp_path / "out").exists()
    code, _, err = run(*arguments, "--config", config(), "--max-drop", 0.5)
    assert code == 0, err
    (record,) = json.loads((tmp_path / "out" / "rollback.json").read_text())["rollbacks"]
    assert record["search"]["later_weight"] == 0.1 and record["search"]["max_drop"] == 0.5


def test_a_given_step_is_taken_whatever_the_scores_say(project, config, run, tmp_path):
    shrinking_reward.value = 1.0
    code, _, err = run("--report", project[2], "--config", config("shrinking_reward"), "--rounds", 2, "--step", 1.5,
                       "--output-dir", tmp_path / "out")  # fmt: skip
    assert code == 0, err
    (record,) = json.loads((tmp_path / "out" / "rollback.json").read_text())["rollbacks"]
    assert record["step"] == 1.5 and record["search"]["scores"]["math"]["difference"]["value"] < 0


def test_it_explains_itself(project, config, run, tmp_path):
    code, out, err = run("--report", project[2], "--output-dir", tmp_path / "given", "--step", 2.0)
    assert code == 0 and "expected by the attribution" in out and "attributed to these routes" in out, err
    (record,) = json.loads((tmp_path / "given" / "rollback.json").read_text())["rollbacks"]
    damage = InterferenceReport.from_pretrained(project[2]).routes["damage"]
    assert record["expected"] == pytest.approx(2.0 * damage[record["routes"]].sum())
    code, out, err = run(
        "--report", project[2], "--config", config(), "--step", "optimal", "--output-dir", tmp_path / "searched"
    )
    assert code == 0, err
    achieved = next(line for line in out.splitlines() if "achieved, weighted loss" in line)
    assert "not measured" not in achieved
    (record,) = json.loads((tmp_path / "searched" / "rollback.json").read_text())["rollbacks"]
    assert f"{record['search']['achieved']:+.4f}" in achieved


@pytest.mark.parametrize("step", ["1.5", "optimal"])
def test_several_domains_at_once(step, project, config, run, make_report, edit_size, moved, contents, tmp_path):
    before, after, report = project
    code_before = tmp_path / "after-code"
    moved(load_model(before), seed=5).save_pretrained(code_before)
    shutil.copyfile(before / "tokenizer.json", code_before / "tokenizer.json")
    shutil.copyfile(before / "tokenizer_config.json", code_before / "tokenizer_config.json")
    damage = np.random.default_rng(3).normal(size=NUM_ROUTES)
    measures = {"damage": damage, "edit_size": edit_size(code_before, after)}
    second = replace(make_report(NUM_ROUTES, "after-code", "after", **measures), earlier="writing", later=["qa"])
    second.save_pretrained(tmp_path / "analysis" / "writing")
    code, out, err = run(
        "--report", report, "--report", tmp_path / "analysis" / "writing", "--weights", "math=2,writing=1",
        "--budget", 0.5, "--step", step, "--config", config(), "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    (record,) = json.loads((tmp_path / "out" / "rollback.json").read_text())["rollbacks"]
    assert record["earlier"] == "math+writing" and record["weights"] == {"math": 2.0, "writing": 1.0}
    assert set(record["targets"]) == {0, 1}
    joint, target = joint_report([InterferenceReport.from_pretrained(report), second], record["weights"])
    routes = RouteRollback(budget=0.5).select(joint, RouteMap(load_model(after).config))
    assert record["routes"] == routes.tolist() and record["targets"] == target[routes].tolist()
    starts = [dict(load_model(place).named_parameters()) for place in (before, code_before)]
    model = load_model(after)
    route_map = RouteMap(model.config)
    roll_back(model, joint_before(starts, target, route_map), route_map, routes, record["step"])
    found = load_model(tmp_path / "out")
    assert all(torch.equal(parameter, found.get_parameter(name)) for name, parameter in model.named_parameters())
    original = contents(after)
    assert run("--undo", tmp_path / "out")[0] == 0 and contents(tmp_path / "out") == original
    if step == "optimal":
        return
    for name, end in (("absolute", after), ("other", code_before)):  # the same folder by another name, and another one
        replace(second, after=str(end)).save_pretrained(tmp_path / "analysis" / name)
        reports = ("--report", report, "--report", tmp_path / "analysis" / name)
        code, _, err = run(*reports, "--output-dir", tmp_path / name)
        assert code == (0 if name == "absolute" else 2), err
    assert "--report: expected the same checkpoint after the update in all" in err
    moved(load_model(before), seed=6).save_pretrained(code_before)
    reports = ("--report", report, "--report", tmp_path / "analysis" / "writing")
    code, _, err = run(*reports, "--output-dir", tmp_path / "again")
    assert code == 2 and "that the report of writing is about, found another one" in err
    weights = ("--weights", "math=1,writing=0", "--output-dir")
    assert run(*reports, *weights, tmp_path / "math alone")[0] == 0
    # A domain that is not repaired is not lost sight of.
    search = ("--step", "optimal", "--max-drop", 100, "--config", config())
    code, _, err = run(*reports, *search, *weights, tmp_path / "writing spared")
    assert code == 0, err
    (record,) = json.loads((tmp_path / "writing spared" / "rollback.json").read_text())["rollbacks"]
    assert set(record["search"]["scores"]) == {"math", "qa", "writing"} and record["earlier"] == "math"
    joint.save_pretrained(tmp_path / "joint")
    for more in ((), ("--before", before)):
        code, _, err = run("--report", tmp_path / "joint", *more, "--output-dir", tmp_path / "from a joint one")
        message = "goes back to several checkpoints" if more else "a report of several domains names no checkpoint"
        assert code == 2 and message in err, err


def test_nothing_is_worth_rolling_back(project, config, run, tmp_path):
    code, _, err = run("--report", project[2], "--config", config(), "--step", "per_route_exact",
                       "--later-weight", 1000, "--output-dir", tmp_path / "out")  # fmt: skip
    assert (
        code == 2 and "losses are lowest where no route is rolled back, with the later domains at weight 1000" in err
    )
    assert not (tmp_path / "out").exists()


def test_the_weight_of_later_domains_counts(project, config, run, tmp_path):
    steps = []
    for weight in (0, 0.3):
        folder = tmp_path / f"out-{weight}"
        code, _, err = run("--report", project[2], "--config", config(), "--step", "per_route_exact", "--budget", 0.5,
                           "--later-weight", weight, "--output-dir", folder)  # fmt: skip
        assert code == 0, err
        steps.append(json.loads((folder / "rollback.json").read_text())["rollbacks"][0]["step"])
    assert steps[0] != steps[1]


def test_a_step_that_the_scores_do_not_confirm(project, config, run, tmp_path):
    shrinking_reward.value = 1.0
    code, _, err = run("--report", project[2], "--config", config("shrinking_reward"), "--step", "optimal",
                       "--output-dir", tmp_path / "out")  # fmt: skip
    assert (
        code == 2
        and "not confirmed by the scores of the selection split (math -" in err
        and "nothing is written" in err
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"names": ("math", "qa")}, "the report names the domain 'writing', the configuration has ['math', 'qa']"),
        (
            {"selection": False},
            "domain 'math' of the report: expected selection prompts (`selection:` in the configuration)",
        ),
    ],
)
def test_configurations_that_do_not_serve_a_search(settings, message, project, config, run, tmp_path):
    code, _, err = run(
        "--report", project[2], "--config", config(**settings), "--step", "optimal", "--output-dir", tmp_path / "out"
    )
    assert code == 2 and message in err
    assert not (tmp_path / "out").exists()


def test_where_checkpoints_of_a_report_are_looked_for(tmp_path, monkeypatch):
    for folder in ("run/stages/1-math", "elsewhere/stages/1-math", "elsewhere/other", "run/analysis/0-math"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    report = tmp_path / "run" / "analysis" / "0-math"
    assert locate_checkpoint("stages/1-math", report) == str(tmp_path / "run" / "stages" / "1-math")
    assert locate_checkpoint("other", report) == str(tmp_path / "elsewhere" / "other")
    assert locate_checkpoint(str(tmp_path / "elsewhere"), report) == str(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match="0-math: names the checkpoint 'stages/2-qa', found .* with --before or --after"
    ):
        locate_checkpoint("stages/2-qa", report)


def moved_report(before, after, report):
    after.rename(after.parent / "gone")


def trained_again(before, after, report):
    model = load_model(after)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)))
    model.save_pretrained(after)


def other_model(before, after, report):
    model = load_model(after)
    config = type(model.config)(**{**model.config.to_dict(), "intermediate_size": 14})
    for folder in (before, after):
        type(model)(config).save_pretrained(folder)


ARGUMENTS = {
    "nothing": ((), None, "expected --report, or --before and --after, or one of --undo"),
    "no output": (("--report", "analysis/math"), None, "--output-dir: expected the folder of the result, found none"),
    "output taken": (
        ("--report", "analysis/math", "--output-dir", "after"),
        None,
        "after: expected an empty or a new folder",
    ),
    "delta taken": (
        ("--report", "analysis/math", "--output-dir", "out", "--delta", "after/config.json"),
        None,
        "after/config.json: expected a new file, found one",
    ),
    "two things": (("--undo", "after", "--apply-delta", "x"), None, "expected --undo without --apply-delta"),
    "undo and report": (("--undo", "after", "--report", "analysis/math"), None, "expected --undo without --report"),
    "delta without model": (("--apply-delta", "x"), None, "--apply-delta: expected --model, the folder to change"),
    "undo and model": (
        ("--undo", "before", "--model", "after"),
        None,
        "--model: expected with --apply-delta or --revert-delta; --undo names the folder itself",
    ),
    "limit for a given step": (
        ("--report", "analysis/math", "--max-drop", "1", "--output-dir", "out"),
        None,
        "max_drop: expected a step that is searched for, such as 'optimal', found 1, which is taken as it is",
    ),
    "weight for a given step": (
        ("--report", "analysis/math", "--later-weight", "2", "--output-dir", "out"),
        None,
        "later_weight: expected a step that is searched for",
    ),
    "weights of one": (
        ("--report", "analysis/math", "--weights", "math=1", "--output-dir", "out"),
        None,
        "--weights: expected several --report, one for each earlier domain",
    ),
    "one domain twice": (
        ("--report", "analysis/math", "--report", "analysis/math", "--output-dir", "out"),
        None,
        "reports: expected one for each domain, found ['math', 'math']",
    ),
    "before of several": (
        ("--report", "analysis/math", "--report", "analysis/math", "--before", "before", "--output-dir", "out"),
        None,
        "--before: expected one --report with it, each of several reports names its own",
    ),
    "weights of some": (
        ("--report", "analysis/math", "--report", "analysis/math", "--weights", "qa=1", "--output-dir", "out"),
        None,
        "--weights: expected a number for each report, 0 for a domain that is only spared, found none for ['math', '",
    ),
    "weights": (
        ("--report", "analysis/math", "--report", "analysis/math", "--weights", "math", "--output-dir", "out"),
        None,
        "--weights: expected domain=number separated by commas, found 'math'",
    ),
    "undo with a step": (
        ("--undo", "after", "--step", "1.0"),  # its default: what was given counts
        None,
        "expected --undo without --step",
    ),
    "delta with a budget": (
        ("--apply-delta", "x", "--model", "after", "--budget", "0.1"),
        None,
        "expected --apply-delta without --budget",
    ),
    "model alone": (("--model", "after"), None, "--model: expected with --apply-delta or --revert-delta"),
    "missing delta": (
        ("--apply-delta", "x", "--model", "after"),
        None,
        "x: expected a delta file of a rollback, found none",
    ),
    "missing report": (("--report", "gone", "--output-dir", "out"), None, "gone: expected a report with report.json"),
    "criterion": (
        ("--before", "before", "--after", "after", "--output-dir", "out"),
        None,
        "criterion: 'damage' needs a report (trl-interfere analyze), without one it is one of ['magnitude', 'random']",
    ),
    "unknown criterion": (
        ("--report", "analysis/math", "--criterion", "damag", "--output-dir", "out"),
        None,
        "criterion: expected one of",
    ),
    "route conflict without base": (
        ("--report", "analysis/math", "--criterion", "route_conflict", "--output-dir", "out"),
        None,
        "route_conflict: expected a report that was made with `base`",
    ),
    "step": (
        ("--report", "analysis/math", "--step", "much", "--output-dir", "out"),
        None,
        "--step: expected a number of 0 or more or one of 'optimal', 'per_route', 'per_route_exact', found 'much'",
    ),
    "step 0": (
        ("--report", "analysis/math", "--step", "0", "--output-dir", "out"),
        None,
        "step: expected a number above 0, found 0, with which nothing is rolled back",
    ),
    "step back": (
        ("--report", "analysis/math", "--step", "-1", "--output-dir", "out"),
        None,
        "step: expected a number of 0 or more or one of 'optimal', 'per_route', 'per_route_exact', found -1.0",
    ),
    "protection": (
        ("--report", "analysis/math", "--protection", "nan", "--output-dir", "out"),
        None,
        "protection: expected 0 or more, found nan",
    ),
    "later weight": (
        ("--report", "analysis/math", "--later-weight", "-1", "--output-dir", "out"),
        None,
        "later_weight: expected 0 or more, found -1",
    ),
    "max drop": (
        ("--report", "analysis/math", "--max-drop", "nan", "--output-dir", "out"),
        None,
        "max_drop: expected 0 or more points, found nan",
    ),
    "optimal": (
        ("--report", "analysis/math", "--step", "optimal", "--output-dir", "out"),
        None,
        "step 'optimal': needs a report and the domains that it names: give --report, and --config with the YAML",
    ),
    "rounds": (
        ("--report", "analysis/math", "--rounds", "2", "--output-dir", "out"),
        None,
        "2 rounds: needs a report and the",
    ),
    "budget": (
        ("--report", "analysis/math", "--budget", "0", "--output-dir", "out"),
        None,
        "budget: expected a share above 0",
    ),
    "no before": (
        ("--after", "after", "--criterion", "random", "--output-dir", "out"),
        None,
        "before: expected a checkpoint",
    ),
    "moved": (
        ("--report", "analysis/math", "--output-dir", "out"),
        moved_report,
        "analysis/math: names the checkpoint 'after', found it neither in the folder of the report",
    ),
    "trained again": (
        ("--report", "analysis/math", "--output-dir", "out"),
        trained_again,
        "that the report of math is about, found another one: the edits of ",
    ),
    "delta inside": (
        ("--report", "analysis/math", "--output-dir", "out", "--delta", "out/rollback/delta.safetensors"),
        None,
        "delta.safetensors: expected a file outside the new checkpoint out",
    ),
    "delta is the folder": (
        ("--report", "analysis/math", "--output-dir", "out", "--delta", "out"),
        None,
        "out: expected a file outside the new checkpoint out",
    ),
    "delta under a file": (
        ("--report", "analysis/math", "--output-dir", "out", "--delta", "run.yaml/delta.safetensors"),
        lambda before, after, report: (before.parent / "run.yaml").touch(),
        "delta.safetensors: expected a folder that can be written to, found",
    ),
    "seed": (
        ("--report", "analysis/math", "--output-dir", "out", "--seed", "-1"),
        None,
        "seed: expected a whole number of 0 or more, found -1",
    ),
    "another model": (
        ("--report", "analysis/math", "--output-dir", "out"),
        other_model,
        "after: expected a model of 36 routes as in the report, found 40",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_arguments(case, project, run, contents, tmp_path, monkeypatch):
    arguments, damage, message = ARGUMENTS[case]
    if damage is not None:
        damage(*project)
    monkeypatch.chdir(tmp_path)
    original = contents(tmp_path)
    code, _, err = run(*arguments)
    assert code == 2 and message in err and "Traceback" not in err, err
    assert contents(tmp_path) == original


def test_other_places_of_the_checkpoints(project, run, tmp_path):
    before, after, report = project
    shutil.move(report.parent, tmp_path / "elsewhere" / "analysis")
    (tmp_path / "elsewhere").mkdir(exist_ok=True)
    before, after = before.rename(tmp_path / "start"), after.rename(tmp_path / "end")
    arguments = ("--report", tmp_path / "elsewhere" / "analysis" / "math", "--output-dir", tmp_path / "out")
    code, _, err = run(*arguments)
    assert code == 2 and "names the checkpoint 'before'" in err
    code, _, err = run(*arguments, "--before", before, "--after", after)
    assert code == 0, err


def test_help(run):
    code, out, _ = run("--help")
    assert code == 0 and "--apply-delta" in out
