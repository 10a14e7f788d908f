"""Verdicts on generated programs, by tests that call their functions."""

import ast
import builtins
import json
import os
import secrets
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from .sandbox import Execution, Limits, Sandbox, again


_SIDES = Path(__file__).with_name("function_sides.py").read_text(encoding="utf-8")
# Modules of which tests may import all names.
_WHOLE_MODULES = "typing collections functools itertools heapq bisect math operator string statistics".split()
_ATTRIBUTES = {name for kind in (str, bytes, int, float, complex, list, dict, set, deque) for name in dir(kind)}
_LOCK = threading.Lock()  # CPython 3.11 fails when two threads make syntax trees at the same time


@dataclass(frozen=True)
class Verdict:
    """
    What tests say of a program.

    Args:
        passed (`bool`):
            Whether it passes all tests.
        share (`float`):
            Share of the tests that it passes, as far as they were run. A test of functions counts as one.
        reason (`str`):
            Why it does not pass.
        forgeable (`bool`):
            Whether a program that knows how could pass without being right.
    """

    passed: bool
    share: float
    reason: str = ""
    forgeable: bool = False


def check_function(
    sandbox: Sandbox, program: str, tests: str, limits: Limits, function: str | None = None, header: str = ""
) -> Verdict:
    """
    Run tests that call a function of a program.

    Tests and program run in two sandboxes, and the calls go from one to the other: the process of the program sees
    their arguments and neither the tests nor the expected results, and only plain values come out of it. Without a
    `function`, for tests that hand over what is no plain value, and on a server, both run in one process and the
    verdict is forgeable: the program could find the word by which the tests say that they passed.

    Args:
        sandbox ([`Sandbox`]):
            Where both run.
        program (`str`):
            Text of the program.
        tests (`str`):
            Text of the tests: statements, test functions, test methods and test cases of unittest.
        limits ([`Limits`]):
            Limits of each process.
        function (`str`, *optional*):
            Name of the function that the tests call, see [`called_function`].
        header (`str`, *optional*, defaults to `""`):
            Text that is run before the program and before the tests: imports and helpers.

    Returns:
        [`Verdict`]: The verdict.
    """
    nonce = secrets.token_hex(16)
    request = {"program": program, "tests": tests, "header": header, "function": function, "nonce": nonce}
    if function is not None and type(sandbox) is Sandbox:
        execution = again(lambda: _two_processes(sandbox, request, limits), lambda found: found.status == "killed")
        if not execution.stdout.startswith("not plain"):
            return _verdict(execution, nonce, forgeable=False)
    execution = sandbox.run(f"{_SIDES}\nmain('both')\n", json.dumps(request), limits)
    return _verdict(execution, nonce, forgeable=True)


def _two_processes(sandbox: Sandbox, request: dict, limits: Limits) -> Execution:
    """How the process of the tests ended; that of the program if the system ended it."""
    (called, calls), (replies, answers) = os.pipe(), os.pipe()
    of_program = json.dumps({name: request[name] for name in ("program", "header", "function")})
    with ThreadPoolExecutor(1) as pool:
        text = f"{_SIDES}\nmain('answer', {called}, {answers})\n"
        program = pool.submit(sandbox.run_once, text, of_program, limits, (called, answers))
        text = f"{_SIDES}\nmain('test', {calls}, {replies})\n"
        of_tests = json.dumps({**request, "program": ""})
        tests = sandbox.run_once(text, of_tests, limits, (calls, replies))
    ended = program.result()
    if tests.stdout.startswith("no plain answer") and ended.status != "ok":
        return ended
    return tests


def _verdict(execution: Execution, nonce: str, forgeable: bool) -> Verdict:
    passed = execution.status == "ok" and execution.stdout.endswith(nonce)
    last = [*execution.stdout.strip().splitlines()[-1:], *execution.stderr.strip().splitlines()[-1:]]
    reason = "" if passed else ": ".join([execution.status, *(line[:200] for line in last)])
    return Verdict(passed, float(passed), reason, forgeable)


def called_function(tests: str, header: str) -> str | None:
    """
    The one function of a program that tests call with plain values, so that they can be run in a process of their own.

    Args:
        tests (`str`):
            Text of the tests.
        header (`str`):
            Text that is run before them.

    Returns:
        `str`: Its name; `None` if they need more of the program than that: a class, an argument that it changes, one
        of its functions for the result of another.

    Raises:
        `ValueError`: If the tests cannot be run, since they are no Python, use no name of the program or need more
            than the standard library.
    """
    with _LOCK:
        try:
            compile(tests, "tests.py", "exec", dont_inherit=True)
            tree, head = ast.parse(tests), ast.parse(header)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"no Python ({error})") from error
        nodes, bound = list(ast.walk(tree)), _bound(tree)
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)}
    foreign = {name for name in modules if name.split(".")[0] not in {*sys.stdlib_module_names, "solution"}}
    if foreign:
        raise ValueError(f"imports {min(foreign)}")
    used = {node.id for node in nodes if isinstance(node, ast.Name)} - bound - set(dir(builtins)) - {"__name__"}
    names = used - _bound(head) or used  # a name that is all that tests use is that of the function
    if not names and "solution" not in modules:
        raise ValueError("calls nothing of the program")
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test"):
            if isinstance(node, ast.FunctionDef) and not [item for item in node.args.args if item.arg != "self"]:
                continue
            raise ValueError(f"{node.name} needs what pytest provides")
    if (
        len(names) != 1
        or min(names)[:1].isupper()
        or "solution" in {n.name for n in nodes if isinstance(n, ast.alias)}
    ):
        return None
    (name,) = names
    imports = _bound(head) | _bound(ast.Module([n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))], []))
    for node in nodes:  # an attribute that no plain value has
        if isinstance(node, ast.Attribute) and node.attr not in _ATTRIBUTES and node.attr[:6] != "assert":
            if getattr(node.value, "id", "") not in {*imports, "self"}:
                return None
    functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    tried = {id(part) for node in nodes if isinstance(node, (ast.With, ast.Try)) for part in ast.walk(node)}
    plain = set()  # places of the name where it is called, or handed to a function of the tests that calls it
    for node in nodes:
        if isinstance(node, ast.Expr) and _called(node.value) == name and id(node) not in tried:
            return None  # a call for the sake of what it changes
        if isinstance(node, ast.Call):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            if _called(node) in functions:
                plain.update(map(id, arguments))
            elif _called(node) == name:
                plain.add(id(node.func))
                if any(isinstance(item, ast.Lambda) or getattr(item, "id", "") in functions for item in arguments):
                    return None
    return None if any(getattr(node, "id", "") == name and id(node) not in plain for node in nodes) else name


def _called(node: ast.AST) -> str | None:
    return getattr(getattr(node, "func", None), "id", None)


def _bound(tree: ast.AST) -> set[str]:
    """Names that a text binds anywhere, other than by imports from the program."""
    bound = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
        elif isinstance(node, ast.ImportFrom) and node.names[0].name == "*" and node.module != "solution":
            bound |= set(dir(import_module(node.module))) if node.module in _WHOLE_MODULES else set()
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and getattr(node, "module", "") != "solution":
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return bound
