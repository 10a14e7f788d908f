import pytest

from trl_interfere.rewards.sandbox import Sandbox


@pytest.fixture(scope="session")
def sandbox(bubblewrap):
    """A real sandbox with two workers."""
    return Sandbox(workers=2)
