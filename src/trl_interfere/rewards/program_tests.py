"""Verdicts on generated programs, reached outside the process that runs them."""

import ast
import json
import logging
import marshal
from binascii import b2a_base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkable import unsupported
from .sandbox import Execution, Limits, SandboxError


logger = logging.getLogger(__name__)

_ROUNDS = 200  # of calls that could not be foreseen; each costs a run of the program and one of the tests
_TIMES = 10  # the limit of one run, for all rounds together


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


def _sides() -> dict[tuple[str, bool], str]:
    """
    Texts of the two programs that [`check_calls`] runs, by their names and whether they run by this interpreter.

    Made here once. Where they do, they hold bytecode: it takes longer to compile them than to run most programs.
    """
    body, texts = ast.parse(Path(__file__).with_name("calls.py").read_text(encoding="utf-8")).body, {}
    end = next(index for index, node in enumerate(body) if getattr(node, "name", "") == "answer")
    for side, part in (("answer", body[: end + 1]), ("test", body[:end] + body[end + 1 :])):
        text, call = ast.unparse(ast.Module(part, [])), f"\n{side}(json.loads(sys.stdin.read()))\n"
        code = b2a_base64(
            marshal.dumps(compile(text, f"{side}.py", "exec", dont_inherit=True)), newline=False
        ).decode()
        texts[side, False] = text + call
        texts[side, True] = f"import binascii, marshal\nexec(marshal.loads(binascii.a2b_base64({code!r}))){call}"
    return texts


_SIDES = _sides()


def check_calls(sandbox: Any, program: str, tests: str, limits: Limits, header: str = "") -> Verdict:
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
            Text of the tests. Names that they use and do not define are those of the program; functions, methods of
            classes and test cases of unittest are called as pytest would.
        limits ([`Limits`]):
            Limits of each run.
        header (`str`, *optional*, defaults to `""`):
            Text that is run before the program, in its module.

    Returns:
        [`Verdict`]: The verdict.

    Raises:
        [`SandboxError`]: If the sandbox cuts off what the tests report.
    """
    problem, calls = _foreseen_calls(sandbox, tests, limits)
    if problem:
        return Verdict(False, 0.0, f"tests: {problem}")
    seconds = 0.0
    for _ in range(_ROUNDS):
        request = {"header": header, "program": program, "calls": calls}
        execution = _run(sandbox, "answer", request, limits)
        seconds += execution.seconds
        if execution.status != "ok":
            return Verdict(False, 0.0, f"program: {_reason(execution)}")
        results = _results(execution.stdout, len(calls))
        if results is None:
            return Verdict(False, 0.0, "program: wrote over the answers to the calls")
        known = [{"call": call, "result": result} for call, result in zip(calls, results, strict=True)]
        execution = _run(sandbox, "test", {"tests": tests, "known": known}, limits)
        if execution.status != "ok":
            return Verdict(False, 0.0, f"tests: {_reason(execution)}")
        report = _report(execution)
        if report["verdict"] == "passed" and not report["calls"]:
            return Verdict(False, 0.0, "tests: made no call of the program")
        if report["verdict"] != "unknown":
            return Verdict(report["verdict"] == "passed", float(report["verdict"] == "passed"), report["text"])
        if seconds > _TIMES * limits.seconds:
            return Verdict(False, 0.0, "program: timeout of all runs together")
        calls = report["calls"]
    logger.warning("a test was given up: more than %d calls depend on results of others:\n%s", _ROUNDS, tests[:500])
    return Verdict(False, 0.0, f"tests: more than {_ROUNDS} calls depend on results of others")


def _foreseen_calls(sandbox: Any, tests: str, limits: Limits) -> tuple[str, list[list]]:
    """Why tests cannot be run, and the calls that they make whatever the results are."""
    cache = sandbox.__dict__.setdefault("_foreseen", {})
    if tests not in cache:
        problem = unsupported(tests)
        calls = []
        if not problem:
            execution = _run(sandbox, "test", {"tests": tests, "known": None}, limits)
            if execution.status != "ok":
                return "", []  # this time only: the machine may have been busy
            calls = _report(execution)["calls"]
        cache[tests] = problem, calls
    return cache[tests]


def _run(sandbox: Any, side: str, request: dict, limits: Limits) -> Execution:
    return sandbox.run(_SIDES[side, getattr(sandbox, "same_interpreter", False)], json.dumps(request), limits)


def _report(execution: Execution) -> dict:
    """What the side of the tests reports. The program has no part in how it is written."""
    try:
        return json.loads(execution.stdout)
    except ValueError as error:
        raise SandboxError(
            "sandbox: expected the report of a test as JSON, found a part of it "
            f"({len(execution.stdout):,} characters). On a Piston server, raise PISTON_OUTPUT_MAX_SIZE"
        ) from error


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
