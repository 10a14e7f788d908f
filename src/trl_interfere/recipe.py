"""Domains and settings from a YAML file."""

import difflib
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from enum import Enum
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pandas
import yaml
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from pyarrow import ArrowException

from .domain import Domain


_FILE_TYPES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
_PARTS = ("training", "peft", "heal", "refresh", "analysis")
_DATASETS = ("train_dataset", "eval_dataset", "selection_dataset")
_DOMAIN = ("name", *_DATASETS, "reward_funcs", "reward_weights", "metric", "benchmark", "settings")
_SHIPPED = ("name", "domain", "options", "settings")
_OLD_NAMES = {"rewards": "reward_funcs", **{name.removesuffix("_dataset"): name for name in _DATASETS}}
# Packages that a dry run imports functions from, besides the folder of the recipe.
_TRUSTED = ("trl", "trl_interfere")
# Name in YAML to the dotted path of a function that makes the domain.
SHIPPED_DOMAINS = {name: f"trl_interfere.datasets.{name}_domain" for name in ("math", "code", "qa", "writing")}
# Name in YAML to the dotted path of a reward function.
BUILT_IN_REWARDS = {
    **{kind: f"trl_interfere.rewards.text.{kind}" for kind in ("exact_match", "contains_answer", "contains_words")},
    **{f"lab_{name}": f"trl_interfere.lab.{name}.{name}_reward" for name in SHIPPED_DOMAINS},
    "math_answer": "trl_interfere.rewards.math.math_reward",
    "choice": "trl_interfere.rewards.qa.qa_reward",
    "writing_rubric": "trl_interfere.rewards.writing.writing_reward",
    "math_verify": "trl.rewards.accuracy_reward",
    "think_format": "trl.rewards.think_format_reward",
}
_DATA = ("path", "name", "split", "columns", "prompt", "system", "limit", "skip")


@dataclass
class RunFile:
    """
    Content of a recipe: model, domains, and settings of [`SequentialGRPOConfig`], [`~peft.LoraConfig`],
    [`HealCallback`], [`RefreshCallback`] and [`InterferenceConfig`].
    """

    model: str
    domains: list[Domain]
    training: dict[str, Any] = field(default_factory=dict)
    peft: dict[str, Any] | None = None
    heal: dict[str, Any] | None = None
    refresh: dict[str, Any] | None = None
    analysis: dict[str, Any] = field(default_factory=dict)


def load_run_file(path: str | Path, folder: str | Path | None = None, dry: bool = False) -> RunFile:
    """
    Read a recipe, with the datasets loaded. Its paths start from `folder`, by default its own; a recipe that names
    functions is code: they are imported, from its folder and from what is installed. With `dry`, only functions of
    this package, of TRL and of the folder are; others stay unknown.
    """
    path = Path(path)
    content = read_yaml(path)
    check_names(content, ("model", "domains", *_PARTS), str(path), required=("model", "domains"))
    if not isinstance(content["domains"], list) or not content["domains"]:
        raise ValueError(f"{path}, domains: expected a list of domains, found {content['domains']!r}")
    if not isinstance(content["model"], str) or not content["model"]:
        raise ValueError(f"{path}, model: expected a folder or a Hub id, found {content['model']!r}")
    # Functions of the file are looked for beside it: a console script has no folder of the user on its path.
    folder = path.parent if folder is None else Path(folder)
    if str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))
    parts = {part: _mapping(content[part], f"{path}, {part}") for part in _PARTS if content.get(part) is not None}
    training = parts.setdefault("training", {})
    overrides = _mapping(training.get("stage_overrides"), f"{path}, training.stage_overrides")
    domains = []
    for position, entry in enumerate(content["domains"]):
        where = f"{path}, domains[{position}]"
        make = _shipped_domain if "domain" in _mapping(entry, where) else _domain
        domains.append(make(entry, where, folder, folder if dry else None))
        if entry.get("settings"):
            overrides[domains[-1].name] = _mapping(entry["settings"], f"{where}, settings")
    if overrides:
        training["stage_overrides"] = overrides
    local = folder / content["model"]
    return RunFile(str(local) if local.is_dir() else content["model"], domains, **parts)


class _Loader(yaml.SafeLoader):
    """YAML without two values for one name, of which the last one would count."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} stands twice", node.start_mark)
        super().flatten_mapping(node)


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings by name; what is no YAML, or names a setting twice, is refused."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected YAML, found something else ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected settings by name, found {type(content).__name__}")
    return content


def check_names(settings: dict[str, Any], known: Iterable[str], where: str, required: Iterable[str] = ()) -> None:
    """Refuse unknown and missing names, naming the nearest known one."""
    known = list(known)
    for name in settings:
        if name not in known and _OLD_NAMES.get(name) in known:
            raise ValueError(f"{where}: {name!r} is called {_OLD_NAMES[name]!r}")
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1)
            hint = f", did you mean {nearest[0]!r}?" if nearest else f", expected some of {sorted(known)}"
            raise ValueError(f"{where}: unknown option {name!r}{hint}")
    for name in required:
        if name not in settings:
            raise ValueError(f"{where}: expected the option {name!r}, found {sorted(map(str, settings))}")


def build_dataclass(cls: type, settings: dict[str, Any], where: str) -> Any:
    """A configuration object from settings by name; unknown names and values that do not fit are refused."""
    check_names(settings, [entry.name for entry in fields(cls) if entry.init], where)
    try:
        return cls(**typed(cls, settings, where))
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def typed(cls: type, settings: dict[str, Any], where: str) -> dict[str, Any]:
    """
    Settings with values of the types that a dataclass expects. YAML 1.1 reads `5e-3`, without a point, as a text, and
    a bare `no` as false.
    """
    types, found = get_type_hints(cls), dict(settings)
    for name, value in settings.items():
        hint = types.get(name, Any)
        if not _fits(value, hint):
            found[name] = _converted(value, hint)
            if not _fits(found[name], hint):
                expected = hint.__name__ if isinstance(hint, type) else str(hint)
                raise ValueError(f"{where}, {name}: expected {expected.replace('typing.', '')}, found {value!r}")
    return found


def _converted(value: Any, hint: Any) -> Any:
    if value is False and _fits("no", hint):
        return "no"
    if isinstance(value, str) and _fits(0.5, hint):
        with suppress(ValueError):
            return float(value)
    if isinstance(value, str) and _fits(0, hint):
        with suppress(ValueError):
            return int(value) if value.lstrip("+-").isdecimal() else int(float(value))
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    kind = origin or hint
    if not isinstance(kind, type):
        return True  # Any
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind) or (issubclass(kind, Enum) and isinstance(value, str))


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected settings by name, found {value!r}")
    return dict(value)


def _domain(entry: dict[str, Any], where: str, folder: Path, only: Path | None) -> Domain:
    check_names(entry, _DOMAIN, where, required=("name",))
    rewards = entry.get("reward_funcs") or []
    rewards = rewards if isinstance(rewards, list) else [rewards]
    for name, kinds in (("name", (str, int)), ("benchmark", (str, type(None)))):
        if not isinstance(entry.get(name, ""), kinds) or isinstance(entry.get(name), bool):
            raise ValueError(f"{where}, {name}: expected a text, found {entry[name]!r}")
    parts = {part: entry[part] for part in _DATASETS if entry.get(part) is not None}
    try:
        return Domain(
            name=str(entry["name"]),
            **{part: load_prompts(source, f"{where}, {part}", folder) for part, source in parts.items()},
            reward_funcs=[load_function(reward, f"{where}, reward_funcs", only=only) for reward in rewards],
            metric=entry.get("metric") and load_function(entry["metric"], f"{where}, metric", only=only),
            reward_weights=entry.get("reward_weights"),
            benchmark=entry.get("benchmark"),
        )
    except ValueError as error:
        raise error if str(error).startswith(where) else ValueError(f"{where}, {error}") from error


def _shipped_domain(entry: dict[str, Any], where: str, folder: Path, only: Path | None) -> Domain:
    check_names(entry, _SHIPPED, where)
    function = load_function(entry["domain"], f"{where}, domain", SHIPPED_DOMAINS, "shipped domain", only)
    options = _mapping(entry.get("options"), f"{where}, options")
    parameters = inspect.signature(function).parameters
    more = next((one.annotation for one in parameters.values() if one.kind == one.VAR_KEYWORD), None)
    known = {*parameters, *(name for named in get_args(more) for name in named.__annotations__)}
    if more is None or get_args(more):
        check_names(options, known - {"name", "folder", "options"}, f"{where}, options")
    if "name" in entry:
        options["name"] = str(entry["name"])
    if "folder" in known:
        options["folder"] = folder
    try:
        domain = function(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(domain, Domain):
        raise ValueError(f"{where}, domain: expected a function that returns a Domain, found {entry['domain']!r}")
    return domain


def load_function(
    name: str, where: str, known: Mapping = BUILT_IN_REWARDS, kind: str = "built-in reward", only: Path | None = None
) -> Callable:
    """
    A function by its built-in name or its dotted path. With `only`, modules that are neither trusted nor in that
    folder are not imported, and a function that cannot be called stands for theirs.
    """
    if not isinstance(name, str):
        raise ValueError(f"{where}: expected the name of a function, found {name!r}")
    name = known.get(name, name)
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(f"{where}: {name!r} is neither a {kind} ({', '.join(sorted(known))}) nor a dotted path")
    package = module.partition(".")[0]
    if only is not None and package not in _TRUSTED and not any(only.glob(f"{package}*")):
        if known is SHIPPED_DOMAINS:
            raise ValueError(f"{where}: {name!r} is not imported in a dry run, expected a function of {only}")
        return _not_imported
    try:
        function = getattr(import_module(module), attribute)
    except Exception as error:  # whatever a module of the user does as it is imported
        raise ValueError(f"{where}: cannot import {name!r} ({type(error).__name__}: {error})") from error
    if not callable(function):
        raise ValueError(f"{where}: expected a function, found {name!r} of type {type(function).__name__}")
    return function


def _not_imported(**kwargs):
    raise RuntimeError("a function that was not imported in a dry run was called")


def read_dataset(source: dict[str, Any], where: str, folder: Path) -> Dataset:
    """
    Rows of a local file, a folder or a data set on the Hub. Values of a file stay as they are written: what stands in
    a csv is text (`007`, `NA`), a text in json is never made a date, a column of integers and decimals is text.
    """
    split, local = source.get("split", "train"), folder / source["path"]
    try:
        if local.suffix in _FILE_TYPES and not local.exists():
            raise FileNotFoundError(f"no {local}")
        if local.is_file():
            return _read_file(local)
        if not any((local / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
            return load_dataset(str(local) if local.is_dir() else source["path"], source.get("name"), split=split)
        dataset = load_from_disk(str(local))
        if isinstance(dataset, DatasetDict) and split not in dataset:
            raise ValueError(f"expected the split {split!r}, found {sorted(dataset)}")
        return dataset[split] if isinstance(dataset, DatasetDict) else dataset
    except (DatasetGenerationError, ArrowException, ValueError) as error:
        raise ValueError(f"{where}: {source['path']!r} cannot be read ({error.__cause__ or error})") from error
    except (OSError, DatasetNotFoundError) as error:
        found = f"{source['path']!r} is neither a local file or folder nor readable from the Hub"
        raise ValueError(f"{where}: {found} ({error})") from error


def _read_file(path: Path) -> Dataset:
    if path.suffix not in _FILE_TYPES:
        raise ValueError(f"expected a file of type {sorted(_FILE_TYPES)}, found {path}")
    if path.suffix == ".parquet":
        return load_dataset("parquet", data_files=str(path), split="train")
    if path.suffix in (".csv", ".tsv"):
        table = pandas.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", dtype=str, keep_default_na=False)
        columns = {str(name): list(values) for name, values in table.items()}
    else:
        columns = _json_columns(path.read_text(encoding="utf-8-sig"))
    if not any(map(len, columns.values())):
        raise ValueError(f"expected at least one row, found none in {path}")
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
    Rows with a column `prompt` from a local file, a folder or the Hub: a path or Hub id, or a mapping with `path`,
    `name` (Hub configuration), `split`, `columns` (new name to old name), `prompt` (a template such as
    `"Solve {question}"` that makes the prompt conversational), `system` (its system message), `skip` and `limit`.
    """
    source = {"path": source} if isinstance(source, str) else _mapping(source, where)
    check_names(source, _DATA, where, required=("path",))
    for name in ("path", "name", "split", "prompt", "system"):
        if not isinstance(source.get(name, ""), str if name == "path" else (str, type(None))):
            raise ValueError(f"{where}, {name}: expected a text, found {source[name]!r}")
    dataset = read_dataset(source, where, folder)
    for new, old in _mapping(source.get("columns"), f"{where}, columns").items():
        if old not in dataset.column_names:
            raise ValueError(f"{where}, columns: expected a column {old!r}, found {dataset.column_names}")
        if old != new:
            dataset = dataset.remove_columns(new) if new in dataset.column_names else dataset
            dataset = dataset.rename_column(old, new)
    for option in ("skip", "limit"):
        found = source.get(option)
        if found is not None and (type(found) is not int or found < 0):
            raise ValueError(f"{where}, {option}: expected a number of rows, found {found!r}")
    chosen = range(len(dataset))[source.get("skip") or 0 :][: source.get("limit")]
    if not chosen:
        raise ValueError(f"{where}: expected at least one row, skip and limit leave none of {len(dataset)}")
    dataset = dataset.select(chosen)
    if source.get("prompt") is not None:
        settings = {"template": source["prompt"], "system": source.get("system"), "where": where}
        dataset = dataset.map(_to_messages, fn_kwargs=settings)
    if "prompt" not in (columns := dataset.column_names):
        raise ValueError(f"{where}: expected a column 'prompt', found {columns}; use `columns` or `prompt`")
    return dataset


def _to_messages(row: dict[str, Any], template: str, system: str | None, where: str) -> dict[str, Any]:
    try:
        text = template.format(**row)
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}, prompt: expected columns of {sorted(row)} in the template ({error})") from error
    messages = [] if system is None else [{"role": "system", "content": system}]
    return {"prompt": [*messages, {"role": "user", "content": text}]}
