from collections import Counter

import pytest
from datasets import Dataset

from trl_interfere.splits import split_dataset


KEYS = [f"prompt {index}" for index in range(100)]
TABLE = Dataset.from_dict({"key": KEYS, "kind": [index % 7 for index in range(100)]})


def split(sizes, table=TABLE, keys=None, strata=None):
    parts = split_dataset(table, keys or table["key"], sizes, "here", strata)
    return {name: list(part["key"]) for name, part in parts.items()}


def test_parts_do_not_overlap():
    parts = split({"train": 50, "selection": 20, "test": 30})
    assert {name: len(part) for name, part in parts.items()} == {"train": 50, "selection": 20, "test": 30}
    assert sorted(sum(parts.values(), [])) == sorted(KEYS)


def test_more_training_moves_no_test_row():
    small, large = split({"train": 10, "test": 30}), split({"train": 70, "test": 30})
    assert small["test"] == large["test"] and small["train"] == large["train"][:10]


def test_order_of_rows_does_not_matter():
    shuffled = TABLE.shuffle(seed=3)
    assert split({"train": 20, "test": 5}, shuffled) == split({"train": 20, "test": 5})


def test_what_is_left():
    assert len(split({"train": None, "test": 30})["train"]) == 70
    assert set(split({"test": 5})) == {"test"}


def test_equal_prompts_are_one():
    table = Dataset.from_dict({"key": ["What is  1+1?", "what is 1+1?", "WHAT IS 1+1? ", "other"]})
    assert sorted(sum(split({"train": 1, "test": 1}, table).values(), [])) == ["What is  1+1?", "other"]
    with pytest.raises(ValueError, match="here: expected at least 3 different prompts .*found 2"):
        split({"train": 3}, table)


def test_strata_keep_their_shares():
    strata = ["rare" if index % 10 == 0 else "middle" if index % 10 < 4 else "common" for index in range(100)]
    kinds = dict(zip(KEYS, strata, strict=True))
    parts = split({"train": 50, "selection": 20, "test": 30}, strata=strata)
    for name, size in (("train", 50), ("selection", 20), ("test", 30)):
        counts = Counter(kinds[key] for key in parts[name])
        for kind, share in (("rare", 0.1), ("middle", 0.3), ("common", 0.6)):
            assert abs(counts[kind] - share * size) <= 1, (name, counts)
    assert parts["test"] != split({"test": 30})["test"]


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"train": 101}, "here: expected at least 101 different prompts"),
        ({"eval": 5}, r"here: expected sizes of \['selection', 'test', 'train'\], found {'eval': 5}"),
        ({"train": 1.5}, "here, train: expected a number of rows, found 1.5"),
        ({"test": True}, "here, test: expected a number of rows, found True"),
    ],
)
def test_sizes_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        split(sizes)
