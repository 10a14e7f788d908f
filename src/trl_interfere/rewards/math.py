"""Domain `math`: problems with one answer, checked by value."""

import json
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

from datasets import Dataset

from ..domain import Domain
from ..extras import require
from ..sources import Parts, Source, apart, check_source, deal, read_source
from ..splits import part_sizes
from .text import answer_text


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
_TEN = r"10\s*\^\s*\{?\s*([+-]?\d{1,3})\s*\}?"
_SCIENTIFIC = re.compile(
    rf"([+-]?)\s*(?:{_TEN}|({_NUMBER})(?:e([+-]?\d{{1,3}})|\s*(?:\\times|\\cdot|\*|×)\s*{_TEN})?)"
)
_PART = rf"\s*(?:\{{\s*([+-]?(?:{_NUMBER}))\s*\}}|(\d))"
_QUOTIENT = re.compile(
    rf"([+-]?)\s*(?:(\d+)(?:\s+|(?=\\)))?(?:\\[cdt]?frac{_PART}{_PART}|({_NUMBER})\s*/\s*({_NUMBER}))"
)

# Words behind a number that change its value, or say that it is not the answer.
_NO_UNIT = (
    r"\b(?:(?:hundred|thousand|\w*illion|lakh|crore|dozen|score|ten|half|third|quarter)s?|halves|gross|basis|"
    r"per\s?cent(?:s|ages?)?|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|\w+teen|\w+tie|hundred|thousand|\w*illion)"
    r"ths?|and|are|as|but|by|equals|fewer|has|if|is|its|less|minus|mod|modulo|more|no|not|or|out|over|plus|than|this|"
    r"times(?=\s)|to|unless|was|were)\b"
)
_PLURAL = r"[a-z]+s|[a-z]*(?:people|children|men|feet|mice|geese|teeth|fish|sheep)|yen|yuan"
_SQUARED = r"(?:\s*\^\s*\{?\s*[23]\s*\}?|[²³])?"
_SYMBOL = (
    r"(?:[cdkmµμ]?m|[kmµμ]?g|[cdm]?[lL]|m?s|k?(?:Hz|J|N|Pa|V|W)|deg|ft|h|hrs?|in|kmh|lbs?|mi|min|mph|oz|rad|sec|yd)"
    + _SQUARED
)
_WORDS = (
    rf"(?i:\s+(?!.*{_NO_UNIT})(?:[a-z]+\.?\s)?(?:%s){_SQUARED}"
    r"(?:\s(?:per|of)\s[a-z]+|\sin\stotal|\sleft|\scelsius|\sfahrenheit)?)"
)
_UNIT = re.compile(
    r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|°)\s*[CF]?"
    rf"|(?:\s+|(?=[ckm]m|kg))(?:(?:cu|sq)\.?\s)?{_SYMBOL}(?:\s*/\s*{_SYMBOL})?|{_WORDS % _PLURAL}"
)
_UNIT_OF_ONE = re.compile(_WORDS % "[a-z]{2,}")
_VALUE_IN_TEXT = re.compile(rf"[\d}}]\s*\\text\s*\{{[^{{}}]*{_NO_UNIT}[^{{}}]*\}}$", re.IGNORECASE)

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_STATED = re.compile(r"(?:final answer|answer)[\s*_]*(?:is\s*:?|:|=)\s*([^\n]+)", re.IGNORECASE)
_DELIMITERS = re.compile(r"\\?\$|\\[()\[\]]|\*\*|__")
_EQUALS = re.compile(r"(?<![<>!])=|\\equiv\b")
_CONCLUDES = re.compile(rf"{_EQUALS.pattern}|\b(?:is|are|equals)\b:?")
_DENIED = re.compile(r"\b(?:not|never|wrong|false|if|unless)\b|n['’]t\b", re.IGNORECASE)
_SUBSCRIPTS = re.compile(r"_\{[^{}]*\}|_\w|(?<=[A-Za-z'}])\([^()]*\)")
_NO_NAME = re.compile(r"\d|\\(?:sqrt|pi|infty|not|neq?|[lg]eq?)(?![A-Za-z])|[<>!≠≤≥π√∞]|^\s*[-+]")
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
            Rows of `train`, `selection` and `test`. Defaults to 512, 64 and 128. Of a `test_source` that is a
            data set, all rows are the test if `test` is not given.
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
    default = _SIZES if test_source in (None, source, OFFLINE) else {**_SIZES, "test": None}
    sizes = part_sizes(sizes, default, f"{where}, sizes")
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
    number that the last line is or ends in, after "=", "is", "are" or "equals".

    Where a number is expected, a number must be given, see [`number`]: an expression that has the value, such as the
    one in the problem, is not an answer. Other answers are compared by math-verify. The name of a quantity and "=" may
    stand before an answer, as in `AB = 12`, `f(2) = 12` or `m + n = 12`. Such a name has variables, and no number
    except in indices and arguments: `7 = 2\\sqrt{3}` and `2x = 12` state no value. In a chain of equations all parts
    behind the name must have the value.

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
    boxes = list(_BOX.finditer(text))
    if boxes:
        begin, depth = boxes[-1].end(), 1
        for end in range(begin, min(len(text), begin + _LONGEST + 1)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[begin:end].strip()
        return None
    stated = _STATED.findall(text[-2000:])
    if stated:
        return stated[-1].strip()
    line = _DELIMITERS.sub(" ", text[-2000:]).strip().rsplit("\n", 1)[-1]
    *before, last = _CONCLUDES.split(line)
    denied = before and _DENIED.search(re.split(r"[,.;:]", before[-1])[-1])
    return last.strip() if not denied and number(last) is not None else None


def number(text: str) -> Fraction | None:
    """
    The number that a text writes down: an integer, a decimal, a quotient, a mixed number or in powers of ten.

    A unit may follow, bare or in `\\text{}`: a symbol (`cm^2`, `km/h`, `^\\circ`), or a noun, with at most one word
    before it, and "per ...", "of ...", "in total" or "left" behind it. The noun must be a plural (`42 apples`,
    `42 square feet`), unless the number is at most 1 (`1 apple`, `1/2 cup`). Words for numbers, shares and comparisons
    are no units: `42 million`, `42 percent`, `42 dozen eggs` and `42 or more` are not 42, and no numbers here.

    Args:
        text (`str`):
            The text.

    Returns:
        `Fraction`: Its value; `None` if it is anything else, an expression that has a value included.
    """
    if len(text) > _LONGEST:
        return None
    text = _DELIMITERS.sub(" ", text).replace("−", "-").replace("~", " ")
    text = re.sub(r"\\(?:text\w*|math(?:bf|it|rm)|mbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r" \1 ", text)
    text = re.sub(r"\\!|(?<=\d)(?:\{,\}|\\[,;: ])(?=\d{3})", "", text)
    text = _stripped(re.sub(r"\\[,;: ]|\s+", " ", text))
    text = re.sub(r"^\{([^{}]*)\}$", r"\1", text)
    name, *values = _EQUALS.split(text)
    if len(values) > 1 or (values and not _is_name(name)):
        return None
    text = re.sub(r"^([+-]?)\s*[€£]", r"\1", (values or [name])[0].strip())
    for pattern in (_QUOTIENT, _SCIENTIFIC):
        match = pattern.match(text)
        value = match and _value(match)
        if value is not None and _is_unit(text[match.end() :], value):
            return value
    return None


def _value(match: re.Match) -> Fraction | None:
    sign, *parts = match.groups()
    factor = -1 if sign == "-" else 1
    if match.re is _SCIENTIFIC:
        ten, digits, *exponents = parts
        exponent = ten or next(filter(None, exponents), "0")
        return factor * Fraction((digits or "1").replace(",", "")) * Fraction(10) ** int(exponent)
    whole, *parts = parts
    top, bottom = (Fraction(part.replace(",", "")) for part in parts if part is not None)
    if bottom == 0 or (whole and not 0 <= top < bottom):
        return None
    return factor * (int(whole or 0) + top / bottom)


def _is_unit(text: str, value: Fraction) -> bool:
    return bool(not text or _UNIT.fullmatch(text) or (abs(value) <= 1 and _UNIT_OF_ONE.fullmatch(text)))


def _is_name(text: str) -> bool:
    """Whether the left side of an equation names a quantity: variables, and no number but in indices and arguments."""
    text = _SUBSCRIPTS.sub("", text)
    return re.search(r"[^\W\d_]", text) is not None and _NO_NAME.search(text) is None


def _stripped(text: str) -> str:
    """Without emphasis around it, and without the full stop at its end."""
    return re.sub(r"(?<!\.)\.$", "", text.strip("*_` \n")).strip("*_` \n")


def _agree(given: str | None, expected: str) -> bool:
    if not given or len(given) > _LONGEST:
        return False
    value = number(expected)
    if value is not None:
        return number(given) == value
    given = _stripped(given)
    if _COSTLY.search(given):
        return False
    # math-verify drops the left side of an equation, and any text behind an expression.
    if not _EQUALS.search(expected):
        parts = re.split(r"[,;]|\b(?:and|or)\b", _SUBSCRIPTS.sub("", given))
        if len(parts) == 1 and len(values := _EQUALS.split(given)) > 1:
            return all(_agree(value, expected) for value in values[_is_name(values[0]) :])
        for part in parts:
            name, *values = _EQUALS.split(part)
            if len(values) > 1 or (values and not _is_name(name)):
                return False
    if "\\text" not in expected and _VALUE_IN_TEXT.search(given):
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
