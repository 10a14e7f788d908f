"""
Runs inside the sandbox: the process of a generated program, that of the tests that call its function, or both in one.

Between the two go lines of Python literals: no object of the program, with an `__eq__` of its own, reaches a test.
"""

import ast
import builtins
import json
import os
import sys
from itertools import islice


_CONTAINERS = (str, bytes, list, tuple, dict, set, frozenset)
_MOST = 10_000  # items of an iterator that cross


class Lost(BaseException):
    """The end of the program, or an answer that is none."""


class _Infinite(ast.NodeTransformer):
    def visit_Name(self, node):
        return ast.Constant(float(node.id)) if node.id in ("inf", "nan") else node


def plain(value):
    """A copy of a value in built-in types."""
    if value is None:
        return value
    for kind in (bool, str, int, float, complex, bytes):
        if isinstance(value, kind):
            return kind(value)
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return (set if kind is frozenset else kind)(map(plain, value))
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    raise TypeError(f"{type(value).__name__} is no plain value")


def read(line):
    """The value that was written as a literal."""
    return ast.literal_eval(_Infinite().visit(ast.parse(line, mode="eval")))


def answer(request, calls, answers):
    """The process of the program: run it, and give back what its function returns for each call."""
    module = load(request)
    for line in calls:
        args, kwargs = read(line)
        try:
            value = getattr(module, request["function"])(*args, **kwargs)
            if hasattr(type(value), "__iter__") and not isinstance(value, _CONTAINERS):
                reply = "items", plain(list(islice(value, _MOST)))
            else:
                reply = "value", plain(value)
        except Exception as error:
            reply = type(error).__name__, str(error)[:200]
        answers.write(f"{reply!r}\n")
        answers.flush()


def load(request):
    """The module of the program."""
    module = sys.modules["solution"] = type(sys)("solution")
    # One after the other: the program may begin with an import from `__future__`.
    for name in ("header", "program"):
        exec(compile(request[name], f"{name}.py", "exec", dont_inherit=True), module.__dict__)
    return module


class Remote:
    """What a test holds instead of the function of the program. It can be called, and nothing else."""

    __slots__ = ("calls", "answers", "made", "problem")

    def __init__(self, calls, answers):
        self.calls, self.answers, self.made, self.problem = calls, answers, 0, ""

    def __call__(self, *args, **kwargs):
        self.made += 1
        try:
            line = repr(plain([args, kwargs]))
        except TypeError as error:
            self.stop(f"not plain: {error}")
        try:
            self.calls.write(f"{line}\n")
            self.calls.flush()
            name, value = read(self.answers.readline())
            if name in ("value", "items"):
                return value if name == "value" else iter(value)
        except Exception as error:
            self.stop(f"no plain answer ({type(error).__name__})")
        # Not one that would end a loop of the test before its time, as `StopIteration` does.
        kind = getattr(builtins, str(name), None)
        fine = isinstance(kind, type) and issubclass(kind, Exception) and "Iteration" not in kind.__name__
        raise (kind if fine and not issubclass(kind, UnicodeError) else RuntimeError)(str(value))

    def stop(self, problem):
        self.problem = self.problem or problem  # kept where a test that catches everything does not reach it
        raise Lost(problem)


def run_tests(text, namespace):
    """Run the text of the tests and the test functions and test cases that it defines."""
    before = set(namespace)
    exec(compile(text, "tests.py", "exec", dont_inherit=True), namespace)
    unittest = sys.modules.get("unittest")
    for name, item in [(name, item) for name, item in namespace.items() if name not in before]:
        if unittest and isinstance(item, type) and issubclass(item, unittest.TestCase):
            result = unittest.TestResult()
            unittest.defaultTestLoader.loadTestsFromTestCase(item).run(result)
            assert result.wasSuccessful(), [*result.failures, *result.errors][:1]
        elif isinstance(item, type) and name.startswith("Test"):
            for method in [method for method in vars(item) if method.startswith("test")]:
                getattr(item(), method)()
        elif callable(item) and name.startswith("test"):
            item()


def test(request, *pipes):
    """The process of the tests, without pipes that of the program too. It says the nonce if they pass."""
    report, module, remote = sys.stdout.buffer, load(request), None
    if pipes:
        remote = vars(module)[request["function"]] = Remote(*pipes)
        sys.stdout = open(os.devnull, "w")
    try:
        run_tests(request["tests"], {**vars(module), "__name__": "tests"})
        problem = "" if remote is None or remote.made else "made no call of the program"
    except BaseException as error:
        problem = f"{type(error).__name__}: {error}"[:200]
    problem = getattr(remote, "problem", "") or problem
    report.write((problem or request["nonce"]).encode("utf-8", "replace"))
    report.flush()
    os._exit(0)


def main(side, *pipes):
    request = json.loads(sys.stdin.read())
    modes = "rw" if side == "answer" else "wr"
    globals()[side](request, *(os.fdopen(pipe, mode) for pipe, mode in zip(pipes, modes, strict=False)))
