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
_STATED = re.compile(r"(?:####|answer[\s*_]{0,9}(?:is\b\s*:?|:|=))\s*([^\n]+)", re.IGNORECASE)
_CONCLUDES = re.compile(
    r"(?<![<>!])=|:|\\equiv\b|\b(?:is|are|equals|ha[sd]|have|gets?|gives|makes?|needs?|leaves|totals)\b:?"
    r"(?:\s(?:therefore|thus|hence|then|only|exactly|just|now)\b)?"
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
    """Readings of the final answer that a text states: a "!" at its end may be the sentence's."""
    boxes = [*_BOX.finditer(text or "")][-9:]
    if boxes:
        return _boxed(text, boxes)
    text = (text or "")[-2000:].strip()
    if stated := _STATED.findall(text):
        found = _without_clause(stated[-1])
    else:
        found = _concluded(text.rsplit("\n", 1)[-1])
    return [found, found.rstrip("!*_ ")] if found else []


def _boxed(text: str, boxes: list[re.Match]) -> list[str]:
    """The content of the last box, with that of the boxes right before it."""
    contents, begin = [], 0
    for box in reversed(boxes):
        depth, end = 1, box.end()
        while depth and end < min(len(text), box.end() + LONGEST + 1):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if depth or (contents and (begin - end > 40 or not _BETWEEN.fullmatch(text[end:begin]))):
            break
        contents.insert(0, text[box.end() : end - 1].strip())
        begin = box.start()
    return [", ".join(contents)] if contents else []


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
        return text.strip() if number(short) is None else short
    return None if _HEDGE.match(text[clause.end() :]) else text[: clause.start()].strip()
