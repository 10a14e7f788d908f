import shutil

import pytest

from trl_interfere.rewards.sandbox import Sandbox


NO_BUBBLEWRAP = "bubblewrap is not installed (apt-get install bubblewrap)"


@pytest.fixture(scope="session")
def sandbox():
    """A real sandbox with two workers."""
    if shutil.which("bwrap") is None:
        pytest.skip(NO_BUBBLEWRAP)
    return Sandbox(workers=2)


@pytest.fixture(scope="session")
def bubblewrap():
    """For tests that open a sandbox of their own."""
    if shutil.which("bwrap") is None:
        pytest.skip(NO_BUBBLEWRAP)
