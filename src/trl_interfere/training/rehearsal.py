"""Rehearsal: prompts of earlier domains in the data of a later stage."""

import copy

import numpy as np
from datasets import Dataset, concatenate_datasets

from ..domain import Domain


def rehearse(domain: Domain, earlier: list[Domain], share: float = 0.2, seed: int = 0) -> Domain:
    """
    A domain with training prompts of earlier domains mixed in (experience replay, Rolnick et al., 2019, arXiv
    1811.11682, without stored rewards). Each row keeps the name of its own domain, by which [`SequentialGRPOTrainer`]
    finds its rewards: the earlier domains must be among those of the trainer.

    Args:
        domain ([`Domain`]):
            Domain of the later stage.
        earlier (`list[Domain]`):
            Domains to rehearse, in equal parts.
        share (`float`, *optional*, defaults to `0.2`):
            Share of the rows that are of the earlier domains; the number of rows stays the same.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw of rows and of their order.

    Returns:
        [`Domain`]: The domain with the mixed data set.

    Raises:
        `ValueError`: If the share is out of range, or a domain has no data set to draw rows from.
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number above 0 and below 1, found {share}")
    if not earlier:
        raise ValueError("earlier: expected at least one domain, found none")
    for one in (domain, *earlier):
        if not isinstance(one.train_dataset, Dataset):
            found = type(one.train_dataset).__name__
            raise ValueError(
                f"domain {one.name!r}, train_dataset: expected a Dataset to draw rows from, found {found}"
            )
    rng = np.random.default_rng(seed)
    total = len(domain.train_dataset)
    rehearsed = max(len(earlier), round(share * total))
    counts = [len(part) for part in np.array_split(np.arange(rehearsed), len(earlier))]
    parts = [(domain.train_dataset, total - rehearsed)]
    parts += [(one.train_dataset, count) for one, count in zip(earlier, counts, strict=True)]
    drawn = [rows.select(np.sort(rng.permutation(len(rows))[:count])) for rows, count in parts]
    mixed = concatenate_datasets(drawn)
    # Domain refuses rows of other domains, which here are meant.
    result = copy.copy(domain)
    result.train_dataset = mixed.select(rng.permutation(len(mixed)))
    return result
