"""The domain `math`."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from datasets import Dataset

from ..domain import Domain
from ..extras import require
from ..rewards.math import MathReward, number
from .sources import OFFLINE, DataOptions, asked, parts_of


# Generators of reasoning-gym that answer with a number.
TASKS = ("chain_sum", "basic_arithmetic", "gsm_symbolic", "simple_equations", "gcd", "lcm")
MATH_INSTRUCTION = "Reason step by step, and put your final answer within \\boxed{}."
_NO_ANSWER = {"", "proof", "not found", "notfound", "none", "null"}
_LONGEST = 300  # characters of an answer


def math_domain(
    name: str = "math",
    source: str = OFFLINE["math"],
    test_source: str | None = None,
    tasks: Mapping[str, dict] | list[str] | None = None,
    seed: int = 0,
    instruction: str = MATH_INSTRUCTION,
    thinking: bool = False,
    **options: Unpack[DataOptions],
) -> Domain:
    """
    The domain `math`: problems with one answer.

    Args:
        name (`str`, *optional*, defaults to `"math"`):
            Name of the domain.
        source (`str`, *optional*, defaults to `"reasoning-gym"`):
            `"reasoning-gym"` (made on this machine), `"openr1-math"` or `"aime25"`.
        test_source (`str`, *optional*):
            Where the test part comes from. Defaults to `source`.
        tasks (`Mapping[str, dict]` or `list[str]`, *optional*):
            Generators of reasoning-gym with their settings. Defaults to `TASKS`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the generators.
        instruction (`str`, *optional*):
            What follows the problem in the prompt.
        thinking (`bool`, *optional*, defaults to `False`):
            Whether the model thinks before it answers: only what follows `</think>` counts.
        **options:
            See [`DataOptions`].

    Returns:
        [`Domain`]: With one reward, [`MathReward`].

    Raises:
        `ImportError`: If an extra is not installed.
        `ValueError`: If a data set cannot be read or there are too few rows.
    """
    where = f"domain {name!r}"
    require("math_verify", "math", where)

    def row(given: dict[str, Any]) -> dict[str, Any]:
        answer, question = str(given["answer"] or "").strip(), given["question"]
        right = given.get("question_type") != "proof" and answer.casefold() not in _NO_ANSWER
        text = f"{question}\n\n{instruction}" if instruction else question
        stratum = {"stratum": given["task"]} if "task" in given else {}
        return {"answer": answer, **asked(text, question if right and len(answer) <= _LONGEST else ""), **stratum}

    parts = parts_of("math", where, partial(_generated, tasks, seed, where), row, [source], test_source, **options)
    return Domain(name=name, **parts, reward_funcs=MathReward(thinking))


def _generated(
    tasks: Mapping[str, dict] | list[str] | None, seed: int, where: str, path: Path | None, total: int
) -> Dataset:
    gym = require("reasoning_gym", "math", where)
    tasks = TASKS if tasks is None else tasks
    settings = tasks if isinstance(tasks, Mapping) else {task: {} for task in tasks}
    if not settings or total == 0:
        raise ValueError(f"{where}: expected tasks and sizes of reasoning-gym, found {json.dumps(settings)}, {total}")
    rows = []
    for task, options in settings.items():
        # Small spaces repeat themselves: more than are needed are drawn, and equal ones count once.
        size = 2 * -(-total // len(settings)) + 16
        try:
            entries = gym.create_dataset(task, size=size, seed=seed, **(options or {}))
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"{where}, tasks: reasoning-gym refuses {task!r} with {options} ({error})") from error
        for entry in entries:
            if number(str(entry["answer"])) is None:
                raise ValueError(
                    f"{where}, tasks: expected a task whose answers are numbers, found {task!r}, which answers "
                    f"{entry['answer']!r}"
                )
            rows.append({"question": entry["question"].strip(), "answer": str(entry["answer"]), "task": task})
    return Dataset.from_list(rows)
