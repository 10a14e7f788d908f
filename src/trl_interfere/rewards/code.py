"""Reward `code`: programs that are run against tests in the sandbox."""

import json
import math
import re
import textwrap
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from .functions import check_function
from .piston import PistonSandbox
from .sandbox import Limits, Sandbox, check_sandbox
from .text import answer_text


_LONGEST = 100_000  # characters of a program
_FENCE = re.compile(
    r"(?P<fence>```|~~~)[ \t]*(?P<tag>\w*)[^\n]*\n(?P<program>.*?)(?:^[ \t]*(?P=fence)|\Z)", re.DOTALL | re.MULTILINE
)
_BEGIN = re.compile(r"^(?:import|from|def|class|async def|@)\b", re.MULTILINE)
_DECIMAL = re.compile(r"[+-]?\d{1,30}\.\d{1,30}(?:e[+-]?\d{1,3})?")


@lru_cache
def open_sandbox(name: str = "bubblewrap") -> Sandbox:
    """The sandbox of a name: `"bubblewrap"`, or the address of a Piston server."""
    check_sandbox(name)
    return Sandbox() if name == "bubblewrap" else PistonSandbox(name)


class CodeReward:
    """
    1 if the program of a completion passes all tests, 0 otherwise.

    The program is the last block between fences that defines the function that is asked for; the last one where no
    function is asked for or none defines it; the whole completion where there is none. What it prints is compared
    line by line, without regard to space at the ends of lines; decimals may differ by a millionth of their size. Tests
    of functions run in two processes where they can; the share of completions that pass tests that a program could
    forge is logged as `code/forgeable`.

    Args:
        sandbox (`str`, *optional*, defaults to `"bubblewrap"`):
            Where programs run: `"bubblewrap"`, or the address of a Piston server, opened at the first call.
        seconds (`float`, *optional*, defaults to `5.0`):
            Processor time of one test.
        memory_mb (`int`, *optional*, defaults to `512`):
            Largest address space, in MiB.
        partial (`bool`, *optional*, defaults to `False`):
            Whether the reward is the share of the tests that pass.
        thinking (`bool`, *optional*, defaults to `False`):
            Whether the model thinks before it answers.
    """

    __name__ = "code_reward"

    def __init__(
        self,
        sandbox: str = "bubblewrap",
        seconds: float = 5.0,
        memory_mb: int = 512,
        partial: bool = False,
        thinking: bool = False,
    ):
        self.sandbox, self.limits = sandbox, Limits(seconds=seconds, memory=memory_mb * 2**20)
        self.partial, self.thinking = partial, thinking

    def __call__(
        self,
        completions: list,
        tests: list[str],
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        """
        Rewards of completions by the tests of each problem, as JSON: `inputs` and `outputs`, or `calls` (texts of
        tests) with `function`, `header` and `code` (the beginning of the program).
        """
        checked = open_sandbox(self.sandbox).map(self.check, completions, tests)
        if log_metric is not None and any("calls" in json.loads(content) for content in tests):
            log_metric("code/forgeable", sum(share == 1 and forgeable for share, forgeable in checked) / len(checked))
        return [share if self.partial else float(share == 1) for share, _ in checked]

    def check(self, completion: str | list[dict], tests: str) -> tuple[float, bool]:
        """Share of the tests that the program of a completion passes, and whether a program could forge one."""
        content, limits = json.loads(tests), self.limits
        function = content.get("function")
        program = extract_program(answer_text(completion, self.thinking), function, content.get("code"))
        if program is None:
            return 0.0, False
        sandbox, forgeable, passed = open_sandbox(self.sandbox), False, 0
        apart, header = None if content.get("forgeable") else function, content.get("header", "")
        cases = content.get("calls") or [*zip(content["inputs"], content["outputs"], strict=True)]
        for case in cases:
            if "calls" in content:
                right, forged = check_function(sandbox, program, case, limits, apart, header)
            else:  # what is expected stays in this process
                execution, forged = sandbox.run(program, case[0], limits), False
                right = execution.status == "ok" and _same_lines(execution.stdout, case[1])
            passed, forgeable = passed + right, forgeable or forged
            if not right and not self.partial:
                break
        return passed / len(cases), forgeable


code_reward = CodeReward()


def _same_lines(found: str, expected: str) -> bool:
    lines = [[line.rstrip() for line in text.rstrip().split("\n")] for text in (found, expected)]
    return len(lines[0]) == len(lines[1]) and all(
        one == other or (len(one.split()) == len(other.split()) and all(map(_close, one.split(), other.split())))
        for one, other in zip(*lines, strict=True)
    )


def _close(found: str, expected: str) -> bool:
    decimals = _DECIMAL.fullmatch(found) and _DECIMAL.fullmatch(expected)
    return math.isclose(float(found), float(expected), rel_tol=1e-6, abs_tol=1e-9) if decimals else found == expected


def extract_program(text: str | None, function: str | None = None, code: str | None = None) -> str | None:
    """
    The program in a text: the last block between fences that defines the function. A text that begins with an indented
    line goes on from `code`, the beginning of the program up to the body of the function.
    """
    if not text or not text.strip() or len(text) > _LONGEST:
        return None
    blocks = sorted(_FENCE.finditer(text), key=lambda match: match["tag"].casefold() in ("python", "py", "python3"))
    programs = [match["program"] for match in blocks] or [text]
    if function is None:
        return textwrap.dedent(programs[-1])
    begin = re.compile(rf"^(?:(?:(?:async\s+)?def|class)\s+{function}\b|{function}\s*[=:])", re.MULTILINE)
    for program in map(textwrap.dedent, reversed(programs)):
        if begin.search(program):
            first = None if blocks else _BEGIN.search(program)
            return program[first.start() :] if first else program
    body = programs[-1].strip("\n")
    if code is not None and body[:1] in (" ", "\t"):
        return "{}\n{}\n".format(code, re.split(r"\n(?=\S)", body, maxsplit=1)[0])
    return programs[-1] if blocks else None
