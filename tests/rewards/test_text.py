import pytest

from trl_interfere.rewards.text import (
    completion_text,
    contains_answer,
    contains_words,
    exact_match,
)


def as_messages(text):
    return [{"role": "assistant", "content": "draft"}, {"role": "assistant", "content": text}]


def test_completion_text():
    assert completion_text("a b") == "a b"
    assert completion_text("") == ""
    assert completion_text(as_messages("a b")) == "a b"


@pytest.mark.parametrize(
    "completion, answer, reward",
    [
        ("42", "42", 1.0),
        (" 42.\n", "42", 1.0),
        ("Paris", "paris", 1.0),
        ("STRASSE", "straße", 1.0),
        ("4.2", "4.2", 1.0),
        ("42", 42, 1.0),
        ("42 .", "42.", 1.0),
        ("42..", "42", 0.0),
        ("42!", "42", 0.0),
        ("The answer is 42", "42", 0.0),
        ("", "42", 0.0),
    ],
)
def test_exact_match(completion, answer, reward):
    assert exact_match([completion], answer=[answer], prompts=["?"]) == [reward]
    assert exact_match([as_messages(completion)], answer=[answer]) == [reward]


@pytest.mark.parametrize(
    "completion, words, reward",
    [
        ("The moon, the river.", "moon river", 1.0),
        ("The moon!", ["moon", "River"], 0.5),
        ("RIVER (moon)", ["moon", "River"], 1.0),
        ("moonlight rivers", "moon river", 0.0),
        ("moon moon", "moon river boat bell", 0.25),
        ("", "moon", 0.0),
        ("anything", [], 0.0),
    ],
)
def test_contains_words(completion, words, reward):
    assert contains_words([completion], words=[words], prompts=["?"]) == [reward]
    assert contains_words([as_messages(completion)], words=[words]) == [reward]


@pytest.mark.parametrize(
    "completion, answer, reward",
    [
        ("The capital is Paris.", "Paris", 1.0),
        ("paris", "Paris", 1.0),
        ("It is Sao Tome, of course", "São Tomé", 1.0),
        ("N’Djamena!", "N'Djamena", 1.0),
        ("Port-au-Prince", "Port-au-Prince", 1.0),
        ("Port au Prince", "Port-au-Prince", 0.0),
        ("The answer: 42.", 42, 1.0),
        ("New  \n York", "New York", 1.0),
        ("York New", "New York", 0.0),
        ("New great York", "New York", 0.0),
        ("Parisian", "Paris", 0.0),
        ("comparison", "paris", 0.0),
        ("142", "42", 0.0),
        ("", "Paris", 0.0),
    ],
)
def test_contains_answer(completion, answer, reward):
    assert contains_answer([completion], answer=[answer], prompts=["?"]) == [reward]
    assert contains_answer([as_messages(completion)], answer=[answer]) == [reward]


def test_one_reward_per_completion():
    assert exact_match(["1", "2", "3"], answer=["1", "0", "3"]) == [1.0, 0.0, 1.0]
    assert contains_words(["a b", "b"], words=["a b", "a b"]) == [1.0, 0.5]
    for function, columns in ((exact_match, {"answer": ["1"]}), (contains_words, {"words": ["a"]})):
        with pytest.raises(ValueError):
            function(["1", "2"], **columns)
