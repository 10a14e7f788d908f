import pytest
import tiny_runs
from datasets import Dataset

from trl_interfere import Domain
from trl_interfere.training.rehearsal import rehearse


def test_rows_and_shares():
    math, writing = tiny_runs.math_domain(), tiny_runs.writing_domain()
    mixed = rehearse(writing, [math], share=0.25, seed=1)
    assert len(mixed.train_dataset) == len(writing.train_dataset) == 48
    origins = mixed.train_dataset["domain"][:]
    assert origins.count("math") == 12 and origins.count("writing") == 36
    assert origins != sorted(origins)
    prompts = {name: set(domain.train_dataset["prompt"]) for name, domain in (("math", math), ("writing", writing))}
    assert all(row["prompt"] in prompts[row["domain"]] for row in mixed.train_dataset)
    assert set(writing.train_dataset["domain"]) == {"writing"}  # the domain itself stays as it was
    assert mixed.eval_dataset is writing.eval_dataset
    again = rehearse(writing, [math], share=0.25, seed=1)
    assert again.train_dataset["prompt"][:] == mixed.train_dataset["prompt"][:]


def test_bad_input():
    math, writing = tiny_runs.math_domain(), tiny_runs.writing_domain()
    for share in (0, 1, -0.5):
        with pytest.raises(ValueError, match="share: expected a number above 0 and below 1"):
            rehearse(writing, [math], share=share)
    with pytest.raises(ValueError, match="earlier: expected at least one domain"):
        rehearse(writing, [])
    scored = Domain("qa", eval_dataset=Dataset.from_list([{"prompt": "a"}]), reward_funcs=tiny_runs.text_reward)
    with pytest.raises(ValueError, match="domain 'qa', train_dataset: expected a Dataset to draw rows from"):
        rehearse(writing, [scored])
