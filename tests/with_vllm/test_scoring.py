"""A checkpoint in a vLLM engine completes and scores as it does with transformers."""

import copy
import json

import numpy as np
import pytest
import torch
from finished_run import settings, write
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_interfere.cli import main
from trl_interfere.evaluation.scorer import Scorer
from trl_interfere.evaluation.vllm_engine import VLLMEngine
from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.lab.domains import lab_domain, lab_rows
from trl_interfere.repair.subspace_rollback import SubspaceRollback


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

NAMES = ("code", "math", "qa", "writing")
TOKENIZER = AutoTokenizer.from_pretrained(MODEL_FOLDER)


@pytest.fixture(scope="module")
def prompts():
    return [row["prompt"] for name in NAMES for row in lab_rows(name, "test", 32)]


@pytest.fixture(scope="module")
def plain():
    return AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def engine():
    with VLLMEngine(MODEL_FOLDER, max_length=96) as engine:
        yield engine


def test_greedy_tokens_are_those_of_transformers(engine, plain, prompts):
    scorer = Scorer(TOKENIZER, max_new_tokens=32)
    found = scorer.complete_ids(engine, prompts)
    assert found == scorer.complete_ids(plain, prompts)
    lengths = {len(ids) for ids in found}
    assert len(lengths) > 3 and len(set(map(tuple, found))) > len(prompts) / 2
    assert any(ids[-1] == TOKENIZER.eos_token_id for ids in found)


def test_ends_at_any_end_token(engine, plain, prompts, monkeypatch):
    scorer = Scorer(TOKENIZER, max_new_tokens=16)
    free = scorer.complete_ids(plain, prompts)
    end = max({token for ids in free for token in ids[1:-1]}, key=lambda t: sum(t in ids[1:-1] for ids in free))
    monkeypatch.setattr(engine, "end_ids", [end])
    monkeypatch.setattr(plain.generation_config, "eos_token_id", [end])
    found = scorer.complete_ids(engine, prompts)
    assert found == scorer.complete_ids(plain, prompts) != free
    assert any(ids[-1] == end and len(ids) < 16 for ids in found)


def test_sampling_follows_the_softmax_and_repeats(engine, plain, prompts):
    ids = Scorer(TOKENIZER).encode_prompt(prompts[-1])
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([ids])).logits[0, -1].double().numpy()
    chances = np.exp(logits / 2 - (logits / 2).max())
    chances /= chances.sum()
    scorer = Scorer(TOKENIZER, max_new_tokens=1, temperature=2.0)
    tokens = [new[0] for new in scorer.complete_ids(engine, [prompts[-1]] * 2000)]
    found = np.bincount(tokens, minlength=len(chances)) / 2000
    assert (np.abs(found - chances) < 4.5 * np.sqrt(chances * (1 - chances) / 2000) + 1e-3).all()
    assert len(set(tokens)) > 3
    assert scorer.complete_ids(engine, [prompts[-1]] * 50) == [[token] for token in tokens[:50]]
    other = Scorer(TOKENIZER, max_new_tokens=1, temperature=2.0, seed=1)
    assert other.complete_ids(engine, [prompts[-1]] * 50) != [[token] for token in tokens[:50]]


def test_a_prompt_that_is_too_long(engine, prompts):
    longest = max(len(Scorer(TOKENIZER).encode_prompt(prompt)) for prompt in prompts)
    with pytest.raises(ValueError, match=rf"at most 96 tokens .*found a prompt of {longest} and max_new_tokens=96"):
        Scorer(TOKENIZER, max_new_tokens=96).complete_ids(engine, prompts)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, plain):
    """An adapter of the lab's model that changes what it writes."""
    base = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder, model


def test_greedy_tokens_of_an_adapter(adapter, plain, prompts):
    folder, model = adapter
    scorer = Scorer(TOKENIZER, max_new_tokens=16)
    with VLLMEngine(folder, max_length=96) as engine:
        found = scorer.complete_ids(engine, prompts)
    assert found == scorer.complete_ids(model, prompts) != scorer.complete_ids(plain, prompts)


def test_a_repair_beside_the_model_that_it_heals(tmp_path, plain, prompts):
    final = copy.deepcopy(plain)
    with torch.no_grad():
        for name, parameter in final.named_parameters():
            if "mlp" in name:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    final.save_pretrained(tmp_path / "final")
    TOKENIZER.save_pretrained(tmp_path / "final")
    domains = [lab_domain(name, 16) for name in ("math", "writing")]
    rollback = SubspaceRollback(rank=16, references=16, max_new_tokens=16)
    repair = rollback.fit(tmp_path / "final", {"math": MODEL_FOLDER}, domains)
    repair.save_pretrained(tmp_path / "repair")
    scorer = Scorer(TOKENIZER, max_new_tokens=16)
    with VLLMEngine(tmp_path / "repair", max_length=96) as engine:
        healed = scorer.complete_ids(engine, prompts)
        engine._adapter = None
        damaged = scorer.complete_ids(engine, prompts)
    assert damaged == scorer.complete_ids(final, prompts)
    assert healed == scorer.complete_ids(repair.merge(), prompts) != damaged


def test_the_command_gives_the_same_scores(tmp_path, adapter):
    recipe = write(tmp_path, settings(tmp_path, max_completion_length=16))
    for engine in ("transformers", "vllm"):
        arguments = ["evaluate", MODEL_FOLDER, adapter[0], "--recipe", recipe, "--threads", 1]
        main(list(map(str, [*arguments, "--engine", engine, "--output_dir", tmp_path / engine])))
    expected, found = (
        json.loads((tmp_path / engine / "scores.json").read_text()) for engine in ("transformers", "vllm")
    )
    assert (expected.pop("engine"), found.pop("engine")) == ("transformers", "vllm")
    assert found == expected
    files = sorted(path.relative_to(tmp_path / "vllm") for path in (tmp_path / "vllm" / "scores").rglob("*.jsonl"))
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "vllm" / file).read_bytes() == (tmp_path / "transformers" / file).read_bytes()
    assert any(entry["points"]["value"] != 0 for entry in found["models"][1]["changes"].values())
