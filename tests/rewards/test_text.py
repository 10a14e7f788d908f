import pytest

from trl_interfere.rewards.text import contains_answer, contains_words, exact_match


TABLE = [
    (exact_match, "answer", "42", ["42", " 42.\n", "42 ."], ["42..", "42!", "The answer is 42", "", "4.2"]),
    (exact_match, "answer", "Paris", ["paris", "PARIS."], ["Pari"]),
    (exact_match, "answer", "straße", ["STRASSE"], []),
    (exact_match, "answer", 42, ["42"], []),
    (contains_words, "words", "moon river", ["The moon, the river."], ["moonlight rivers", ""]),
    (contains_words, "words", ["moon", "River"], ["RIVER (moon)"], []),
    (contains_words, "words", [], [], ["anything"]),
    (contains_answer, "answer", "Paris", ["The capital is Paris.", "paris"], ["Parisian", "comparison", ""]),
    (contains_answer, "answer", "São Tomé", ["It is Sao Tome, of course"], []),
    (contains_answer, "answer", "N'Djamena", ["N’Djamena!"], []),
    (contains_answer, "answer", "Port-au-Prince", ["Port-au-Prince"], ["Port au Prince"]),
    (contains_answer, "answer", 42, ["The answer: 42."], ["142"]),
    (contains_answer, "answer", "New York", ["New  \n York"], ["York New", "New great York"]),
]


@pytest.mark.parametrize("function, column, answer, right, wrong", TABLE)
def test_answers(function, column, answer, right, wrong):
    for completion, reward in [*((text, 1) for text in right), *((text, 0) for text in wrong)]:
        assert function([completion], prompts=["?"], **{column: [answer]}) == [reward], completion
        messages = [{"role": "assistant", "content": text} for text in ("draft", completion)]
        assert function([messages], **{column: [answer]}) == [reward], completion


def test_share_of_words():
    assert contains_words(["The moon!", "moon moon"], words=[["moon", "River"], "moon river boat bell"]) == [0.5, 0.25]
