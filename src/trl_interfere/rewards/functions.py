"""Tests that call the functions of generated programs."""

import ast
import builtins
import json
import os
import secrets
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from unittest import TestCase

from .sandbox import Execution, Limits, Sandbox, again


_SIDES = Path(__file__).with_name("function_sides.py").read_text(encoding="utf-8")
# What solutions to problems of functions may take for granted.
_MODULES = "typing collections functools itertools heapq bisect math".split()
_IMPORTED = "math operator re random string sys".split()
HEADER = "\n".join(f"from {module} import *" for module in _MODULES) + f"\nimport {', '.join(_IMPORTED)}"
_ATTRIBUTES = {name for kind in (str, bytes, int, float, complex, list, dict, set, TestCase) for name in dir(kind)}


def check_function(
    sandbox: Sandbox, program: str, tests: str, limits: Limits, function: str | None = None, header: str = ""
) -> tuple[bool, bool]:
    """
    Whether a program passes tests that call its function, after a header of imports and helpers, and whether one that
    knows how could pass without being right.

    Tests and program run in two sandboxes: the program sees the arguments of calls and no expected result, and only
    plain values come out of it. Without a `function`, for tests that hand over what is no plain value, and on a server
    both run in one process, where the program could find the word by which the tests say that they passed.
    """
    nonce = secrets.token_hex(16)
    request = {"program": program, "tests": tests, "header": header, "function": function, "nonce": nonce}
    apart = function is not None and type(sandbox) is Sandbox
    execution = again(lambda: _two_processes(sandbox, request, limits)) if apart else None
    if execution is None or execution.stdout.startswith("not plain"):
        execution, apart = sandbox.run(f"{_SIDES}\nmain('test')\n", json.dumps(request), limits), False
    return execution.status == "ok" and execution.stdout.endswith(nonce), not apart


def _two_processes(sandbox: Sandbox, request: dict, limits: Limits) -> Execution:
    """How the process of the tests ended; that of the program if the system ended it."""
    (called, calls), (replies, answers) = os.pipe(), os.pipe()

    def run(side: str, pipes: tuple[int, int], **without: str) -> Execution:
        return sandbox.run_once(f"{_SIDES}\nmain({side!r}, *{pipes})\n", json.dumps(request | without), limits, pipes)

    with ThreadPoolExecutor(1) as pool:
        program = pool.submit(run, "answer", (called, answers), tests="", nonce="")
        tests = run("test", (calls, replies), program="")
    ended = program.result()
    return ended if tests.stdout.startswith("no plain answer") and ended.status != "ok" else tests


def called_function(tests: str) -> str | None:
    """
    Name of the one function of a program that tests with `HEADER` call with plain values; `None` if they need more of
    it. Refuses tests that cannot be run.
    """
    try:
        nodes = [*ast.walk(ast.parse(tests))]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"no Python ({error})") from error
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = [(node, alias) for node in imports for alias in node.names]
    modules = {getattr(node, "module", alias.name) or "." for node, alias in imported}
    if foreign := {name for name in modules if name.split(".")[0] not in {*sys.stdlib_module_names, "solution"}}:
        raise ValueError(f"imports {min(foreign)}")
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test"):
            if isinstance(node, ast.AsyncFunctionDef) or [item for item in node.args.args if item.arg != "self"]:
                raise ValueError(f"{node.name} needs what pytest provides")
    known = {*_IMPORTED, *(name for module in _MODULES for name in dir(import_module(module)))}
    bound = {getattr(node, field, None) for node in nodes for field in ("name", "arg", "asname")}
    bound |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    wanted = {alias.name for node, alias in imported if getattr(node, "module", "") == "solution"}
    used = ({node.id for node in nodes if isinstance(node, ast.Name)} - bound | wanted) - {"*", *dir(builtins)}
    names = used - known or used  # a name that is all that tests use is that of the function
    if not names and "solution" not in modules:
        raise ValueError("calls nothing of the program")
    name, bases = min(names, default=""), {"self", *known, *((alias.asname or alias.name) for _, alias in imported)}
    if len(names) != 1 or name[0].isupper() or any(alias.name == "solution" for _, alias in imported):
        return None
    called = {id(part) for node in nodes if isinstance(node, ast.Call) for part in (node.func, *node.args)}
    caught = {id(part) for node in nodes if isinstance(node, (ast.With, ast.Try)) for part in ast.walk(node)}
    more = (
        node
        for node in nodes
        # it is more than called, or handed on to be called
        if (isinstance(node, ast.Name) and node.id == name and id(node) not in called)
        # a call for the sake of what it changes
        or (isinstance(node, ast.Expr) and _base(node.value, "func") == name and id(node) not in caught)
        # what no plain value has
        or (isinstance(node, ast.Attribute) and node.attr not in _ATTRIBUTES and _base(node, "value") not in bases)
    )
    return None if any(more) else name


def _base(node: ast.AST, field: str) -> str:
    return getattr(getattr(node, field, None), "id", "")
