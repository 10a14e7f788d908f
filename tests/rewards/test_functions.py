# ruff: noqa: E501
import pytest

from trl_interfere.rewards.functions import called_function, check_function
from trl_interfere.rewards.sandbox import Limits


# Whether a program passes, in one process with the tests or apart || the tests || the program; "⏎" is a new line.
CALLS = r"""
passes apart || x = f(1)⏎for _ in range(5):⏎    x = f(x)⏎assert x == 64 || f = lambda x: 2 * x
passes together || assert Solution().add(a=1, b=2) == 3 || class Solution:⏎    def add(self, a, b): return a + b
passes apart || from solution import f⏎def test_one():⏎    assert f(1) == 1⏎def test_two():⏎    assert f(2) == 2 || f = int
passes apart || try:⏎    f(0)⏎    assert False⏎except ZeroDivisionError:⏎    pass || f = lambda x: 1 / x
fails apart || try:⏎    f(0)⏎except ZeroDivisionError:⏎    pass⏎else:⏎    assert False || f = lambda x: 0
fails apart || assert all(map(lambda x: f(x) == x, [1, 2, 3])) || def f(x): raise StopIteration
passes apart || assert f((1, 2)) == {1: (2, 3.5), 'x': {1, 2}} || f = lambda t: {1: (2, 3.5), 'x': set(t)}
passes apart || assert f(b'x', 1j, None, True, 2**100) == 5 || f = lambda *a: len(a)
passes apart || assert next(f(3)) == 0 || import itertools⏎def f(n): return itertools.count()
fails apart || assert f(3) == [0, 1, 2] || f = range
passes together || from decimal import Decimal⏎assert f(Decimal('1.1')) == Decimal('2.2') || f = lambda x: 2 * x
fails apart || class TestF:⏎    def test_f(self):⏎        assert f(1) == 2 || f = int
passes apart || import unittest⏎class TestF(unittest.TestCase):⏎    def setUp(self):⏎        self.x = 1⏎    def test_f(self):⏎        self.assertEqual(f(self.x), 2)⏎        self.assertTrue(f(0) == 1) || f = lambda x: x + 1
fails apart || import unittest⏎class TestF(unittest.TestCase):⏎    def test_f(self):⏎        self.assertEqual(f(1), 3) || f = lambda x: x + 1
passes together || s = S(2)⏎assert s.n == 2 and len(s) == 1 and 2 in s and str(s) == 'S' and s[0] == 2 || class S:⏎    def __init__(self, n): self.n = n⏎    def __len__(self): return 1⏎    def __contains__(self, x): return x == 2⏎    def __str__(self): return 'S'⏎    def __getitem__(self, i): return self.n
passes together || node = f([1, 2])⏎assert node.x == 1 and node.next.x == 2 and node.next.next is None || class Node: pass⏎def f(items):⏎    if not items: return None⏎    node = Node()⏎    node.x, node.next = items[0], f(items[1:])⏎    return node
fails apart || assert f('x').startswith('ab') || class f:⏎    def __init__(self, x): pass⏎    def startswith(self, x): return True
fails apart || assert f(1) < 6 || class Yes:⏎    __lt__ = __gt__ = lambda *a: True⏎f = lambda x: Yes()
passes apart || import math⏎assert f(0) == math.inf and -f(0) < 0 || def f(x): return float('inf')
passes apart || assert f(1) == {1, 2} || def f(x): return frozenset({x, 2})
fails apart || try:⏎    f('x').startswith('ab')⏎except:⏎    pass⏎assert f(1) || class f:⏎    def __init__(self, x): pass
"""
CALLS = [
    (tests.strip(), program[1:], "passes" in how, "together" in how)
    for how, tests, program in (line.replace("⏎", "\n").split("||") for line in CALLS.strip().splitlines())
]


@pytest.mark.parametrize("tests, program, passed, forgeable", CALLS)
def test_calls(tests, program, passed, forgeable, sandbox):
    assert check_function(sandbox, program, tests, Limits(seconds=2), called_function(tests)) == (passed, forgeable)


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
        assert check_function(sandbox, FORGERIES[name], tests, Limits(seconds=1), "f") == (False, False), tests


def test_the_program_sees_no_expected_result(sandbox, monkeypatch):
    """All that the process of a program is given: its text, and arguments. The number 987654 stands in the tests only."""
    seen, run_once = [], type(sandbox).run_once

    def recording(self, program, stdin="", *others):
        if "main('answer'" in program:
            seen.append(program + stdin)
        return run_once(self, program, stdin, *others)

    monkeypatch.setattr(type(sandbox), "run_once", recording)
    for tests in TESTS:
        assert check_function(sandbox, "def f(x): return 987653 + x", tests, Limits(), "f") == (True, False)
    assert len(seen) == len(TESTS) and all("987654" not in text for text in seen)


def test_tests_that_cannot_be_run_apart_or_at_all():
    assert called_function("assert gcd(4, 6) == 2") == "gcd"  # though the header imports one
    for tests in ("assert is_close(f(1), 0.5)", "x = [2, 1]\nf(x)\nassert x == [1, 2]", "f.cache == {}"):
        assert called_function(tests) is None
    for tests, reason in (
        ("import numpy as np\nassert f(1) == np.int64(1)", "numpy"),
        ("from submission import f\nassert f(1) == 1", "submission"),
        ("def test_f(capsys):\n    assert f(1) == 1", "test_f"),
        ("async def test_f():\n    assert f(1) == 1", "test_f"),
        ("assert sum([1]) == 1", "calls nothing"),
        ("assert f(1) ==", "no Python"),
    ):
        with pytest.raises(ValueError, match=reason):
            called_function(tests)
