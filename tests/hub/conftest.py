"""A small run of the lab, with reports and repairs, that the tests of this folder publish."""

import shutil

import pytest

from trl_interfere.hub.run_folder import RunFolder
from trl_interfere.lab.pipeline import Lab


@pytest.fixture(scope="session")
def lab_folder(tmp_path_factory):
    """Folder of a finished lab run of two domains; not to be changed."""
    folder = tmp_path_factory.mktemp("published") / "lab-out"
    Lab(folder, seed=3, order=["math", "qa"], steps=2, prompts=8).run()
    # Any file of weights there is published with the report; this one has the content of another.
    shutil.copy(next(folder.glob("analysis/*/routes.safetensors")), folder / "repair" / "delta.safetensors")
    return folder


@pytest.fixture
def run(lab_folder):
    return RunFolder.read(lab_folder)


@pytest.fixture
def copied(lab_folder, tmp_path):
    """A copy of the run that a test may change."""
    return shutil.copytree(lab_folder, tmp_path / "lab-out")


@pytest.fixture
def no_waits(monkeypatch):
    """How long the client and the push would have waited."""
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    return waits
