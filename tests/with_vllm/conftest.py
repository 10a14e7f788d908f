"""
What vLLM needs on a CPU, and one engine for all trainers.

The folder is not called `vllm`: `tests/` is on the path of imports, where it would pass for that package.
"""

import os
from importlib.util import find_spec

import pytest
import torch


os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the tests look at the weights in the engine


def pytest_runtest_setup(item):
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed (make test-vllm)")


@pytest.fixture(scope="session")
def _no_packing():
    """On a CPU vLLM packs weights into layouts that new ones cannot be loaded into; on a GPU it does not."""
    import vllm._custom_ops

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        patch.setattr(vllm._custom_ops, "_supports_onednn", False)
        yield


@pytest.fixture(scope="session")
def _engines(_no_packing):
    """
    One engine for all trainers of the session, in float32.

    It is a real one, and what it holds when a trainer is built are the weights that the last one left there: nothing
    but a synchronisation can make them right. TRL leaves the data type to vLLM, which never takes float32.
    """
    import vllm

    engines = {}

    def shared(model, **kwargs):
        if not engines:
            engines["one"] = vllm.LLM(model=model, dtype="float32", **kwargs)
        return engines["one"]

    return shared


@pytest.fixture
def shared_engine(_engines, monkeypatch):
    """Trainers that are built use the engine of the session."""
    monkeypatch.setattr("trl.generation.vllm_generation.LLM", _engines)
