"""The domain `qa`."""

import json
import re
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Unpack

from datasets import Dataset

from ..domain import Domain
from ..extras import package_folder
from ..rewards.qa import QAReward
from .sources import OFFLINE, DataOptions, asked, parts_of


# That of SuperGPQA's own evaluation.
QA_INSTRUCTION = (
    "Answer the following multiple choice question. There is only one correct answer. The last line of your response "
    "should be in the format 'Answer: $LETTER' (without quotes), where LETTER is one of {letters}."
)
_MMLU_FILE = "tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
_QUESTION = re.compile(r"(.+?)\n\(A\)\s(.+?)\s\(B\)\s(.+?)\s\(C\)\s(.+?)\s\(D\)\s(.+?)\s*\nA: .*?", re.DOTALL)
_LETTER = re.compile(r"The answer is \(?([A-D])\)?")


def qa_domain(
    name: str = "qa",
    source: str = OFFLINE["qa"],
    instruction: str = QA_INSTRUCTION,
    thinking: bool = False,
    **options: Unpack[DataOptions],
) -> Domain:
    """
    The domain `qa`: multiple choice, answered by a letter.

    Args:
        name (`str`, *optional*, defaults to `"qa"`):
            Name of the domain.
        source (`str`, *optional*, defaults to `"mmlu-dev"`):
            `"mmlu-dev"` (the development questions of MMLU that lm-eval ships), `"supergpqa"` (stratified by subfield
            and difficulty) or `"mmlu-pro"` (by category).
        instruction (`str`, *optional*):
            What precedes the question in the prompt; `{letters}` is replaced by those of the options.
        thinking (`bool`, *optional*, defaults to `False`):
            Whether the model thinks before it answers: only what follows `</think>` counts.
        **options:
            See [`DataOptions`].

    Returns:
        [`Domain`]: With one reward, [`QAReward`].
    """
    where = f"domain {name!r}"

    def row(given: dict[str, Any]) -> dict[str, Any]:
        letter, choices = str(given["letter"] or "").strip().upper(), list(given["options"] or [])
        letters = ascii_uppercase[: len(choices)]
        right = 2 <= len(choices) <= 26 and len(letter) == 1 and letter in letters
        head = instruction.replace("{letters}", f"{', '.join(letters[:-1])}, or {letters[-1:]}")
        listed = "\n".join(f"{letter}) {choice}" for letter, choice in zip(letters, choices, strict=False))
        text = "\n\n".join(filter(None, (head, given["question"].strip(), listed)))
        stratum = f"{given.get('subfield')}/{given.get('difficulty')}"
        prompt = asked(text, given["question"] if right else "")
        return {"options": choices, "answer": letter, **prompt, "stratum": stratum}

    parts = parts_of("qa", where, lambda path, n: _mmlu(path, where), row, [source], **options)
    return Domain(name, **parts, reward_funcs=QAReward(thinking))


def _mmlu(file: Path | None, where: str) -> Dataset:
    """Questions of a file that holds, for each subject, a prompt with worked examples."""
    file = file or package_folder("lm_eval", "qa", where) / _MMLU_FILE
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
