"""A domain: what a stage trains on and what it is scored with."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset
from trl.trainer.grpo_trainer import RewardFunc


DOMAIN_COLUMN = "domain"


@dataclass
class Domain:
    """
    One skill that a model is RL-tuned for: prompts, rewards, and the prompts it is scored on.

    Args:
        name (`str`):
            Name of the domain: letters, digits, `-` and `_`. It names folders, metrics and score-matrix columns.
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

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ValueError(f"domain name {self.name!r}: expected letters, digits, '-' and '_' only")
        if self.reward_funcs is None:
            self.reward_funcs = []
        elif not isinstance(self.reward_funcs, list):
            self.reward_funcs = [self.reward_funcs]
        if not self.reward_funcs and self.metric is None:
            raise ValueError(f"domain {self.name!r}: expected at least one reward function or a metric, found neither")
        if self.reward_weights is None:
            self.reward_weights = [1.0] * len(self.reward_funcs)
        if len(self.reward_weights) != len(self.reward_funcs):
            raise ValueError(
                f"domain {self.name!r}: expected {len(self.reward_funcs)} reward weights (one per reward function), "
                f"found {len(self.reward_weights)}"
            )
        for field in ("train_dataset", "eval_dataset", "selection_dataset"):
            if getattr(self, field) is not None:
                setattr(self, field, self._checked(getattr(self, field), field))

    def _checked(self, dataset: Any, field: str) -> Any:
        if isinstance(dataset, IterableDataset) and field != "train_dataset":
            raise ValueError(
                f"domain {self.name!r}, {field}: expected a Dataset, since scores are compared prompt by prompt, "
                "found an IterableDataset; pass `Dataset.from_list(list(stream.take(n)))`"
            )
        if not isinstance(dataset, (Dataset, IterableDataset)):
            raise ValueError(f"domain {self.name!r}, {field}: expected a Dataset, found {type(dataset).__name__}")
        columns = dataset.column_names
        if columns is not None and "prompt" not in columns:
            raise ValueError(f"domain {self.name!r}, {field}: expected a column 'prompt', found {sorted(columns)}")
        if isinstance(dataset, IterableDataset):
            if columns is not None and DOMAIN_COLUMN in columns:
                raise ValueError(
                    f"domain {self.name!r}, {field}: the column '{DOMAIN_COLUMN}' is used to route rewards; rename it"
                )
            return dataset.map(_mark, fn_kwargs={"name": self.name, "field": field})
        if len(dataset) == 0:
            raise ValueError(f"domain {self.name!r}, {field}: expected at least one row, found none")
        if DOMAIN_COLUMN in columns:
            if set(dataset.unique(DOMAIN_COLUMN)) != {self.name}:
                raise ValueError(
                    f"domain {self.name!r}, {field}: the column '{DOMAIN_COLUMN}' is used to route rewards and holds "
                    f"other values ({sorted(map(str, dataset.unique(DOMAIN_COLUMN)))[:5]}); rename it"
                )
            return dataset
        return dataset.add_column(DOMAIN_COLUMN, [self.name] * len(dataset))


def _mark(row: dict[str, Any], name: str, field: str) -> dict[str, str]:
    # The columns of a stream may be unknown until its rows are read.
    if row.get(DOMAIN_COLUMN, name) != name:
        raise ValueError(
            f"domain {name!r}, {field}: the column '{DOMAIN_COLUMN}' is used to route rewards and holds "
            f"{row[DOMAIN_COLUMN]!r}; rename it"
        )
    return {DOMAIN_COLUMN: name}
