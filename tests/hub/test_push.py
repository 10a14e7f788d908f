"""Pushes against the local Hub: what arrives, what a repetition sends, and what a Hub that misbehaves leaves."""

import json
import re
import shutil

import pytest
import torch
from hub_server.server import SIGNATURE, TOKEN
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM

from trl_interfere import InterferenceReport, Repair, Run
from trl_interfere.checkpoint import Checkpoint
from trl_interfere.cli import main
from trl_interfere.hub.callback import write_card
from trl_interfere.hub.plan import plan_run
from trl_interfere.hub.push import PushError, push_folder
from trl_interfere.models import load_model


REPO = "tester/model"
SECRETS = (TOKEN, SIGNATURE.split("=")[1])


def test_what_arrives(hub, healed_run):
    result = push_folder(healed_run, REPO, private=True, collection="A study")
    repo = hub.repo(REPO)
    assert set(repo.branches) == {"main", "stage-1-math", "stage-2-writing", "stage-3-heal"} and repo.private
    assert result.commits == {branch: commit.id for branch, commit in repo.branches.items()}
    for branch, name in (("stage-1-math", "1-math"), ("stage-2-writing", "2-writing"), ("main", "2-writing")):
        found = hub.files(REPO, branch)
        assert found["model.safetensors"] == (healed_run / "stages" / name / "model.safetensors").read_bytes()
        assert {"README.md", "config.json", "tokenizer.json"} <= set(found) and "trainer_state.json" not in found
    report = healed_run / "analysis" / "math"
    assert found["interference/routes.safetensors"] == (report / "routes.safetensors").read_bytes()
    assert "interference/scores/0-base/math.jsonl" in found and "interference/figures/scores.png" in found
    assert "local.json" not in found and "recipe.yaml" not in found
    hub.log.clear()
    assert push_folder(healed_run, REPO, private=True, collection="A study") == result  # nothing is sent twice
    assert set(hub.uploads.values()) == {1}
    assert not any("/commit/" in path or "/storage/" in path for _, path in hub.log)
    (collection,) = hub.collections.values()
    assert [item["id"] for item in collection["items"]] == [REPO] and result.collection == collection["slug"]
    assert repo.titles("main")[1:] == ["initial commit"]  # main is never seen half-written
    for branch in repo.branches:
        card = ModelCard(hub.files(REPO, branch)["README.md"].decode())
        card.validate()
        assert (card.data.to_dict().get("base_model_relation") == "adapter") == (branch == "stage-3-heal")


def test_what_is_pulled_is_what_was_pushed(hub, healed_run, tmp_path, monkeypatch):
    push_folder(healed_run, REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another-cache"))
    expected = Repair.from_pretrained(healed_run / "repair").merge()
    ids = torch.arange(3, 12)[None]
    for place in ({"subfolder": "repair"}, {"revision": "stage-3-heal"}):
        base = AutoModelForCausalLM.from_pretrained(REPO)
        healed = PeftModel.from_pretrained(base, REPO, **place)
        torch.testing.assert_close(healed(input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    pulled, local = load_model(REPO, "stage-1-math"), load_model(healed_run / "stages" / "1-math")
    assert all(torch.equal(a, b) for a, b in zip(pulled.parameters(), local.parameters(), strict=True))
    names = [Checkpoint(place).tensors.keys() for place in (f"{REPO}@stage-1-math", healed_run / "stages" / "1-math")]
    assert names[0] == names[1]
    pulled, local = map(InterferenceReport.from_pretrained, (REPO, healed_run / "analysis" / "math"))
    assert pulled.loss_after == local.loss_after
    with pytest.raises(ValueError, match="'stage-9-none'"):
        load_model(REPO, "stage-9-none")


def test_what_is_outdated_goes_and_what_is_foreign_stays(hub, copied):
    push_folder(copied, REPO, stages=False)
    assert set(hub.repo(REPO).branches) == {"main"}
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.md", repo_id=REPO)
    shutil.rmtree(copied / "analysis")
    push_folder(copied, REPO)
    assert "interference/report.json" not in hub.files(REPO) and hub.files(REPO)["notes.md"] == b"mine"
    assert "notes.md" not in hub.files(REPO, "stage-1-math")


def test_no_pickle_no_hidden_file_and_no_path_of_the_machine(hub, copied):
    stage = copied / "stages" / "1-math"
    for name in ("training_args.bin", "optimizer.pt", ".env", "secret.key"):
        (stage / name).write_text("hf_secret")
    push_folder(copied, REPO)
    for branch in hub.repo(REPO).branches:
        files = hub.files(REPO, branch)
        assert not [name for name in files if name.endswith((".bin", ".pt", ".env", ".key"))]
        assert not [name for name, content in files.items() if str(copied.parent.parent).encode() in content], branch
    config = json.loads(hub.files(REPO, "stage-3-heal")["adapter_config.json"])
    assert config["base_model_name_or_path"] == REPO


@pytest.mark.parametrize("place", ["repair/adapter_model.safetensors", "results.json"])
def test_links_out_of_the_run_are_refused_by_name(hub, copied, tmp_path, place):
    path = copied / place
    outside = tmp_path / "outside"
    shutil.move(path, outside) if path.exists() else outside.write_text("{}")
    path.symlink_to(outside)
    with pytest.raises(ValueError, match=path.name):
        push_folder(copied, REPO)
    assert hub.repos == {}


def test_the_licence_is_that_of_the_base_model(hub, copied):
    HfApi().create_repo("tester/base")
    ModelCard("---\nlicense: cc-by-4.0\n---\n").push_to_hub("tester/base")
    content = json.loads((copied / "stages.json").read_text())
    content["run"]["base_model"] = "tester/base"
    (copied / "stages.json").write_text(json.dumps(content))
    push_folder(copied, REPO, stages=False)
    data = ModelCard(hub.files(REPO)["README.md"].decode()).data
    assert (data.license, data.base_model) == ("cc-by-4.0", "tester/base")


def test_figures_of_the_card_are_files(copied):
    figure = re.compile(r"!\[[^]]*\]\(([^)]+)\)")
    files = plan_run(Run(copied), REPO, license="apache-2.0", page="<p>").branches["main"]
    card = files["README.md"].decode()
    shown = figure.findall(card)
    assert len(shown) >= 3 and set(shown) <= set(files) and ModelCard(card).data.license == "apache-2.0"
    assert files["interference.html"] == b"<p>" and "(interference.html)" in card
    shown = figure.findall(write_card(copied).read_text())
    assert shown and all((copied / path).is_file() for path in shown)


# What goes wrong, and whether the push gets over it.
WEIGHTS = "/storage/"
MISBEHAVIOUR = {
    "429 on a commit": (("POST", "/commit/main", 429, {"Retry-After": "7"}), True),
    "cut connection": (("PUT", WEIGHTS, None, None, "", 1, 1000), True),
    "500 without end on a branch": (("POST", "/commit/stage-2-writing", 500, None, "Oops", 99), False),
    "429 for an hour": (("POST", "/commit/main", 429, {"Retry-After": "3600"}), False),
    "commit at the same time": (("POST", "/commit/main", 412), False),
    "expired token": (("POST", "/commit/main", 401), False),
}


@pytest.mark.parametrize("case", MISBEHAVIOUR)
def test_misbehaviour(hub, healed_run, no_waits, case):
    failure, survived = MISBEHAVIOUR[case]
    hub.fail(*failure)
    if survived:
        push_folder(healed_run, REPO)
        assert hub.failures[0].times == 0
    else:
        with pytest.raises(PushError) as error:
            push_folder(healed_run, REPO)
        text = str(error.value)
        assert f"trl-interfere push {healed_run} {REPO}" in text and "main is as it was" in text
        assert list(hub.files(REPO)) == [".gitattributes"]
        assert not any(secret in text for secret in SECRETS)
        hub.failures.clear()
        push_folder(healed_run, REPO)  # what the message says
    assert set(hub.uploads.values()) == {1}  # even after a failure nothing is stored a second time
    for branch, files in plan_run(Run(healed_run), REPO).branches.items():
        assert hub.files(REPO, branch).keys() == files.keys() | {".gitattributes"}


def test_quota_and_rights(hub, healed_run):
    with pytest.raises(PushError, match="rights"):
        push_folder(healed_run, "somebody/model")
    hub.fail("POST", "/commit/stage-2-writing", 403, message="Private repository storage limit reached")
    with pytest.raises(PushError, match="storage limit.*Finished branches: stage-1-math;"):
        push_folder(healed_run, REPO)


def test_another_model_is_not_replaced_unasked(hub, healed_run):
    HfApi().create_repo(REPO)
    HfApi().upload_file(path_or_fileobj=b"\0other", path_in_repo="model.safetensors", repo_id=REPO)
    with pytest.raises(ValueError, match="--overwrite"):
        push_folder(healed_run, REPO)
    assert set(hub.repo(REPO).branches) == {"main"}
    push_folder(healed_run, REPO, overwrite=True)
    assert hub.files(REPO)["model.safetensors"] != b"\0other"


def test_report(hub, healed_run, make_report, tmp_path):
    with pytest.raises(FileNotFoundError, match="stages.json"):
        push_folder(tmp_path, REPO)
    report = make_report(20, before="/home/me/out/stages/1-math", after="/home/me/out/stages/2-qa")
    report.save_pretrained(tmp_path / "report")
    first = push_folder(tmp_path / "report", REPO, private=True)
    files = hub.files(REPO)
    assert {"README.md", "interference/report.json", "interference/routes.safetensors"} <= files.keys()
    assert b"/home/me" not in b"".join(files.values())
    loaded = InterferenceReport.from_pretrained(REPO)
    assert loaded.before == f"{REPO}@stage-1-math" and loaded.first_order == report.first_order
    assert first.commits == {"main": hub.repo(REPO).resolve("main").id}
    push_folder(healed_run, "tester/trained", stages=False)
    card = hub.files("tester/trained")["README.md"]
    push_folder(tmp_path / "report", "tester/trained")
    assert hub.files("tester/trained")["README.md"] == card  # the card of a model is left alone
    assert InterferenceReport.from_pretrained("tester/trained").loss_after == 0.7


def test_command(hub, healed_run, capsys):
    main(["push", str(healed_run), REPO, "--dry_run"])
    output = capsys.readouterr().out
    size = (healed_run / "stages/1-math/model.safetensors").stat().st_size
    assert hub.log == [] and "stage-1-math" in output and f"{size:,}" in output and "README.md" in output
    main(["push", str(healed_run), REPO, "--private", "--no_stages"])
    assert set(hub.repo(REPO).branches) == {"main"} and hub.repo(REPO).private
    assert "interference.html" in hub.files(REPO)
    assert f"Published: {hub.url}/{REPO}" in capsys.readouterr().out
