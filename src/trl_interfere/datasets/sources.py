"""Where the prompts of the domains that ship come from, and how they are dealt to train, selection and test."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from datasets import Dataset, concatenate_datasets

from ..recipe import check_names, read_dataset


class Source(NamedTuple):
    """A data set on the Hub: its columns, `ours=theirs` where they have other names, its split and configuration."""

    path: str
    columns: str
    split: str = "train"
    name: str | None = None


# Names of columns: see docs/domains.md for what they rest on.
SOURCES = {
    "math": {
        "openr1-math": Source("open-r1/OpenR1-Math-220k", "question=problem answer question_type", name="default"),
        "aime25": Source("math-ai/aime25", "question=problem answer", "test"),
    },
    "code": {"klear-code": Source("Kwai-Klear/KlearReasoner-CodeSub-15K", "messages=prompt reward_model")},
    "qa": {
        "supergpqa": Source("m-a-p/SuperGPQA", "question options letter=answer_letter subfield difficulty"),
        "mmlu-pro": Source("TIGER-Lab/MMLU-Pro", "question options letter=answer subfield=category", "test"),
    },
    "writing": {
        f"creative-{name}": Source(f"crownelius/Creative-Writing-{path}", f"question={question} reference=response")
        for name, path, question in (
            ("sonnet", "Sonnet4.6-800x", "prompt"),
            ("gemini", "Gemini3Pro-2700x", "prompt"),
            ("kimi", "Reasoning-KimiK2.5-600x", "instruction"),
            ("qwen", "Qwen3.5Plus-2000x", "prompt"),
        )
    },
}
OFFLINE = {"math": "reasoning-gym", "code": "humaneval", "qa": "mmlu-dev", "writing": "constraints"}
SIZES = {
    "math": {"train": 512, "selection": 64, "test": 128},
    "code": {"train": 84, "selection": 30, "test": 50},
    "qa": {"train": 150, "selection": 50, "test": 70},
    "writing": {"train": 512, "selection": 64, "test": 128},
}
# In this order rows are dealt, so that more training moves no test row.
PARTS = {"test": "eval_dataset", "selection": "selection_dataset", "train": "train_dataset"}


class DataOptions(TypedDict, total=False):
    """
    Options that all domains take. Unreadable data and too few rows are a `ValueError`, a missing extra an
    `ImportError`.

    Attributes:
        test_source (`str`, *optional*):
            Where the test part comes from. Defaults to `source`.
        sizes (`Mapping[str, int]`, *optional*):
            Rows of `train`, `selection` and `test`, see `SIZES`. Of a `test_source` that is a data set, all rows are
            the test if `test` is not given.
        max_prompt_characters (`int`, *optional*):
            Longer prompts are left out.
        paths (`Mapping[str, str]`, *optional*):
            Local copies by name of the data set.
        columns (`Mapping[str, str]`, *optional*):
            Other names of the columns of `source`; for `writing`, by name of the data set.
        folder (`pathlib.Path`, *optional*):
            Folder that relative paths start from.
    """

    test_source: str | None
    sizes: Mapping[str, int | None] | None
    max_prompt_characters: int | None
    paths: Mapping[str, str] | None
    columns: Mapping[str, Any] | None
    folder: Path | None


def asked(text: str, key: str) -> dict[str, Any]:
    """A prompt, and the key that it is dealt by; without a key the row is left out."""
    return {"prompt": [{"role": "user", "content": text}], "key": key}


def parts_of(
    kind: str,
    where: str,
    make: Callable[[Path | None, int], Dataset],
    to_row: Callable[[dict], dict],
    sources: list[str],
    test_source: str | None = None,
    sizes: Mapping[str, int | None] | None = None,
    max_prompt_characters: int | None = None,
    paths: Mapping[str, str] | None = None,
    columns: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> dict[str, Dataset]:
    """Datasets of a domain: of its sources, or the test of another, all of which no training row may repeat."""
    made, known = OFFLINE[kind], {OFFLINE[kind], *SOURCES[kind]}
    apart = test_source not in (None, *sources[:1])
    named = [*sources, *([test_source] if apart else [])]
    if not sources or not known.issuperset(named) or (kind == "writing" and made in named and len(named) > 1):
        raise ValueError(f"{where}, source: expected one of {sorted(known)}, found {named}")
    paths, columns, folder, where_sizes = paths or {}, columns or {}, Path(folder or ""), f"{where}, sizes"
    of_test = {"test": None} if apart and test_source != made else {}  # all of it
    sizes = _sizes({**SIZES[kind], **of_test} if sizes is None else sizes, where_sizes)
    longest = math.inf if max_prompt_characters is None else max_prompt_characters

    def rows(source: str, columns: Mapping[str, str] | None = None) -> Dataset:
        if source == made:
            dataset = make(folder / paths[source] if source in paths else None, sum(n or 0 for n in sizes.values()))
        else:
            dataset = read_source(SOURCES[kind][source], f"{where}, {source}", paths.get(source), columns, folder)
        dataset = dataset.map(to_row, remove_columns=dataset.column_names, load_from_cache_file=False)
        return dataset.filter(
            lambda row: row["key"] != "" and sum(len(m["content"]) for m in row["prompt"]) <= longest,
            load_from_cache_file=False,
        )

    columns = columns if kind == "writing" else {sources[0]: columns}
    dataset = concatenate_datasets([rows(source, columns.get(source)) for source in sources])
    if not apart:
        return split_dataset(dataset, sizes, where_sizes)
    test, of_test = rows(test_source), {"test": sizes.pop("test", None)}
    taken = set(map(_normal, test["key"]))
    dataset = dataset.select([row for row, key in enumerate(dataset["key"]) if _normal(key) not in taken])
    return split_dataset(dataset, sizes, where_sizes) | split_dataset(test, of_test, where_sizes)


def read_source(
    source: Source, where: str, path: str | None, columns: Mapping[str, str] | None, folder: Path
) -> Dataset:
    """The columns of a data set on the Hub, or of a local copy of it, under the names that are used here."""
    known = {column.partition("=")[0]: column.rpartition("=")[2] for column in source.columns.split()}
    wanted = {**known, **(columns or {})}
    check_names(wanted, known, f"{where}, columns")
    name = None if path else source.name
    dataset = read_dataset({"path": path or source.path, "split": source.split, "name": name}, where, folder)
    if set(wanted.values()) - set(dataset.column_names):
        expected = f"{where}: expected the columns {sorted(wanted.values())} in {path or source.path!r}"
        raise ValueError(f"{expected}, found {dataset.column_names}; give other names by `columns`")
    dataset = dataset.select_columns(list(dict.fromkeys(wanted.values())))
    return dataset.rename_columns({old: new for new, old in wanted.items() if old != new})


def split_dataset(dataset: Dataset, sizes: Mapping[str, int | None], where: str) -> dict[str, Dataset]:
    """
    Deal rows to the datasets of a domain, in an order that depends on nothing but their column `key`; a size of `None`
    is all that is left. Rows with the same key, regardless of case and space, are one prompt.

    With a column `stratum`, every part holds each stratum in the same proportion, up to rounding: row i of the n of a
    stratum gets the place (i + u) / n with u from a hash of its name, and the places are sorted.
    """
    first: dict[str, int] = {}
    for row, key in enumerate(dataset["key"]):
        first.setdefault(_normal(key), row)
    order = sorted(first, key=lambda key: _hash(f"row/{key}"))
    if "stratum" in dataset.column_names:
        strata = [str(stratum) for stratum in dataset["stratum"]]
        totals, seen, places = Counter(strata[first[key]] for key in order), Counter(), {}
        for key in order:
            stratum = strata[first[key]]
            places[key] = (seen[stratum] + _hash(f"stratum/{stratum}") / 2**64) / totals[stratum]
            seen[stratum] += 1
        order.sort(key=places.__getitem__)
    rows = [first[key] for key in order]
    wanted = sum(size or 0 for size in sizes.values())
    if wanted > len(rows):
        raise ValueError(f"{where}: expected at least {wanted} different prompts ({dict(sizes)}), found {len(rows)}")
    dataset = dataset.remove_columns([column for column in ("key", "stratum") if column in dataset.column_names])
    parts = {}
    for part, field in PARTS.items():
        size = sizes.get(part, 0)
        chosen, rows = rows[:size], rows[len(rows[:size]) :]
        if chosen:
            parts[field] = dataset.select(chosen)
    return parts


def _sizes(sizes: Mapping[str, int | None], where: str) -> dict[str, int | None]:
    if not isinstance(sizes, Mapping) or not all(
        part in PARTS and (size is None or (type(size) is int and size >= 0)) for part, size in sizes.items()
    ):
        raise ValueError(f"{where}: expected numbers of rows of {sorted(PARTS)}, found {sizes!r}")
    return dict(sizes)


def _normal(text: str) -> str:
    return " ".join(str(text).split()).casefold()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
