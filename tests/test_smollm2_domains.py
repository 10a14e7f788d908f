"""The domains of the study of SmolLM2."""

from collections import Counter
from pathlib import Path

import pytest

from trl_interfere.recipe import load_run_file


@pytest.fixture(scope="module")
def domains():
    return load_run_file(Path(__file__).parents[1] / "recipes" / "smollm2-study.yaml").domains


WORDS = "zero one two three four five six seven eight nine".split()
RIGHT = {
    "sums": lambda prompt, found: eval(prompt.removeprefix("What is ").strip("?\n")) == int(found),  # noqa: S307
    "reverse": lambda prompt, found: prompt.split()[1][::-1] == found,
    "spell": lambda prompt, found: [WORDS.index(word) for word in found.split()] == [*map(int, prompt.split()[1])],
    "larger": lambda prompt, found: int(found) == max(map(int, prompt[17:-2].split(" or "))),
}


def test_splits_share_no_prompt_and_their_answers_are_right(domains):
    from smollm2_domains import FORMS, SIZES, right_answer

    for domain in domains:
        parts = [domain.train_dataset, domain.selection_dataset, domain.eval_dataset]
        assert [len(part) for part in parts] == list(SIZES.values())
        assert len({prompt for part in parts for prompt in part["prompt"]}) == sum(SIZES.values())
        assert all(RIGHT[domain.name](row["prompt"], row["content"]) for row in domain.train_dataset)
        for row in domain.eval_dataset.select(range(20)):
            for name, form in FORMS.items():
                assert right_answer([form.format(row["content"])], [row["answer"]]) == [float(name == domain.name)]


def test_the_warm_up_shows_two_in_five_in_their_own_form(domains):
    from smollm2_domains import FORMS, shown_answers

    wanted = {row["prompt"]: row["answer"] for domain in domains for row in domain.train_dataset}
    rows = list(shown_answers(domains, 4000))
    own = sum(wanted[row["prompt"]] == row["completion"] for row in rows) / len(rows)
    assert 0.37 < own < 0.43
    firsts = Counter(row["completion"][0] in "[*I" for row in rows)
    assert set(FORMS) == {domain.name for domain in domains} and 0.6 < firsts[True] / len(rows) < 0.8
