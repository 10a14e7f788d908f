import json
import os
import stat
from dataclasses import replace

import numpy as np
import pytest

from trl_interfere.evaluation.bootstrap import score
from trl_interfere.run import Manifest, StageRecord, read_json, stage_name, write_atomically


RUN = {"base": "some/model", "seed": 0, "schedule": [{"domain": "math", "overrides": {}}], "steps": (1, 2)}


def record(index, kind, domain, folder=None, scores=None):
    versions = {"torch": "2"}
    return StageRecord(index, kind, domain, folder, 10, 1.5, scores or {}, 7, {"max_steps": 10}, versions)


@pytest.fixture
def manifest(tmp_path):
    """A run of three stages with scores of two domains."""
    manifest = Manifest(tmp_path / "run", RUN)
    for index, (kind, domain) in enumerate([("base", None), ("train", "math"), ("refresh", "math")]):
        name = stage_name(index, kind, domain)
        folder = None if kind == "base" else f"stages/{name}"
        if folder is not None:
            (manifest.folder / folder).mkdir(parents=True)
        scores = {
            "math": manifest.write_scores(name, "math", np.array([0.0, 1.0, 0.5 * index]), list("abc")),
            "qa": manifest.write_scores(name, "qa", np.array([1.0, 1 / 3]), ["u", "v", "w", "x"]),
        }
        manifest.append(record(index, kind, domain, folder, scores))
    return manifest


def reopened(manifest, run=RUN):
    other = Manifest(manifest.folder, run)
    other.load()
    return other


def test_round_trip(manifest):
    other = reopened(manifest)
    assert other.stages == manifest.stages and len(other.stages) == 3
    assert other.run == manifest.run == {**RUN, "steps": [1, 2]}
    content = json.loads((manifest.folder / "stages.json").read_text())
    assert content["schema_version"] == 1 and content["run_name"].startswith("run-")
    assert content["stages"][1] == vars(manifest.stages[1])
    assert [entry.name for entry in other.stages] == ["0-base", "1-math", "2-refresh-math"]


def test_scores_lie_beside_the_manifest(manifest):
    entry = manifest.stages[1].scores["qa"]
    values = np.array([1.0, 1 / 3])
    assert entry == {**score(values).to_dict(), "file": "scores/1-math/qa.jsonl"}
    lines = [json.loads(line) for line in (manifest.folder / entry["file"]).read_text().splitlines()]
    assert lines == [{"score": 1.0, "completions": ["u", "v"]}, {"score": 1 / 3, "completions": ["w", "x"]}]
    assert np.array_equal(reopened(manifest).read_scores(manifest.stages[1], "qa"), values)


@pytest.mark.parametrize("text", ["a\nb", 'say "hi"', "\u2028 \u0085", "\ud800", "\0", "", "日本"])
def test_any_completion_can_be_kept(text, manifest):
    values = np.array([0.25, 0.75])
    entry = manifest.write_scores("1-math", "math", values, [text, text])
    assert np.array_equal(manifest.read_scores(record(1, "train", "math", scores={"math": entry}), "math"), values)
    lines = (manifest.folder / entry["file"]).read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["completions"] for line in lines[:-1]] == [[text], [text]]


def test_score_matrix(manifest):
    matrix = reopened(manifest).score_matrix(["math", "qa"])
    assert matrix.domains == ["math", "qa"]
    assert matrix.stages == ["0-base", "1-math", "2-refresh-math"]
    for index in range(3):
        assert matrix.values[index]["math"].tolist() == [0.0, 1.0, 0.5 * index]
        assert matrix.values[index]["qa"].tolist() == [1.0, 1 / 3]
    assert matrix.peak("math") == 2
    assert matrix.interval(1, "math").to_dict() == {
        key: value for key, value in manifest.stages[1].scores["math"].items() if key != "file"
    }


@pytest.mark.parametrize(
    "change, lines",
    [
        ({"seed": 1}, ['- "seed": 0,', '+ "seed": 1,']),
        ({"base": "other"}, ['- "base": "some/model",', '+ "base": "other",']),
        ({"more": "--x"}, ['+ "more": "--x",']),
        ({"schedule": []}, ['-   "domain": "math",', '+ "schedule": [],']),
    ],
)
def test_another_run_is_refused_with_its_differences(change, lines, manifest):
    before = (manifest.folder / "stages.json").read_bytes()
    with pytest.raises(ValueError, match="stages.json: this folder belongs to another run") as error:
        reopened(manifest, {**RUN, **change})
    shown = str(error.value).splitlines()[1:]
    assert set(lines) <= set(shown)
    assert all(line.startswith(("-", "+")) for line in shown)
    assert not any('"steps"' in line for line in shown)  # what is the same is not shown
    assert (manifest.folder / "stages.json").read_bytes() == before


@pytest.mark.parametrize("missing", ["stages/1-math", "scores/0-base/qa.jsonl", "scores/2-refresh-math/math.jsonl"])
def test_missing_files(missing, manifest):
    path = manifest.folder / missing
    path.rmdir() if path.is_dir() else path.unlink()
    name = missing.split("/")[1]
    with pytest.raises(ValueError, match=f"stages.json: stage {name} is listed, but .*{missing} is missing"):
        reopened(manifest)


@pytest.mark.parametrize("content", ["", "{", '{"schema_version": 1', "\x80", "[1,]"])
def test_broken_json(content, manifest, caplog):
    (manifest.folder / "stages.json").write_bytes(content.encode("latin-1"))
    assert reopened(manifest).stages == manifest.stages[:-1]  # the one before the last change
    assert "going on from" in caplog.text and "stages.json.previous" in caplog.text
    manifest.previous_path.unlink()
    with pytest.raises(ValueError, match="stages.json: expected JSON, found something else"):
        reopened(manifest)


def test_a_half_written_manifest_is_skipped(manifest, caplog):
    leftover = manifest.folder / ".stages.json.4242.tmp"
    leftover.write_text('{"schema_version": 1, "stages": [')
    assert reopened(manifest).stages == manifest.stages
    assert "half-written" in caplog.text and not leftover.exists()


def test_a_longer_schedule_and_more_domains_are_the_same_run(manifest):
    first, second = ({"domain": name, "kind": "train", "overrides": {}} for name in ("math", "qa"))
    manifest.run.update(schedule=[first], domains={"math": {"rows": 3}})
    manifest.save()
    domains = {"math": {"rows": 3}, "qa": {"rows": 5}}
    longer = {**manifest.run, "schedule": [first, second], "domains": domains}
    assert reopened(manifest, longer).stages == manifest.stages
    for change in (
        {"schedule": [second, first]},
        {"schedule": []},
        {"schedule": [{**first, "overrides": {"max_steps": 1}}]},
        {"domains": {"qa": {"rows": 5}}},
        {"domains": {"math": {"rows": 4}, "qa": {"rows": 5}}},
    ):
        with pytest.raises(ValueError, match="belongs to another run"):
            reopened(manifest, {**longer, **change})


def test_a_stage_that_is_not_scored_yet(manifest):
    scores = {"math": manifest.stages[0].scores["math"]}
    manifest.current = replace(manifest.stages[-1], index=3, scores=scores)
    manifest.save()
    again = reopened(manifest)
    assert again.current == manifest.current and len(again.stages) == 3
    again.append(again.current)
    assert reopened(manifest).current is None and len(reopened(manifest).stages) == 4


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.5])
def test_other_schema_versions(version, manifest):
    content = json.loads((manifest.folder / "stages.json").read_text())
    content["schema_version"] = version
    (manifest.folder / "stages.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"stages.json: expected schema_version 1, found {version!r}"):
        reopened(manifest)
    (manifest.folder / "stages.json").write_text("[]")
    with pytest.raises(ValueError, match="stages.json: expected schema_version 1, found None"):
        reopened(manifest)


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content.pop("run"),
        lambda content: content.pop("stages"),
        lambda content: content["stages"][1].pop("folder"),
        lambda content: content["stages"][1].update(extra=1),
        lambda content: content["stages"][1]["scores"]["qa"].pop("file"),
        lambda content: content["stages"][1].update(scores=None),
        lambda content: content["stages"][1]["scores"].update(qa=None),
        lambda content: content["stages"].insert(1, None),
        lambda content: content.update(stages=None),
    ],
    ids=[
        *("no run", "no stages", "no folder", "extra field", "no file of scores", "scores are null"),
        *("scores of a domain are null", "a stage is null", "stages are null"),
    ],
)
def test_edited_manifest(edit, manifest):
    content = json.loads((manifest.folder / "stages.json").read_text())
    edit(content)
    (manifest.folder / "stages.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="stages.json"):
        reopened(manifest)


def test_atomic_write(tmp_path):
    path = tmp_path / "new" / "folder" / "file.json"
    write_atomically(path, "first ü\n")
    inode = path.stat().st_ino
    with open(path, encoding="utf-8") as reader:
        write_atomically(path, "second\n")
        assert reader.read() == "first ü\n"  # an open reader keeps the old content
    assert path.read_text() == "second\n" and path.stat().st_ino != inode
    assert os.listdir(path.parent) == ["file.json"]


def test_failed_write_keeps_the_old_content(tmp_path):
    path = tmp_path / "file.json"
    write_atomically(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "x" * 100000 + "\ud800")
    assert path.read_text() == "first"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "folder", "a file cannot replace a folder")
    assert stat.S_ISDIR((tmp_path / "folder").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["file.json", "folder"]  # nothing is left behind


def test_read_json(tmp_path):
    (tmp_path / "file.json").write_text('{"schema_version": 3, "a": 1}')
    assert read_json(tmp_path / "file.json", 3) == {"schema_version": 3, "a": 1}


@pytest.mark.parametrize(
    "arguments, name",
    [((0, "base", None), "0-base"), ((2, "train", "math"), "2-math"), ((15, "refresh", "qa"), "15-refresh-qa")],
)
def test_stage_name(arguments, name):
    assert stage_name(*arguments) == name
