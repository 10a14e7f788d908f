import json

import pytest

from trl_interfere.rewards.qa import QAReward, _mmlu, chosen_letter, qa_domain, qa_reward


OPTIONS = ["London", "Berlin", "Paris", "Rome"]
# Completion, and the reward that a person would give where C is right of A to D.
TABLE = [
    # correct
    ("Answer: C", 1),
    ("answer: c", 1),
    ("ANSWER: C.", 1),
    ("Answer: **C**", 1),
    ("**Answer:** C", 1),
    ("**Answer: C**", 1),
    ("Answer: (C)", 1),
    ("Answer: [C]", 1),
    (r"Answer: $\boxed{C}$", 1),
    (r"\boxed{C}", 1),
    (r"The answer is \boxed{\text{C}}.", 1),
    ("The answer is (C).", 1),
    ("The correct answer is C: Paris", 1),
    ("The best option is C", 1),
    ("The answer is C because it is the capital.", 1),
    ("C", 1),
    ("C.", 1),
    ("(C)", 1),
    ("**C**", 1),
    ("C) Paris", 1),
    ("C. Paris", 1),
    ("London is in England, so it is not A.\n\nAnswer: C", 1),
    ("Answer: A\nWait, that is wrong.\nAnswer: C", 1),
    ("Answer: C\n\nA is wrong, since London is in England.", 1),
    ("<think>Perhaps A. Answer: A</think>\nAnswer: C", 1),
    ("C) Paris\nIt has been the capital for a long time.", 1),
    ("Answer:\nC", 1),
    ("The answer is:\n\nC", 1),
    ("**Answer:**\n\n(C) Paris", 1),
    ("Answer: C\nI hope this answer is helpful!", 1),
    ("Answer: C (Paris)", 1),
    ("Answer: C (Paris).", 1),
    ("Answer: C - Paris", 1),
    ("The answer is C, Paris.", 1),
    (r"\boxed{C) Paris}", 1),
    (r"\boxed{\text{(C) Paris}}", 1),
    (r"\boxed{C} is the answer", 1),
    ("**Answer**: C", 1),
    ("Answer:\n$\\boxed{C}$", 1),
    ("C\n\nI hope this answer is helpful!", 1),
    ("Answer: C (A city in France)", 1),
    ("Answer: C) Both A and B", 1),
    ("Answer: C) Vitamin D", 1),
    ("The answer is C. A is wrong.", 1),
    ("The answer is C because A or B would be smaller.", 1),
    # wrong
    ("Answer: A", 0),
    ("The answer is (D).", 0),
    ("B) Berlin", 0),
    (r"\boxed{A}", 0),
    ("Answer: C\nOn reflection:\nAnswer: B", 0),
    ("<think>Answer: C</think> Answer: D", 0),
    # unparsable
    ("", 0),
    ("   \n ", 0),
    ("I cannot answer this question.", 0),
    ("A good question. Cities are interesting.", 0),
    ("Answer: Paris", 0),
    ("Answer:", 0),
    ("<think>Answer: C", 0),
    ("The answer is not C", 0),
    ("Answer: E", 0),
    ("Answer: Z", 0),
    # adversarial: more than one letter
    ("Answer: A, B, C, D", 0),
    ("Answer: C, A", 0),
    ("Answer: C or A", 0),
    ("Answer: A or C", 0),
    ("Answer: A/C", 0),
    ("Answer: C/A", 0),
    ("Answer: C and D", 0),
    ("Answer: ABCD", 0),
    ("Answer: CC", 0),
    ("A\nB\nC\nD", 0),
    ("A) London\nB) Berlin\nC) Paris\nD) Rome", 0),
    (r"\boxed{A}\boxed{C}", 0),
    (r"\boxed{A, C}", 0),
    (r"\boxed{C) or A}", 0),
    (r"\boxed{C or A}", 0),
    ("Answer:\nA", 0),
    ("Answer:\nC or A", 0),
    ("Choose the right answer:\nC) Paris\nA) London", 0),
    ("Answer: C (or A)", 0),
    ("Answer: C - A", 0),
    ("Answer: C - Paris or A", 0),
    ("Answer: C - Paris, D - Rome", 0),
    ("Answer: C (Paris), D (Rome)", 0),
    ("Answer: C (could also be D)", 0),
    ("Answer: C, it might be D", 0),
    ("The answer is C, Paris, D, Rome", 0),
    ("Answer: C) Paris or D) Rome", 0),
    ("Answer: C) Paris D) Rome", 0),
    ("Answer: C. Paris or D. Rome", 0),
    ("Answer: (C) (D)", 0),
    ("C) Paris or D) Rome", 0),
    (r"\boxed{C) Paris or D) Rome}", 0),
    (r"\boxed{C) Paris, D) Rome}", 0),
    ("Answer: C\nOn reflection this answer is not C.", 0),
    ("Answer: C-section", 0),
    ("Answer: C, maybe A", 0),
    ("Answer: C, Paris or A", 0),
    ("The answer is C, or perhaps A", 0),
    ("Answer: C\nNo, the answer is not C.", 0),
    ("I hope this answer is helpful!", 0),
    ("Answer: A\nI hope this answer is helpful!", 0),
    ("Answer: C" + "(" * 50_000, 0),
    ("Answer: C, " + "or " * 30_000, 0),
    ("Answer:\n" * 20_000, 0),
    ("The answer is C. Or the answer is A.", 0),
    ("Answer: $LETTER", 0),
    ("C" * 100_000, 0),
    ("Answer: " * 20_000, 0),
    ("((((((((((((((((" * 5_000, 0),
    ("Answer: " + "*" * 50_000 + "C", 1),  # the one letter that it gives
    ("Answer: " + "*" * 50_000 + "C or A", 0),
]


@pytest.mark.parametrize("completion, reward", TABLE)
def test_hand_checked_table(completion, reward):
    assert qa_reward([completion], ["C"], [OPTIONS]) == [reward]
    assert qa_reward([[{"role": "assistant", "content": completion}]], ["C"], [OPTIONS], domain=["qa"]) == [reward]


def test_size_of_the_table():
    assert len(TABLE) >= 40 and sum(reward for _, reward in TABLE) >= 20


def test_each_completion_chooses_one_letter():
    """No completion of the table is right for two different answers."""
    for completion, _ in TABLE:
        assert sum(qa_reward([completion] * 4, list("ABCD"), [OPTIONS] * 4)) <= 1


def test_number_of_options():
    assert chosen_letter("Answer: J", 10) == "J"
    assert chosen_letter("Answer: J", 9) is None


def test_thoughts_that_do_not_end():
    assert QAReward(thinking=True)(["Answer: C", "Answer: A</think>Answer: C"], ["C", "C"], [OPTIONS] * 2) == [0, 1]


# The shape of the file of lm-eval, with the flaws that it has.
PROMPTS = {
    subject: f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    + "".join(
        f"Q: Which number follows {index} in {subject}?\n(A) {index} (B) {index + 1} (C) {index + 2} (D) none\n"
        f"A: Let's think step by step. The answer is (B).\n\n"
        for index in range(8)
    )
    + "Q: A formula \x0crac{1}{2}?\n(A) 1 (B) 2 (C) 3 (D) 4\nA: The answer is (A).\n\n"
    + "Q: No options?\nA: The answer is (A)."
    for subject in ("counting", "more_counting")
}


@pytest.fixture
def mmlu(tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    return {"paths": {"mmlu-dev": "prompts.json"}, "folder": tmp_path}


def keys(dataset):
    return {row[-1]["content"] for row in dataset["prompt"]}


def test_offline_domain(mmlu):
    domain = qa_domain(sizes={"train": 8, "selection": 2, "test": 6}, **mmlu)
    parts = [domain.train_dataset, domain.selection_dataset, domain.eval_dataset]
    assert [len(part) for part in parts] == [8, 2, 6]
    assert len(set.union(*map(keys, parts))) == 16
    prompt = domain.train_dataset["prompt"][0][0]["content"]
    assert "where LETTER is one of A, B, C, or D." in prompt and "\n\nA) " in prompt and "\nD) none" in prompt
    assert set(domain.train_dataset["answer"]) == {"B"}
    for part in parts:  # as many of each subject in each part
        counts = [sum("more_counting" in row[0]["content"] for row in part["prompt"]) for part in parts]
        assert counts == [4, 1, 3]
    with pytest.raises(ValueError, match="sizes: expected at least 17 different prompts .*found 16"):
        qa_domain(sizes={"train": 17}, **mmlu)


def test_questions_of_lm_eval():
    domain = qa_domain()
    parts = [domain.train_dataset, domain.selection_dataset, domain.eval_dataset]
    assert [len(part) for part in parts] == [150, 50, 70]
    assert len(set.union(*map(keys, parts))) == 270


SUPERGPQA = [
    {
        "uuid": f"{index:032x}",
        "question": f"Question {index}?",
        "options": [f"option {letter}" for letter in range(4 + index % 7)],
        "answer": "option 1",
        "answer_letter": "B",
        "discipline": "Science",
        "field": "Physics",
        "subfield": ("Optics", "Acoustics")[index % 2],
        "difficulty": ("easy", "hard")[index // 2 % 2],
        "is_calculation": False,
    }
    for index in range(40)
]
MMLU_PRO = [
    {
        "question_id": index,
        "question": f"Question {index}?" if index < 2 else f"Professional question {index}?",
        "options": ["x", "y", "z"],
        "answer": "C",
        "answer_index": 2,
        "cot_content": "",
        "category": ("law", "physics")[index % 2],
        "src": "x",
    }
    for index in range(8)
]


def test_sets_of_the_hub(tmp_path, monkeypatch):
    for name, rows in (("a", SUPERGPQA), ("b", MMLU_PRO)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {"supergpqa": "a.jsonl", "mmlu-pro": "b.jsonl"}
    domain = qa_domain(
        source="supergpqa", sizes={"train": 20, "selection": 8, "test": 12}, paths=paths, folder=tmp_path
    )
    train = [int(row[0]["content"].split("Question ")[1].split("?")[0]) for row in domain.train_dataset["prompt"]]
    strata = [(index % 2, index // 2 % 2) for index in train]
    assert all(strata.count(stratum) == 5 for stratum in set(strata))  # 20 of 40, and 5 of each 10
    mixed = qa_domain(source="supergpqa", test_source="mmlu-pro", sizes={"train": 38}, paths=paths, folder=tmp_path)
    assert len(mixed.eval_dataset) == 8 and set(mixed.eval_dataset["answer"]) == {"C"}
    with pytest.raises(ValueError, match="expected at least 39 different prompts"):  # two are in the test
        qa_domain(source="supergpqa", test_source="mmlu-pro", sizes={"train": 39}, paths=paths, folder=tmp_path)
    monkeypatch.setattr("trl_interfere.rewards.qa._SIZES", {"train": 20, "selection": 5, "test": 70})
    assert len(qa_domain(source="supergpqa", test_source="mmlu-pro", paths=paths, folder=tmp_path).eval_dataset) == 8


def test_bad_files(tmp_path):
    (tmp_path / "list.json").write_text("{}")
    with pytest.raises(ValueError, match="expected questions in .*list.json, found none"):
        _mmlu(tmp_path / "list.json", "domain 'qa'")
    with pytest.raises(ValueError, match="none.json cannot be read"):
        _mmlu(tmp_path / "none.json", "domain 'qa'")


def test_missing_package(monkeypatch):
    monkeypatch.setattr("trl_interfere.extras.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'lm_eval', which is not installed: pip install 'trl-interfere\[qa\]'"):
        qa_domain()
