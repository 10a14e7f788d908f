"""Rewards `writing`: texts graded by a judge, or by a rubric that can be checked."""

import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .judge import Judge
from .text import answer_text


_AT_ONCE = 8  # comparisons by the judge
_SENTENCE = re.compile(r"[^.!?]+(?:[.!?]+[\"'”’)]*)?")
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


class JudgeReward:
    """
    How a text compares with the reference, by a judge that sees the two in both orders.

    Args:
        judge ([`Judge`]):
            The judge.
        thinking (`bool`, *optional*, defaults to `False`):
            Whether the model thinks before it answers.
        wins (`bool`, *optional*, defaults to `False`):
            The share of the orders in which the text has the higher grade, a tie being half, instead of the mean over
            the orders of 1/2 + (grade of the text - grade of the reference) / 18.
    """

    __name__ = "judge_reward"

    def __init__(self, judge: Judge, thinking: bool = False, wins: bool = False):
        self.judge, self.thinking, self.wins = judge, thinking, wins

    def __call__(self, prompts: list, completions: list, reference: list[str], **kwargs: Any) -> list[float]:
        """Rewards of completions by texts to compare with. An empty one gets 0 and is not shown to the judge."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(self._reward, prompts, completions, reference))

    def _reward(self, prompt: str | list[dict], completion: str | list[dict], reference: str) -> float:
        text = (answer_text(completion, self.thinking) or "").strip()
        if not text:
            return 0.0
        assignment = prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)
        grades = self.judge.compare(assignment, text, reference)
        if self.wins:
            return sum(0.5 * ((own > other) + (own >= other)) for own, other in grades) / len(grades)
        return sum(0.5 + (own - other) / 18 for own, other in grades) / len(grades)


class RubricReward:
    """
    Share of the rubric of an assignment that a text meets; 0 for what is no prose.

    Prose has mostly letters and sentences of three words or more, at most half of its words are repetitions, no
    sentence stands in it twice, and it is not copied from the assignment. Otherwise lists of words and repeated
    sentences would do.

    Args:
        thinking (`bool`, *optional*, defaults to `False`):
            Whether the model thinks before it answers.
        all_or_nothing (`bool`, *optional*, defaults to `False`):
            1 if all of the rubric is met, 0 otherwise.
    """

    __name__ = "writing_reward"

    def __init__(self, thinking: bool = False, all_or_nothing: bool = False):
        self.thinking, self.all_or_nothing = thinking, all_or_nothing

    def __call__(self, completions: list, prompts: list, rubric: list[str], **kwargs: Any) -> list[float]:
        """Rewards of completions by the rubric of each assignment, as JSON."""
        rewards = []
        for completion, prompt, content in zip(completions, prompts, rubric, strict=True):
            assignment = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            items = check_rubric(answer_text(completion, self.thinking), json.loads(content), assignment)
            share = sum(items.values()) / len(items) if items else 0.0
            rewards.append(float(share == 1) if self.all_or_nothing else share)
        return rewards


writing_reward = RubricReward()


def check_rubric(text: str | None, rubric: Mapping[str, Any], assignment: str = "") -> dict[str, bool]:
    """The items of a rubric and whether a text meets them; empty if the text is no prose."""
    text = (text or "").strip().strip("*_").strip()
    if len(text) > 20_000:
        return {}
    sentences = [part.strip() for part in _SENTENCE.findall(text) if re.search("[.!?]", part)]
    words, bodies = _words(text), [*map(_words, sentences)]
    runs, asked = ({part[i : i + 6] for i in range(len(part) - 5)} for part in (words, _words(assignment)))
    prose = (
        min(map(len, bodies), default=0) >= 3
        and len(set(bodies)) == len(bodies)
        and sum(sign.isalpha() or sign.isspace() for sign in text) >= 0.8 * len(text)
        and len(set(words)) >= 0.5 * len(words)
        # A list of words has commas after nearly every one.
        and all(sentence.count(",") <= 0.5 * len(body) for sentence, body in zip(sentences, bodies, strict=True))
        and runs.isdisjoint(asked)
    )
    items = {f"word {word}": word.casefold() in words for word in rubric["words"]} | {
        "without": rubric["without"].casefold() not in words,
        "sentences": rubric["sentences"][0] <= len(sentences) <= rubric["sentences"][1],
        "length": rubric["length"][0] <= len(words) <= rubric["length"][1],
        "ending": text.rstrip("\"'”’)").endswith(rubric["ending"]),
    }
    return items if prose else {}


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.casefold() for word in _WORD.findall(text))
