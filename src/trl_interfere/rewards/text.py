"""Rewards that a YAML file can name, and what a completion says."""

import re
import unicodedata

from trl.data_utils import is_conversational


def completion_text(completion: str | list[dict]) -> str:
    """Text of a completion in TRL's plain or conversational form."""
    return completion if not is_conversational({"prompt": completion}) else completion[-1]["content"]


def answer_text(completion: str | list[dict], thinking: bool = False) -> str | None:
    """What follows the thoughts, which a `thinking` model begins in its prompt; `None` if they do not end."""
    text = completion_text(completion) or ""
    _, tag, after = text.rpartition("</think>")
    return after if tag or not (thinking or "<think>" in text) else None


def exact_match(completions: list, answer: list[str], **kwargs) -> list[float]:
    """1 if the completion is the answer, regardless of case, surrounding space and a final full stop; 0 otherwise."""

    def normal(text: str) -> str:
        return text.strip().removesuffix(".").strip().casefold()

    pairs = zip(map(completion_text, completions), map(str, answer), strict=True)
    return [float(normal(text) == normal(expected)) for text, expected in pairs]


def contains_answer(completions: list, answer: list[str], **kwargs) -> list[float]:
    """1 if the answer stands in the completion as whole words in a row, in any case and accents; 0 otherwise."""

    def words(text: str) -> str:
        letters = unicodedata.normalize("NFKD", text.replace("\u2019", "'"))
        letters = "".join(letter for letter in letters if not unicodedata.combining(letter)).casefold()
        return " " + " ".join(re.findall(r"[\w'-]+", letters)) + " "

    pairs = zip(map(completion_text, completions), map(str, answer), strict=True)
    return [float(words(expected) in words(text)) for text, expected in pairs]


def contains_words(completions: list, words: list, **kwargs) -> list[float]:
    """Share of the required words, a list or a text, that occur in the completion as whole words, in any case."""
    rewards = []
    for completion, required in zip(completions, words, strict=True):
        required = required.split() if isinstance(required, str) else list(required)
        found = {word.strip(".,;:!?\"'()").casefold() for word in completion_text(completion).split()}
        rewards.append(sum(word.casefold() in found for word in required) / max(len(required), 1))
    return rewards
