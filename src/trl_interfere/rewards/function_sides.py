"""
Runs inside the sandbox: the process of a generated program, that of the tests that call its functions, or both in one.

Standard library only. Between the two go lines of JSON with plain values, so that no object of the generated code,
with an `__eq__` of its own, reaches a test.
"""

import builtins
import json
import os
import sys
from collections import deque
from itertools import islice


_KINDS = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque, "iterator": iter}
_MOST = 10_000  # items of an iterator that cross


class Lost(BaseException):
    """The end of the program, or an answer that is none."""


class NotPlain(BaseException):
    """A test hands over what is no plain value."""


def encode(value):
    """A plain value as JSON; `NotPlain` for anything else."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    for name in ("tuple", "set", "frozenset", "deque"):
        if isinstance(value, _KINDS[name]):
            return {name: [encode(item) for item in value]}
    if hasattr(type(value), "__next__") or type(value) in (type({}.keys()), type({}.values()), type({}.items())):
        return {"iterator": [encode(item) for item in islice(value, _MOST)]}
    raise NotPlain(type(value).__name__)


def decode(content):
    """The value that `encode` was given."""
    if isinstance(content, list):
        return [decode(item) for item in content]
    if not isinstance(content, dict):
        return content
    ((kind, inner),) = content.items()
    if kind == "complex":
        return complex(*map(float, inner))
    if kind == "bytes":
        return bytes.fromhex(inner)
    if kind == "range":
        return range(*map(int, inner))
    if kind == "dict":
        return {decode(key): decode(item) for key, item in inner}
    return _KINDS[kind]([decode(item) for item in inner])


def answer(request, calls, answers):
    """The process of the program: run it, and give back what its function returns for each call."""
    module = load(request)
    for line in calls:
        args, kwargs = decode(json.loads(line))
        try:
            reply = {"value": encode(getattr(module, request["function"])(*args, **kwargs))}
        except Exception as error:
            reply = {"error": type(error).__name__, "text": str(error)[:200]}
        except NotPlain as error:
            reply = {"object": str(error)}
        answers.write(json.dumps(reply) + "\n")
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
            line = json.dumps([encode(list(args)), encode(kwargs)]) + "\n"
        except NotPlain as error:
            self.stop(f"not plain: {error}")
        try:
            self.calls.write(line)
            self.calls.flush()
            reply = json.loads(self.answers.readline())
            if "error" not in reply:
                return decode(reply["value"])
            name, text = str(reply["error"]), str(reply.get("text", ""))
        except Exception as error:
            self.stop(f"no plain answer ({type(error).__name__})")
        # Not one that would end a loop of the test before its time, as `StopIteration` does.
        kind = getattr(builtins, name, None)
        fine = isinstance(kind, type) and issubclass(kind, Exception) and "Iteration" not in name
        raise (kind if fine and not issubclass(kind, UnicodeError) else RuntimeError)(text)

    def stop(self, problem):
        self.problem = self.problem or problem  # kept where a test that catches everything does not reach it
        raise Lost(problem)


def run_tests(text, namespace):
    """Run the text of the tests and the test functions and test cases that it defines."""
    before = set(namespace)
    exec(compile(text, "tests.py", "exec", dont_inherit=True), namespace)
    for name in [name for name in namespace if name not in before]:
        item = namespace[name]
        if "unittest" in sys.modules and isinstance(item, type) and issubclass(item, sys.modules["unittest"].TestCase):
            result = sys.modules["unittest"].TestResult()
            sys.modules["unittest"].defaultTestLoader.loadTestsFromTestCase(item).run(result)
            assert result.wasSuccessful(), [*result.failures, *result.errors][:1]
        elif isinstance(item, type) and name.startswith("Test"):
            for method in [method for method in vars(item) if method.startswith("test")]:
                getattr(item(), method)()
        elif callable(item) and name.startswith("test"):
            item()


def test(request, calls, answers):
    """The process of the tests. It says the nonce if they pass."""
    remote = Remote(calls, answers)
    solution = sys.modules["solution"] = type(sys)("solution")
    namespace = {"__name__": "tests"}
    exec(compile(request["header"], "header.py", "exec", dont_inherit=True), namespace)
    namespace[request["function"]] = remote
    solution.__dict__[request["function"]] = remote
    report = sys.stdout
    sys.stdout = open(os.devnull, "w")
    problem = ""
    try:
        run_tests(request["tests"], namespace)
    except BaseException as error:
        problem = f"{type(error).__name__}: {error}"[:200] or "failed"
    problem = remote.problem or problem or ("" if remote.made else "made no call of the program")
    report.write(problem or request["nonce"])
    report.flush()
    os._exit(0)


def both(request):
    """Program and tests in one process. It says the nonce if they pass, or if the program finds it."""
    report = sys.stdout.buffer
    module = load(request)
    namespace = {**vars(module), "__name__": "tests"}
    run_tests(request["tests"], namespace)
    report.write(request["nonce"].encode())
    report.flush()
    os._exit(0)


def main(side, calls=None, answers=None):
    request = json.loads(sys.stdin.read())
    if side == "both":
        return both(request)
    if side == "answer":
        return answer(request, os.fdopen(calls), os.fdopen(answers, "w"))
    return test(request, os.fdopen(calls, "w"), os.fdopen(answers))
