"""Non-overlapping parts of a data set: train, selection and test."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

from datasets import Dataset


PARTS = ("test", "selection", "train")  # in this order a row is dealt, so that more training moves no test row


def split_dataset(
    dataset: Dataset, keys: Sequence[str], sizes: Mapping[str, int | None], where: str, strata: Sequence | None = None
) -> dict[str, Dataset]:
    """
    Deal rows to parts, in an order that depends on nothing but their keys.

    Rows with the same key (regardless of case and space) are one prompt; the first of them is used. With strata, every
    part holds each stratum in the same proportion, up to rounding: row i of the n of a stratum gets the place
    (i + u) / n with u from a hash of its name, and the places are sorted.

    Args:
        dataset ([`~datasets.Dataset`]):
            The rows.
        keys (`Sequence[str]`):
            For each row the text that tells prompts apart.
        sizes (`Mapping[str, int]`):
            Rows of `"test"`, `"selection"` and `"train"`; `None` is all that is left, for the last part.
        where (`str`):
            Where the sizes stand, for the message.
        strata (`Sequence`, *optional*):
            For each row the stratum it belongs to.

    Returns:
        `dict[str, Dataset]`: The parts that have rows, each in the dealt order.

    Raises:
        `ValueError`: If there are fewer prompts than asked for.
    """
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(normal_key(key), row)
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
    """
    Sizes of the parts of a domain, checked.

    Args:
        sizes (`Mapping[str, int]`, *optional*):
            What the user gave.
        default (`Mapping[str, int]`):
            What holds if it is nothing.
        where (`str`):
            Where the sizes stand, for the message.

    Returns:
        `dict[str, int]`: Rows by part.

    Raises:
        `ValueError`: If a part is unknown or a size is no number of rows.
    """
    if sizes is None:
        return dict(default)
    if not isinstance(sizes, Mapping) or set(sizes) - set(PARTS):
        raise ValueError(f"{where}: expected sizes of {sorted(PARTS)}, found {sizes!r}")
    for part, size in sizes.items():
        if size is not None and (type(size) is not int or size < 0):
            raise ValueError(f"{where}, {part}: expected a number of rows, found {size!r}")
    return dict(sizes)


def normal_key(text: str) -> str:
    """
    Text of a prompt without regard to case and space.

    Args:
        text (`str`):
            The text.

    Returns:
        `str`: The key under which prompts are told apart.
    """
    return " ".join(str(text).split()).casefold()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
