"""What can be said of a vLLM engine without vLLM; with it, see tests/with_vllm."""

from dataclasses import fields
from importlib.util import find_spec

import pytest
from datasets import Dataset
from peft import IA3Config, LoraConfig
from tiny_runs import build

from trl_interfere.domain import Domain
from trl_interfere.evaluation.checkpoints import score_checkpoint
from trl_interfere.evaluation.vllm_engine import VLLMEngine, _check_adapter
from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.training.config import SequentialGRPOConfig


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_is_not_installed(tmp_path):
    domain = Domain("math", eval_dataset=Dataset.from_list([{"prompt": "1+1="}]), metric=lambda **kwargs: [1.0])
    settings = {field.name: field.default for field in fields(SequentialGRPOConfig)}
    with pytest.raises(ImportError, match=r"pip install 'trl-interfere\[vllm\]'"):
        VLLMEngine(MODEL_FOLDER)
    with pytest.raises(ImportError, match="engine"):
        score_checkpoint(str(MODEL_FOLDER), [domain], settings, engine="vllm")
    with pytest.raises(ValueError, match="engine.*'sglang'"):
        score_checkpoint(str(MODEL_FOLDER), [domain], settings, engine="sglang")
    with pytest.raises(ImportError, match="use_vllm"):
        build(tmp_path / "run", use_vllm=True)
    assert not (tmp_path / "run" / "stages.json").exists()


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (IA3Config(), "IA3"),
        (LoraConfig(use_dora=True), "use_dora=True"),
        (LoraConfig(modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\]"),
        (LoraConfig(rank_pattern={"q_proj": 2}), "rank_pattern={'q_proj': 2}"),
        (LoraConfig(r=513), "rank 512.*513"),
    ],
)
def test_adapters_that_vllm_cannot_use(adapter, message):
    with pytest.raises(ValueError, match=f"out/1-math: .*{message}"):
        _check_adapter("out/1-math", adapter, most=512)
    _check_adapter("out/1-math", LoraConfig(r=512, lora_alpha=7, target_modules=["q_proj"]), most=512)
