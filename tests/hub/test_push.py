"""Pushes against the local Hub: what arrives, what a repetition sends, and what a Hub that misbehaves leaves."""

import hashlib
import logging
import re

import pytest
from hub_server.server import SIGNATURE, TOKEN
from huggingface_hub import HfApi, ModelCard

from trl_interfere.analysis.report import InterferenceReport
from trl_interfere.cli import main
from trl_interfere.hub.push import plan_push, push_report, push_run
from trl_interfere.hub.run_folder import RunFolder
from trl_interfere.hub.upload import PushError


REPO = "tester/model"
SECRETS = (TOKEN, SIGNATURE.split("=")[1])


def state(hub) -> dict:
    repo = hub.repo(REPO)
    return {branch: repo.resolve(branch).id for branch in repo.branches}


def test_what_arrives(hub, lab_folder):
    result = push_run(lab_folder, REPO, stages=True, private=True, collection="A study")
    stages = [path.name for path in sorted((lab_folder / "stages").iterdir())]
    assert set(hub.repo(REPO).branches) == {"main", *(f"stage-{name}" for name in stages)}
    assert hub.repo(REPO).private and result.commits == state(hub)
    for name in stages:
        files = hub.files(REPO, f"stage-{name}")
        for path in (lab_folder / "stages" / name).glob("*.safetensors"):
            assert files[path.name] == path.read_bytes()
        assert set(files) == {
            ".gitattributes", "README.md", "config.json", "generation_config.json", "log_history.json",
            "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        }  # fmt: skip
    main = hub.files(REPO)
    assert main["model.safetensors"] == (lab_folder / "stages" / stages[-1] / "model.safetensors").read_bytes()
    report = next(lab_folder.glob("analysis/0-*"))
    for name in ("report.json", "routes.safetensors"):
        assert main[f"interference/{name}"] == (report / name).read_bytes()
    for name in ("stages.json", "results.json", "repair/delta.safetensors", "repair/rollback.json"):
        assert main[f"interference/{name}"] == (lab_folder / name).read_bytes()
    assert main["interference/figures/score_matrix.png"] == (lab_folder / "figures/score_matrix.png").read_bytes()
    assert "interference/scores/0-base/math.jsonl" in main
    (collection,) = hub.collections.values()
    assert [item["id"] for item in collection["items"]] == [REPO] and result.collection == collection["slug"]
    # main is never seen half-written: the empty commit, and then everything
    assert len(HfApi().list_repo_commits(REPO)) == 2


def test_nothing_is_sent_twice(hub, lab_folder):
    first = push_run(lab_folder, REPO, stages=True, collection="A study")
    hub.log.clear()
    commits = len(hub.committed)
    assert push_run(lab_folder, REPO, stages=True, collection="A study") == first
    assert len(hub.committed) == commits and set(hub.uploads.values()) == {1}
    assert not any("/commit/" in path or "/storage/" in path for _, path in hub.log)
    weights = {hashlib.sha256(path.read_bytes()).hexdigest() for path in lab_folder.glob("stages/*/model.safetensors")}
    assert weights <= hub.uploads.keys()


def test_a_longer_run_replaces_what_is_outdated(hub, copied):
    (copied / "repair" / "old.json").write_text("{}")
    push_run(copied, REPO)
    assert "interference/repair/old.json" in hub.files(REPO)
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.md", repo_id=REPO)
    (copied / "repair" / "old.json").unlink()
    push_run(copied, REPO, stages=True)
    assert "interference/repair/old.json" not in hub.files(REPO) and hub.files(REPO)["notes.md"] == b"mine"
    assert "stage-1-math" in hub.files(REPO)["README.md"].decode()
    assert "notes.md" not in hub.files(REPO, "stage-1-math")


def test_no_pickle_no_hidden_file_and_no_path_of_the_machine(hub, copied):
    stage = copied / "stages" / "1-math"
    for name in ("training_args.bin", "optimizer.pt", ".env", "secret.key"):
        (stage / name).write_text("hf_secret")
    path = next(copied.glob("analysis/0-*/report.json"))
    path.write_text(path.read_text().replace('"stages/1-math"', f'"{stage}"'))
    push_run(copied, REPO, stages=True)
    for branch in hub.repo(REPO).branches:
        files = hub.files(REPO, branch)
        assert not [name for name in files if name.endswith((".bin", ".pt", ".env", ".key"))]
        assert not [name for name, content in files.items() if str(copied).encode() in content]
    assert InterferenceReport.from_pretrained(REPO).before == f"{REPO}@stage-1-math"


def test_the_licence_is_that_of_the_base_model(hub, copied):
    base = "tester/base"
    HfApi().create_repo(base)
    ModelCard("---\nlicense: cc-by-4.0\n---\n").push_to_hub(base)
    path = copied / "stages.json"
    path.write_text(re.sub(r'"base_model": "[^"]*"', f'"base_model": "{base}"', path.read_text()))
    push_run(copied, REPO)
    data = ModelCard(hub.files(REPO)["README.md"].decode()).data
    assert (data.license, data.base_model) == ("cc-by-4.0", base)


def test_cards_are_validated_by_the_hub(hub, lab_folder):
    push_run(lab_folder, REPO, stages=True)
    assert hub.validated == len(hub.repo(REPO).branches)
    for branch in hub.repo(REPO).branches:
        ModelCard(hub.files(REPO, branch)["README.md"].decode()).validate()


# What goes wrong, whether the push gets over it, and what its message says.
WEIGHTS = "/storage/"
MISBEHAVIOUR = {
    "429 on a commit": (("POST", "/commit/main", 429, {"Retry-After": "7"}), True, None),
    "429 on an upload": (("PUT", WEIGHTS, 429, {"Retry-After": "7"}), True, None),
    "500 on creation": (("POST", "/repos/create", 500), True, None),
    "500 on a commit": (("POST", "/commit/stage-2-qa", 500), True, None),
    "500 without end on main": (("POST", "/commit/main", 500, None, "Oops", 99), False, "internal error"),
    "500 without end on a branch": (("POST", "/commit/stage-2-qa", 500, None, "Oops", 99), False, "internal error"),
    "429 for an hour": (("POST", "/commit/main", 429, {"Retry-After": "3600"}), False, "fewer requests"),
    "cut connection": (("PUT", WEIGHTS, None, None, "", 1, 1000), True, None),
    "cut connections without end": (("PUT", WEIGHTS, None, None, "", 99, 1000), False, "no connection"),
    "commit at the same time": (("POST", "/commit/main", 412), False, "somebody else has committed"),
}


@pytest.mark.parametrize("case", MISBEHAVIOUR)
def test_misbehaviour(hub, lab_folder, no_waits, case, caplog, capfd):
    failure, survived, message = MISBEHAVIOUR[case]
    caplog.set_level(logging.DEBUG)
    hub.fail(*failure)
    if survived:
        push_run(lab_folder, REPO, stages=True)
        assert hub.failures[0].times == 0
        if failure[3:] and failure[3]:
            assert any(wait >= 7 for wait in no_waits)
        first = None
    else:
        with pytest.raises(PushError, match=message) as error:
            push_run(lab_folder, REPO, stages=True)
        text = str(error.value)
        assert f"trl-interfere push {lab_folder} {REPO} --stages" in text and "main is as it was" in text
        assert list(hub.files(REPO)) == [".gitattributes"]
        assert not any(secret in text for secret in SECRETS)
        hub.failures.clear()
        first = dict(hub.uploads)
        push_run(lab_folder, REPO, stages=True)  # what the message says
    assert set(hub.uploads.values()) == {1}  # even after a failure nothing is stored a second time
    assert first is None or all(hub.uploads[sha] == count for sha, count in first.items())
    expected = {
        revision.branch: revision for revision in plan_push(RunFolder.read(lab_folder), REPO, stages=True).revisions
    }
    for branch, revision in expected.items():
        files = hub.files(REPO, branch)
        assert files.keys() == revision.files.keys() | {".gitattributes"}
    output = caplog.text + "".join(capfd.readouterr())
    assert not any(secret in output for secret in SECRETS)


def test_uploads_in_parts(hub, lab_folder, no_waits):
    hub.part_size = 500_000
    hub.fail("PUT", r"/storage/.*/3$", cut_after=1000)
    push_run(lab_folder, REPO)
    assert set(hub.uploads.values()) == {1}


def test_expired_token(hub, lab_folder, no_waits):
    hub.tokens.clear()
    with pytest.raises(PushError, match="the token is missing, invalid or has expired: run `hf auth login`") as error:
        push_run(lab_folder, REPO)
    assert hub.repos == {} and no_waits == [] and TOKEN not in str(error.value)


def test_a_token_that_expires_on_the_way(hub, lab_folder, no_waits):
    hub.fail("POST", "/commit/main", 401, message="Invalid credentials in Authorization header", times=9)
    with pytest.raises(PushError, match="Finished revisions: stage-1-math, stage-2-qa.*; main is as it was"):
        push_run(lab_folder, REPO, stages=True)


def test_no_right_to_the_name(hub, lab_folder):
    with pytest.raises(PushError, match="You don't have the rights to create"):
        push_run(lab_folder, "somebody/model")


def test_quota(hub, lab_folder, no_waits):
    hub.quota = 4_000_000  # one stage fits
    with pytest.raises(PushError, match=r"the Hub refuses it \(.*storage limit reached") as error:
        push_run(lab_folder, REPO, stages=True)
    assert list(hub.files(REPO)) == [".gitattributes"] and "Finished revisions: stage-1-math" in str(error.value)
    hub.quota = None
    push_run(lab_folder, REPO, stages=True)
    assert set(hub.uploads.values()) == {1}


@pytest.mark.parametrize("kind", ["dataset", "space"])
def test_a_repository_of_another_type(hub, lab_folder, kind):
    HfApi().create_repo(REPO, repo_type=kind, space_sdk="gradio" if kind == "space" else None)
    with pytest.raises(ValueError, match=f"expected a model repository or an unused name, found a {kind}"):
        push_run(lab_folder, REPO)
    assert list(hub.repos) == [(kind, REPO)]


def test_another_model_is_not_replaced_unasked(hub, lab_folder):
    api = HfApi()
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"\0other", path_in_repo="model.safetensors", repo_id=REPO)
    with pytest.raises(ValueError, match="found another model; .*--overwrite"):
        push_run(lab_folder, REPO, stages=True)
    assert set(hub.repo(REPO).branches) == {"main"}
    push_run(lab_folder, REPO, overwrite=True)
    assert hub.files(REPO)["model.safetensors"] != b"\0other"


def test_a_tag_in_the_way_of_a_stage(hub, lab_folder):
    HfApi().create_repo(REPO)
    HfApi().create_tag(REPO, tag="stage-1-math")
    with pytest.raises(ValueError, match="expected no tag 'stage-1-math'"):
        push_run(lab_folder, REPO, stages=True)


def test_a_folder_without_a_run(hub, tmp_path):
    with pytest.raises(ValueError, match="expected the folder of a run with stages.json, found none"):
        push_run(tmp_path, REPO)
    assert hub.repos == {}


def test_report(hub, make_report, tmp_path):
    report = make_report(20, before="/home/me/out/stages/1-math", after="/home/me/out/stages/2-qa")
    first = report.push_to_hub(REPO, private=True)
    files = hub.files(REPO)
    assert {"README.md", "interference/report.json", "interference/routes.safetensors"} <= files.keys()
    assert b"/home/me" not in b"".join(files.values())
    loaded = InterferenceReport.from_pretrained(REPO)
    assert loaded.before == f"{REPO}@stage-1-math" and loaded.first_order == report.first_order
    assert report.push_to_hub(REPO) == first and len(hub.committed) == 1


def test_a_report_leaves_the_card_of_a_model_alone(hub, lab_folder, make_report):
    push_run(lab_folder, REPO)
    card = hub.files(REPO)["README.md"]
    push_report(make_report(20), REPO)
    assert hub.files(REPO)["README.md"] == card
    assert InterferenceReport.from_pretrained(REPO).loss_after == 0.7


def command(*arguments):
    return main(list(map(str, arguments)))


def test_command(hub, lab_folder, capsys):
    command("push", lab_folder, REPO, "--stages", "--private", "--collection", "A study")
    assert set(hub.repo(REPO).branches) == {"main", "stage-1-math", "stage-2-qa"} | {
        branch for branch in hub.repo(REPO).branches if "refresh" in branch
    }
    assert hub.repo(REPO).private and len(hub.collections) == 1
    assert f"Published: {hub.url}/{REPO}" in capsys.readouterr().out.replace("\n", "")


def test_dry_run(hub, lab_folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    command("push", lab_folder, REPO, "--stages", "--dry-run")
    assert hub.log == []
    output = capsys.readouterr().out
    size = (lab_folder / "stages/1-math/model.safetensors").stat().st_size
    for part in ("stage-1-math", "interference/report.json", f"{size:,}", "README.md"):
        assert part in output


def test_command_with_a_report(hub, make_report, tmp_path, capsys):
    make_report(20).save_pretrained(tmp_path / "report")
    command("push", tmp_path / "report", REPO, "--dry-run")
    assert hub.log == [] and "report.json" in capsys.readouterr().out
    command("push", tmp_path / "report", REPO)
    assert "interference/report.json" in hub.files(REPO)
    with pytest.raises(ValueError, match="--stages: expected the folder of a run, found that of a report"):
        command("push", tmp_path / "report", REPO, "--stages")


def test_a_repaired_model_on_main(hub, lab_folder, tmp_path):
    repaired = tmp_path / "repaired"
    (repaired / "rollback").mkdir(parents=True)
    for path in (lab_folder / "stages" / "1-math").iterdir():
        (repaired / path.name).write_bytes(path.read_bytes())
    (repaired / "rollback.json").write_text("{}")
    (repaired / "rollback" / "0.safetensors").write_bytes(b"\0slices")
    push_run(lab_folder, REPO, model=repaired, repaired="Routes were rolled back.")
    files = hub.files(REPO)
    assert files["model.safetensors"] == (repaired / "model.safetensors").read_bytes()
    assert files["interference/rollback/rollback.json"] == b"{}" and "rollback.json" not in files
    assert files["interference/rollback/0.safetensors"] == b"\0slices"
    assert "Routes were rolled back." in files["README.md"].decode()
