import re

import pytest

from trl_interfere.rewards.qa import QAReward, chosen_letter, qa_reward


def parts(block):
    return [part.replace("⏎", "\n") for part in re.split(r" \|\s", block.strip())]


OPTIONS = ["London", "Berlin", "Paris", "Rome"]
# Completions that choose C of A to D for a person, and others; "⏎" is a new line.
RIGHT = r"""
Answer: C [Paris] | Answer: [C] Paris | Answer: C | answer: c | Answer: **C** | **Answer: C** | Answer: (C) |
Answer: [C] | Answer: $\boxed{C}$ | \boxed{C} | The answer is (C). | The best option is C |
The answer is C because it is the capital. | C | C. | C) Paris | London is in England, so it is not A.⏎⏎Answer: C |
<think>Perhaps A. Answer: A</think>⏎Answer: C | C) Paris⏎It has been the capital for a long time. | Answer:⏎C |
The answer is:⏎⏎C | Answer: C⏎I hope this answer is helpful! | Answer: C (Paris) | Answer: C - Paris |
The answer is C, Paris. | \boxed{C) Paris} | \boxed{C} is the answer | Answer:⏎$\boxed{C}$ |
C⏎⏎I hope this answer is helpful! | Answer: C (A city in France) | Answer: C) Both (A) and (B) |
The answer is C. A is wrong. | So the correct option is (C). | Therefore, C. | I choose C. | C is correct. | c | (c) |
the choices are hard; the answer is C | Answer: C (E = mc^2) | "Answer: C" |
Options A and B are wrong. The answer is C. | The correct answer is option C. | Answer - C | C – Paris |
The answer would be C. | Answer: C.⏎⏎Because A is too small and B or D would be too large. |
The answer is clearly C. | The answers A, B are wrong, so the answer is C. | ### Answer⏎C |
After comparing the options, the answer is C. | The answer is C because the other options fail. |
Answer: C. The other options are wrong. | Among the choices, the answer is C. |
Comparing the answers, the answer is C. | The answer I get is C. So the answer is C. |
**Answer: C** (the other options are wrong) | Among the four options, \boxed{C} is correct |
**Answer: C**⏎⏎The final value is \boxed{42} | Answer: C⏎⏎Explanation: the answer is not A because it is too small. |
c) 42 | Answer: C (5 A) | 'Answer: C' | Answer：C
"""
WRONG = r"""
Answer: C [Paris] or A | Answer: C [or A] | Answer: A | The answer is (D). | Answer: C⏎On reflection:⏎Answer: B |
<think>Answer: C</think> Answer: D | I cannot answer this question. | Answer: Paris | Answer: | <think>Answer: C |
The answer is not C | Answer: E | Answer: C or A | Answer: C/A | Answer: CC | A⏎B⏎C⏎D |
A) London⏎B) Berlin⏎C) Paris⏎D) Rome | \boxed{A}\boxed{C} | \boxed{A, C} | \boxed{C) or A} | Answer:⏎C or A |
Choose the right answer:⏎C) Paris⏎A) London | Answer: C (or A) | Answer: C - A | Answer: C - Paris or A |
Answer: C (could also be D) | The answer is C, Paris, D, Rome | Answer: C) Paris D) Rome | Answer: (C) (D) |
\boxed{C) Paris, D) Rome} | Answer: C⏎On reflection this answer is not C. | Answer: C-section |
The answer is C, or perhaps A | I hope this answer is helpful! | The answer is C. Or the answer is A. |
Answer: $LETTER | d | The answer is a city. | I think A is correct, no, C is correct | Answer: A and C |
It must be C. | Answer: D, not C | Answer: A. No, C
"""
TABLE = [
    *((text, 1) for text in parts(RIGHT)),
    *((text, 0) for text in parts(WRONG)),
    ("", 0),
    ("Answer: C" + "(" * 50_000, 0),
    ("Answer:\n" * 20_000, 0),
    ("Answer: " * 20_000, 0),
    ("Answer: " + "*" * 50_000 + "C", 1),  # the one letter that it gives
    ("Answer: " + "*" * 50_000 + "C or A", 0),
]


@pytest.mark.parametrize("completion, reward", TABLE)
def test_hand_checked_table(completion, reward):
    assert qa_reward([completion], ["C"], [OPTIONS]) == [reward]
    assert qa_reward([[{"role": "assistant", "content": completion}]], ["C"], [OPTIONS], domain=["qa"]) == [reward]


def test_each_completion_chooses_one_letter():
    """No completion of the table is right for two different answers."""
    for completion, _ in TABLE:
        assert sum(qa_reward([completion] * 4, list("ABCD"), [OPTIONS] * 4)) <= 1


def test_thoughts_that_do_not_end_and_more_options():
    assert QAReward(thinking=True)(["Answer: C", "Answer: A</think>Answer: C"], ["C", "C"], [OPTIONS] * 2) == [0, 1]
    assert (chosen_letter("Answer: J", 10), chosen_letter("Answer: J", 9)) == ("J", None)
