"""
Four domains for the study of SmolLM2: a short task each, and a form that its answers must have.

Sums are wanted bare (`68`), reversed digits in a sentence (`It is 128.`), digits as words in brackets (`[four two]`),
the larger of two numbers in asterisks (`**57**`). Only the right answer in the right form is rewarded.
"""

import random
from collections.abc import Callable, Iterator

from datasets import Dataset

from trl_interfere import Domain


WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FORMS = {"sums": "{}", "reverse": "It is {}.", "spell": "[{}]", "larger": "**{}**"}
SIZES = {"train": 320, "selection": 100, "test": 200}


def sums(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randrange(10, 100), rng.randrange(1, 10)
    return f"What is {a} + {b}?\n", str(a + b)


def reverse(rng: random.Random) -> tuple[str, str]:
    digits = "".join(rng.choices("123456789", k=3))
    return f"Write {digits} in reverse.\n", digits[::-1]


def spell(rng: random.Random) -> tuple[str, str]:
    digits = rng.choices(range(1, 10), k=3)
    return f"Write {''.join(map(str, digits))} in words.\n", " ".join(WORDS[digit] for digit in digits)


def larger(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(range(10, 100), 2)
    return f"Which is larger, {a} or {b}?\n", str(max(a, b))


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "sums": sums, "reverse": reverse, "spell": spell, "larger": larger}  # fmt: skip


def right_answer(completions: list[str], answer: list[str], **kwargs) -> list[float]:
    """1 if the completion is the answer to the letter, but for space around it."""
    return [float(found.strip() == wanted) for found, wanted in zip(completions, answer, strict=True)]


def domain(name: str, seed: int = 0) -> Domain:
    """A domain with prompts of its own in train, selection and test."""
    rng, rows = random.Random(f"{name} {seed}"), {}
    while len(rows) < sum(SIZES.values()):
        prompt, content = TASKS[name](rng)
        rows[prompt] = {"prompt": prompt, "content": content, "answer": FORMS[name].format(content)}
    rows, parts = list(rows.values()), {}
    for split, size in SIZES.items():
        parts[split], rows = Dataset.from_list(rows[:size]), rows[size:]
    return Domain(name, parts["train"], right_answer, parts["test"], parts["selection"])


def shown_answers(domains: list[Domain], count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Right answers to training prompts of every domain: two in five in its own form, one in each of the others."""
    rng, rows = random.Random(seed), {domain.name: domain.train_dataset.to_list() for domain in domains}
    for _ in range(count):
        name = rng.choice(list(rows))
        row, form = rng.choice(rows[name]), rng.choice([FORMS[name], *FORMS.values()])
        yield {"prompt": row["prompt"], "completion": form.format(row["content"])}
