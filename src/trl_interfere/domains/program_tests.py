"""Verdicts on generated programs, reached outside the process that runs them."""

import ast
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .sandbox import Execution, Limits


# Without docstrings and comments, since it is compiled in every run. Here and not where it is used: CPython 3.11 fails
# when two threads make syntax trees at the same time.
_CALLS = ast.unparse(ast.parse(Path(__file__).with_name("calls.py").read_text(encoding="utf-8")))
_ROUNDS = 40  # of calls that could not be foreseen; each costs a run of the program and one of the tests


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
    """

    passed: bool
    share: float
    reason: str = ""


def check_output(
    sandbox: Any, program: str, inputs: list[str], outputs: list[str], limits: Limits, stop: bool = True
) -> Verdict:
    """
    Run a program on inputs and compare what it prints, line by line, without regard to space at the ends of lines.

    The expected outputs stay in this process: to print them, a program has to find them.

    Args:
        sandbox ([`Sandbox`]):
            Where it runs.
        program (`str`):
            Its text.
        inputs (`list[str]`):
            Standard inputs.
        outputs (`list[str]`):
            Expected standard outputs, one for each input.
        limits ([`Limits`]):
            Limits of each run.
        stop (`bool`, *optional*, defaults to `True`):
            End with the first test that fails.

    Returns:
        [`Verdict`]: The verdict.
    """
    passed, reason = 0, ""
    for index, (stdin, expected) in enumerate(zip(inputs, outputs, strict=True)):
        execution = sandbox.run(program, stdin, limits)
        if execution.status == "ok" and _lines(execution.stdout) == _lines(expected):
            passed += 1
            continue
        reason = reason or f"test {index}: {_reason(execution) or 'wrong output'}"
        if stop:
            break
    return Verdict(passed == len(inputs) > 0, passed / max(len(inputs), 1), reason)


def check_calls(sandbox: Any, program: str, tests: str, limits: Limits) -> Verdict:
    """
    Run tests that call functions of a program.

    Tests and program run in two processes of the sandbox, one after the other: the tests say which calls they make,
    the program answers them, and the tests judge the answers. The process of the program sees the arguments of the
    calls and neither the tests nor the expected results, and only plain values come out of it.

    Args:
        sandbox ([`Sandbox`]):
            Where both run.
        program (`str`):
            Text of the program.
        tests (`str`):
            Text of the tests. Names that they use and do not define are those of the program; functions `test_...` are
            called.
        limits ([`Limits`]):
            Limits of each run.

    Returns:
        [`Verdict`]: The verdict.
    """
    calls = _foreseen_calls(sandbox, tests, limits)
    for _ in range(_ROUNDS):
        execution = _run(sandbox, "answer", {"program": program, "calls": calls}, limits)
        if execution.status != "ok":
            return Verdict(False, 0.0, f"program: {_reason(execution)}")
        results = _results(execution.stdout, len(calls))
        if results is None:
            return Verdict(False, 0.0, "program: wrote over the answers to the calls")
        known = [{"call": call, "result": result} for call, result in zip(calls, results, strict=True)]
        execution = _run(sandbox, "test", {"tests": tests, "known": known}, limits)
        if execution.status != "ok":
            return Verdict(False, 0.0, f"tests: {_reason(execution)}")
        report = json.loads(execution.stdout)
        if report["verdict"] == "passed" and not report["calls"]:
            return Verdict(False, 0.0, "tests: made no call of the program")
        if report["verdict"] != "unknown":
            return Verdict(report["verdict"] == "passed", float(report["verdict"] == "passed"), report["text"])
        calls = report["calls"]
    return Verdict(False, 0.0, f"tests: more than {_ROUNDS} calls depend on results of others")


def _foreseen_calls(sandbox: Any, tests: str, limits: Limits) -> list[dict]:
    cache = sandbox.__dict__.setdefault("_foreseen", {})
    if tests not in cache:
        execution = _run(sandbox, "test", {"tests": tests, "known": None}, limits)
        cache[tests] = json.loads(execution.stdout)["calls"] if execution.status == "ok" else []
    return cache[tests]


def _run(sandbox: Any, side: str, request: dict, limits: Limits) -> Execution:
    return sandbox.run(f"{_CALLS}\n{side}(json.loads(sys.stdin.read()))\n", json.dumps(request), limits)


def _results(text: str, n: int) -> list[dict] | None:
    try:
        results = json.loads(text)
    except (ValueError, RecursionError):
        return None
    fine = isinstance(results, list) and len(results) == n
    fine = fine and all(isinstance(item, dict) and ("value" in item or "error" in item) for item in results)
    return results if fine else None


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _reason(execution: Execution) -> str:
    if execution.status == "ok":
        return ""
    last = execution.stderr.strip().splitlines()[-1:]
    return f"{execution.status}{''.join(f' ({line[:200]})' for line in last)}"
