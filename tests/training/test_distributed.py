"""The same training in one process and in several, and what of it is the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from distributed_run import GLOBAL_BATCH, SCORED, main, make_domains, settings
from finished_run import write
from safetensors.torch import load_file
from tiny_runs import assert_same
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_interfere.evaluation.scorer import Scorer
from trl_interfere.lab import MODEL_FOLDER


SCRIPT = Path(__file__).with_name("distributed_run.py")
CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"
pytestmark = pytest.mark.slow
STAGES = [("base", None, 0), ("train", "math", 2), ("train", "writing", 2), ("refresh", "writing", 2)]


def command(config: Path) -> list[str]:
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]


def start(words: list) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return subprocess.run([*map(str, words)], env=environment, capture_output=True, text=True, timeout=300)


def launch(way: str, folder: Path, *options: str) -> subprocess.CompletedProcess:
    config = CONFIGS / "cpu.yaml"
    if way == "fsdp2":
        settings = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())
        config = folder.with_name("fsdp2-cpu.yaml")
        config.write_text(yaml.safe_dump({**settings, "mixed_precision": "no", "num_processes": 2, "use_cpu": True}))
        options = ("--fsdp-on-cpu", *options)
    return start([*command(config), SCRIPT, folder, *options])


def launched(way: str, folder: Path, *options: str) -> None:
    result = launch(way, folder, *options)
    assert result.returncode == 0, result.stderr[-4000:]


def in_this_process(way: str, folder: Path) -> None:
    torch.set_num_threads(1)
    main(folder)


# How the run can be run: functions that take the name of the way and the folder.
WAYS = {"one process": in_this_process, "two processes": launched, "fsdp2": launched}
DISTRIBUTED = [way for way, start in WAYS.items() if start is launched]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Function that returns the folder of the run in one of `WAYS`; each is run once."""
    finished = {}

    def run(way: str) -> Path:
        if way not in finished:
            finished[way] = tmp_path_factory.mktemp("runs") / "run"
            WAYS[way](way, finished[way])
        return finished[way]

    return run


def stages(folder: Path) -> list[dict]:
    return json.loads((folder / "stages.json").read_text())["stages"]


def read_scores(folder: Path, entry: dict) -> list[float]:
    return [json.loads(line)["score"] for line in (folder / entry["file"]).read_text().splitlines()]


def assert_same_files(first: Path, second: Path) -> None:
    assert_same(load_file(first), load_file(second))


@pytest.mark.parametrize("way", WAYS)
def test_stages_and_their_scores(runs, way):
    """As in one process; in two, the second one raises if it writes scores or the manifest."""
    folder = runs(way)
    assert [(stage["kind"], stage["domain"], stage["steps"]) for stage in stages(folder)] == STAGES
    assert [stage["seed"] for stage in stages(folder)] == [7, 7, 8, 9]
    files = {path.relative_to(folder).as_posix() for path in (folder / "scores").rglob("*") if path.is_file()}
    assert files == {entry["file"] for stage in stages(folder) for entry in stage["scores"].values()}
    scorer = Scorer(AutoTokenizer.from_pretrained(MODEL_FOLDER), max_new_tokens=8)
    before = None
    for stage in stages(folder):
        path = MODEL_FOLDER if stage["folder"] is None else folder / stage["folder"]
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        assert stage["scores"].keys() == {"math", "writing"}
        for domain in make_domains():
            values, entry = scorer.score(model, domain, domain.eval_dataset).values, stage["scores"][domain.name]
            assert values.tolist() == read_scores(folder, entry) and len(values) == entry["n"] == SCORED
            assert entry["value"] == pytest.approx(100 * np.mean(values))
        weights = load_file(path / "model.safetensors")  # a stage trains every one
        assert before is None or not [name for name in before if torch.equal(weights[name], before[name])]
        before = weights


@pytest.mark.parametrize("way", DISTRIBUTED)
def test_processes_end_with_the_same_weights_after_different_completions(runs, way):
    # Each process draws random numbers of its own, so that a group of completions gets no doubles, and a run in two
    # processes is not the run in one process: they agree on prompts, not on completions or weights.
    folder = runs(way)
    live, other = (load_file(folder / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert_same(live, other)
    saved = load_file(folder / "stages" / "3-refresh-writing" / "model.safetensors")
    assert_same(saved, {name: live[name] for name in saved})
    alone, *parts = (
        json.loads((place / name).read_text())
        for place, name in ((runs("one process"), "seen-0.json"), (folder, "seen-0.json"), (folder, "seen-1.json"))
    )
    for whole, first, second in zip(alone, *parts, strict=True):
        assert whole["domain"] == first["domain"] == second["domain"]
        assert len(whole["prompts"]) == GLOBAL_BATCH and len(set(whole["prompts"])) == 1
        assert whole["prompts"] == first["prompts"] + second["prompts"]
    assert any(first["completions"] != second["completions"] for first, second in zip(*parts, strict=True))


@pytest.mark.parametrize(
    ("way", "stage", "step", "rank"), [("two processes", "2-writing", 1, 1), ("fsdp2", "3-refresh-writing", 1, 0)]
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, runs, way, stage, step, rank):
    folder = tmp_path / "cut"
    result = launch(way, folder, "--kill", stage, str(step), str(rank))
    assert result.returncode != 0 and "SIGKILL" in result.stderr
    assert len(stages(folder)) == int(stage[0]) and not list(folder.glob("rank-*"))
    launched(way, folder, "--resume")
    for rank in (0, 1):
        assert_same_files(folder / f"rank-{rank}.safetensors", runs(way) / f"rank-{rank}.safetensors")
    for before, after in zip(stages(runs(way)), stages(folder), strict=True):
        assert {**before, "seconds": 0} == {**after, "seconds": 0}


def test_processes_are_taught_alike_and_a_killed_refresh_goes_on(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    launched("two processes", whole, "--distill")
    assert launch("two processes", cut, "--distill", "--kill", "3-refresh", "1", "1").returncode != 0
    launched("two processes", cut, "--distill", "--resume")
    for path in (*whole.glob("rank-1*"), *cut.glob("rank-*")):
        assert_same_files(path, whole / "rank-0.safetensors")
    log = json.loads((whole / "stages" / "3-refresh" / "log_history.json").read_text())
    assert {"kl/math", "kl/writing"} <= {name for entry in log for name in entry}


@pytest.mark.parametrize(("way", "processes"), [("one process", 1), ("two processes", 2)])
def test_a_process_per_stage_trains_the_same(tmp_path, runs, way, processes):
    # The command knows no callback that asks for the refresh: the stages before it are compared.
    training = {"output_dir": str(tmp_path / "run"), **settings(processes)}
    content = {"model": str(MODEL_FOLDER), "training": training, "domains": []}
    for domain in make_domains():
        entry = {"name": domain.name, "reward_funcs": "tiny_runs.text_reward", "metric": "tiny_runs.text_reward"}
        for part, dataset in (("train_dataset", domain.train_dataset), ("eval_dataset", domain.eval_dataset)):
            entry[part] = f"{domain.name}-{part}.jsonl"
            dataset.select_columns("prompt").to_json(tmp_path / entry[part])
        content["domains"].append(entry)
    words = [sys.executable, "-m"] if processes == 1 else [*command(CONFIGS / "cpu.yaml"), "-m"]
    words += ["trl_interfere", "train", write(tmp_path, content), "--threads", "1", "--process-per-stage"]
    result = start(words)
    assert result.returncode == 0, result.stderr[-4000:]
    expected, found = runs(way), tmp_path / "run"
    assert [stage["domain"] for stage in stages(found)] == [None, "math", "writing"]
    for before, after in zip(stages(expected), stages(found), strict=False):
        for domain, entry in before["scores"].items():
            assert read_scores(expected, entry) == read_scores(found, after["scores"][domain])
        if before["folder"] is not None:
            assert_same_files(*(folder / before["folder"] / "model.safetensors" for folder in (expected, found)))
