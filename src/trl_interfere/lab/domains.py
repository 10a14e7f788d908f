"""The four domains of the lab, with their splits."""

import random
from types import ModuleType

from datasets import Dataset

from ..domain import Domain
from . import code, math, qa, writing
from .splits import split_of


TASKS: dict[str, ModuleType] = {"code": code, "math": math, "qa": qa, "writing": writing}
REWARDS = {
    "code": code.code_reward,
    "math": math.math_reward,
    "qa": qa.qa_reward,
    "writing": writing.writing_reward,
}
SIZES = {"pretrain": 20000, "train": 4000, "selection": 256, "test": 512}


def lab_rows(name: str, split: str, size: int | None = None) -> list[dict]:
    """
    Rows of one split of one domain, the same on every machine.

    Args:
        name (`str`):
            `"code"`, `"math"`, `"qa"` or `"writing"`.
        split (`str`):
            `"pretrain"`, `"train"`, `"selection"` or `"test"`. Rows of `"selection"` and `"test"` are unique.
        size (`int`, *optional*):
            Number of rows. Defaults to the size of the split in `SIZES`.

    Returns:
        `list[dict]`: Rows with `prompt`, `answer` and the columns of the reward.
    """
    size = SIZES[split] if size is None else size
    rng = random.Random(f"{name}-{split}")
    rows, seen = [], set()
    while len(rows) < size:
        row = TASKS[name].sample(rng)
        if split_of(row["prompt"]) != split or (split in ("selection", "test") and row["prompt"] in seen):
            continue
        seen.add(row["prompt"])
        rows.append(row)
    return rows


def lab_domain(name: str, test_size: int = SIZES["test"]) -> Domain:
    """
    One domain of the lab.

    Args:
        name (`str`):
            `"code"`, `"math"`, `"qa"` or `"writing"`.
        test_size (`int`, *optional*, defaults to `512`):
            Number of test prompts, and the most selection prompts.

    Returns:
        [`Domain`]: Trains on `train`, chooses on `selection`, is scored on `test`.
    """
    return Domain(
        name=name,
        train_dataset=Dataset.from_list(lab_rows(name, "train")),
        selection_dataset=Dataset.from_list(lab_rows(name, "selection", min(test_size, SIZES["selection"]))),
        eval_dataset=Dataset.from_list(lab_rows(name, "test", test_size)),
        reward_funcs=REWARDS[name],
    )
