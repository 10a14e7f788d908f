"""Domains and settings from a YAML file."""

import difflib
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pandas
import yaml
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from pandas.errors import EmptyDataError, ParserError
from pyarrow import ArrowException

from .domain import Domain


_FILE_TYPES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
_TOP = ("model", "training", "domains", "peft", "refresh", "analysis")
_DOMAIN = ("name", "train", "eval", "selection", "rewards", "reward_weights", "metric", "benchmark", "settings")
_SHIPPED = ("name", "domain", "options", "settings")
# Name in YAML to the dotted path of a function that makes the domain.
SHIPPED_DOMAINS = {
    "math": "trl_interfere.datasets.math_domain",
    "code": "trl_interfere.datasets.code_domain",
    "qa": "trl_interfere.datasets.qa_domain",
    "writing": "trl_interfere.datasets.writing_domain",
}
# Name in YAML to the dotted path of a reward function.
BUILT_IN_REWARDS = {
    "exact_match": "trl_interfere.rewards.text.exact_match",
    "contains_answer": "trl_interfere.rewards.text.contains_answer",
    "contains_words": "trl_interfere.rewards.text.contains_words",
    "math_answer": "trl_interfere.rewards.math.math_reward",
    "choice": "trl_interfere.rewards.qa.qa_reward",
    "writing_rubric": "trl_interfere.rewards.writing.writing_reward",
    "math_verify": "trl.rewards.accuracy_reward",
    "think_format": "trl.rewards.think_format_reward",
    "lab_code": "trl_interfere.lab.code.code_reward",
    "lab_math": "trl_interfere.lab.math.math_reward",
    "lab_qa": "trl_interfere.lab.qa.qa_reward",
    "lab_writing": "trl_interfere.lab.writing.writing_reward",
}
_DATA = ("path", "name", "split", "columns", "prompt", "system", "limit", "skip")


@dataclass
class RunFile:
    """
    Content of a YAML file for `trl-interfere train`.

    Args:
        model (`str`):
            Folder or Hub id of the model.
        domains (`list[Domain]`):
            The domains.
        training (`dict`):
            Settings of [`SequentialGRPOConfig`].
        peft (`dict`, *optional*):
            Settings of [`~peft.LoraConfig`].
        refresh (`dict`, *optional*):
            Settings of [`RefreshCallback`].
        analysis (`dict`, *optional*):
            Settings of [`InterferenceConfig`].
    """

    model: str
    domains: list[Domain]
    training: dict[str, Any] = field(default_factory=dict)
    peft: dict[str, Any] | None = None
    refresh: dict[str, Any] | None = None
    analysis: dict[str, Any] = field(default_factory=dict)


def load_run_file(path: str | Path, folder: str | Path | None = None) -> RunFile:
    """
    Read a YAML file with a model, domains and settings.

    Args:
        path (`str` or `pathlib.Path`):
            The file.
        folder (`str` or `pathlib.Path`, *optional*):
            Folder that the paths in it start from. Defaults to its own.

    Returns:
        [`RunFile`]: Its content, with the datasets loaded.

    Raises:
        `ValueError`: If the file cannot be read, or anything in it is unknown, missing or malformed.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML, found something else ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected settings by name, found {type(content).__name__}")
    check_names(content, _TOP, str(path), required=("model", "domains"))
    if not isinstance(content["domains"], list) or not content["domains"]:
        raise ValueError(f"{path}, domains: expected a list of domains, found {content['domains']!r}")

    # Functions of the file are looked for beside it: a console script has no folder of the user on its path.
    folder = path.parent if folder is None else Path(folder)
    if str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))
    training = _mapping(content.get("training"), f"{path}, training")
    overrides = _mapping(training.get("stage_overrides"), f"{path}, training.stage_overrides")
    domains = []
    for position, entry in enumerate(content["domains"]):
        where = f"{path}, domains[{position}]"
        if "domain" in _mapping(entry, where):
            check_names(entry, _SHIPPED, where)
            domains.append(_shipped_domain(entry, where, folder))
        else:
            check_names(entry, _DOMAIN, where, required=("name",))
            domains.append(_domain(entry, where, folder))
        if entry.get("settings"):
            overrides[domains[-1].name] = _mapping(entry["settings"], f"{where}, settings")
    if overrides:
        training["stage_overrides"] = overrides
    model = str(content["model"])
    local = folder / model
    return RunFile(
        model=str(local) if local.is_dir() else model,
        domains=domains,
        training=training,
        peft=None if content.get("peft") is None else _mapping(content["peft"], f"{path}, peft"),
        refresh=None if content.get("refresh") is None else _mapping(content["refresh"], f"{path}, refresh"),
        analysis=_mapping(content.get("analysis"), f"{path}, analysis"),
    )


def check_names(settings: dict[str, Any], known: Iterable[str], where: str, required: Iterable[str] = ()) -> None:
    """
    Refuse unknown and missing names, naming the nearest known one.

    Args:
        settings (`dict`):
            Settings by name.
        known (`Iterable[str]`):
            Names that exist.
        where (`str`):
            Where the settings stand, for the message.
        required (`Iterable[str]`, *optional*):
            Names that must be there.

    Raises:
        `ValueError`: If a name is unknown or missing.
    """
    known = list(known)
    for name in settings:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1)
            hint = f", did you mean {nearest[0]!r}?" if nearest else f", expected some of {sorted(known)}"
            raise ValueError(f"{where}: unknown option {name!r}{hint}")
    for name in required:
        if name not in settings:
            raise ValueError(f"{where}: expected the option {name!r}, found {sorted(map(str, settings))}")


def build_dataclass(cls: type, settings: dict[str, Any], where: str) -> Any:
    """
    Build a configuration object from settings by name.

    Args:
        cls (`type`):
            A dataclass.
        settings (`dict`):
            Settings by name.
        where (`str`):
            Where the settings stand, for the message.

    Returns:
        The object.

    Raises:
        `ValueError`: If a name is unknown or a value does not fit.
    """
    check_names(settings, [entry.name for entry in fields(cls) if entry.init], where)
    try:
        return cls(**numbers(cls, settings, where))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def numbers(cls: type, settings: dict[str, Any], where: str) -> dict[str, Any]:
    """
    Settings with numbers where numbers belong: YAML 1.1 reads `5e-3`, without a point, as a text.

    Args:
        cls (`type`):
            A dataclass.
        settings (`dict`):
            Settings by name.
        where (`str`):
            Where they stand, for the message.

    Returns:
        `dict`: The settings.

    Raises:
        `ValueError`: If a number was expected and a text is there.
    """
    types, found = get_type_hints(cls), dict(settings)
    for name, value in settings.items():
        allowed = set(get_args(types.get(name))) or {types.get(name)}
        if isinstance(value, str) and str not in allowed and allowed <= {int, float, bool, type(None)}:
            try:
                found[name] = yaml.safe_load(value) if float not in allowed else float(value)
            except ValueError:
                raise ValueError(f"{where}, {name}: expected a number, found {value!r}") from None
            if isinstance(found[name], str):
                raise ValueError(f"{where}, {name}: expected a number, found {value!r}")
    return found


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected settings by name, found {value!r}")
    return dict(value)


def _domain(entry: dict[str, Any], where: str, folder: Path) -> Domain:
    rewards = entry.get("rewards") or []
    rewards = rewards if isinstance(rewards, list) else [rewards]
    datasets = {
        part: None if entry.get(part) is None else load_prompts(entry[part], f"{where}, {part}", folder)
        for part in ("train", "eval", "selection")
    }
    return Domain(
        name=str(entry["name"]),
        train_dataset=datasets["train"],
        eval_dataset=datasets["eval"],
        selection_dataset=datasets["selection"],
        reward_funcs=[load_function(reward, f"{where}, rewards") for reward in rewards],
        metric=None if entry.get("metric") is None else load_function(entry["metric"], f"{where}, metric"),
        reward_weights=entry.get("reward_weights"),
        benchmark=None if entry.get("benchmark") is None else str(entry["benchmark"]),
    )


def _shipped_domain(entry: dict[str, Any], where: str, folder: Path) -> Domain:
    function = load_function(entry["domain"], f"{where}, domain", SHIPPED_DOMAINS, "shipped domain")
    options = _mapping(entry.get("options"), f"{where}, options")
    parameters = inspect.signature(function).parameters
    if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        check_names(options, [name for name in parameters if name not in ("name", "folder")], f"{where}, options")
    if "name" in entry:
        options["name"] = str(entry["name"])
    if "folder" in parameters:
        options["folder"] = folder
    try:
        domain = function(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(domain, Domain):
        raise ValueError(f"{where}, domain: expected a function that returns a Domain, found {entry['domain']!r}")
    return domain


def load_function(
    name: str, where: str, known: Mapping[str, str] = BUILT_IN_REWARDS, kind: str = "built-in reward"
) -> Callable:
    """
    A function by its built-in name or its dotted path.

    Args:
        name (`str`):
            A built-in name, or e.g. `"my_package.rewards.my_reward"`.
        where (`str`):
            Where the name stands, for the message.
        known (`Mapping[str, str]`, *optional*):
            Dotted paths by built-in name. Defaults to those of rewards.
        kind (`str`, *optional*, defaults to `"built-in reward"`):
            What the names are of, for the message.

    Returns:
        `Callable`: The function.

    Raises:
        `ValueError`: If there is no such function.
    """
    if not isinstance(name, str):
        raise ValueError(f"{where}: expected the name of a function, found {name!r}")
    name = known.get(name, name)
    module, _, attribute = str(name).rpartition(".")
    if not module:
        raise ValueError(f"{where}: {name!r} is neither a {kind} ({', '.join(sorted(known))}) nor a dotted path")
    try:
        function = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{where}: cannot import {name!r} ({error})") from error
    if not callable(function):
        raise ValueError(f"{where}: expected a function, found {name!r} of type {type(function).__name__}")
    return function


def read_dataset(source: dict[str, Any], where: str, folder: Path) -> Dataset:
    """
    Rows of a local file, a folder or a data set on the Hub.

    Values of a file stay as they are written: what stands in a csv is text (`007`, `2.50`, `NA`), a text in json is
    never made a date, and a json column of integers and decimals is text too.

    Args:
        source (`dict`):
            A mapping with `path`, and optionally `name` (Hub configuration) and `split`.
        where (`str`):
            Where the source stands, for the message.
        folder (`pathlib.Path`):
            Folder that relative paths start from.

    Returns:
        [`~datasets.Dataset`]: The rows.

    Raises:
        `ValueError`: If the source cannot be read.
    """
    split = source.get("split", "train")
    local = folder / str(source["path"])
    if local.suffix in _FILE_TYPES and not local.exists():
        raise ValueError(
            f"{where}: {source['path']!r} is neither a local file or folder nor readable from the Hub (no {local})"
        )
    try:
        if local.is_file():
            if local.suffix not in _FILE_TYPES:
                raise ValueError(f"{where}: expected a file of type {sorted(_FILE_TYPES)}, found {local}")
            dataset = _read_file(local, where)
        elif local.is_dir() and ((local / "dataset_info.json").exists() or (local / "dataset_dict.json").exists()):
            dataset = load_from_disk(str(local))
            if isinstance(dataset, DatasetDict):
                if split not in dataset:
                    raise ValueError(f"{where}: expected the split {split!r}, found {sorted(dataset)}")
                dataset = dataset[split]
        else:
            path = str(local) if local.is_dir() else str(source["path"])
            dataset = load_dataset(path, source.get("name"), split=split)
    except (DatasetGenerationError, ArrowException, EmptyDataError, ParserError, json.JSONDecodeError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"{where}: {source['path']!r} cannot be read ({cause})") from error
    except ValueError as error:
        raise error if str(error).startswith(where) else ValueError(f"{where}: {error}") from error
    except (OSError, DatasetNotFoundError) as error:
        raise ValueError(
            f"{where}: {source['path']!r} is neither a local file or folder nor readable from the Hub ({error})"
        ) from error
    return dataset


def _read_file(path: Path, where: str) -> Dataset:
    if path.suffix == ".parquet":
        return load_dataset("parquet", data_files=str(path), split="train")
    if path.suffix in (".csv", ".tsv"):
        separator = "\t" if path.suffix == ".tsv" else ","
        columns: Mapping[str, list] = pandas.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
        columns = {str(name): list(values) for name, values in columns.items()}
    else:
        columns = _json_columns(path.read_text(encoding="utf-8-sig"))
    if not any(map(len, columns.values())):
        raise ValueError(f"{where}: expected at least one row, found none in {path}")
    return Dataset.from_dict(columns)


def _json_columns(text: str) -> dict[str, list]:
    listed = text.lstrip().startswith("[")
    rows = json.loads(text) if listed else [json.loads(line) for line in text.split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected rows with names, found other values")
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    for name, values in columns.items():
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 and kinds <= {str, int, float, bool}:
            columns[name] = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
    return columns


def load_prompts(source: str | dict[str, Any], where: str, folder: Path) -> Dataset:
    """
    Prompts from a local file, a folder or the Hub.

    Args:
        source (`str` or `dict`):
            A path or Hub id, or a mapping with `path`, `name` (Hub configuration), `split`, `columns` (new name to old
            name), `prompt` (a template such as `"Solve {question}"` that makes the prompt conversational), `system`
            (its system message), `skip` and `limit` (rows).
        where (`str`):
            Where the source stands, for the message.
        folder (`pathlib.Path`):
            Folder that relative paths start from.

    Returns:
        [`~datasets.Dataset`]: Rows with a column `prompt`.

    Raises:
        `ValueError`: If the source cannot be read or a column is missing.
    """
    source = {"path": source} if isinstance(source, str) else _mapping(source, where)
    check_names(source, _DATA, where, required=("path",))
    dataset = read_dataset(source, where, folder)
    for new, old in _mapping(source.get("columns"), f"{where}, columns").items():
        if old not in dataset.column_names:
            raise ValueError(f"{where}, columns: expected a column {old!r}, found {dataset.column_names}")
        if old != new:
            dataset = dataset.remove_columns(new) if new in dataset.column_names else dataset
            dataset = dataset.rename_column(old, new)
    rows = {}
    for option in ("skip", "limit"):
        rows[option] = source.get(option)
        if rows[option] is not None and (type(rows[option]) is not int or rows[option] < 0):
            raise ValueError(f"{where}, {option}: expected a number of rows, found {rows[option]!r}")
    chosen = range(len(dataset))[rows["skip"] or 0 :][: rows["limit"]]
    if not chosen:
        raise ValueError(
            f"{where}: expected at least one row, found {len(dataset)} of which skip and limit leave none"
        )
    dataset = dataset.select(chosen)
    if source.get("prompt") is not None:
        dataset = dataset.map(
            _to_messages,
            fn_kwargs={"template": source["prompt"], "system": source.get("system"), "where": where},
        )
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"{where}: expected a column 'prompt', found {dataset.column_names}; use `columns` or `prompt`"
        )
    return dataset


def _to_messages(row: dict[str, Any], template: str, system: str | None, where: str) -> dict[str, Any]:
    try:
        text = template.format(**row)
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{where}, prompt: expected columns named in the template, {error} is missing from {sorted(row)}"
        ) from error
    messages = [] if system is None else [{"role": "system", "content": system}]
    return {"prompt": [*messages, {"role": "user", "content": text}]}
