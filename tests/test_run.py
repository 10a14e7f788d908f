import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from trl_interfere.evaluation.bootstrap import score
from trl_interfere.run import Run, StageRecord, lock_folder, write_atomically
from trl_interfere.stage_record import stage_name


SCHEDULE = [{"domain": "math", "kind": "train", "overrides": {}}]
IDENTITY = {"base_model": "some/model", "seed": 0, "schedule": SCHEDULE, "steps": (1, 2)}
STAGES = [("base", None), ("train", "math"), ("refresh", "math"), ("heal", None)]
MATH = [[0, 0, 1], [0.5, 1, 1], [1, 1, 0.5], [1, 1, 1]]  # refresh and training are equal


@pytest.fixture
def run(tmp_path):
    """A run of four stages with scores of two domains."""
    run = Run.new(tmp_path / "run", IDENTITY)
    for index, (kind, domain) in enumerate(STAGES):
        name = stage_name(index, kind, domain)
        folder = None if kind == "base" else f"stages/{name}"
        if folder is not None:
            (run.folder / folder).mkdir(parents=True)
        scores = {}
        for other, values in (("math", MATH[index]), ("qa", [1, 1 / 3])):
            file = run.write_scores(name, other, np.array(values), list("uvwxyz"), [f"{v}?" for v in values])
            scores[other] = {**score(np.array(values)).to_dict(), "file": file}
        run.append(StageRecord(index, kind, domain, folder, 10, 1.5, scores, 7, {"max_steps": 10}, {"torch": "2"}))
    return run


def resumed(run, identity=IDENTITY):
    other = Run.new(run.folder, identity)
    other.resume()
    return other


def test_round_trip(run):
    leftover = run.folder / ".stages.json.4242.tmp"
    leftover.write_text('{"schema_version": 1, "stages": [')
    assert Run(run.folder).stages == run.stages and leftover.exists()  # the run may be going on
    assert resumed(run).stages == run.stages and not leftover.exists()
    for other in (Run(run.folder), resumed(run)):
        assert other.stages == run.stages and len(other.stages) == 4
        assert other.identity == run.identity == {**IDENTITY, "steps": [1, 2]}
        assert other.run_name.startswith("run-")
    assert [record.name for record in Run(run.folder).stages] == ["0-base", "1-math", "2-refresh-math", "3-heal"]


def test_what_a_run_knows(run):
    run = Run(run.folder)
    assert (run.order, run.domains, run.base_model, run.recipe) == (["math"], ["math", "qa"], "some/model", None)
    assert (run.peak("math").index, run.peak("qa").index) == (1, 0)  # the earliest of equals; a heal is no peak
    assert (run.trained("math").index, run.trained("qa")) == (1, None)
    assert run.final.name == "2-refresh-math" and run.stage("3-heal") is run.stage(-1)
    assert run.weights("1-math") == run.folder / "stages" / "1-math" and run.weights(0) == "some/model"
    assert run.analysis("math") == run.folder / "analysis" / "math" and run.repair == run.folder / "repair"
    assert run.rows(1, "qa") == [
        {"score": 1.0, "prompt": "1?", "completions": ["u", "v", "w"]},
        {"score": 1 / 3, "prompt": f"{1 / 3}?", "completions": ["x", "y", "z"]},
    ]
    assert run.scores("1-math", "math").tolist() == MATH[1]
    for folder in ("analysis/math", "."):
        write_atomically(run.folder / folder / "report.json", "{}")
    assert run.reports == {"math": run.folder / "analysis" / "math", "report": run.folder}
    for call in (lambda: run.peak("code"), lambda: run.rows(1, "code"), lambda: run.stage("9-code")):
        with pytest.raises(ValueError, match="code"):
            call()
    with pytest.raises(FileNotFoundError, match="stages.json"):
        Run(run.folder / "stages")


def test_what_holds_on_this_machine_is_kept_apart(run, tmp_path):
    (tmp_path / "model").mkdir()
    run.keep_local(base_model=str(tmp_path / "model"))
    run.keep_local(recipe_folder=str(tmp_path))
    (run.folder / "recipe.yaml").write_text("model: x\n")
    read = Run(run.folder)
    assert (read.base_model, read.recipe_folder) == (str(tmp_path / "model"), tmp_path)
    assert read.recipe == run.folder / "recipe.yaml" and str(tmp_path) not in run.path.read_text()


def test_any_completion_can_be_kept(run):
    for text in ("a\nb\u2028 \u0085", "\ud800\0", ""):
        file = run.write_scores("1-math", "math", np.array([0.25, 0.75]), [text, text], [text, [{"content": text}]])
        rows = run.rows(replace(run.stages[1], scores={"math": {"n": 2, "file": file}}), "math")
        assert [(row["completions"], row["prompt"]) for row in rows] == [([text], text), ([text], [{"content": text}])]


@pytest.mark.parametrize("line", ["", '{"score": NaN}\n', '{"value": 1}\n'])
def test_broken_scores(line, run):
    (run.folder / run.stages[1].scores["qa"]["file"]).write_text('{"score": 1}\n' + line)
    with pytest.raises(ValueError, match="qa.jsonl"):
        run.scores(1, "qa")


@pytest.mark.parametrize("missing", ["stages/1-math", "scores/1-math/qa.jsonl"])
def test_a_missing_file_is_named_when_the_run_goes_on(missing, run):
    (run.folder / missing).rename(run.folder / "elsewhere")
    with pytest.raises(ValueError, match=missing):
        resumed(run)
    with pytest.raises(FileNotFoundError, match=missing):  # what is there can still be read
        run.weights(1)
        run.rows(1, "qa")


@pytest.mark.parametrize("content", ["", '{"schema_version": 1', "\x80", "[1,]"])
def test_broken_json(content, run, caplog):
    run.path.write_bytes(content.encode("latin-1"))
    assert resumed(run).stages == run.stages[:-1]  # the one before the last change
    assert "stages.json.previous" in caplog.text
    run.previous_path.unlink()
    with pytest.raises(ValueError, match="stages.json"):
        resumed(run)


def test_a_longer_schedule_and_more_domains_are_the_same_run(run):
    first, second = ({"domain": name, "kind": "train", "overrides": {}} for name in ("math", "qa"))
    run.identity.update(schedule=[first], domains={"math": {"rows": 3}})
    run.save()
    domains = {"math": {"rows": 3}, "qa": {"rows": 5}}
    longer = {**run.identity, "schedule": [first, second], "domains": domains}
    before = run.path.read_bytes()
    for change in (
        {"schedule": [second, first]},
        {"schedule": [{**first, "overrides": {"max_steps": 1}}]},
        {"domains": {"qa": {"rows": 5}}},
        {"domains": {"math": {"rows": 4}, "qa": {"rows": 5}}},
    ):
        with pytest.raises(ValueError, match="another run"):
            resumed(run, {**longer, **change})
    with pytest.raises(ValueError, match='another run(?s:.*)- "seed": 0,\n(?s:.*)\\+ "seed": 1,') as error:
        resumed(run, {**longer, "seed": 1})
    assert '"steps"' not in str(error.value) and run.path.read_bytes() == before
    assert resumed(run, longer).stages == run.stages


def test_a_stage_that_is_not_scored_yet(run):
    run.current = replace(run.stages[-1], index=4, scores={"math": run.stages[0].scores["math"]})
    run.save()
    again = resumed(run)
    assert again.current == run.current and len(again.stages) == 4 and again.records[-1] == run.current
    again.append(again.current)
    assert resumed(run).current is None and len(resumed(run).stages) == 5


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content.update(schema_version=2),
        lambda content: content.pop("run"),
        lambda content: content["stages"][1].update(steps="many"),
        lambda content: content["stages"].pop(1),
        lambda content: content["stages"][1].update(folder="../elsewhere"),
        lambda content: content["stages"][1]["scores"]["qa"].update(file="/etc/passwd"),
    ],
)
def test_edited_stages(edit, run):
    content = json.loads(run.path.read_text())
    edit(content)
    run.path.write_text(json.dumps(content))
    for read in (Run, lambda folder: resumed(run)):
        with pytest.raises(ValueError, match="stages.json|leaves it"):
            read(run.folder)


def test_links_are_followed_into_the_cache_of_the_hub_only(run, tmp_path):
    blob, snapshot = tmp_path / "models--a--b" / "blobs" / "123", tmp_path / "models--a--b" / "snapshots" / "main"
    for folder in (blob.parent, snapshot.parent):
        folder.mkdir(parents=True)
    file = run.stages[1].scores["qa"]["file"]
    (run.folder / file).rename(blob)
    (run.folder / file).symlink_to(blob)
    with pytest.raises(ValueError, match="qa.jsonl"):
        Run(run.folder)
    run.folder.rename(snapshot)
    assert Run(snapshot).scores(1, "qa").tolist() == [1, 1 / 3]


HOLD = "import sys, time; from trl_interfere.run import lock_folder\n"
HOLD += "with lock_folder(sys.argv[1]): print('held', flush=True); time.sleep(60)"


def test_a_second_writer_is_refused_until_the_first_has_died(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as first:
        try:
            assert first.stdout.readline() == b"held\n"
            with pytest.raises(ValueError, match=f"pid {first.pid}"), lock_folder(tmp_path):
                pass
        finally:
            first.kill()
    with lock_folder(tmp_path):
        with pytest.raises(ValueError, match=f"pid {os.getpid()}"), lock_folder(tmp_path):
            pass
        refused = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], capture_output=True, text=True)
        assert f"pid {os.getpid()}" in refused.stderr  # the refusal in this process has not lost the lock


def test_atomic_write(tmp_path):
    path = tmp_path / "new" / "folder" / "file.json"
    write_atomically(path, "first ü\n")
    with open(path, encoding="utf-8") as reader:
        write_atomically(path, "second\n")
        assert reader.read() == "first ü\n"  # an open reader keeps the old content
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "x" * 100000 + "\ud800")
    assert path.read_text() == "second\n" and os.listdir(path.parent) == ["file.json"]  # nothing is left behind
