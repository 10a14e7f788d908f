import json
import random
import re
import tracemalloc
import warnings

import pytest

from trl_interfere.lab.code import code_reward, run_expression
from trl_interfere.lab.domains import REWARDS, SIZES, SPLITS, TASKS, lab_domain, lab_rows, split_of
from trl_interfere.lab.math import math_reward
from trl_interfere.lab.qa import NAMES, PHRASINGS, SYMBOLS, qa_reward
from trl_interfere.lab.writing import rubric, writing_reward


each_task = pytest.mark.parametrize("task", ["code", "math", "qa", "writing"])


@pytest.fixture(scope="module")
def rows():
    """A thousand rows of every split of every domain, or as many as the smaller splits have."""
    return {name: {split: lab_rows(name, split, min(SIZES[split], 1000)) for split in SPLITS} for name in TASKS}


def reward(task, rows, completions):
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    return REWARDS[task](prompts=[row["prompt"] for row in rows], completions=completions, **columns)


@each_task
def test_prompts_of_splits_are_disjoint(task, rows):
    prompts = {split: {row["prompt"] for row in part} for split, part in rows[task].items()}
    assert sum(map(len, prompts.values())) == len(set.union(*prompts.values()))
    for split in SPLITS:
        assert all(split_of(prompt) == split for prompt in prompts[split])
    for split in ("selection", "test"):
        assert len(prompts[split]) == SIZES[split] == len(rows[task][split])
    domain = lab_domain(task, test_size=20)
    assert domain.train_dataset.num_rows == SIZES["train"] and domain.reward_funcs == [REWARDS[task]]
    assert domain.eval_dataset["prompt"] == [row["prompt"] for row in rows[task]["test"][:20]]
    assert domain.selection_dataset["prompt"] == [row["prompt"] for row in rows[task]["selection"][:20]]


@each_task
def test_answers_earn_everything_and_other_styles_do_not(task, rows):
    some = [row for part in rows[task].values() for row in part]
    assert reward(task, some, [row["answer"] for row in some]) == [1.0] * len(some)
    assert {len(row["alternatives"]) for row in some} == {2}
    for position in range(2):
        earned = reward(task, some, [row["alternatives"][position] for row in some])
        assert max(earned) < 1 if task == "writing" else set(earned) == {0.0}
    assert max(reward(task, some, [""] * len(some))) < 1


def test_math_problems_are_right(rows):
    for row in rows["math"]["train"]:
        problem = row["prompt"].removeprefix("Q: ").removesuffix(" A:")
        assert re.fullmatch(r"\d+([+-]\d+)+", problem)
        assert row["answer"] == f" {sum(int(term) for term in re.findall(r'[+-]?[0-9]+', problem))}"
    completions = [" 12", "12\n", " 012", "12.", "The answer is 12.", "1 2"]
    assert math_reward(completions, answer=[" 12"] * 6) == [1, 1, 0, 0, 0, 0]


def test_qa_facts_are_right(rows):
    assert len(SYMBOLS) == len(NAMES) == len(set(SYMBOLS)) == len(set(NAMES)) == 94
    known = {
        "Q: symbol of iron A:": "Fe",
        "Q: what is Au A:": "gold",
        "Q: protons in silver A:": "47",
        "Q: which has 74 A:": "tungsten",
        "Q: period of iron A:": "4",
        "Q: row of plutonium A:": "7",
        "Q: after iron A:": "cobalt",
        "Q: 20 protons 22 neutrons mass A:": "42",
        "Q: 30 neutrons on 26 protons A:": "56",
    }
    rng, seen = random.Random(0), {}
    while not known.keys() <= seen.keys():
        row = TASKS["qa"].sample(rng)
        assert seen.setdefault(row["prompt"], row["answer"]) == row["answer"]  # one answer to a question
    assert all(seen[prompt] == f" The answer is {answer}." for prompt, answer in known.items())
    assert {len(phrasings) for phrasings in PHRASINGS.values()} == {5}
    completions = [" The answer is gold.", "The answer is gold.\n", "The answer is gold", "gold"]
    assert qa_reward(completions, answer=[" The answer is gold."] * 4) == [1, 1, 0, 0]


def test_code_problems_are_right(rows):
    for row in rows["code"]["train"]:
        tests = json.loads(row["tests"])
        assert len({x for x, _ in tests}) == 5
        shown = dict(pair.split(">") for pair in row["prompt"].removeprefix("Q: ").removesuffix(" A:").split(" "))
        assert shown == {str(x): str(y) for x, y in tests[:2]}
        for x, y in tests:
            assert eval(row["answer"].strip(), {"__builtins__": {}}, {"x": x}) == y


def test_arithmetic():
    for expression, value in {"x": 8, "-x + 10": 2, "(x+1)*(x-1)": 63, "x//3": 2, "x%3": 2}.items():
        assert run_expression(expression, 8) == value
        assert code_reward([f" {expression} "], tests=[json.dumps([[8, value]])]) == [1.0]
        assert code_reward([expression], tests=[json.dumps([[8, value], [8, value + 1]])]) == [0.0]


@pytest.mark.parametrize(
    "expression",
    r"""
    x.real|x.__class__|int(x)|__import__('os').getpid()|exec('x')|(lambda: x)()|lambda: x|x**1|9**9**9**9
    1<<99999999999
    x/1|x if x else x|x and x|[x][0]|{0: x}[0]|[y for y in [x]][0]|(y := x)|y|x = 3|x == 3|not x|~-x|import os|del x
    await x|yield x|f'{x}'|x; x|x+True*0|True|x+0.0|6.0//2|x+0j|None|...|'x'|b'x'|x//0|x%0|x +|((x)|\
    x+0 The answer is x.
    """.strip()
    .replace("\n    ", "|")
    .split("|")
    + ["", "   ", "x\nimport os", "x\0", "x" + "+0" * 40, "(" * 60 + "x", "-" * 5000 + "x", "9" * 5000, "\ud800"],
)
def test_sandbox(expression):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tests in ("[[3, 3]]", "[[3, 3.0]]", "[[3, true]]"):
            assert code_reward([expression], tests=[tests]) == [0.0]
    with pytest.raises(ValueError):
        run_expression(expression, 3)


@pytest.mark.parametrize("expression", ["'a'*30000000", "'%30000000d'%x", "b'a'*30000000", "'a'*99999999999999999"])
def test_sandbox_builds_nothing_large(expression):
    tracemalloc.start()
    try:
        assert code_reward([expression], tests=["[[3, 3]]"]) == [0.0]
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


ITEMS = ("first word", "second word", "length", "one sentence", "no repetition")


@pytest.mark.parametrize(
    "text, missed",
    [
        ("The moon shines near the river.", []),
        ("The star shines near the river.", ["first word"]),
        ("The moon shines near the lake.", ["second word"]),
        ("The moon shines brightly near the river.", ["length"]),
        ("the moon shines near the river.", ["one sentence"]),
        ("The moon shines near the river", ["one sentence"]),
        ("The moon shines. Near the river.", ["one sentence"]),
        ("The the the the the the.", ["first word", "second word", "no repetition"]),
        ("", ITEMS),
    ],
)
def test_rubric(text, missed):
    assert rubric(text, ["moon", "river"], 6) == {item: float(item not in missed) for item in ITEMS}
    expected = 1.0 if not missed else 0.5 * (5 - len(missed)) / 5
    assert writing_reward([text], words=["moon river"], length=[6]) == pytest.approx([expected])
