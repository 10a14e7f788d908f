# ruff: noqa: E501
import pytest

from trl_interfere.rewards.functions import called_function, check_function
from trl_interfere.rewards.sandbox import Limits


# Tests, a program, whether it passes, and whether they need both in one process.
CALLS = [
    ("assert f(f(2)) == 4", "f = lambda x: x * 2 if x < 4 else x", True, False),
    ("x = f(1)\nfor _ in range(5):\n    x = f(x)\nassert x == 64", "f = lambda x: 2 * x", True, False),
    ("x = f(1)\nfor _ in range(5):\n    x = f(x)\nassert x == 64", "f = lambda x: 2 * x + 1", False, False),
    (
        "import random\nfor _ in range(50):\n    x = random.random()\n    assert abs(f(x) - x) < 1e-9",
        "f = abs",
        True,
        False,
    ),
    ("assert Solution().add(a=1, b=2) == 3", "class Solution:\n    def add(self, a, b): return a + b", True, True),
    (
        "s = Stack()\ns.push(1)\ns.push(2)\nassert s.pop() == 2\nassert s.pop() == 1",
        "class Stack:\n    def __init__(self): self.x = []\n    def push(self, v): self.x.append(v)\n    def pop(self): return self.x.pop()",
        True,
        True,
    ),
    (
        "from solution import f\ndef test_one():\n    assert f(1) == 1\ndef test_two():\n    assert f(2) == 2",
        "f = int",
        True,
        False,
    ),
    (
        "from solution import f\ndef test_one():\n    assert f(1) == 1\ndef test_two():\n    assert f(2) == 3",
        "f = int",
        False,
        False,
    ),
    ("try:\n    f(0)\n    assert False\nexcept ZeroDivisionError:\n    pass", "f = lambda x: 1 / x", True, False),
    ("try:\n    f(0)\nexcept ZeroDivisionError:\n    pass\nelse:\n    assert False", "f = lambda x: 0", False, False),
    ("assert all(map(lambda x: f(x) == x, [1, 2, 3]))", "def f(x): raise StopIteration", False, False),
    ("assert f((1, 2)) == {1: (2, 3.5), 'x': {1, 2}}", "f = lambda t: {1: (2, 3.5), 'x': set(t)}", True, False),
    ("assert f(b'x', 1j, None, True, 2**100) == 5", "f = lambda *a: len(a)", True, False),
    ("x = 0\nfor _ in range(45):\n    x = f(x)\nassert x == 45", "f = lambda x: x + 1", True, False),
    ("x = 0\nfor _ in range(45):\n    x = f(x + 1)\nassert x == 45", "f = int", True, False),
    ("for n in range(45):\n    assert f('x').strip() == 'x'", "f = str", True, False),
    ("from solution import *\nassert f(1) == 1", "f = int", True, False),
    ("import solution\nassert solution.f(1) == 1", "f = int", True, True),
    ("assert list(f(3)) == [0, 1, 2]\nassert list(f(0)) == []", "f = range", True, False),
    ("assert list(f(3)) == [0, 1, 2]", "def f(n):\n    yield from range(n)", True, False),
    ("assert list(f(3)) == [0, 1, 2]", "def f(n):\n    yield from range(n + 1)", False, False),
    ("assert next(f(3)) == 0", "import itertools\ndef f(n): return itertools.count()", True, False),
    ("assert f(3) == [0, 1, 2]", "f = range", False, False),
    ("assert sorted(f({'a': 1})) == ['a']", "def f(d): return d.keys()", True, False),
    ("from decimal import Decimal\nassert f(Decimal('1.1')) == Decimal('2.2')", "f = lambda x: 2 * x", True, True),
    ("from fractions import Fraction\nassert f(Fraction(1, 3)) == Fraction(2, 3)", "f = lambda x: 2 * x", True, True),
    ("import math\nassert math.isclose(f(1), 0.5)", "f = lambda x: x / 2", True, False),
    (
        "import math\nassert math.isclose(f(1), 0.5)",
        "class math: isclose = staticmethod(lambda *a: True)\nf = print",
        False,
        False,
    ),
    ("class TestF:\n    def test_f(self):\n        assert f(1) == 1", "f = int", True, False),
    ("class TestF:\n    def test_f(self):\n        assert f(1) == 2", "f = int", False, False),
    (
        "import unittest\nclass TestF(unittest.TestCase):\n    def setUp(self):\n        self.x = 1\n    def test_f(self):\n        self.assertEqual(f(self.x), 2)\n        self.assertTrue(f(0) == 1)",
        "f = lambda x: x + 1",
        True,
        False,
    ),
    (
        "import unittest\nclass TestF(unittest.TestCase):\n    def test_f(self):\n        self.assertEqual(f(1), 3)",
        "f = lambda x: x + 1",
        False,
        False,
    ),
    (
        "s = S(2)\nassert s.n == 2 and s.n + 1 == 3 and s.items == [2] and len(s) == 1 and list(s) == [2]\nassert 2 in s and s.none is None and str(s) == 'S' and s and s[0] == 2 and abs(s.n - 2) < 1e-9",
        "class S:\n    none = None\n    def __init__(self, n): self.n, self.items = n, [n]\n    def __len__(self): return 1\n    def __iter__(self): return iter(self.items)\n    def __str__(self): return 'S'\n    def __getitem__(self, i): return self.items[i]",
        True,
        True,
    ),
    (
        "a, b = Node(1), Node(2)\na.next = b\nassert f(a) == [1, 2]",
        "class Node:\n    def __init__(self, x): self.x, self.next = x, None\ndef f(node):\n    return [node.x, *f(node.next)] if node else []",
        True,
        True,
    ),
    (
        "node = f([1, 2])\nassert node.x == 1 and node.next.x == 2 and node.next.next is None",
        "class Node: pass\ndef f(items):\n    if not items: return None\n    node = Node()\n    node.x, node.next = items[0], f(items[1:])\n    return node",
        True,
        True,
    ),
    ("assert f('x').startswith('ab')", "f = lambda x: 'abc'", True, False),
    (
        "assert f('x').startswith('ab')",
        "class f:\n    def __init__(self, x): pass\n    def startswith(self, x): return True",
        False,
        False,
    ),
    ("s = S()\nassert s.text.startswith('ab')", "class S:\n    text = 'abc'", True, True),
    ("assert 6 in f(1)", "class Yes:\n    __contains__ = __eq__ = lambda *a: True\nf = lambda x: Yes()", False, False),
    ("assert f(1) < 6", "class Yes:\n    __lt__ = __gt__ = lambda *a: True\nf = lambda x: Yes()", False, False),
    ("s = S()\nassert s.ok", "class S: ok = False", False, True),
    ("assert f(lambda x: x + 1) == 2", "def f(g): return g(1)", True, True),
    ("def g(x): return x + 1\nassert f(g) == 2", "def f(g): return g(1)", True, True),
    (
        "from collections import deque, Counter\nassert f('aa') == {'a': 2}",
        "from collections import Counter as f",
        True,
        False,
    ),
    ("import math\nassert f(0) == math.inf and -f(0) < 0", "def f(x): return float('inf')", True, False),
    ("assert f(1) == {1, 2}", "def f(x): return frozenset({x, 2})", True, False),
    (
        "try:\n    f('x').startswith('ab')\nexcept:\n    pass\nassert f(1)",
        "class f:\n    def __init__(self, x): pass",
        False,
        False,
    ),
]


@pytest.mark.parametrize("tests, program, passed, forgeable", CALLS)
def test_calls(tests, program, passed, forgeable, sandbox):
    verdict = check_function(sandbox, program, tests, Limits(seconds=2), called_function(tests))
    assert (verdict.passed, verdict.forgeable) == (passed, forgeable), verdict


# Programs that are not right, against `assert f(1) == 987654` and what follows: known ways to pass all the same.
FORGERIES = {
    "equal to all": "class E:\n    __eq__ = __ne__ = __bool__ = __contains__ = lambda *a: True\ndef f(x): return E()",
    "an integer equal to all": "class E(int):\n    __eq__ = __hash__ = lambda *a: True\ndef f(x): return E(3)",
    "a list equal to all": "class E(list):\n    __eq__ = lambda *a: True\ndef f(x): return E()",
    "exit at once": "raise SystemExit(0)",
    "exit in the call": "def f(x): raise SystemExit(0)",
    "os._exit": "import os\ndef f(x): os._exit(0)",
    "StopIteration": "def f(x): raise StopIteration",
    "a patched unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\nunittest.TestCase.run = lambda *a: None\ndef f(x): return 0",
    "a patched assert": "import builtins\nbuiltins.AssertionError = Exception\ndef f(x): return 0",
    "a patched isclose": "import math\nmath.isclose = lambda *a, **k: True\ndef f(x): return 0",
    "a report of its own": "import os\nfor fd in range(64):\n    try: os.write(fd, b'passed')\n    except OSError: pass\ndef f(x): return 0",
    "an answer of its own": 'import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\'{"value": {"o": 1}}\\n\' * 9)\n    except OSError: pass\ndef f(x): return 0',
    "answers without end": "import os\ndef f(x):\n    while True: os.write(4, b'[' * 65536)",
    "a deep answer": "def f(x):\n    y = []\n    for _ in range(500): y = [y]\n    return y",
    "a skipped test": "import unittest\ndef f(x): raise unittest.SkipTest",
    "a hook of the encoder": "import json\njson.dumps = lambda *a, **k: '{\"value\": true}'\ndef f(x): return 0",
    "a look at the tests": "import gc, re, sys\ndef f(x):\n    found = re.search('== (9[0-9]{5})', str(gc.get_objects()) + str([vars(m) for m in list(sys.modules.values())]))\n    return int(found[1]) if found else 0",
    "no function": "",
}
TESTS = [
    "assert f(1) == 987654",
    "def check(candidate):\n    assert candidate(1) == 987654\n    assert candidate(1) in [987654]\ncheck(f)",
    "import unittest\nclass T(unittest.TestCase):\n    def test_f(self):\n        self.assertEqual(f(1), 987654)",
    "import math\ndef test_f():\n    assert math.isclose(f(1), 987654)",
    "for x, y in {1: 987654}.items():\n    assert f(x) == y",
]


@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries(name, sandbox):
    for tests in TESTS:
        assert called_function(tests) == "f"
        verdict = check_function(sandbox, FORGERIES[name], tests, Limits(seconds=1), "f")
        assert (verdict.passed, verdict.forgeable) == (False, False), tests


def test_the_right_program_passes(sandbox):
    for tests in TESTS:
        assert check_function(sandbox, "def f(x): return 987653 + x", tests, Limits(), "f").passed, tests


def test_the_program_sees_no_expected_result(sandbox, monkeypatch):
    """All that the process of a program is given: its text, and arguments. The number 987654 stands in the tests only."""
    seen, run_once = [], type(sandbox).run_once

    def recording(self, program, stdin="", *others):
        if "main('answer'" in program:
            seen.append(program + stdin)
        return run_once(self, program, stdin, *others)

    monkeypatch.setattr(type(sandbox), "run_once", recording)
    for tests in TESTS:
        assert check_function(sandbox, "def f(x): return 987653 + x", tests, Limits(), "f").passed
    assert len(seen) == len(TESTS) and all("987654" not in text for text in seen)


@pytest.mark.parametrize(
    "tests, function",
    [
        ("assert f(1) == 2", "f"),
        ("from solution import f\ndef test_f():\n    assert f(1) == 2", "f"),
        ("assert gcd(4, 6) == 2", "gcd"),
        ("assert sorted(f({'a': 1})) == ['a']", "f"),
        ("try:\n    f(0)\nexcept ValueError:\n    pass", "f"),
        ("assert is_close(f(1), 0.5)", None),
        ("assert S().f(1) == 2", None),
        ("import solution\nassert solution.f(1) == 2", None),
        ("numbers = [2, 1]\nf(numbers)\nassert numbers == [1, 2]", None),
        ("node = f([1])\nassert node.value == 1", None),
        ("assert f.cache == {}", None),
        ("assert isinstance(f(1), Node)", None),
    ],
)
def test_which_tests_can_be_run_apart(tests, function):
    assert called_function(tests) == function


@pytest.mark.parametrize(
    "tests, reason",
    [
        ("import numpy as np\nassert f(1) == np.int64(1)", "numpy"),
        ("import pytest\ndef test_f():\n    assert f(1) == pytest.approx(1)", "pytest"),
        ("from submission import f\nassert f(1) == 1", "submission"),
        ("def test_f(capsys):\n    assert f(1) == 1", "test_f"),
        ("async def test_f():\n    assert f(1) == 1", "test_f"),
        ("assert sum([1]) == 1", "calls nothing"),
        ("assert f(1) ==", "no Python"),
    ],
)
def test_tests_that_cannot_be_run(tests, reason):
    with pytest.raises(ValueError, match=reason):
        called_function(tests)
