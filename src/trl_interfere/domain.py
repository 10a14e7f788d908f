"""A domain: what a stage trains on and what it is scored with."""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from trl.trainer.grpo_trainer import RewardFunc

from .revision import parse_benchmark


DOMAIN_COLUMN = "domain"

# What TRL hands to a reward function besides columns of the dataset, and the columns that it keeps to itself.
_ARGUMENTS = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
_RESERVED = _ARGUMENTS - {"completion_ids"} | {"environments"}
_NOT_HANDED = {"prompt", "completion", "completion_ids"}


@dataclass
class Domain:
    """
    One skill that a model is RL-tuned for: prompts, rewards, and the prompts it is scored on.

    Args:
        name (`str`):
            Name of the domain: letters, digits, `-` and `_`. It names folders, metrics and score-matrix columns, and
            must not begin with `refresh-`, as the folders of refresh stages do.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Prompts to train on, in TRL's prompt-only format (a `"prompt"` column, plain or conversational). Other
            columns are handed to the reward functions. A domain without it can be scored but not trained.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`):
            Reward functions in TRL's sense.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Prompts that scores are reported on.
        selection_dataset ([`~datasets.Dataset`], *optional*):
            Prompts that choices are made on (routes, steps of a rollback), disjoint from `eval_dataset`.
        metric (`Callable`, *optional*):
            Function with the signature of a reward function whose values, 0 to 1, are the score of the domain.
            Defaults to the weighted sum of `reward_funcs`.
        reward_weights (`list[float]`, *optional*):
            One weight per reward function. Defaults to 1 each.
        benchmark (`str`, *optional*):
            Benchmark on the Hub whose prompts `eval_dataset` holds: `user/dataset`, with `@revision` and `:task` if it
            has them. A published model then carries its score in `.eval_results/`.

    Raises:
        `ValueError`: If the name is malformed, a dataset is empty, of another type or lacks `"prompt"`, or the
            weights do not match.
    """

    name: str
    train_dataset: Dataset | IterableDataset | None = None
    reward_funcs: RewardFunc | list[RewardFunc] | None = None
    eval_dataset: Dataset | None = None
    selection_dataset: Dataset | None = None
    metric: Callable[..., list[float]] | None = None
    reward_weights: list[float] | None = None
    benchmark: str | None = None

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ValueError(f"domain name {self.name!r}: expected letters, digits, '-' and '_' only")
        if self.name.startswith("refresh-"):
            raise ValueError(f"domain name {self.name!r}: expected a name that does not begin with 'refresh-'")
        if not isinstance(self.reward_funcs, list):
            self.reward_funcs = [] if self.reward_funcs is None else [self.reward_funcs]
        scored = self.eval_dataset is not None or self.selection_dataset is not None
        if scored and not self.reward_funcs and self.metric is None:  # else an environment may own the reward
            raise ValueError(f"domain {self.name!r}: expected at least one reward function or a metric, found neither")
        if self.benchmark is not None:
            parse_benchmark(self.benchmark, f"domain {self.name!r}, ")
        n, weights = len(self.reward_funcs), self.reward_weights
        self.reward_weights = [1.0] * n if weights is None else weights
        try:
            fits = len(self.reward_weights) == n and all(map(math.isfinite, self.reward_weights))
        except TypeError:
            fits = False
        if not fits:
            where = f"domain {self.name!r}, reward_weights"
            raise ValueError(f"{where}: expected {n} finite numbers, one per reward function, found {weights!r}")
        for field in ("train_dataset", "eval_dataset", "selection_dataset"):
            if getattr(self, field) is not None:
                setattr(self, field, self._checked(getattr(self, field), field))

    def _checked(self, dataset: Any, field: str) -> Any:
        where = f"domain {self.name!r}, {field}"
        streamed = isinstance(dataset, IterableDataset)
        if not isinstance(dataset, (Dataset, IterableDataset)) or (streamed and field != "train_dataset"):
            raise ValueError(
                f"{where}: expected a Dataset (scores are compared prompt by prompt: of a stream, take "
                f"`Dataset.from_list(list(stream.take(n)))`), found {type(dataset).__name__}"
            )
        columns = dataset.column_names or []  # those of a stream may be unknown
        routed = field == "train_dataset" and "environment" in columns
        if columns and "prompt" not in columns and not routed:
            raise ValueError(f"{where}: expected a column 'prompt', found {sorted(columns)}")
        _check_reserved(columns, where)
        if streamed:
            if DOMAIN_COLUMN in columns:
                raise ValueError(f"{where}: the column '{DOMAIN_COLUMN}' routes rewards; rename it")
            return dataset.map(_mark, fn_kwargs={"name": self.name, "where": where})
        if len(dataset) == 0:
            raise ValueError(f"{where}: expected at least one row, found none")
        if DOMAIN_COLUMN not in columns:
            return dataset.add_column(DOMAIN_COLUMN, [self.name] * len(dataset))
        _check_marks(dataset.unique(DOMAIN_COLUMN), self.name, where)
        return dataset


def check_columns(domain: Domain) -> None:
    """Refuse reward functions and metrics that cannot be called with the columns of their dataset."""
    metrics = domain.reward_funcs if domain.metric is None else [domain.metric]
    for field, functions in (("train_dataset", domain.reward_funcs), ("eval_dataset", metrics)):
        dataset = getattr(domain, field)
        if dataset is None or dataset.column_names is None:
            continue
        handed = set(dataset.column_names) - _NOT_HANDED | _ARGUMENTS
        for function in functions:
            if isinstance(function, (str, nn.Module)):
                continue
            parameters = parameters_of(function).values()
            where = f"domain {domain.name!r}, {getattr(function, '__name__', type(function).__name__)}"
            named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            needed = {p.name for p in named if p.default is p.empty} - handed - {"environments"}
            if needed:
                columns = sorted(dataset.column_names)
                raise ValueError(f"{where}: expected a column {min(needed)!r} in {field}, found {columns}")
            surplus = sorted(handed - {p.name for p in named})
            if parameters and surplus and not any(p.kind == p.VAR_KEYWORD for p in parameters):
                raise ValueError(f"{where}: expected a function with **kwargs, found one that does not take {surplus}")


def parameters_of(function: Callable) -> Mapping[str, inspect.Parameter]:
    """Parameters of a function, none where it does not tell its signature."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _check_reserved(columns: Iterable[str], where: str) -> None:
    for name in sorted(_RESERVED & {*columns}):
        raise ValueError(f"{where}: the column {name!r} has the name of what rewards are called with; rename it")


def _check_marks(marks: Iterable[Any], name: str, where: str) -> None:
    if not {*marks} <= {name}:
        found = sorted(map(str, marks))[:5]
        raise ValueError(f"{where}: the column '{DOMAIN_COLUMN}' routes rewards, and holds {found}; rename it")


def _mark(row: dict[str, Any], name: str, where: str) -> dict[str, str]:
    # The columns of a stream may be unknown until its rows are read.
    _check_reserved(row, where)
    _check_marks([row.get(DOMAIN_COLUMN, name)], name, where)
    return {DOMAIN_COLUMN: name}
