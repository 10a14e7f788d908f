import pytest

from trl_interfere.app import catalog as module
from trl_interfere.app.catalog import Catalog, is_packed_lab, store_upload


def test_names(save_run, save_report, tmp_path):
    save_run(tmp_path / "all" / "one")
    save_report(tmp_path / "all" / "two")
    (tmp_path / "all" / "neither").mkdir()
    save_report(tmp_path / "other" / "one")
    catalog = Catalog([tmp_path / "all", tmp_path / "other" / "one"], hub=False)
    assert catalog.names == ["one", "two", "one (2)"]
    assert catalog.open("one").stages and not catalog.open("one (2)").stages


def test_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match="expected the folder of a run or of a report, found none"):
        Catalog([tmp_path])
    with pytest.raises(ValueError, match="expected a folder, found none"):
        Catalog([tmp_path / "missing"])


@pytest.mark.parametrize(
    "name", ["../secret", "/etc", "secret", "", "a/../../b", "..", "a/b/c", "./secret", "x" * 5000]
)
def test_nothing_but_the_chosen_folders(save_run, save_report, tmp_path, monkeypatch, name):
    save_report(tmp_path / "secret")
    monkeypatch.chdir(save_run(tmp_path / "run"))
    with pytest.raises(ValueError, match="expected one of"):
        Catalog([tmp_path / "run"]).open(name)


def test_folder_with_the_name_of_a_repository_is_not_read(save_run, save_report, tmp_path, monkeypatch):
    save_report(tmp_path / "user" / "repo")
    monkeypatch.chdir(tmp_path)
    for hub in (True, False):  # tests are offline
        with pytest.raises(ValueError, match="user/repo: (not readable from the Hub|the Hub is switched off)"):
            Catalog([save_run(tmp_path / "run")], hub=hub).open("user/repo")


def test_search_without_a_network(save_run, tmp_path):
    with pytest.raises(ValueError, match="the Hub cannot be reached"):
        Catalog([save_run(tmp_path)]).search("math")
    with pytest.raises(ValueError, match="switched off"):
        Catalog([tmp_path], hub=False).search()


def test_upload(save_report, tmp_path):
    source = save_report(tmp_path / "source")
    name, folder = store_upload([source / "report.json", source / "routes.safetensors"])
    assert name == "upload: math after qa, writing"
    run = Catalog(hub=False).open(name, {name: str(folder)})
    assert len(run.report("report").routes["damage"]) == 26
    with pytest.raises(ValueError, match="expected one of"):
        Catalog(hub=False).open(name)  # another visitor's


def test_uploads_that_are_refused(save_report, tmp_path, monkeypatch):
    source = save_report(tmp_path / "source")
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"pickle")
    text = tmp_path / "notes.txt"
    text.write_text("")
    report = source / "report.json"
    for files in ([], [other], [report, report], [report, text], [report, other, other]):
        with pytest.raises(ValueError, match="upload: expected one report.json"):
            store_upload(files)
    with pytest.raises(ValueError, match="expected safetensors"):
        store_upload([report, other])
    newer = save_report(tmp_path / "newer", schema_version=4)
    folder = tmp_path / "kept"
    folder.mkdir()
    with pytest.raises(ValueError, match="upload: report.json: expected schema_version 3, found 4"):
        store_upload([newer / "report.json"], folder)
    assert not folder.exists()
    monkeypatch.setattr(module, "MAX_JSON_BYTES", 10)
    with pytest.raises(ValueError, match="upload, report.json: expected at most 0 MB"):
        store_upload([report])


def test_packed_lab(save_run, tmp_path):
    folder = save_run(tmp_path)
    assert not is_packed_lab(folder)
    (folder / "stages" / "1-math").mkdir(parents=True)
    (folder / "stages" / "1-math" / "delta.safetensors").write_bytes(b"")
    assert is_packed_lab(folder)
