"""A small run with a report and a repair, that the tests of this folder publish."""

import shutil

import pytest

from trl_interfere.cli import main


@pytest.fixture(scope="session")
def healed_run(finished_run, tmp_path_factory):
    """Folder of a trained, analysed and healed run; not to be changed."""
    folder = shutil.copytree(finished_run, tmp_path_factory.mktemp("published") / "out")
    main(["analyze", str(folder), "--threads", "1"])
    main(["heal", str(folder), "--threads", "1", "--max_drop", "100"])
    return folder


@pytest.fixture
def copied(healed_run, tmp_path):
    """A copy of the run that a test may change."""
    return shutil.copytree(healed_run, tmp_path / "copy")


@pytest.fixture
def no_waits(monkeypatch):
    """How long the client and the push would have waited."""
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    return waits
