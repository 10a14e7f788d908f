"""The domain `writing`."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from datasets import Dataset

from ..domain import Domain
from ..rewards.judge import Judge
from ..rewards.writing import JudgeReward, RubricReward
from .sources import OFFLINE, DataOptions, asked, parts_of


_FORMS = ("a very short story", "a scene", "a description", "a diary entry", "a letter to a friend", "a fable")
_THEMES = (
    "a storm at sea|the last day of summer|a lost dog|an old house|the first snow|a train at night|a market|"
    "two sisters|"
    "a garden in spring|a broken clock|a long walk|a secret|a birthday|a mountain|a quiet street|an empty theatre|"
    "a fire in the hills|a visitor|a river in flood|a bakery at dawn|a map|a lighthouse|a promise|a borrowed coat|"
    "a piano|a school in the desert|an island|a night without stars|a wedding|a bridge|a harvest|an old photograph"
).split("|")
_WORDS = (
    "lantern window salt feather copper ladder mirror thread apple stone whistle bread candle key rope drum bell "
    "ribbon kettle basket shadow river paper button hammer clay anchor violin pepper wool chalk barrel compass "
    "ash honey glove bottle smoke marble needle"
).split()
_COMMON = ("very", "suddenly", "beautiful", "never", "always", "because", "really", "heart")
_ENDINGS = {"a question mark": "?", "an exclamation mark": "!", "a full stop": "."}


def writing_domain(
    name: str = "writing",
    source: str | list[str] = OFFLINE["writing"],
    judge: Mapping[str, Any] | None = None,
    thinking: bool = False,
    seed: int = 0,
    partial_score: bool = False,
    **options: Unpack[DataOptions],
) -> Domain:
    """
    The domain `writing`: texts that a rubric or a judge grades.

    Args:
        name (`str`, *optional*, defaults to `"writing"`):
            Name of the domain.
        source (`str` or `list[str]`, *optional*, defaults to `"constraints"`):
            `"constraints"` (assignments made on this machine, with a rubric that is checked), or one or several of
            `"creative-sonnet"`, `"creative-gemini"`, `"creative-kimi"` and `"creative-qwen"`, which need a judge.
        judge (`Mapping[str, Any]`, *optional*):
            Settings of [`Judge`].
        thinking (`bool`, *optional*, defaults to `False`):
            Whether the model thinks before it answers: only what follows `</think>` counts.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the assignments.
        partial_score (`bool`, *optional*, defaults to `False`):
            Whether the score of a text by a rubric is the share that it meets, as the reward is. A small model meets
            all of a rubric too rarely for a score to change.
        **options:
            See [`DataOptions`].

    Returns:
        [`Domain`]: The reward grows with the grade, or with the share of the rubric that is met; the score is the
        share of comparisons won, or of texts that meet all of the rubric.
    """
    where, offline = f"domain {name!r}", OFFLINE["writing"]
    sources = [source] if isinstance(source, str) else list(source)
    if sources != [offline] and partial_score:
        raise ValueError(f"{where}, partial_score: expected it with the source {offline!r} only, found {sources}")
    if (sources == [offline]) != (judge is None):
        expected = f"settings of a judge (base_url, model, ...), and none for {offline!r}, which has a rubric"
        raise ValueError(f"{where}, judge: expected {expected}, found {judge} for {sources}")

    def row(given: dict[str, Any]) -> dict[str, Any]:
        question, found = given["question"], "rubric" if "rubric" in given else "reference"
        if isinstance(question, list):  # messages: what the user said first
            question = next((str(m["content"]) for m in question if m.get("role") == "user"), "")
        return {**asked(question or "", (given[found] and question) or ""), found: given[found]}

    if judge is None:
        rewards = RubricReward(thinking), RubricReward(thinking, all_or_nothing=not partial_score)
    else:
        cache = Path(options.get("folder") or "", judge.get("cache", "judge.sqlite"))
        try:
            grader = Judge(**{**judge, "cache": cache})
        except TypeError as error:
            raise ValueError(f"{where}, judge: {error}") from error
        rewards = JudgeReward(grader, thinking), JudgeReward(grader, thinking, wins=True)
    parts = parts_of("writing", where, lambda path, n: _assignments(seed, n), row, sources, **options)
    return Domain(name, **parts, reward_funcs=rewards[0], metric=rewards[1])


def _assignments(seed: int, total: int) -> Dataset:
    rng = random.Random(f"writing-{seed}")
    rows = []
    for _ in range(2 * total + 16):
        form, theme, low = rng.choice(_FORMS), rng.choice(_THEMES), rng.choice((2, 3, 4))
        words = rng.sample([word for word in _WORDS if word not in theme], 2)
        without, ending = rng.choice(_COMMON), rng.choice(list(_ENDINGS))
        rubric = {"words": words, "without": without, "sentences": [low, low + 1]}
        rubric |= {"length": [8 * low, 20 * (low + 1)], "ending": _ENDINGS[ending]}
        text = (
            f"Write {form} about {theme} in {low} or {low + 1} sentences, with {8 * low} to {20 * (low + 1)} words. "
            f'Use the words "{words[0]}" and "{words[1]}". Do not use the word "{without}". End with {ending}. Reply '
            "with the text only."
        )
        rows.append({"question": text, "rubric": json.dumps(rubric)})
    return Dataset.from_list(rows)
