"""Domain `math`: problems with one answer, checked by value."""

import json
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

from datasets import Dataset

from .domain import Domain
from .extras import require
from .rewards import answer_text
from .sources import Parts, Source, apart, check_source, deal, read_source
from .splits import part_sizes


SOURCES = {
    "openr1-math": Source(
        "open-r1/OpenR1-Math-220k",
        {"question": "problem", "answer": "answer", "question_type": "question_type"},
        name="default",
    ),
    "aime25": Source("math-ai/aime25", {"question": "problem", "answer": "answer"}, split="test"),
}
OFFLINE = "reasoning-gym"
# Generators whose answer is a number.
TASKS = ("chain_sum", "basic_arithmetic", "gsm_symbolic", "simple_equations", "gcd", "lcm")
INSTRUCTION = "Reason step by step, and put your final answer within \\boxed{}."
_SIZES = {"train": 512, "selection": 64, "test": 128}
_LONGEST = 300  # characters of an answer
_NO_ANSWER = {"", "proof", "not found", "notfound", "none", "null"}

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_SCIENTIFIC = re.compile(
    rf"([+-]?)({_NUMBER})(?:e([+-]?\d{{1,3}})|(?:\\times|\\cdot|\*)10\^\{{?([+-]?\d{{1,3}})\}}?)?"
)
_QUOTIENT = re.compile(rf"([+-]?)(?:\\[dt]?frac\{{([+-]?(?:{_NUMBER}))\}}\{{({_NUMBER})\}}|({_NUMBER})/({_NUMBER}))")
_STATED = re.compile(r"(?:final answer|answer)\s*(?:is\s*:?|:|=)\s*([^\n]+)", re.IGNORECASE)
# Powers of powers, and exponents and factorials that no answer has: a comparison would work on them for minutes.
_COSTLY = re.compile(r"\^[^\^]{0,40}\^|\^\{?\s*[+-]?\d{4,}|\d{4,}\s*!|!\s*!")


def math_domain(
    name: str = "math",
    source: str = OFFLINE,
    test_source: str | None = None,
    sizes: Mapping[str, int | None] | None = None,
    tasks: Mapping[str, dict] | list[str] | None = None,
    seed: int = 0,
    instruction: str = INSTRUCTION,
    thinking: bool = False,
    max_prompt_characters: int | None = None,
    paths: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Domain:
    """
    The domain `math`.

    Args:
        name (`str`, *optional*, defaults to `"math"`):
            Name of the domain.
        source (`str`, *optional*, defaults to `"reasoning-gym"`):
            `"reasoning-gym"` (made on this machine), `"openr1-math"` or `"aime25"`.
        test_source (`str`, *optional*):
            Where the test part comes from. Defaults to `source`.
        sizes (`Mapping[str, int]`, *optional*):
            Rows of `train`, `selection` and `test`. Defaults to 512, 64 and 128, and all rows of a `test_source`.
        tasks (`Mapping[str, dict]` or `list[str]`, *optional*):
            Generators of reasoning-gym with their settings. Defaults to `TASKS`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the generators.
        instruction (`str`, *optional*):
            What follows the problem in the prompt.
        thinking (`bool`, *optional*, defaults to `False`):
            Whether the model thinks before it answers, see [`~domains.rewards.answer_text`].
        max_prompt_characters (`int`, *optional*):
            Longer prompts are left out.
        paths (`Mapping[str, str]`, *optional*):
            Local copies by name of the data set.
        columns (`Mapping[str, str]`, *optional*):
            Other names of the columns of `source`.
        folder (`pathlib.Path`, *optional*):
            Folder that relative paths start from.

    Returns:
        [`Domain`]: With one reward, 1 for the right answer and 0 otherwise.

    Raises:
        `ValueError`: If a package or a data set is missing, or there are too few rows.
    """
    where = f"domain {name!r}"
    for option in (source, test_source or source):
        check_source(option, (*SOURCES, OFFLINE), where)
    require("math_verify", "math", where)
    sizes = part_sizes(sizes, _SIZES, f"{where}, sizes")
    paths = dict(paths or {})

    def load(option: str, others: Mapping[str, str] | None = None) -> Dataset:
        if option == OFFLINE:
            return _generated(tasks, sum(size or 0 for size in sizes.values()), seed, where)
        dataset = read_source(SOURCES[option], f"{where}, {option}", paths.get(option), others, folder)
        return dataset.filter(_has_answer, load_from_cache_file=False)

    def prompts(dataset: Dataset) -> Dataset:
        dataset = dataset.map(
            _to_prompt, fn_kwargs={"instruction": instruction}, remove_columns=["question"], load_from_cache_file=False
        )
        if max_prompt_characters is not None:
            dataset = dataset.filter(
                lambda row: len(row["prompt"][0]["content"]) <= max_prompt_characters, load_from_cache_file=False
            )
        extra = [column for column in dataset.column_names if column not in ("prompt", "answer", "key", "task")]
        return dataset.remove_columns(extra)

    dataset = prompts(load(source, columns))
    strata = "task" if source == OFFLINE else None
    if test_source in (None, source):
        parts = deal(dataset, sizes, f"{where}, sizes", strata=strata)
    else:
        test = prompts(load(test_source))
        sizes_of_test = {"test": sizes.pop("test", None)}
        parts = deal(apart(dataset, test), sizes, f"{where}, sizes", strata=strata)
        parts = Parts(parts.train, parts.selection, deal(test, sizes_of_test, f"{where}, sizes").test)
    return parts.to_domain(name, reward_funcs=MathReward(thinking))


class MathReward:
    """
    1 if the final answer has the value of the expected one, 0 otherwise.

    The final answer is the content of the last `\\boxed{}`, or what follows the last "answer is" or "answer:", or the
    last line if it is, or ends in an equation with, a number. Where a number is expected, a number must be given: an
    expression that has the value, such as the one in the problem, is not an answer. Other answers are compared by
    math-verify.

    Args:
        thinking (`bool`, *optional*, defaults to `False`):
            Whether the model thinks before it answers.
    """

    __name__ = "math_reward"

    def __init__(self, thinking: bool = False):
        self.thinking = thinking

    def __call__(self, completions: list, answer: list[str], **kwargs: Any) -> list[float]:
        """
        Rewards of completions.

        Args:
            completions (`list`):
                Completions, plain or conversational.
            answer (`list[str]`):
                Expected answers.

        Returns:
            `list[float]`: One reward per completion.
        """
        return [
            float(_agree(final_answer(answer_text(completion, self.thinking)), str(expected)))
            for completion, expected in zip(completions, answer, strict=True)
        ]


math_reward = MathReward()


def final_answer(text: str | None) -> str | None:
    """
    The final answer that a text states.

    Args:
        text (`str`, *optional*):
            What a model said after its thoughts.

    Returns:
        `str`: The answer; `None` if there is none.
    """
    if not text:
        return None
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start >= 0:
        begin = text.index("{", start) + 1
        depth = 1
        for end in range(begin, min(len(text), begin + _LONGEST + 1)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[begin:end].strip()
        return None
    stated = _STATED.findall(text[-2000:])
    if stated:
        return stated[-1].strip()
    lines = text.strip().rsplit("\n", 1)
    last = lines[-1].rpartition("=")[2].strip() if lines[-1] else ""
    return last if number(last) is not None else None


def number(text: str) -> Fraction | None:
    """
    The number that a text writes down: an integer, a decimal, a quotient or in powers of ten, with or without a unit.

    Args:
        text (`str`):
            The text.

    Returns:
        `Fraction`: Its value; `None` if it is anything else, an expression that has a value included.
    """
    if len(text) > _LONGEST:
        return None
    text = text.strip().strip("*_` ")
    text = re.sub(r"^\\\((.*)\\\)$|^\\\[(.*)\\\]$|^\$+(.*?)\$+$", lambda m: next(filter(None, m.groups()), ""), text)
    text = text.strip().removesuffix(".").strip()
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{\s*([-+\d.,/]+)\s*\}", r"\1", text)
    text = re.sub(r"\\[,!;:]|\\ |(?<=\d)\{,\}(?=\d{3})", lambda m: "," if m[0] == "{,}" else "", text)
    text = re.sub(r"\s*(\\times|\\cdot)\s*", r"\1", text)
    text = re.sub(r"^[a-zA-Z]\s*=\s*", "", text)
    text = re.sub(r"^(?:\\?\$|€|£)\s*", "", text)
    # A unit: words, not signs.
    text = re.sub(r"\s*(?:\\(?:text|mathrm)\s*\{[\sA-Za-z.^23]*\}|\^\{?\\circ\}?|°)\s*$", "", text)
    text = re.sub(r"(?<=\d)\s+[A-Za-z]+(?:\s[A-Za-z]+)?$", "", text)
    text = text.replace("−", "-").replace(" ", "") if re.fullmatch(r"[-+−]\s?[\d.,/]+|\S*", text) else text
    match = _SCIENTIFIC.fullmatch(text)
    if match:
        sign, digits, *exponents = match.groups()
        exponent = next(filter(None, exponents), "0")
        return (-1 if sign == "-" else 1) * Fraction(digits.replace(",", "")) * Fraction(10) ** int(exponent)
    match = _QUOTIENT.fullmatch(text)
    if match:
        sign, *parts = match.groups()
        top, bottom = (part.replace(",", "") for part in parts if part is not None)
        if Fraction(bottom) != 0:
            return (-1 if sign == "-" else 1) * Fraction(top) / Fraction(bottom)
    return None


def _agree(given: str | None, expected: str) -> bool:
    if not given or len(given) > _LONGEST:
        return False
    value = number(expected)
    if value is not None:
        return number(given) == value
    if _COSTLY.search(given):
        return False
    from math_verify import parse, verify

    # Its time limits are signals, which only the main thread gets.
    seconds = 3 if current_thread() is main_thread() else None
    gold = parse(f"\\boxed{{{expected}}}", parsing_timeout=seconds)
    if not gold:
        return "".join(given.split()) == "".join(expected.split())
    return bool(verify(gold, parse(f"\\boxed{{{given}}}", parsing_timeout=seconds), timeout_seconds=seconds))


def _has_answer(row: dict[str, Any]) -> bool:
    answer = str(row["answer"] or "").strip()
    return row.get("question_type") != "proof" and answer.casefold() not in _NO_ANSWER and len(answer) <= _LONGEST


def _to_prompt(row: dict[str, Any], instruction: str) -> dict[str, Any]:
    text = row["question"] if not instruction else f"{row['question']}\n\n{instruction}"
    return {
        "prompt": [{"role": "user", "content": text}],
        "answer": str(row["answer"]).strip(),
        "key": row["question"],
    }


def _generated(tasks: Mapping[str, dict] | list[str] | None, total: int, seed: int, where: str) -> Dataset:
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
