"""Reward `qa`: the letter of an option."""

import re
import unicodedata
from string import ascii_uppercase
from typing import Any

from .text import answer_text


_SIGNS = str.maketrans("[]{}", "()()", '*_`$"“”‘')
_LETTER = r"[\s(]*(?:option\s+)?[\s(]*([A-Za-z])(?![A-Za-z'])"
# After a letter: the end, a reason, or the text of the option behind ")", ":", ".", a comma, a dash or "(".
_REST = r"(?=[)\s]*(?:[.!]?\s*$|[.:)]|,?\s+(?:because|since|as|which)\b|,\s+\w|\s[-–—]+\s|\s\())"
_STATED = re.compile(
    r"(?:\b(?:answer|option|choice)\b(?:(?:\s+(?:would|must) be|[^.:;\n]{0,40}?(?:\bis\b|:))"
    r"(?:\s+(?:clearly|thus|therefore|indeed))?)??\s?[:=–-]?"
    rf"|\\boxed|\b(?:choose|select|pick|go with)){_LETTER}{_REST}"
    rf"|^(?:so|thus|hence|therefore)\b,?{_LETTER}[)\s]*[.!]?\s*$"
    r"|(?:^|[\s(])(?-i:([A-Z]))\)?\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b",
    re.IGNORECASE,
)
_ALONE = re.compile(r"^[\s(]*([A-Za-z])(?![A-Za-z'])[\s)]*(?:[.!]?\s*$|[.:)]\s*\S|\s[-–—]+\s\S)")
_DENIED = re.compile(r"\banswer\b[^.\n]{0,20}?\b(?:is|was)(?:\s+not|n't)\s+\(?([A-Za-z])\b", re.IGNORECASE)
_AWAITS = re.compile(r"\b(?:answer|option|choice)(?:\s+is)?\s?:?$", re.IGNORECASE)
_DOUBT = r"(?i:or|and|also|but|maybe|perhaps|possibly|could|might|may)\b"
_ARTICLE = r"\b[AI]\s+(?!(?:and|are|can|could|is|may|might|or)\b)(?=[a-z])"


class QAReward:
    """
    1 if the letter that a completion gives is the right one, 0 otherwise.

    It is the letter of the last statement, such as "Answer: C", "the answer is (C)", "C is correct" or `\\boxed{C}`,
    on its line or the next one; without a statement, the letter that, alone or before its option, makes up the first
    or the last line. A statement of several letters, one that another letter is offered behind, as in "C (or D)", and
    one that is taken back give none.

    Args:
        thinking (`bool`, *optional*, defaults to `False`):
            Whether the model thinks before it answers: only what follows `</think>` counts.
    """

    __name__ = "qa_reward"

    def __init__(self, thinking: bool = False):
        self.thinking = thinking

    def __call__(self, completions: list, answer: list[str], options: list[list[str]], **kwargs: Any) -> list[float]:
        """Rewards of completions, plain or conversational, by the right letters and the options of each question."""
        return [
            float(chosen_letter(answer_text(completion, self.thinking), len(choices)) == letter)
            for completion, letter, choices in zip(completions, answer, options, strict=True)
        ]


qa_reward = QAReward()


def chosen_letter(text: str | None, n_options: int) -> str | None:
    """The letter of the option that a text chooses, see [`QAReward`]."""
    letters, text = ascii_uppercase[:n_options], unicodedata.normalize("NFKC", text or "").translate(_SIGNS)
    text = re.sub(r"\\(?:text\w*|math\w+)\s*|(?<!\w)'|'(?!\w)", "", text).strip()[-4000:]
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    if not lines or not letters:
        return None
    for place, line in enumerate(lines[:-1]):  # the letter of a statement may stand on the next line
        joined = f"{line.rstrip(': ')}: {lines[place + 1].removeprefix(chr(92) + 'boxed')}"
        if _AWAITS.search(line) and _STATED.search(joined) and not _several(lines[place + 1 :], letters):
            lines[place] = joined
    statements = [(place, found) for place, line in enumerate(lines) if (found := [*_STATED.finditer(line)])]
    if not statements and _several(lines, letters):
        return None
    alone = [match for match in map(_ALONE.match, (lines[0], lines[-1])) if match]
    place, found = statements[-1] if statements else (len(lines), alone[-1:])
    denied = {match[1].upper() for line in lines[place:] for match in _DENIED.finditer(line)}
    chosen = {match[match.lastindex].upper() for match in found}
    if len(chosen) != 1 or not chosen <= set(letters) - denied or _hedged(found[-1], letters):
        return None
    return chosen.pop()


def _several(lines: list[str], letters: str) -> bool:
    """Whether lines begin with different letters, as a list of the options does."""
    return len({match[1].upper() for match in map(_ALONE.match, lines) if match} & set(letters)) > 1


def _hedged(match: re.Match, letters: str) -> bool:
    """Whether the text behind a letter takes it back or goes on with another one."""
    rest, letter = match.string[match.end(match.lastindex) :].rstrip(), rf"\b[{letters}](?![A-Za-z'])"
    if (option := re.match(r"[\s)]*\(([^()]{2,})\)", rest)) and not re.search(rf"\b{_DOUBT}", option[1]):
        rest = rest[option.end() :]
    claim = re.split(r"\b(?:because|since)\b", rest, maxsplit=1)[0]
    # Text that no ")", ":" or full stop sets off may go on with anything.
    loose = re.split(r"[.!?]\s", claim, maxsplit=1)[0] if claim[:1] in tuple(" ,-–—") else ""
    another = (
        rf"^\W*(?:{_DOUBT}|{letter}(?=\W*$|[).:,])|[/,&+|]\s*\(?(?i:[a-z])\)?\W*$)"
        rf"|\b(?i:or|maybe|perhaps|possibly|(?:may|might|could)\s+(?:also\s+)?be)\s+\(?{letter}|(?:^|[\s,;/]){letter}[):]"
    )
    return bool(re.search(another, claim) or re.search(letter, re.sub(_ARTICLE, "", loose)))
