"""Reward functions that see the rows of their own domain only, and whose values are checked."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from trl.trainer.utils import is_async_callable

from ..domain import DOMAIN_COLUMN


class RewardError(ValueError):
    """A reward function failed, or returned something else than one number or `None` per completion."""


def mask_reward(reward: Any, domain: str, several: bool) -> Any:
    """A reward function that is called with the rows of its domain only, and returns `None` for the others."""
    if isinstance(reward, (str, nn.Module)):
        return reward
    name = reward_name(reward)
    label = f"domain {domain!r}: reward function {name!r}"

    def select(prompts: list, kwargs: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
        rows = [row for row, other in enumerate(kwargs[DOMAIN_COLUMN]) if other == domain]
        selected = {
            key: [value[row] for row in rows] if isinstance(value, list) and len(value) == len(prompts) else value
            for key, value in kwargs.items()
        }
        log_extra = kwargs.get("log_extra")
        if log_extra is not None:  # a column of the table of all completions
            selected["log_extra"] = lambda column, values: log_extra(column, scatter(rows, values, len(prompts)))
        return rows, selected

    def scatter(rows: list[int], values: list, n: int) -> list:
        scattered = dict(zip(rows, values, strict=True))
        return [scattered.get(row) for row in range(n)]

    @contextmanager
    def named() -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise RewardError(f"{label} raised {type(error).__name__}: {error}") from error

    async def masked_async(prompts, **kwargs):
        rows, selected = select(prompts, {"prompts": prompts, **kwargs})
        with named():
            values = await reward(**selected) if rows else []
        return scatter(rows, _numbers(values, len(rows), label), len(prompts))

    def masked_sync(prompts, **kwargs):
        rows, selected = select(prompts, {"prompts": prompts, **kwargs})
        with named():
            values = reward(**selected) if rows else []
        return scatter(rows, _numbers(values, len(rows), label), len(prompts))

    masked = masked_async if is_async_callable(reward) else masked_sync
    masked.__name__ = f"{domain}/{name}" if several else name
    return masked


def reward_name(reward: Callable | nn.Module | str) -> str:
    """Name of a reward function or reward model, for messages and metrics."""
    return reward if isinstance(reward, str) else getattr(reward, "__name__", type(reward).__name__)


def _numbers(values: Any, n: int, label: str) -> list[float | None]:
    if isinstance(values, (torch.Tensor, np.ndarray)):
        values = values.tolist()
    if isinstance(values, (str, dict)) or not hasattr(values, "__iter__"):
        raise RewardError(f"{label} returned {type(values).__name__}, expected a list with one reward per completion")
    values = list(values)
    if len(values) != n:
        raise RewardError(f"{label} returned {len(values)} rewards, expected {n}, one per completion")
    for index, value in enumerate(values):
        try:
            fits = value is None or (not isinstance(value, str) and math.isfinite(float(value)))
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise RewardError(f"{label} returned {value!r} for completion {index}, expected a finite number or None")
    return [None if value is None else float(value) for value in values]
