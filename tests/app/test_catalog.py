import shutil

import pytest
from space_run import DATA

from trl_interfere.app.catalog import Catalog


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(DATA, tmp_path / "run", ignore=shutil.ignore_patterns("analysis", "stages"))


def test_names(folder, evaluation, tmp_path):
    (tmp_path / "neither").mkdir()
    catalog = Catalog([tmp_path, evaluation, folder], hub=False)
    assert catalog.names == ["run", "strangers", "run (2)"]
    assert catalog.open("run").is_run and not catalog.open("strangers").is_run
    first = catalog.open("run")
    assert catalog.open("run") is first
    (folder / "stages.json").touch()  # the run goes on
    assert catalog.open("run") is not first


def test_nothing_but_the_chosen_folders(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="run or of an evaluation"):
        Catalog([folder / "scores"])
    monkeypatch.chdir(folder)
    for name in ("../secret", "/etc", "", "a/../../b", "..", "a/b/c", "./run", "x" * 5000):
        with pytest.raises(ValueError, match="expected one of"):
            Catalog([folder]).open(name)
    # Nor a folder with the name of a repository.
    shutil.copytree(folder, tmp_path / "user" / "repo" / "interference")
    monkeypatch.chdir(tmp_path)
    for hub, message in ((True, "Hub cannot be reached"), (False, "switched off")):  # tests are offline
        with pytest.raises(ValueError, match="user/repo"):
            Catalog([folder], hub=hub).open("user/repo")
        with pytest.raises(ValueError, match=message):
            Catalog([folder], hub=hub).search()
