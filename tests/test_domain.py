import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from trl_interfere.domain import Domain


def reward(completions, **kwargs):
    return [1.0] * len(completions)


ROWS = Dataset.from_dict({"prompt": ["1", "2"], "answer": ["a", "b"]})


def test_datasets_get_the_column_that_routes_rewards():
    domain = Domain("math-1", train_dataset=ROWS, reward_funcs=reward, eval_dataset=ROWS, selection_dataset=ROWS)
    for dataset in (domain.train_dataset, domain.eval_dataset, domain.selection_dataset):
        assert dataset.to_dict() == {**ROWS.to_dict(), "domain": ["math-1", "math-1"]}
    assert ROWS.column_names == ["prompt", "answer"]
    again = Domain("math-1", train_dataset=domain.train_dataset, reward_funcs=reward)
    assert again.train_dataset.to_dict() == domain.train_dataset.to_dict()


def test_streamed_datasets():
    rows = ROWS.to_list()
    stream = IterableDataset.from_generator(lambda: iter(rows))
    domain = Domain("math", train_dataset=stream, reward_funcs=reward)
    again = Domain("math", train_dataset=domain.train_dataset, reward_funcs=reward)
    assert list(domain.train_dataset) == list(again.train_dataset) == [{**row, "domain": "math"} for row in rows]
    rows = [{"prompt": "1", "domain": "algebra"}]
    with pytest.raises(ValueError, match="column 'domain' routes rewards"):
        list(Domain("math", stream, reward_funcs=reward).train_dataset)
    with pytest.raises(ValueError, match="column 'domain' routes rewards"):  # at once, where columns are known
        Domain("math", Dataset.from_list(rows).to_iterable_dataset(), reward_funcs=reward)


def test_rewards_and_weights():
    for settings, functions, weights in (({"reward_funcs": reward}, [reward], [1.0]), ({"metric": reward}, [], [])):
        domain = Domain("math", **settings)
        assert (domain.reward_funcs, domain.reward_weights) == (functions, weights)


@pytest.mark.parametrize(
    "settings, message",
    [
        *(({"name": name}, "domain name '.*': expected letters") for name in ("a/b", "", "math\n", "..")),
        ({"reward_funcs": None, "eval_dataset": ROWS}, "domain 'math'.*reward function"),
        ({"reward_weights": [1.0, 2.0]}, "domain 'math'.*reward_weights: expected 1 "),
        ({"reward_weights": [float("nan")]}, "domain 'math', reward_weights: "),
        ({"eval_dataset": Dataset.from_dict({"question": ["1"]})}, "eval_dataset: .*'prompt'.*'question'"),
        ({"eval_dataset": ROWS.to_iterable_dataset()}, "eval_dataset: expected a Dataset .*IterableDataset"),
        ({"train_dataset": DatasetDict(train=ROWS)}, "train_dataset: expected a Dataset .*DatasetDict"),
        ({"train_dataset": Dataset.from_dict({"prompt": []})}, "domain 'math', train_dataset: "),
        (
            {"selection_dataset": ROWS.add_column("domain", ["math", "algebra"])},
            r"selection_dataset: .*'domain'.*\['algebra', 'math'\]",
        ),
    ],
)
def test_malformed_domains(settings, message):
    with pytest.raises(ValueError, match=message):
        Domain(**{"name": "math", "reward_funcs": reward, **settings})
