"""Lab domain `writing`: one sentence about two given words, scored under a rubric."""

import random


NOUNS = (
    "boat moon river tree house stone bird fox garden cloud road lamp child king wolf bell door snow tower field "
    "bridge candle horse island letter mirror clock forest window shadow"
).split()
ADJECTIVES = "old small grey bright cold quiet golden broken distant gentle".split()
VERBS = "sleeps waits sings falls shines moves turns rests burns fades".split()
PLACES = "near under beyond behind above beside".split()
ADVERBS = "slowly softly alone again tonight forever".split()


def sample(rng: random.Random) -> dict:
    """Draw one assignment: two nouns to use and the number of words."""
    first, second = rng.sample(NOUNS, 2)
    length = rng.choice([7, 8, 9, 10])
    # "the N V P the N" has six words; each further one is an adjective of a noun, "still" or an adverb.
    slots = rng.sample(range(4), length - 6)
    one, two = rng.sample(ADJECTIVES, 2)
    words = ["The", first, rng.choice(VERBS), rng.choice(PLACES), "the", second]
    if 3 in slots:
        words.insert(3, "still")
    if 1 in slots:
        words.insert(-1, two)
    if 0 in slots:
        words.insert(1, one)
    if 2 in slots:
        words.append(rng.choice(ADVERBS))
    return {
        "prompt": f"Q: write {length} words with {first} {second} A:",
        "answer": f" {' '.join(words)}.",
        "alternatives": [" " + " ".join(word for word in words if word.lower() != "the"), f" {' '.join(words)}!"],
        "words": f"{first} {second}",
        "length": length,
    }


def rubric(text: str, words: list[str], length: int) -> dict[str, float]:
    """The five items of the rubric, each 0 or 1."""
    text = text.strip()
    found = text.rstrip(".!").lower().split()
    content = [word for word in found if word != "the"]
    return {
        "first word": float(words[0] in found),
        "second word": float(words[1] in found),
        "length": float(len(found) == length),
        "one sentence": float(text.endswith(".") and text.count(".") == 1 and text[:1].isupper()),
        "no repetition": float(len(content) > 0 and len(content) == len(set(content))),
    }


def writing_reward(completions: list[str], words: list[str], length: list[int], **kwargs) -> list[float]:
    """1 if the whole rubric is met; otherwise half the share of its items that are."""
    found = [rubric(text, pair.split(), count) for text, pair, count in zip(completions, words, length, strict=True)]
    return [1.0 if all(items.values()) else 0.5 * sum(items.values()) / len(items) for items in found]
