# ruff: noqa: E501
import json
import sys

import pytest

from trl_interfere.rewards.code import CodeReward
from trl_interfere.rewards.sandbox import SandboxError


TESTS = json.dumps({"inputs": ["3 4\n", "10 -2\n", "0 0\n"], "outputs": ["7\n", "8\n", "0\n"]})
ADD = "a, b = map(int, input().split())\nprint(a + b)"
CHECK = """
def check(candidate):
    assert candidate([1, 2, 3]) == 6
    assert candidate([]) == 0
    assert candidate([-5, 5, 7]) == 7
"""
CALLS = json.dumps(
    {
        "function": "total",
        "code": 'def total(numbers):\n    """Sum of numbers."""\n',
        "header": "import math\n\ndef double(x):\n    return 2 * x",
        "calls": [f"{CHECK}\n    assert candidate([double(4)]) == 8\ncheck(total)"],
    }
)


def block(program):
    return f"Here it is:\n```python\n{program}\n```\nIt adds the numbers."


# Completion and the reward that a person would give, for a program that reads two numbers and prints their sum.
PROGRAMS = [
    # correct
    (block(ADD), 1),
    (f"```py\n{ADD}\n```", 1),
    (ADD, 1),
    (f"```python\n{ADD}", 1),
    (f"```python\nprint('first try')\n```\nBetter:\n```python\n{ADD}\n```", 1),
    (f"<think>```python\nprint(7)\n```</think>{block(ADD)}", 1),
    (f"```sh\nls\n```\n```python\n{ADD}\n```\n```\noutput\n```", 1),
    (block(f"def main():\n    {ADD.replace(chr(10), chr(10) + '    ')}\nif __name__ == '__main__':\n    main()"), 1),
    # wrong
    (block(f"{ADD}\nexit(1)"), 0),
    (f"{block(ADD)}\nExample usage:\n{block('print(3)')}", 0),
    (block("a, b = map(int, input().split())\nprint(a - b)"), 0),
    (block(f"print('The sum is:')\n{ADD}"), 0),
    # unparsable
    ("", 0),
    ("I cannot write programs.", 0),
    (f"<think>{block(ADD)}", 0),
    ("(" * 99_000, 0),
    (block("x = " + "[" * 50_000), 0),
    # adversarial: printing what is expected, ending well, looking for the answer, using up the machine
    (block("print(7)"), 0),
    (block("import os\nos._exit(0)"), 0),
    (block("while True: print(7)"), 0),
    (block("import gc\nprint([x for x in gc.get_objects() if 'outputs' in str(x)[:200]] and 7 or '')"), 0),
    (block("import sys\nf = sys._getframe()\nwhile f.f_back: f = f.f_back\nprint(f.f_locals.get('outputs', ''))"), 0),
    (block("print('7' * 10**8)"), 0),
]

TOTAL = "def total(numbers):\n    return sum(numbers)"
# The same for a program that must define `total(numbers)`.
FUNCTIONS = [
    # correct
    (block(TOTAL), 1),
    (TOTAL, 1),
    ("    return sum(numbers)", 1),
    ("    result = 0\n    for n in numbers:\n        result += n\n    return result\n\nprint(total([1]))", 1),
    (block("total = sum"), 1),
    (block("def total(numbers):\n    print('hello')\n    return sum(numbers)"), 1),
    (block("def total(numbers):\n    return float(sum(numbers))"), 1),
    (block(f"{TOTAL}\nif __name__ == '__main__':\n    raise SystemExit(1)"), 1),
    (block("def total(numbers):\n    return sum(double(n) for n in numbers) // 2"), 1),
    (block(f"from __future__ import annotations\n\n{TOTAL}"), 1),
    (f"{block(TOTAL)}\nExample usage:\n{block('print(total([1, 2]))')}", 1),
    (f"{block('def total(numbers): return 0')}\nBetter:\n{block(TOTAL)}", 1),
    ("1. ```python\n   def total(numbers):\n       return sum(numbers)\n   ```", 1),
    # wrong
    (f"{block(TOTAL)}\nBetter:\n{block('def total(numbers): return 0')}", 0),
    (block("def helper(numbers):\n    return sum(numbers)"), 0),
    (block("def total(numbers):\n    return iter([sum(numbers)])"), 0),
    (block("def total(numbers):\n    return str(sum(numbers))"), 0),
    # unparsable
    ("", 0),
    (block("def total(numbers)\n    return sum(numbers)"), 0),
    # adversarial: known ways to pass without being right stand in test_functions.py
    (block("def check(candidate): pass\ndef total(numbers): pass"), 0),
    (block("def double(x): return 4\ndef total(numbers):\n    return numbers"), 0),
    (block("def total(numbers):\n    return 10 ** 10 ** 7"), 0),
]


@pytest.fixture(scope="module")
def reward(sandbox):
    return CodeReward(seconds=2.0)


def test_hand_checked_tables(reward):
    for table, tests in ((PROGRAMS, TESTS), (FUNCTIONS, CALLS)):
        rewards = reward([completion for completion, _ in table], [tests] * len(table))
        assert [(text, right) for (text, right), found in zip(table, rewards, strict=True) if found != right] == []


def test_settings(reward):
    assert reward([[{"role": "assistant", "content": block(ADD)}]], [TESTS], domain=["code"]) == [1]
    partial = CodeReward(partial=True, seconds=2.0)
    assert partial([block("print(7)"), block(ADD), ""], [TESTS] * 3) == pytest.approx([1 / 3, 1, 0])
    assert CodeReward(thinking=True)([block(ADD), f"x</think>{block(ADD)}"], [TESTS] * 2) == [0, 1]


def test_ways_to_fence_and_print(reward):
    sys.set_int_max_str_digits(0)
    for completion, output, expected in (
        ("~~~python\nprint(7)\n~~~", "7", 1),
        ("~~~\nprint(7)\n~~~\nIt prints 7.", "7", 1),
        (block("print(2**20000)"), str(2**20000), 1),
        (block("print(1/3)"), "0.333333333333", 1),
        (block("print(1, 2/3)"), "1 0.66666666667", 1),
        (block("print(0.334)"), "0.333333333333", 0),
        (block("print(1.0000001)"), "1", 0),
        (block("print(1000001)"), "1000000", 0),
        (block("print('a  b')"), "a b", 1),
        (block("print('a', 'b', sep='\\n')"), "a b", 0),
    ):
        assert reward([completion], [json.dumps({"inputs": [""], "outputs": [output]})]) == [expected], completion


def test_tests_that_can_be_forged_are_counted(reward):
    """By a program that finds the word by which tests in one process say that they passed."""
    forged = (
        "import os, sys\ndef f(x):\n    frame = sys._getframe()\n    while 'request' not in frame.f_locals: frame = frame.f_back\n"
        "    os.write(1, frame.f_locals['request']['nonce'].encode())\n    os._exit(0)"
    )
    one = json.dumps({"function": "f", "header": "", "calls": ["assert f(1) == 2"], "forgeable": True})
    two = json.dumps({"function": "f", "header": "", "calls": ["assert f(1) == 2"]})
    logged = {}
    assert reward([forged] * 2, [one, two], log_metric=logged.__setitem__) == [1, 0]
    assert logged == {"code/forgeable": 0.5}
    assert reward.check(forged, one) == (1, True) and reward.check("def f(x): return 2", two) == (1, False)
    # Ways to end early and objects that are equal to all pass neither.
    for program in ("exit()", "import os\nos._exit(0)", "raise SystemExit", "def f(x): exit()"):
        assert reward([block(program)], [one]) == [0]


def test_it_is_never_run_elsewhere(monkeypatch, tmp_path):
    """Without bubblewrap nothing is run."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match="bubblewrap"):
        CodeReward(sandbox="bubblewrap", seconds=1)(["print(1)"], [json.dumps({"inputs": [""], "outputs": ["1"]})])
    for name in ("", "docker", "ftp://x", "unsafe", None):
        with pytest.raises(SandboxError, match="Piston"):
            CodeReward(sandbox=name)([], [])
