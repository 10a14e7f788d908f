"""The domain `math`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from datasets import Dataset

from ..domain import Domain
from ..extras import package_folder
from ..rewards.math import MathReward
from ..rewards.math_numbers import LONGEST, number
from .sources import OFFLINE, DataOptions, asked, parts_of


# Generators of reasoning-gym that answer with a number.
TASKS = ("chain_sum", "basic_arithmetic", "gsm_symbolic", "simple_equations", "gcd", "lcm")
MATH_INSTRUCTION = "Reason step by step, and put your final answer within \\boxed{}."
_NO_ANSWER = {"", "proof", "not found", "notfound", "none", "null"}


def math_domain(
    name: str = "math",
    source: str = OFFLINE["math"],
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
    """
    where = f"domain {name!r}"
    package_folder("math_verify", "math", where)

    def row(given: dict[str, Any]) -> dict[str, Any]:
        answer, question = str(given["answer"] or "").strip(), given["question"]
        right = given.get("question_type") != "proof" and answer.casefold() not in _NO_ANSWER
        text = "\n\n".join(filter(None, (question, instruction)))
        prompt = asked(text, question if right and len(answer) <= LONGEST else "")
        return {"answer": answer, **prompt, **({"stratum": given["task"]} if "task" in given else {})}

    def make(path: Path | None, total: int) -> Dataset:
        settings = tasks if isinstance(tasks, Mapping) else dict.fromkeys(TASKS if tasks is None else tasks)
        return Dataset.from_list(_generated(settings, seed, where, total))

    return Domain(name, **parts_of("math", where, make, row, [source], **options), reward_funcs=MathReward(thinking))


def _generated(settings: Mapping[str, dict | None], seed: int, where: str, total: int) -> list[dict[str, str]]:
    package_folder("reasoning_gym", "math", where)
    import reasoning_gym

    if not settings or total == 0:
        raise ValueError(f"{where}: expected tasks and sizes of reasoning-gym, found {settings}, {total}")
    rows = []
    for task, options in settings.items():
        # Small spaces repeat themselves: more than are needed are drawn, and equal ones count once.
        size = 2 * -(-total // len(settings)) + 16
        try:
            entries = reasoning_gym.create_dataset(task, size=size, seed=seed, **(options or {}))
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"{where}, tasks: reasoning-gym refuses {task!r} with {options} ({error})") from error
        for entry in entries:
            if number(str(entry["answer"])) is None:
                raise ValueError(f"{where}, tasks: expected numbers as answers, found {entry['answer']!r} of {task!r}")
            rows.append({"question": entry["question"].strip(), "answer": str(entry["answer"]), "task": task})
    return rows
