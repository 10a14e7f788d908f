"""Domain `qa`: multiple choice, answered by a letter."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from datasets import Dataset

from ..domain import Domain
from ..extras import package_file
from ..sources import Parts, Source, apart, check_source, deal, read_source
from ..splits import part_sizes
from .text import answer_text


SOURCES = {
    "supergpqa": Source(
        "m-a-p/SuperGPQA",
        {
            "question": "question",
            "options": "options",
            "letter": "answer_letter",
            "subfield": "subfield",
            "difficulty": "difficulty",
        },
    ),
    "mmlu-pro": Source(
        "TIGER-Lab/MMLU-Pro",
        {"question": "question", "options": "options", "letter": "answer", "subfield": "category"},
        split="test",
    ),
}
OFFLINE = "mmlu-dev"
# That of SuperGPQA's own evaluation.
INSTRUCTION = (
    "Answer the following multiple choice question. There is only one correct answer. The last line of your response "
    "should be in the format 'Answer: $LETTER' (without quotes), where LETTER is one of {letters}."
)
_SIZES = {"train": 150, "selection": 50, "test": 70}
_FILE = "tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
_QUESTION = re.compile(r"(.+?)\n\(A\)\s(.+?)\s\(B\)\s(.+?)\s\(C\)\s(.+?)\s\(D\)\s(.+?)\s*\nA: .*?", re.DOTALL)
_LETTER = re.compile(r"The answer is \(?([A-D])\)?")

_OPEN, _CLOSE = r"[\s*_`$([{\\]*(?:(?:boxed|text|mathbf|mathrm|textbf)\s*\{\s*\(?)*", r"[\s*_`$)\]}]*"
# After a letter: the end, a reason, or the text of the option behind ")", ":", ".", a comma, a dash or "(".
_REST = rf"{_CLOSE}(?:(?:[.!]{_CLOSE})?$|[.:)]|,?\s+(?:because|since)\b|,\s+\w|\s[-–—]+\s|\s\()"
_STATED = re.compile(
    rf"(?:answer|option|choice)\s*(?:is)?[\s*_]{{0,9}}:?\s*{_OPEN}(?:option\s+)?([A-Z])(?![A-Za-z']){_REST}",
    re.IGNORECASE,
)
_MARKED = re.compile(r"answer[\s*_]*(?:is|:)|\\boxed|\b(?:option|choice)\s+is", re.IGNORECASE)
_ALONE = re.compile(rf"^{_OPEN}([A-Z])(?![A-Za-z']){_CLOSE}(?:[.!]?{_CLOSE}$|[.:)]\s*\S[^\n]*$)")
_NAMED = re.compile(rf"(?:answer|option|choice)\s*(?:is)?[\s*_]{{0,9}}:?\s*{_OPEN}([A-Z])(?![A-Za-z'])", re.IGNORECASE)
_BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_BOXED = re.compile(rf"{_OPEN}([A-Z])(?![A-Za-z']){_REST}", re.IGNORECASE)
# "Answer:" with the letter on the next line, and lines that speak of an answer and give none.
_AWAITS = re.compile(r"(?:answer|option|choice)\s*(?:is)?[\s*_]{0,9}:?[\s*_]{0,9}$", re.IGNORECASE)
_ABOUT = re.compile(r"\b(?:hope|this|my|your)\b[^.\n]*\banswer\b", re.IGNORECASE)
# What takes a letter back or adds another one: `{letter}` is one of the question's.
_ANOTHER = r"\W*(?:(?i:or|but|maybe|perhaps|possibly)\b|{letter}(?=\W*$|[).:,]))|\W*[/,&+|(]\s*\(?[a-z]\)?\W*$"
_HEDGE = (
    r"\b(?i:or|maybe|perhaps|possibly|(?:may|might|could)\s+(?:also\s+)?be)\s+\(?{letter}"
    r"|(?:^|[\s,;/])\(?{letter}[):]"
)
_ARTICLE = r"\b[AI]\s+(?!(?:and|are|can|could|is|may|might|or)\b)(?=[a-z])"


def qa_domain(
    name: str = "qa",
    source: str = OFFLINE,
    test_source: str | None = None,
    sizes: Mapping[str, int | None] | None = None,
    instruction: str = INSTRUCTION,
    thinking: bool = False,
    max_prompt_characters: int | None = None,
    paths: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Domain:
    """
    The domain `qa`.

    Args:
        name (`str`, *optional*, defaults to `"qa"`):
            Name of the domain.
        source (`str`, *optional*, defaults to `"mmlu-dev"`):
            `"mmlu-dev"` (the development questions of MMLU that lm-eval ships), `"supergpqa"` (stratified by subfield
            and difficulty) or `"mmlu-pro"` (by category).
        test_source (`str`, *optional*):
            Where the test part comes from. Defaults to `source`.
        sizes (`Mapping[str, int]`, *optional*):
            Rows of `train`, `selection` and `test`. Defaults to 150, 50 and 70. Of a `test_source` that is a data set,
            all rows are the test if `test` is not given.
        instruction (`str`, *optional*):
            What precedes the question in the prompt; `{letters}` is replaced by those of the options.
        thinking (`bool`, *optional*, defaults to `False`):
            Whether the model thinks before it answers, see [`~domains.rewards.answer_text`].
        max_prompt_characters (`int`, *optional*):
            Longer prompts are left out.
        paths (`Mapping[str, str]`, *optional*):
            Local copies by name of the data set.
        columns (`Mapping[str, str]`, *optional*):
            Other names of the columns of `source`.
        folder (`pathlib.Path`, *optional*):
            Folder that relative paths start from.

    Returns:
        [`Domain`]: With one reward, 1 for the right letter and 0 otherwise.

    Raises:
        `ValueError`: If a package or a data set is missing, or there are too few rows.
    """
    where = f"domain {name!r}"
    for option in (source, test_source or source):
        check_source(option, (*SOURCES, OFFLINE), where)
    default = _SIZES if test_source in (None, source, OFFLINE) else {**_SIZES, "test": None}
    sizes = part_sizes(sizes, default, f"{where}, sizes")
    paths = dict(paths or {})

    def load(option: str, others: Mapping[str, str] | None = None) -> Dataset:
        if option == OFFLINE:
            file = Path(folder or "", paths[OFFLINE]) if OFFLINE in paths else None
            dataset = _mmlu(file or package_file("lm_eval", _FILE, "qa", where), where)
        else:
            dataset = read_source(SOURCES[option], f"{where}, {option}", paths.get(option), others, folder)
        dataset = dataset.filter(_has_answer, load_from_cache_file=False)
        used = [column for column in ("question", "letter", "subfield", "difficulty") if column in dataset.features]
        dataset = dataset.map(
            _to_prompt, fn_kwargs={"instruction": instruction}, remove_columns=used, load_from_cache_file=False
        )
        if max_prompt_characters is not None:
            dataset = dataset.filter(
                lambda row: len(row["prompt"][0]["content"]) <= max_prompt_characters, load_from_cache_file=False
            )
        return dataset

    dataset = load(source, columns)
    if test_source in (None, source):
        return deal(dataset, sizes, f"{where}, sizes", strata="stratum").to_domain(
            name, reward_funcs=QAReward(thinking)
        )
    test = load(test_source)
    of_test = {"test": sizes.pop("test", None)}
    parts = deal(apart(dataset, test), sizes, f"{where}, sizes", strata="stratum")
    parts = Parts(parts.train, parts.selection, deal(test, of_test, f"{where}, sizes", strata="stratum").test)
    return parts.to_domain(name, reward_funcs=QAReward(thinking))


class QAReward:
    """
    1 if the letter that a completion gives is the right one, 0 otherwise.

    Args:
        thinking (`bool`, *optional*, defaults to `False`):
            Whether the model thinks before it answers.
    """

    __name__ = "qa_reward"

    def __init__(self, thinking: bool = False):
        self.thinking = thinking

    def __call__(self, completions: list, answer: list[str], options: list[list[str]], **kwargs: Any) -> list[float]:
        """
        Rewards of completions.

        Args:
            completions (`list`):
                Completions, plain or conversational.
            answer (`list[str]`):
                Right letters.
            options (`list[list[str]]`):
                Options of each question.

        Returns:
            `list[float]`: One reward per completion.
        """
        return [
            float(chosen_letter(answer_text(completion, self.thinking), len(choices)) == letter)
            for completion, letter, choices in zip(completions, answer, options, strict=True)
        ]


qa_reward = QAReward()


def chosen_letter(text: str | None, n_options: int) -> str | None:
    """
    The letter of the option that a text chooses.

    It is the one in the last line with "Answer:", "the answer is" or a box, or on the line behind such a line, or that
    alone, or before its option, makes up the first or the last line. A line that names several letters chooses none,
    and nor does a letter behind which another one is offered, as in "C (or D)".

    Args:
        text (`str`, *optional*):
            What a model said after its thoughts.
        n_options (`int`):
            Number of options.

    Returns:
        `str`: The letter; `None` if none is chosen or there is no such option.
    """
    letters, matches = ascii_uppercase[:n_options], []
    lines = [" ".join(line.split()) for line in (text or "").strip()[-4000:].splitlines() if line.strip()]
    if not lines or not letters:
        return None
    for place, line in enumerate(lines[:-1]):
        if (
            _AWAITS.search(line)
            and _ALONE.match(lines[place + 1])
            and not _several_alone(lines[place + 1 :], n_options)
        ):
            lines[place] = f"{line.rstrip('*_: ')}: {lines[place + 1]}"
    marked = [line for line in lines if _MARKED.search(line) and not _gives_none(line, letters)]
    if marked:
        line = marked[-1]
        boxed = [match for match in map(_BOXED.match, _BOX.findall(line)) if match]
        matches = boxed or list(_STATED.finditer(line))
        named = {letter.upper() for letter in (*_NAMED.findall(line), *(match[1] for match in boxed))}
        matches = matches[-1:] if len(named) <= 1 else []
    elif not _several_alone(lines, n_options):
        matches = [match for match in map(_ALONE.match, (lines[0], lines[-1])) if match]
    chosen = [match[1].upper() for match in matches if not _hedged(match, letters)]
    return chosen[-1] if chosen and chosen[-1] in letters else None


def _gives_none(line: str, letters: str) -> bool:
    """Whether a line speaks of an answer, as in "I hope this answer is helpful", and names no letter."""
    about = _ABOUT.search(line)
    return bool(about) and not _STATED.search(line) and not re.search(rf"\b[{letters}]\b", line[about.end() :])


def _hedged(match: re.Match, letters: str) -> bool:
    """Whether the text behind a letter takes it back or goes on with another one."""
    rest = match.string[match.end(1) :].lstrip("*_`$)]}").strip()
    claim = re.split(r"\b(?:because|since)\b", rest, maxsplit=1)[0]
    letter = rf"\b[{letters}](?![A-Za-z'])"
    if re.match(_ANOTHER.format(letter=letter), rest) or re.search(_HEDGE.format(letter=letter), claim):
        return True
    # Text that no ")", ":" or full stop sets off may go on with anything.
    sentence = re.split(r"[.!?]\s", claim, maxsplit=1)[0]
    return rest[:1] in tuple(",(-–—") and re.search(letter, re.sub(_ARTICLE, "", sentence)) is not None


def _several_alone(lines: list[str], n_options: int) -> bool:
    """Whether lines begin with different letters, as a list of the options does."""
    letters = {match[1] for match in map(_ALONE.match, lines) if match and match[1] in ascii_uppercase[:n_options]}
    return len(letters) > 1


def _has_answer(row: dict[str, Any]) -> bool:
    letter, options = str(row["letter"] or "").strip().upper(), row["options"] or []
    return 2 <= len(options) <= 26 and len(letter) == 1 and letter in ascii_uppercase[: len(options)]


def _to_prompt(row: dict[str, Any], instruction: str) -> dict[str, Any]:
    letters = ascii_uppercase[: len(row["options"])]
    choices = "\n".join(f"{letter}) {option}" for letter, option in zip(letters, row["options"], strict=True))
    head = instruction.replace("{letters}", f"{', '.join(letters[:-1])}, or {letters[-1]}")
    question = f"{row['question'].strip()}\n\n{choices}"
    return {
        "prompt": [{"role": "user", "content": f"{head}\n\n{question}" if head else question}],
        "answer": row["letter"].strip().upper(),
        "options": list(row["options"]),
        "key": row["question"],
        "stratum": f"{row.get('subfield')}/{row.get('difficulty')}",
    }


def _mmlu(file: Path, where: str) -> Dataset:
    """Questions of a file that holds, for each subject, a prompt with worked examples."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: {file} cannot be read ({error})") from error
    rows = []
    for subject, text in content.items():
        for block in f"\n{text}".split("\nQ: ")[1:]:
            match, letter = _QUESTION.match(block), _LETTER.search(block)
            # Backslashes of some formulas were lost and left control characters.
            if match is None or letter is None or any(ord(sign) < 32 and sign != "\n" for sign in match[0]):
                continue
            question, *options = (part.strip() for part in match.groups())
            if any("(A)" in option or "\n\n" in option for option in options):
                continue
            rows.append({"question": question, "options": options, "letter": letter[1], "subfield": subject})
    if not rows:
        raise ValueError(f"{where}: expected questions in {file}, found none")
    return Dataset.from_list(rows)
