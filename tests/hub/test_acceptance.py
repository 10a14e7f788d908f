"""The whole way: a run of the lab, its publication, a fresh cache, and the same bytes and figures from there."""

import hashlib

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, hf_hub_download

from trl_interfere import InterferenceAnalyzer, InterferenceConfig, InterferenceReport, RouteRollback
from trl_interfere.checkpoint import Checkpoint
from trl_interfere.hub.push import push_run
from trl_interfere.lab.build import MODEL_FOLDER
from trl_interfere.lab.domains import lab_domain
from trl_interfere.models import load_model, load_tokenizer


REPO = "tester/model"


@pytest.fixture
def published(hub, lab_folder, tmp_path, monkeypatch):
    push_run(lab_folder, REPO, stages=True, collection="A study")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another-cache"))
    return lab_folder


def digest(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_the_whole_way(published, hub):
    # byte-identical
    for stage in ("1-math", "2-qa"):
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            pulled = hf_hub_download(REPO, name, revision=f"stage-{stage}")
            assert digest(pulled) == digest(published / "stages" / stage / name)
    folder = next(published.glob("analysis/0-*"))
    for name, path in {
        "report.json": folder / "report.json",
        "routes.safetensors": folder / "routes.safetensors",
        "repair/delta.safetensors": published / "repair" / "delta.safetensors",
    }.items():
        assert digest(hf_hub_download(REPO, f"interference/{name}")) == digest(path)

    # the report names the revisions, and is otherwise the one on disk
    local, report = InterferenceReport.from_pretrained(folder), InterferenceReport.from_pretrained(REPO)
    assert (report.before, report.after) == (f"{REPO}@stage-1-math", f"{REPO}@stage-2-qa")
    names = {"before": local.before, "after": local.after, "base": local.base}
    assert report.to_dict() | names == local.to_dict()

    # the same analysis from the revisions
    config = InterferenceConfig(**{**report.config, "subspace_size": 0})  # it takes most of the time
    analyzer = InterferenceAnalyzer.from_pretrained(report.before, report.after, base=MODEL_FOLDER, config=config)
    again = analyzer.analyze(lab_domain("math", 8), [lab_domain("qa", 8)])
    assert (again.before, again.after) == (report.before, report.after)
    for name in ("loss_before", "loss_after", "first_order", "second_order", "attributed", "outside_routes"):
        assert getattr(again, name) == getattr(report, name), name
    assert again.cosines == report.cosines
    for name, values in report.routes.items():
        assert np.array_equal(again.routes[name], values), name

    # a repair from nothing but the name of the repository
    rollback = RouteRollback(budget=0.1)
    repaired = rollback.apply(report).state_dict()
    names = {key: str(published / getattr(local, key)) for key in ("before", "after")}
    local.before, local.after = names["before"], names["after"]
    for name, tensor in rollback.apply(local).state_dict().items():
        assert torch.equal(tensor, repaired[name]), name


def test_everything_that_takes_a_checkpoint_takes_a_revision(published):
    name, folder = f"{REPO}@stage-1-math", published / "stages" / "1-math"
    model, expected = load_model(name), load_model(folder)
    assert model.name_or_path == name
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert load_tokenizer(name).eos_token_id is not None
    assert load_tokenizer(REPO, revision="stage-1-math").get_vocab() == load_tokenizer(folder).get_vocab()
    assert Checkpoint(name).tensors.keys() == Checkpoint(folder).tensors.keys()
    # main is the last stage, with and without its name
    last = load_model(published / "stages" / "2-qa")
    refreshed = sorted(published.glob("stages/*"))[-1]
    last = last if refreshed.name == "2-qa" else load_model(refreshed)
    assert all(
        torch.equal(a, b) for a, b in zip(load_model(f"{REPO}@main").parameters(), last.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{REPO}@stage-9-none", "tester/model: expected the branch, tag or commit 'stage-9-none', found none"),
        ("tester/none@main", "tester/none@main: expected a folder or the id of a Hub repository"),
    ],
)
def test_revisions_that_do_not_exist(published, name, message):
    with pytest.raises(ValueError, match=message):
        load_model(name)
    with pytest.raises(ValueError, match=message):
        InterferenceReport.from_pretrained(name)


def test_a_repository_without_a_report(hub):
    HfApi().create_repo(REPO)
    with pytest.raises(ValueError, match="^tester/model: expected a report with interference/report.json, found none"):
        InterferenceReport.from_pretrained(REPO)
