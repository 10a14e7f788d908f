"""Local copies of the data sets of the domains that ship: rows of the same shape, with columns as in their cards."""

import json
from pathlib import Path

from trl_interfere.datasets.sources import OFFLINE


def problem(i):
    truth = json.dumps({"inputs": ["1"], "outputs": ["1"]})
    return {"prompt": [{"role": "user", "content": f"Problem {i}"}], "reward_model": {"ground_truth": truth}}


def proof_or_word(i):
    kind = "proof" if i % 5 == 4 else "math-word-problem"
    return {"problem": f"What is {i} + 1?", "answer": str(i + 1), "question_type": kind}


def stratified(i):
    options = [f"option {n}" for n in range(4 + i % 7)]
    strata = {"subfield": "AB"[i % 2], "difficulty": ("easy", "hard")[i // 2 % 2]}
    return {"question": f"Question {i}?", "options": options, "answer": "option 1", "answer_letter": "B", **strata}


def of_law(i):
    question = f"{'Question' if i < 2 else 'Law'} {i}?"
    return {"question": question, "options": list("xyz"), "answer": "C", "category": "law"}


# Of each data set by name, row i. The first two problems and questions of a test are those of the training.
ROWS = {
    "klear-code": problem,
    "openr1-math": proof_or_word,
    "aime25": lambda i: {"problem": f"What is {i} + 1?" if i < 2 else f"AIME {i}", "answer": str(i)},
    "supergpqa": stratified,
    "mmlu-pro": of_law,
    "creative-sonnet": lambda i: {"prompt": f"Sonnet {i}", "response": "text"},
    "creative-gemini": lambda i: {"prompt": f"Story {i}", "response": f"Once {i}"},
    "creative-kimi": lambda i: {"instruction": f"Poem {i}", "thought": "hm", "response": f"Rose {i}"},
    "creative-qwen": lambda i: {"prompt": f"Letter {i}", "response": f"Dear {i}"},
}


def questions(subject: str) -> str:
    """A prompt of the file of lm-eval, with the flaws that it has."""
    right = [
        f"Q: Which number follows {index} in {subject}?\n(A) {index} (B) {index + 1} (C) {index + 2} (D) none\n"
        "A: Let's think step by step. The answer is (B)."
        for index in range(8)
    ]
    broken = ["Q: A formula \x0crac{1}{2}?\n(A) 1 (B) 2 (C) 3 (D) 4\nA: The answer is (A).", "Q: None?\nA: It is (A)."]
    return "\n\n".join([f"The following are multiple choice questions about {subject}.", *right, *broken])


def write_rows(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_copies(folder: Path, count: int, subjects: list[str]) -> dict[str, str]:
    """Write a copy of each data set, and return the option `paths` that names them."""
    rows = {name: [row(i) for i in range(count)] for name, row in ROWS.items()}
    rows[OFFLINE["qa"]] = [{subject: questions(subject) for subject in subjects}]
    for name in rows:
        write_rows(folder / f"{name}.jsonl", rows[name])
    return {name: f"{name}.jsonl" for name in rows}
