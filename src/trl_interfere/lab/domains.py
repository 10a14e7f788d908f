"""The four domains of the lab, with their splits."""

import hashlib
import random

from datasets import Dataset

from ..domain import Domain
from . import code, math, qa, writing


TASKS = {"code": code, "math": math, "qa": qa, "writing": writing}
REWARDS = {name: getattr(task, f"{name}_reward") for name, task in TASKS.items()}
SIZES = {"pretrain": 20000, "train": 4000, "selection": 256, "test": 512}
# Shares of the prompt space. The base model sees `pretrain` only, GRPO sees `train` only.
SPLITS = {"pretrain": 0.4, "train": 0.3, "selection": 0.1, "test": 0.2}


def split_of(prompt: str) -> str:
    """Split to which a prompt belongs: a hash of its text, so that no two splits can share a prompt."""
    point = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") / 2**64
    for name, share in SPLITS.items():
        if point < share:
            return name
        point -= share
    return name


def lab_rows(name: str, split: str, size: int | None = None) -> list[dict]:
    """Rows of one split of one domain, the same on every machine."""
    size = SIZES[split] if size is None else size
    rng = random.Random(f"{name}-{split}")
    rows, seen = [], set()
    while len(rows) < size:
        row = TASKS[name].sample(rng)
        if split_of(row["prompt"]) == split and (split in ("pretrain", "train") or row["prompt"] not in seen):
            seen.add(row["prompt"])
            rows.append(row)
    return rows


def lab_domain(name: str, test_size: int = SIZES["test"]) -> Domain:
    """One domain of the lab."""
    return Domain(
        name=name,
        train_dataset=Dataset.from_list(lab_rows(name, "train")),
        selection_dataset=Dataset.from_list(lab_rows(name, "selection", min(test_size, SIZES["selection"]))),
        eval_dataset=Dataset.from_list(lab_rows(name, "test", test_size)),
        reward_funcs=REWARDS[name],
    )
