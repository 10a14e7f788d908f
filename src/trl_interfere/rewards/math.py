"""Reward `math`: the final answer, compared by value."""

import re
from typing import Any

from .math_forms import same_answer
from .math_numbers import LONGEST, number, plain
from .text import answer_text


class MathReward:
    """
    1 if the final answer has the value of the expected one, 0 otherwise.

    The final answer is the content of the last `\\boxed{}` (of several in a row, all), what follows the last
    `####`, "answer is" or "answer:", or the number that the last line is or ends in, after "=", ":", "is" and so on.

    Where a number is expected, a number must be given, see [`number`]: an expression that has the value, such as the
    one in the problem, is not an answer. Words and units count: `5 million` is 5000000 and not 5, `3 cm` is not
    `3 m`, though a unit may be left out. Order counts in tuples, intervals, sequences and named values
    (`x = 1, y = 2`), not in sets and lists. Formulas are read by the parser of math-verify and compared at points, to
    twenty digits, or exactly where they are rational.

    Args:
        thinking (`bool`, *optional*, defaults to `False`):
            Whether the model thinks before it answers: only what follows `</think>` counts.
    """

    __name__ = "math_reward"

    def __init__(self, thinking: bool = False):
        self.thinking = thinking

    def __call__(self, completions: list, answer: list[str], **kwargs: Any) -> list[float]:
        """Rewards of completions, plain or conversational, by their expected answers."""
        texts = (answer_text(completion, self.thinking) for completion in completions)
        return [
            float(any(same_answer(given, str(expected)) for given in final_answers(text)))
            for text, expected in zip(texts, answer, strict=True)
        ]


math_reward = MathReward()

# Where a final answer stands, and where it ends.

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BETWEEN = re.compile(r"[\s$,;.()\[\]\\]*(?:\b(?:and|or)\b)?[\s$,;.()\[\]\\]*(?:[A-Za-z]\w{0,3}\s*=\s*)?\$?")
_STATED = re.compile(r"####\s*([^\n]+)|answer[\s*_]{0,9}(?:is\b\s*:?|:|=)\s*([^\n]+)", re.IGNORECASE)
_CONCLUDES = re.compile(
    r"(?<![<>!])=|:|\\equiv\b|\b(?:is|are|equals|ha[sd]|have|gets?|gives|makes?|needs?|leaves|totals)\b:?(?:\s(?:therefore|thus|hence|then|only|exactly|just|now)\b)?"
    r"|^\W*(?:hence|thus|therefore|so|then|finally|total)\b(?:[^\d=:\\]*\s(?=[\d-]|dollars))?[,:]?",
    re.IGNORECASE,
)
_CLAUSE = re.compile(
    r"[.?;](?=[*_\"')]*\s|[*_\"')]*$)|(?<=!)\s(?=[A-Z])|,\s+(?=(?:which|since|because|so|as|where|the|she|he|it|they|that|when|with|for)\b)"
    r"|\s(?=(?:because|since|which)\b)|\s(?=[-–—]\s[a-z]{2})|\s(?=\([^()]*[a-z]{2}[^()]*\)\W*$)"
)
_TAIL = re.compile(r"\s(?:in|on|at|during|from|for)\s(?![^.]*(?:base|\d|illion|thousand|hundred))[A-Za-z\s]*(?=\W*$)")
_HEDGE = re.compile(r"\W*(?:or|no|not|wait|but|maybe|perhaps|possibly|actually|hmm|instead|alternatively)\b", re.I)
_DENIED = re.compile(r"\b(?:not|never|wrong|false|if|unless)\b|n['’]t\b|\d\s?[a-z]\s*$", re.IGNORECASE)


def final_answers(text: str | None) -> list[str]:
    """The final answer that a text states, in two readings where it ends in "!", which may be the sentence's."""
    if not text:
        return []
    if boxes := [_boxed(text, match) for match in list(_BOX.finditer(text))[-9:]]:
        answers = boxes[-1:]
        for box, (start, *_) in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
            if box[1] is None or start - box[2] > 40 or not _BETWEEN.fullmatch(text[box[2] : start]):
                break
            answers.insert(0, box)
        contents = [content for _, content, _ in answers]
        return [] if None in contents else [", ".join(contents)]
    text = text[-2000:]
    if stated := list(_STATED.finditer(text)):
        found = _without_clause(stated[-1][1] or stated[-1][2])
    else:
        found = _concluded(text.strip().rsplit("\n", 1)[-1])
    return [] if found is None else [found, found.rstrip("!*_ ")] if found.rstrip("*_ ").endswith("!") else [found]


def _boxed(text: str, match: re.Match) -> tuple[int, str | None, int]:
    """Begin, content and end of a box; no content where it does not end."""
    depth = 1
    for end in range(match.end(), min(len(text), match.end() + LONGEST + 1)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return match.start(), text[match.end() : end].strip(), end + 1
    return match.start(), None, match.end()


def _concluded(line: str) -> str | None:
    """The number that a line is or ends in, as a conclusion that is not denied."""
    for part in map(plain, filter(None, (line, _TAIL.sub("", line), _without_clause(line)))):
        last = _CONCLUDES.split(part)[-1]
        if number(last.rstrip("!")) is not None:
            before = _CONCLUDES.sub(lambda match: match[0].rstrip("=:"), part[: len(part) - len(last)])
            return None if _DENIED.search(re.split(r"[,.;:]", before)[-1]) else last.strip()
    return None


def _without_clause(text: str) -> str | None:
    """The beginning of a statement, up to a clause that goes on; `None` if that takes it back."""
    clause = _CLAUSE.search(text)
    if clause is None:
        short = _TAIL.sub("", text).strip()
        return short if number(short) is not None else text.strip()
    return None if _HEDGE.match(text[clause.end() :]) else text[: clause.start()].strip()
