"""Domain `writing`: texts graded by a judge, or by a rubric that can be checked."""

import json
import random
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..domain import Domain
from ..sources import Source, check_source, deal, joined, read_source
from ..splits import part_sizes
from .judge import Judge
from .text import answer_text


# Names of columns: see docs/domains.md for what they rest on.
SOURCES = {
    "creative-sonnet": Source(
        "crownelius/Creative-Writing-Sonnet4.6-800x", {"question": "prompt", "reference": "response"}
    ),
    "creative-gemini": Source(
        "crownelius/Creative-Writing-Gemini3Pro-2700x", {"question": "prompt", "reference": "response"}
    ),
    "creative-kimi": Source(
        "crownelius/Creative-Writing-Reasoning-KimiK2.5-600x", {"question": "instruction", "reference": "response"}
    ),
    "creative-qwen": Source(
        "crownelius/Creative-Writing-Qwen3.5Plus-2000x", {"question": "prompt", "reference": "response"}
    ),
}
OFFLINE = "constraints"
_SIZES = {"train": 512, "selection": 64, "test": 128}

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
_SENTENCE = re.compile(r"[^.!?]+[.!?]+[\"'”’)]*")
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def writing_domain(
    name: str = "writing",
    source: str | list[str] = OFFLINE,
    judge: Mapping[str, Any] | None = None,
    sizes: Mapping[str, int | None] | None = None,
    thinking: bool = False,
    seed: int = 0,
    partial_score: bool = False,
    max_prompt_characters: int | None = None,
    paths: Mapping[str, str] | None = None,
    columns: Mapping[str, Mapping[str, str]] | None = None,
    folder: Path | None = None,
) -> Domain:
    """
    The domain `writing`.

    Args:
        name (`str`, *optional*, defaults to `"writing"`):
            Name of the domain.
        source (`str` or `list[str]`, *optional*, defaults to `"constraints"`):
            `"constraints"` (assignments made on this machine, with a rubric that is checked), or one or several of
            `"creative-sonnet"`, `"creative-gemini"`, `"creative-kimi"` and `"creative-qwen"`, which need a judge.
        judge (`Mapping[str, Any]`, *optional*):
            Settings of [`~domains.judge.Judge`].
        sizes (`Mapping[str, int]`, *optional*):
            Rows of `train`, `selection` and `test`. Defaults to 512, 64 and 128.
        thinking (`bool`, *optional*, defaults to `False`):
            Whether the model thinks before it answers, see [`~domains.rewards.answer_text`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of the assignments.
        partial_score (`bool`, *optional*, defaults to `False`):
            Whether the score of a text by a rubric is the share that it meets, as the reward is. A small model meets
            all of a rubric too rarely for a score to change.
        max_prompt_characters (`int`, *optional*):
            Longer prompts are left out.
        paths (`Mapping[str, str]`, *optional*):
            Local copies by name of the data set.
        columns (`Mapping[str, Mapping[str, str]]`, *optional*):
            Other names of columns, by name of the data set.
        folder (`pathlib.Path`, *optional*):
            Folder that relative paths start from.

    Returns:
        [`Domain`]: The reward grows with the grade, or with the share of the rubric that is met; the score is the
        share of comparisons won, or of texts that meet all of the rubric.

    Raises:
        `ValueError`: If a package, a data set or the judge is missing, or there are too few rows.
    """
    where = f"domain {name!r}"
    names = [source] if isinstance(source, str) else list(source)
    if not names:
        raise ValueError(f"{where}, source: expected one or several of {sorted(SOURCES)}, found none")
    for option in names:
        check_source(option, SOURCES if len(names) > 1 else (*SOURCES, OFFLINE), where)
    sizes = part_sizes(sizes, _SIZES, f"{where}, sizes")
    if names == [OFFLINE]:
        if judge is not None:
            raise ValueError(f"{where}, judge: expected none for the source {OFFLINE!r}, which has a rubric")
        metric = RubricReward(thinking, all_or_nothing=not partial_score)
        dataset = Dataset.from_list(_assignments(2 * sum(size or 0 for size in sizes.values()) + 16, seed))
        parts = deal(dataset, sizes, f"{where}, sizes")
        return parts.to_domain(name, reward_funcs=RubricReward(thinking), metric=metric)
    if partial_score:
        raise ValueError(f"{where}, partial_score: expected it with the source {OFFLINE!r} only, found {names}")
    if judge is None:
        raise ValueError(
            f"{where}, judge: expected the settings of a judge (base_url, model, max_requests, ...) for {names}, "
            f"found none; without one there is the source {OFFLINE!r}"
        )
    settings = dict(judge)
    settings["cache"] = Path(folder or "", settings.get("cache", "judge.sqlite"))
    try:
        asked = Judge(**settings)
    except TypeError as error:
        raise ValueError(f"{where}, judge: {error}") from error
    paths, columns = dict(paths or {}), dict(columns or {})
    dataset = joined(*(read_source(SOURCES[n], f"{where}, {n}", paths.get(n), columns.get(n), folder) for n in names))
    dataset = dataset.filter(lambda row: bool(row["question"] and row["reference"]), load_from_cache_file=False)
    dataset = dataset.map(_to_prompt, remove_columns=["question"], load_from_cache_file=False)
    if max_prompt_characters is not None:
        dataset = dataset.filter(lambda row: len(row["key"]) <= max_prompt_characters, load_from_cache_file=False)
    parts = deal(dataset, sizes, f"{where}, sizes")
    return parts.to_domain(
        name, reward_funcs=JudgeReward(asked, thinking), metric=JudgeReward(asked, thinking, wins=True)
    )


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
        concurrency (`int`, *optional*, defaults to `8`):
            Comparisons at a time.
    """

    __name__ = "judge_reward"

    def __init__(self, judge: Judge, thinking: bool = False, wins: bool = False, concurrency: int = 8):
        self.judge, self.thinking, self.wins, self.concurrency = judge, thinking, wins, concurrency

    def __call__(self, prompts: list, completions: list, reference: list[str], **kwargs: Any) -> list[float]:
        """
        Rewards of completions.

        Args:
            prompts (`list`):
                Prompts, plain or conversational.
            completions (`list`):
                Completions, plain or conversational.
            reference (`list[str]`):
                For each prompt the text to compare with.

        Returns:
            `list[float]`: One reward per completion. An empty one gets 0 and is not shown to the judge.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
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
        """
        Rewards of completions.

        Args:
            completions (`list`):
                Completions, plain or conversational.
            prompts (`list`):
                Prompts, plain or conversational.
            rubric (`list[str]`):
                Rubric of each assignment, as JSON.

        Returns:
            `list[float]`: One reward per completion.
        """
        rewards = []
        for completion, prompt, content in zip(completions, prompts, rubric, strict=True):
            assignment = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            items = check_rubric(answer_text(completion, self.thinking), json.loads(content), assignment)
            share = sum(items.values()) / len(items) if items else 0.0
            rewards.append(float(share == 1) if self.all_or_nothing else share)
        return rewards


writing_reward = RubricReward()


def check_rubric(text: str | None, rubric: Mapping[str, Any], assignment: str = "") -> dict[str, bool]:
    """
    The items of a rubric and whether a text meets them.

    Args:
        text (`str`, *optional*):
            The text.
        rubric (`Mapping[str, Any]`):
            `words` that must occur, `without` (a word that must not), `sentences` (fewest and most), `length` (fewest
            and most words) and `ending` (the last sign).
        assignment (`str`, *optional*, defaults to `""`):
            What was asked for.

    Returns:
        `dict[str, bool]`: Each item; empty if the text is no prose.
    """
    text = (text or "").strip().strip("*_").strip()
    if len(text) > 20_000:
        return {}
    sentences = [sentence.strip() for sentence in _SENTENCE.findall(text)]
    words = [word.casefold() for word in _WORD.findall(text)]
    if not _is_prose(text, sentences, words, assignment):
        return {}
    found = set(words)
    items = {f"word {word}": word.casefold() in found for word in rubric["words"]}
    items["without"] = rubric["without"].casefold() not in found
    items["sentences"] = rubric["sentences"][0] <= len(sentences) <= rubric["sentences"][1]
    items["length"] = rubric["length"][0] <= len(words) <= rubric["length"][1]
    items["ending"] = text.rstrip("\"'”’)").endswith(rubric["ending"])
    return items


def _is_prose(text: str, sentences: list[str], words: list[str], assignment: str) -> bool:
    letters = sum(sign.isalpha() or sign.isspace() for sign in text)
    if not sentences or letters < 0.8 * len(text) or len(set(words)) < 0.5 * len(words):
        return False
    bodies = [tuple(word.casefold() for word in _WORD.findall(sentence)) for sentence in sentences]
    if any(len(body) < 3 for body in bodies) or len(set(bodies)) < len(bodies):
        return False
    # A list of words: commas after nearly every one.
    if any(text_.count(",") > 0.5 * len(body) for text_, body in zip(sentences, bodies, strict=True)):
        return False
    asked = [word.casefold() for word in _WORD.findall(assignment)]
    runs = {tuple(asked[i : i + 6]) for i in range(len(asked) - 5)}
    return not any(tuple(words[i : i + 6]) in runs for i in range(len(words) - 5))


def _assignments(n: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(f"writing-{seed}")
    rows = []
    for _ in range(n):
        form, theme, low = rng.choice(_FORMS), rng.choice(_THEMES), rng.choice((2, 3, 4))
        words = rng.sample([word for word in _WORDS if word not in theme], 2)
        without, ending = rng.choice(_COMMON), rng.choice(list(_ENDINGS))
        rubric = {
            "words": words,
            "without": without,
            "sentences": [low, low + 1],
            "length": [8 * low, 20 * (low + 1)],
            "ending": _ENDINGS[ending],
        }
        text = (
            f"Write {form} about {theme} in {low} or {low + 1} sentences, with {8 * low} to {20 * (low + 1)} words. "
            f'Use the words "{words[0]}" and "{words[1]}". Do not use the word "{without}". End with {ending}. Reply '
            "with the text only."
        )
        rows.append({"prompt": [{"role": "user", "content": text}], "rubric": json.dumps(rubric), "key": text})
    return rows


def _to_prompt(row: dict[str, Any]) -> dict[str, Any]:
    question = row["question"]
    if isinstance(question, list):  # messages: what the user said first
        question = next((str(m["content"]) for m in question if m.get("role") == "user"), "")
    return {"prompt": [{"role": "user", "content": question}], "key": question}
