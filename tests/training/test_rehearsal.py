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


@pytest.mark.parametrize(
    "share, earlier, message",
    [(1, ["math"], "^share: "), (0.5, [], "^earlier: "), (0.5, ["qa"], "domain 'qa', train_dataset: ")],
)
def test_bad_input(share, earlier, message):
    scored = Domain("qa", eval_dataset=Dataset.from_list([{"prompt": "a"}]), reward_funcs=tiny_runs.text_reward)
    made = {"math": tiny_runs.math_domain(), "qa": scored}
    with pytest.raises(ValueError, match=message):
        rehearse(tiny_runs.writing_domain(), [made[name] for name in earlier], share=share)
