"""
Calls of functions across two programs: one holds the generated code, the other the tests.

This file is the text of both, up to `answer` that of the first, without `answer` that of the second. Standard library
only; what goes from one to the other is JSON on their standard input and output. Only plain values cross, so that no
object of the generated code, with an `__eq__` of its own, reaches a test.
"""

import ast
import builtins
import json
import operator
import os
import random
import re
import sys
from collections import deque
from decimal import Decimal
from fractions import Fraction
from itertools import islice


_SEQUENCES = {"l": list, "t": tuple, "s": set, "z": frozenset, "q": deque}
_SAFE = 2**53
_MOST = 10_000  # items of an iterator that cross
# What is done to an object of the generated code. None of it hands over what the object shall be equal to.
_ACTIONS = {
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    "get": lambda value: value,
    "set": setattr,
    "getitem": operator.getitem,
    "bool": bool,
    "iter": iter,
    "len": len,
    "repr": repr,
    "str": str,
}


def encode(value, other=lambda value: {"o": type(value).__name__}):
    """A plain value as JSON; anything else by the name of its type."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        value = int(value)
        return value if -_SAFE < value < _SAFE else {"i": hex(value)}
    if isinstance(value, float):
        return {"f": float(value).hex()}
    if isinstance(value, complex):
        return {"c": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, (bytes, bytearray)):
        return {"b": bytes(value).hex()}
    for name, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [encode(item, other) for item in value]}
    if isinstance(value, dict):
        return {"d": [[encode(key, other), encode(item, other)] for key, item in value.items()]}
    if isinstance(value, range):
        return {"a": [encode(item) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, Decimal):
        return {"n": str(value)}
    if isinstance(value, Fraction):
        return {"v": [encode(value.numerator), encode(value.denominator)]}
    if hasattr(type(value), "__next__") and type(value).__module__ in ("builtins", "itertools"):
        return {"y": [encode(item, other) for item in islice(value, _MOST)]}
    return other(value)


def decode(content, find=lambda reference: object()):
    """The value that `encode` was given."""
    if not isinstance(content, dict):
        return content
    (kind, inner), *_ = content.items()
    if kind == "i":
        return int(inner, 16)
    if kind == "f":
        return float.fromhex(inner)
    if kind == "c":
        return complex(*map(float.fromhex, inner))
    if kind == "b":
        return bytes.fromhex(inner)
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](decode(item, find) for item in inner)
    if kind == "d":
        return {decode(key, find): decode(item, find) for key, item in inner}
    if kind == "a":
        return range(*map(decode, inner))
    if kind == "n":
        return Decimal(inner)
    if kind == "v":
        return Fraction(*map(decode, inner))
    if kind == "y":
        return (item for item in [decode(item, find) for item in inner])
    return find(inner) if kind == "r" else object()


def answer(request):
    """The side of the generated code: run it, make the calls in order, and give back what each returned."""
    module = type(sys)("solution")
    sys.modules["solution"] = module
    output, sys.stdout = sys.stdout, open(os.devnull, "w")
    # One after the other: the program may begin with an import from `__future__`.
    for name in ("header", "program"):
        exec(compile(request[name], f"{name}.py", "exec"), module.__dict__)
    objects, results = [], []

    def find(reference):
        target, *path = reference
        value = getattr(module, target) if isinstance(target, str) else objects[target]
        for name in path:
            value = getattr(value, name)
        return value

    for action, reference, args, kwargs in request["calls"]:
        objects.append(None)
        try:
            args = [decode(item, find) for item in args]
            kwargs = {name: decode(item, find) for name, item in kwargs.items()}
            objects[-1] = _ACTIONS[action](find(reference), *args, **kwargs)
            results.append({"value": encode(objects[-1])})
        except Exception as error:
            results.append({"error": type(error).__name__, "text": str(error)[:200]})
    output.write(json.dumps(results))
    output.flush()


# An exception that a test may see. `StopIteration` is not among them: raised by a function that is mapped over inputs,
# it would end the test before its time, as passed.
_EXCEPTIONS = {
    name: getattr(builtins, name)
    for name in (
        "ArithmeticError AssertionError AttributeError EOFError FileNotFoundError IndexError KeyError LookupError "
        "NameError NotImplementedError OSError OverflowError PermissionError RecursionError RuntimeError TimeoutError "
        "TypeError UnicodeError ValueError ZeroDivisionError"
    ).split()
}
_AHEAD = 2000  # calls that are foreseen at a time


class _Stop(BaseException):
    """The end of a test whose verdict is not known yet, or that asks for what it may not have."""


class Record:
    """
    The calls that a test makes, and their results as far as they are known.

    A call that differs from the known ones, or goes beyond them, ends the test, or is guessed, and all after it, so
    that what the test calls next is seen.

    A test may not ask what a function of the generated code returned, be it by a method of it: an object whose
    `startswith` says yes would decide its own test.
    """

    def __init__(self, known, guessing):
        self.known, self.calls, self.guessing, self.certain = _settled(known), [], guessing, True
        self.verdict, self.text = "", ""

    def stop(self, verdict, text=""):
        # Kept here too, where a test that catches everything does not reach it.
        self.verdict, self.text = self.verdict or verdict, self.text or text
        raise _Stop

    def ask(self, action, reference, args=(), kwargs=None):
        args = [encode(item, _reference) for item in args]
        kwargs = {name: encode(item, _reference) for name, item in (kwargs or {}).items()}
        call, index = [action, reference, args, kwargs], len(self.calls)
        self.calls.append(call)
        if not self.certain or index >= len(self.known) or self.known[index]["call"] != call:
            self.certain = False
            if not self.guessing or index - len(self.known) > _AHEAD:
                self.stop("unknown")
            return (Remote if self.of_class(index) else Guess)(self, [index])
        result = self.known[index]["result"]
        if "error" in result:
            raise _EXCEPTIONS.get(result["error"], RuntimeError)(result.get("text", ""))
        return Remote(self, [index]) if _is_object(result) else decode(result["value"])

    def of_class(self, target):
        """Whether a target is a class, or was made by calling one, to judge by its name."""
        if isinstance(target, int):
            action, (target, *path), *_ = self.calls[target]
            if action != "call" or path:
                return False
        return isinstance(target, str) and target.lstrip("_")[:1].isupper()


class Remote:
    """What a test holds instead of a name of the generated code, or of something that it returned."""

    def __init__(self, record, reference):
        self.__dict__.update(_record=record, _reference=reference)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Remote(self._record, [*self._reference, name])

    def __setattr__(self, name, value):
        if not self._record.of_class(self._reference[0]):
            self._record.stop("failed", "sets an attribute of what the program returned")
        self._record.ask("set", self._reference, [name, value])

    def __call__(self, *args, **kwargs):
        target, *path = self._reference
        if (args or kwargs) and path and not (len(path) == 1 and self._record.of_class(target)):
            owner = Remote(self._record, self._reference[:-1])._value()
            if type(owner) is Remote:
                self._record.stop("failed", "gives arguments to a method of what the program returned")
            return getattr(owner, path[-1])(*args, **kwargs)
        return self._record.ask("call", self._reference, args, kwargs)

    def _value(self):
        named = len(self._reference) > 1 or isinstance(self._reference[0], str)
        return self._record.ask("get", self._reference) if named else self

    def __getitem__(self, key):
        return self._record.ask("getitem", self._reference, [key])

    def __bool__(self):
        return bool(self._record.ask("bool", self._reference))

    def __iter__(self):
        return iter(self._record.ask("iter", self._reference))

    def __len__(self):
        return int(self._record.ask("len", self._reference))

    def __repr__(self):
        return str(self._record.ask("repr", self._reference))

    def __str__(self):
        return str(self._record.ask("str", self._reference))

    __hash__ = object.__hash__


class Guess(Remote):
    """A result that is not known: goes through a test without an error, so that all calls are seen."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __setattr__(self, name, value):
        pass

    def __call__(self, *args, **kwargs):
        return self

    def __repr__(self):
        return ""

    def __format__(self, form):
        return ""

    def __bool__(self):
        return False

    def __iter__(self):
        return iter(())

    def __len__(self):
        return 0

    def __int__(self):
        return 0

    def __float__(self):
        return 0.0

    def __index__(self):
        return 0

    def __hash__(self):
        return 0

    def __eq__(self, other):
        return False

    def __ne__(self, other):
        return True

    __str__ = __repr__


def _here(function):
    """An operator that works on the value of an attribute, in the process of the test, and on no object."""

    def method(self, *others):
        value = self._value()
        return NotImplemented if type(value) is Remote else function(value, *others)

    return method


for _name in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split():
    _function = getattr(operator, f"__{_name}__")
    setattr(Remote, f"__{_name}__", _here(_function))
    setattr(Remote, f"__r{_name}__", _here(lambda value, other, function=_function: function(other, value)))
for _name in "eq ne lt le gt ge neg pos abs index".split():
    setattr(Remote, f"__{_name}__", _here(getattr(operator, f"__{_name}__")))
for _function in (int, float, round):
    setattr(Remote, f"__{_function.__name__}__", _here(_function))
for _name in (
    "add sub mul truediv floordiv mod pow and or xor lshift rshift getitem neg pos abs round lt le gt ge "
    "radd rsub rmul rtruediv rfloordiv rmod rpow rand ror rxor rlshift rrshift"
).split():
    setattr(Guess, f"__{_name}__", lambda self, *others: self)


def _plain(value):
    return value._value() if isinstance(value, Remote) else value


def _reference(value):
    return {"r": value._reference} if isinstance(value, Remote) else {"o": type(value).__name__}


def _is_object(result):
    content = result.get("value")
    return isinstance(content, dict) and "o" in content


def _settled(known):
    """Known calls as the test makes them, with the values of the results that they were given."""

    def settle(item):
        if isinstance(item, list):
            return [settle(part) for part in item]
        if not isinstance(item, dict):
            return item
        target, *path = item.get("r", [None])
        if isinstance(target, int) and not path:
            result = known[target]["result"]
            return item if "error" in result or _is_object(result) else result["value"]
        return {kind: settle(inner) for kind, inner in item.items()}

    settled = []
    for entry in known:
        action, reference, args, kwargs = entry["call"]
        kwargs = {name: settle(item) for name, item in kwargs.items()}
        settled.append({"call": [action, reference, settle(args), kwargs], "result": entry["result"]})
    return settled


class _Reading(ast.NodeTransformer):
    """Reads attributes of objects of the generated code where no operator does."""

    def visit_Compare(self, node):
        self.generic_visit(node)
        if any(isinstance(operation, (ast.Is, ast.IsNot)) for operation in node.ops):
            node.left, node.comparators = self._read(node.left), list(map(self._read, node.comparators))
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name == "isinstance" or name.startswith("assertIs"):
            node.args = list(map(self._read, node.args))
        return node

    def _read(self, node):
        return ast.Call(ast.Name("__plain__", ast.Load()), [node], []) if isinstance(node, ast.Attribute) else node


class _Tolerant(ast.NodeTransformer):
    """Turns `assert X` into `not X`, and lets errors of statements pass."""

    def visit_Assert(self, node):
        return self._guarded(ast.Expr(ast.UnaryOp(ast.Not(), node.test)))

    def visit_Expr(self, node):
        return node if isinstance(node.value, ast.Constant) else self._guarded(node)

    def visit_With(self, node):
        return self._guarded(self.generic_visit(node))

    visit_Assign = visit_Expr

    def _guarded(self, node):
        handler = ast.ExceptHandler(type=ast.Name("Exception", ast.Load()), name=None, body=[ast.Pass()])
        return ast.Try(body=[node], handlers=[handler], orelse=[], finalbody=[])


def free_names(tree):
    """Names that a test uses and nobody binds: those of the generated code."""
    used, bound = set(), set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return used - bound


class _Raises:
    def __init__(self, expected, match=None):
        self.expected, self.match, self.value = expected, match, None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        assert kind is not None, "nothing was raised"
        self.type, self.value = kind, error
        found = issubclass(kind, self.expected)
        assert not found or self.match is None or re.search(self.match, str(error)), f"another message: {error}"
        return found


class _Approx:
    def __init__(self, expected, rel=None, abs=None):
        self.expected, self.rel, self.abs = expected, rel, abs

    def __eq__(self, other):
        return self._close(self.expected, other)

    def _close(self, expected, other):
        if isinstance(expected, (list, tuple)):
            fine = isinstance(other, (list, tuple)) and len(other) == len(expected)
            return fine and all(map(self._close, expected, other))
        if isinstance(expected, dict):
            fine = isinstance(other, dict) and other.keys() == expected.keys()
            return fine and all(self._close(item, other[key]) for key, item in expected.items())
        numbers = (int, float, complex, Decimal, Fraction)
        if not isinstance(expected, numbers) or not isinstance(other, numbers) or expected == other:
            return expected == other
        relative = (1e-6 if self.rel is None else self.rel) if self.abs is None or self.rel is not None else 0
        return abs(expected - other) <= max(relative * abs(expected), 1e-12 if self.abs is None else self.abs)


def _raises(expected, *call, match=None, **kwargs):
    if not call:
        return _Raises(expected, match)
    with _Raises(expected) as raised:
        call[0](*call[1:], **kwargs)
    return raised


def _parametrize(names, values, **kwargs):
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    rows = [dict(zip(names, value if len(names) > 1 else [value])) for value in values]  # noqa: B905

    def mark(function):
        function.cases = [{**case, **row} for case in getattr(function, "cases", [{}]) for row in rows]
        return function

    return mark


def _fail(reason=""):
    raise AssertionError(reason)


def _pytest():
    """What tests use of pytest, which is not installed in the sandbox."""
    module = type(sys)("pytest")
    module.raises, module.approx, module.fail, module.main = _raises, _Approx, _fail, lambda *args: 0
    module.mark = type(sys)("mark")
    module.mark.parametrize, module.mark.timeout = _parametrize, lambda *args, **kwargs: lambda function: function
    return module


def _steps(names):
    """The tests that pytest would collect from a module."""
    unittest = sys.modules.get("unittest")
    for name, item in names:
        if isinstance(item, Remote):
            continue
        if isinstance(item, type) and item.__module__ == "tests":
            if unittest is not None and issubclass(item, unittest.TestCase):
                item.setUpClass()
                for method in unittest.TestLoader().getTestCaseNames(item):
                    yield item(method).debug
            elif name.startswith("Test"):
                for method in [method for method in vars(item) if method.startswith("test")]:
                    case = item()
                    getattr(case, "setup_method", bool)()
                    yield from _cases(getattr(case, method))
        elif name.startswith("test") and type(item) is type(_steps):
            yield from _cases(item)


def _cases(function):
    for case in getattr(function, "cases", [{}]):
        yield lambda case=case: function(**case)


def _attempt(text, record):
    """Run tests with a record of calls. Returns the verdict and a reason for it."""
    tree = ast.parse(text)
    names = free_names(tree)
    tree = _Reading().visit(tree)
    tree = ast.fix_missing_locations(_Tolerant().visit(tree) if record.guessing else tree)

    def attribute(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Remote(record, [name])

    solution, module = type(sys)("solution"), type(sys)("tests")
    solution.__getattr__ = attribute
    module.__dict__.update({name: Remote(record, [name]) for name in names}, __plain__=_plain)
    sys.modules.update(solution=solution, tests=module, pytest=_pytest())
    random.seed(0)
    verdict = "passed", ""
    try:
        exec(compile(tree, "tests.py", "exec"), module.__dict__)
        for step in _steps(list(module.__dict__.items())):
            try:
                step()
            except Exception:
                if not record.guessing:
                    raise
    except BaseException as error:
        verdict = "failed", f"{type(error).__name__}: {error}"[:500]
    return (record.verdict, record.text) if record.verdict else verdict


def test(request):
    """The side of the tests: run them against the results that are known, and say how they went."""
    output, sys.stdout = sys.stdout, open(os.devnull, "w")
    known, calls, verdict, text = request["known"], [], "unknown", ""
    if known is not None:
        record = Record(known, False)
        verdict, text = _attempt(request["tests"], record)
        calls = record.calls
    if verdict == "unknown":
        record = Record(known or [], True)
        _attempt(request["tests"], record)
        # If the guesses led elsewhere, what is certain is enough.
        calls = record.calls if record.calls[: len(calls)] == calls else calls
    output.write(json.dumps({"verdict": verdict, "text": text, "calls": calls}))
    output.flush()
