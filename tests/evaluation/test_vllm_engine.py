"""What can be said of a vLLM engine without vLLM; with it, see tests/with_vllm."""

from importlib.util import find_spec

import pytest
from datasets import Dataset
from peft import IA3Config, LoraConfig
from tiny_runs import build

from trl_interfere.domain import Domain
from trl_interfere.evaluation.checkpoints import evaluate_checkpoints
from trl_interfere.evaluation.vllm_engine import VLLMEngine, _check_adapter
from trl_interfere.lab.build import MODEL_FOLDER
from trl_interfere.recipe import RunFile


without_vllm = pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")


@pytest.fixture
def run():
    rows = Dataset.from_list([{"prompt": "1+1="}])
    return RunFile(str(MODEL_FOLDER), [Domain("math", eval_dataset=rows, metric=lambda **kwargs: [1.0])])


@without_vllm
def test_vllm_is_not_installed(tmp_path, run):
    with pytest.raises(ValueError, match=r"engine: 'vllm' needs vLLM \(pip install 'trl-interfere\[vllm\]'\)"):
        VLLMEngine(MODEL_FOLDER)
    with pytest.raises(ValueError, match="engine: 'vllm' needs vLLM"):
        evaluate_checkpoints(run, [run.model], tmp_path / "scores", engine="vllm")
    assert not (tmp_path / "scores").exists()
    with pytest.raises(ValueError, match="use_vllm: expected vLLM, which is not installed: pip install"):
        build(tmp_path / "run", use_vllm=True)
    assert not (tmp_path / "run" / "stages.json").exists()


def test_an_unknown_engine(tmp_path, run):
    with pytest.raises(ValueError, match=r"engine: expected one of \['transformers', 'vllm'\], found 'sglang'"):
        evaluate_checkpoints(run, [run.model], tmp_path / "scores", engine="sglang")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (IA3Config(), "expected a LoRA adapter for vLLM, found IA3"),
        (LoraConfig(use_dora=True), "expected a plain LoRA adapter for vLLM, found use_dora=True"),
        (LoraConfig(modules_to_save=["lm_head"]), r"found modules_to_save=\['lm_head'\]"),
        (LoraConfig(rank_pattern={"q_proj": 2}), "found rank_pattern={'q_proj': 2}"),
        (LoraConfig(alpha_pattern={"q_proj": 2}), "found alpha_pattern={'q_proj': 2}"),
        (LoraConfig(bias="all"), "expected bias='none' in a LoRA for vLLM, found 'all'"),
        (LoraConfig(r=513), "expected a LoRA of rank 512 at most for vLLM, found 513"),
    ],
)
def test_adapters_that_vllm_cannot_use(adapter, message):
    with pytest.raises(ValueError, match=f"out/1-math: .*{message}"):
        _check_adapter("out/1-math", adapter, most=512)


def test_a_plain_lora_can_be_used():
    _check_adapter("out/1-math", LoraConfig(r=512, lora_alpha=7, target_modules=["q_proj"]), most=512)
