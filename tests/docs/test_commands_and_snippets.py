"""The command line takes the commands of README and docs, and the package takes their Python and YAML."""

import dataclasses
import json
import re
import runpy
import shlex
import textwrap
from importlib import import_module
from itertools import product
from pathlib import Path

import pytest

from trl_interfere import cli
from trl_interfere.recipe import load_run_file
from trl_interfere.training.options import parse_options


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes").rglob("*.md"))]
missing = runpy.run_path(str(ROOT / ".ci" / "check_imports.py"))["missing"]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(language):
    """Page, line and text of each block."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in BLOCK.finditer(text):
            if found[2] == language:
                line = text[: found.start()].count("\n") + 2
                yield pytest.param(textwrap.dedent(found[3]), id=f"{page.relative_to(ROOT)}:{line}")


def commands():
    for block in blocks("bash"):
        for line in block.values[0].replace("\\\n", " ").split("\n"):
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if "trl_interfere" in words:  # python -m, or a launcher
                    words = ["trl-interfere", *words[words.index("trl_interfere") + 1 :]]
                if words and words[0].endswith("trl-interfere"):
                    yield pytest.param(words[1:], id=f"{block.id}: {' '.join(words[1:])}")
    for name in cli.COMMANDS:  # examples of the help
        for example in re.findall(r"trl-interfere ([^(]+)", import_module(f"trl_interfere.cli.{name}").EXAMPLE):
            yield shlex.split(example)


class Taken(Exception):
    """The command line was read."""


@pytest.mark.parametrize("words", list(commands()))
def test_commands_are_taken(words, monkeypatch):
    module = import_module(f"trl_interfere.cli.{words[0]}")
    read = module.parse

    def parse(command, arguments, positional, example, rest=False):
        found = read(command, arguments, positional, example, rest)
        if rest:
            parse_options(found[1], known=[field.name for field in dataclasses.fields(command)])
        raise Taken

    monkeypatch.setattr(module, "parse", parse)
    with pytest.raises(Taken):
        module.main(words[1:])


@pytest.mark.parametrize("code", list(blocks("python")))
def test_python_compiles_and_its_imports_lead_somewhere(code):
    compile(code, "page", "exec")
    assert missing(code) == []


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The files that the pages name, in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for folder, name, part in product((".", "data"), ("math", "qa"), ("train", "selection", "test")):
        row = json.dumps({"prompt": f"{name} {part}", "answer": "1"})
        (tmp_path / folder / f"{name}-{part}.jsonl").write_text(row + "\n")
    return tmp_path


OWN_DATA = [block for block in blocks("python") if "def exact_match" in block.values[0]]
RECIPES = [one for one in blocks("yaml") if "math-train.jsonl" in one.values[0] and "my-org" not in one.values[0]]


@pytest.mark.parametrize("code", OWN_DATA)
def test_domains_from_own_data(code, data):
    names = {"__name__": "page"}
    exec(compile(code.partition("config = ")[0], "page", "exec"), names)  # a config asks for a GPU
    for name in ("math", "qa"):
        domain = names[name]
        assert domain.name == name and domain.eval_dataset["prompt"] == [f"{name} test"]
        assert domain.reward_funcs[0](completions=["1 ", "2"], answer=["1", "1"]) == [1.0, 0.0]


@pytest.mark.parametrize("text", RECIPES)
def test_recipes_of_the_pages(text, data):
    (data / "recipe.yaml").write_text(text)
    recipe = load_run_file(data / "recipe.yaml")
    assert [domain.name for domain in recipe.domains] == recipe.training["order"]
    assert all(domain.selection_dataset is not None for domain in recipe.domains)


def test_the_pages_have_what_is_tested():
    assert len(list(commands())) > 45 and len(OWN_DATA) == 2 and len(RECIPES) == 2
