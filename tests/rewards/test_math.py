import json
import random
from fractions import Fraction

import pytest
from datasets import Dataset

from trl_interfere.rewards.math import MathReward, math_domain, math_reward, number


pytest.importorskip("math_verify")
reasoning_gym = pytest.importorskip("reasoning_gym")

THIRD = r"\frac{1}{3}"
# Completion, expected answer, and the reward that a person would give.
TABLE = [
    # correct
    (r"So the answer is \boxed{42}.", "42", 1),
    (r"\boxed{42}", "42", 1),
    (r"\boxed{42.0}", "42", 1),
    (r"\boxed{+42}", "42", 1),
    (r"\boxed{ 42 }", "42", 1),
    (r"\boxed{\text{42}}", "42", 1),
    (r"\boxed{42\text{ cm}}", "42", 1),
    (r"\boxed{\$42}", "42", 1),
    (r"\boxed{1,042}", "1042", 1),
    (r"\boxed{1{,}042}", "1042", 1),
    (r"\boxed{-7}", "-7", 1),
    (r"\boxed{x = -7}", "-7", 1),
    (r"\boxed{\dfrac{2}{6}}", THIRD, 1),
    (r"\boxed{1/3}", THIRD, 1),
    (r"\boxed{0.5}", r"\frac{1}{2}", 1),
    (r"\boxed{4.2 \times 10^{3}}", "4200", 1),
    ("The answer is 42.", "42", 1),
    ("57 + 87 = 144", "144", 1),
    ("First 6 * 7 = 42.\nAnswer: 42", "42", 1),
    ("42", "42", 1),
    (r"\boxed{2\sqrt{3}}", r"2\sqrt{3}", 1),
    (r"\boxed{\sqrt{12}}", r"2\sqrt{3}", 1),
    (r"\boxed{(2, 1)}", "(2,1)", 1),
    (r"\boxed{\{2, 1\}}", r"\{1, 2\}", 1),
    (r"\boxed{1+x}", "x+1", 1),
    (r"\boxed{B}", r"\text{B}", 1),
    (r"<think>It may be \boxed{7}.</think> \boxed{42}", "42", 1),
    (r"I first thought \boxed{41}, but it is \boxed{42}", "42", 1),
    ("The answer is $42$.", "42", 1),
    (r"The answer is \(42\).", "42", 1),
    ("**42**.", "42", 1),
    ("Therefore, the sum is 42.", "42", 1),
    ("So we get\n$x = 42$", "42", 1),
    ("The answer is 42 apples.", "42", 1),
    (r"\boxed{\frac12}", r"\frac{1}{2}", 1),
    (r"\boxed{24\text{ cm}^2}", "24", 1),
    (r"\boxed{24 \text{ m/s}}", "24", 1),
    (r"\boxed{10^5}", "100000", 1),
    (r"\boxed{1\frac{1}{2}}", "1.5", 1),
    (r"\boxed{{5}}", "5", 1),
    (r"\boxed{AB = 12}", "12", 1),
    (r"\boxed {42}", "42", 1),
    (r"\boxed{x = 2\sqrt{3}}", r"2\sqrt{3}", 1),
    (r"The answer is $2\sqrt{3}$.", r"2\sqrt{3}", 1),
    (r"\boxed{x_1 = 1, x_2 = 2}", "1, 2", 1),
    (r"\boxed{m + n = 42}", "42", 1),
    (r"\boxed{\angle ABC = 42^\circ}", "42", 1),
    (r"\boxed{1\text{ hour}}", "1", 1),
    (r"\boxed{42 \mathrm{~cm}^{2}}", "42", 1),
    ("The answer is $42$ square feet.", "42", 1),
    ("The answer is 42 people.", "42", 1),
    ("The answer is 42 miles per hour.", "42", 1),
    ("The answer is 1 1/2 cups.", "1.5", 1),
    ("**Final Answer**: 42", "42", 1),
    ("Therefore, the cost is $42.", "42", 1),
    ("Since 7 is not a divisor, the sum is 42.", "42", 1),
    (r"Thus \(x = 42\).", "42", 1),
    # wrong
    ("The answer is $41$.", "42", 0),
    ("Therefore, the sum is 41.", "42", 0),
    (r"\boxed{\frac13}", r"\frac{1}{2}", 0),
    (r"\boxed{24\text{ cm}^2}", "42", 0),
    (r"\boxed{10^5}", "10", 0),
    (r"\boxed{10^5}", "105", 0),
    (r"\boxed{1\frac{1}{2}}", "0.5", 0),
    (r"\boxed{AB = 13}", "12", 0),
    (r"The answer is \(41\).", "42", 0),
    ("**41**.", "42", 0),
    ("So we get\n$x = 41$", "42", 0),
    ("The answer is 41 apples.", "42", 0),
    (r"\boxed{25 \text{ m/s}}", "24", 0),
    (r"\boxed{{6}}", "5", 0),
    (r"\boxed {41}", "42", 0),
    (r"\boxed{x = 2\sqrt{5}}", r"2\sqrt{3}", 0),
    (r"\boxed{41}", "42", 0),
    (r"\boxed{-42}", "42", 0),
    (r"\boxed{0.333}", THIRD, 0),
    (r"\boxed{42\%}", "42", 0),
    (r"\boxed{(1, 2)}", "(2,1)", 0),
    (r"\boxed{2\sqrt{5}}", r"2\sqrt{3}", 0),
    (r"\boxed{\{1, 2, 3\}}", r"\{1, 2\}", 0),
    (r"\boxed{A}", r"\text{B}", 0),
    ("57 + 87 = 134", "144", 0),
    # unparsable
    ("", "42", 0),
    ("I do not know.", "42", 0),
    (r"\boxed{}", "42", 0),
    (r"\boxed{42", "42", 0),
    ("\\boxed{forty-two}", "42", 0),
    (r"<think>\boxed{42}", "42", 0),
    ("The answer is", "42", 0),
    # adversarial
    (r"\boxed{42 million}", "42", 0),
    (r"\boxed{42 \text{ million}}", "42", 0),
    (r"\boxed{42 percent}", "42", 0),
    (r"\boxed{42 or more}", "42", 0),
    (r"\boxed{42 is wrong}", "42", 0),
    ("The answer is 42 plus something", "42", 0),
    ("The answer is 42 dozen eggs", "42", 0),
    (r"\boxed{7 = 2\sqrt{3}}", r"2\sqrt{3}", 0),
    (r"\boxed{2x = 12}", "12", 0),
    (r"\boxed{x^2 = 12}", "12", 0),
    (r"\boxed{x \neq 12}", "12", 0),
    (r"\boxed{x >= 12}", "12", 0),
    (r"\boxed{x = 7 = 12}", "12", 0),
    (r"\boxed{\pi = 2\sqrt{3}}", r"2\sqrt{3}", 0),
    (r"\boxed{x = 7 = 2\sqrt{3}}", r"2\sqrt{3}", 0),
    (r"\boxed{x = \sqrt{12} = 2\sqrt{3}}", r"2\sqrt{3}", 1),
    (r"\boxed{x = 2\sqrt{3} = 7}", r"2\sqrt{3}", 0),
    (r"\boxed{7 = 1, 8 = 2}", "1, 2", 0),
    (r"\boxed{2\sqrt{3}\text{ million}}", r"2\sqrt{3}", 0),
    ("The answer is 42 tenths", "42", 0),
    ("The answer is 42 squared", "42", 0),
    ("The answer is 42 million dollars", "42", 0),
    ("The answer is 42 percentage points", "42", 0),
    ("The answer is 42k", "42", 0),
    ("The answer is 1 or more", "1", 0),
    ("The answer is 1 million", "1", 0),
    (r"\boxed{42x}", "42", 0),
    (r"\boxed{2\frac{7}{2}}", "7", 0),
    (r"\boxed{2^{10}}", "1024", 0),
    ("I don't think that the sum is 42.", "42", 0),
    ("x != 42", "42", 0),
    ("The sum is not 42", "42", 0),
    (r"\boxed{" + "4 apples " * 30 + "}", "4", 0),
    ("The answer is 42 " + "a" * 200, "42", 0),
    (r"\boxed{57 + 87}", "144", 0),
    (r"\boxed{\sqrt{1764}}", "42", 0),
    (r"\boxed{\int_0^{42} 1 dx}", "42", 0),
    (r"\boxed{41, 42, 43}", "42", 0),
    (r"\boxed{41 \text{ or } 42}", "42", 0),
    (r"\boxed{42 or 43}", "42", 0),
    (r"\boxed{[42]}", "42", 0),
    (r"\boxed{42}\boxed{43}", "42", 0),
    (r"The answer is \boxed{x}, where x is what was expected", "42", 0),
    (r"\boxed{\boxed{}}", "42", 0),
    (r"\boxed{9^{9^{9^{9}}}}", r"2\sqrt{3}", 0),
    (r"\boxed{99999!}", r"2\sqrt{3}", 0),
    (r"\boxed{" + "4" * 100_000 + "}", "42", 0),
    ("1 2 3 42 " * 50_000, "42", 0),
    ("{" * 100_000, "42", 0),
    (" ".join(map(str, range(1000))), "42", 0),
    (r"\boxed{__import__('os').system('true')}", "42", 0),
]


@pytest.mark.parametrize("completion, answer, reward", TABLE)
def test_hand_checked_table(completion, answer, reward):
    assert math_reward([completion], [answer]) == [reward]
    messages = [{"role": "assistant", "content": completion}]
    assert math_reward([messages], [answer], domain=["math"]) == [reward]


def test_size_of_the_table():
    assert len(TABLE) >= 40 and sum(reward for *_, reward in TABLE) >= 20


def test_thoughts_that_do_not_end():
    thinking = MathReward(thinking=True)
    assert thinking([r"so \boxed{42}", r"so \boxed{41}</think>\boxed{42}"], ["42", "42"]) == [0, 1]


def test_in_another_thread():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(math_reward, [r"\boxed{\sqrt{12}}"], [r"2\sqrt{3}"]).result() == [1]


def test_numbers_against_python():
    rng = random.Random(0)
    for _ in range(300):
        top, bottom = rng.randint(-(10**6), 10**6), rng.randint(1, 999)
        sign = "-" if top < 0 else ""
        assert number(str(top)) == top
        assert number(f"{top:,}") == top
        assert number(f"{top}/{bottom}") == Fraction(top, bottom)
        assert number(f"{sign}\\frac{{{abs(top)}}}{{{bottom}}}") == Fraction(top, bottom)
        assert number(f"{top / 1000:.3f}") == Fraction(top, 1000)
        assert number(f"{top}e-3") == Fraction(top, 1000)


@pytest.mark.parametrize("task", ["chain_sum", "basic_arithmetic", "gsm_symbolic", "simple_equations", "gcd", "lcm"])
def test_agrees_with_the_verifier_of_reasoning_gym(task):
    """Its own verifier gives 1 to the answer and less to its neighbours."""
    dataset = reasoning_gym.create_dataset(task, size=20, seed=3)
    for entry in dataset:
        for answer in (entry["answer"], str(int(entry["answer"]) + 1)):
            expected = float(dataset.score_answer(answer, entry) == 1)
            assert math_reward([f"\\boxed{{{answer}}}"], [entry["answer"]]) == [expected]


def keys(dataset):
    return {" ".join(row[-1]["content"].split()).casefold() for row in dataset["prompt"]}


def test_offline_domain():
    domain = math_domain(sizes={"train": 60, "selection": 20, "test": 30})
    parts = [domain.train_dataset, domain.selection_dataset, domain.eval_dataset]
    assert [len(part) for part in parts] == [60, 20, 30]
    assert len(set.union(*map(keys, parts))) == 110  # no prompt twice, in one part or in two
    assert domain.train_dataset.column_names == ["answer", "prompt", "domain"]
    assert domain.reward_funcs[0](domain.eval_dataset["answer"], domain.eval_dataset["answer"]) == [1] * 30
    again = math_domain(sizes={"train": 60, "selection": 20, "test": 30})
    assert again.eval_dataset["prompt"] == domain.eval_dataset["prompt"]
    other = math_domain(sizes={"train": 60, "selection": 20, "test": 30}, seed=1)
    assert other.eval_dataset["prompt"] != domain.eval_dataset["prompt"]


def test_tasks_with_settings():
    tasks = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
    domain = math_domain(tasks=tasks, sizes={"train": 10, "test": 5}, instruction="")
    assert all(len(prompt[0]["content"].split(":")[1].split()) == 4 for prompt in domain.train_dataset["prompt"])
    assert domain.selection_dataset is None


# Rows of the shape of the data sets on the Hub: names of columns as their cards give them.
OPENR1 = [
    {
        "problem": f"What is {index} + 1?",
        "solution": "...",
        "answer": str(index + 1),
        "problem_type": "Algebra",
        "question_type": "proof" if index % 5 == 4 else "math-word-problem",
        "source": "olympiads",
        "uuid": str(index),
        "is_reasoning_complete": [True],
        "generations": ["<think>"],
        "correctness_math_verify": [True],
        "correctness_llama": None,
        "finish_reasons": None,
        "correctness_count": 1,
        "messages": [{"content": "...", "role": "user"}],
    }
    for index in range(40)
]
AIME25 = [
    {"problem": f"What is {index} + 1?" if index < 2 else f"AIME {index}", "answer": str(index), "id": str(index)}
    for index in range(6)
]


@pytest.fixture
def copies(tmp_path):
    for name, rows in (("openr1", OPENR1), ("aime25", AIME25)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"openr1-math": "openr1.jsonl", "aime25": "aime25.jsonl"}


def test_sets_of_the_hub(copies, tmp_path):
    domain = math_domain(
        source="openr1-math",
        test_source="aime25",
        sizes={"train": 20, "selection": 5},
        paths=copies,
        folder=tmp_path,
        thinking=True,
    )
    assert len(domain.train_dataset) == 20 and len(domain.selection_dataset) == 5 and len(domain.eval_dataset) == 6
    assert not keys(domain.train_dataset) & keys(domain.eval_dataset)
    assert not keys(domain.train_dataset) & keys(domain.selection_dataset)
    prompt = domain.train_dataset["prompt"][0]
    assert prompt[0]["role"] == "user" and prompt[0]["content"].endswith("\\boxed{}.")
    # Proofs have no answer, and problems of the test are not trained on: 40 - 8 - 2 are left.
    with pytest.raises(ValueError, match=r"sizes: expected at least 31 different prompts .*found 30"):
        math_domain(source="openr1-math", test_source="aime25", sizes={"train": 31}, paths=copies, folder=tmp_path)


def test_a_test_source_is_the_test_as_a_whole(copies, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_interfere.rewards.math._SIZES", {"train": 20, "selection": 5, "test": 128})
    domain = math_domain(source="openr1-math", test_source="aime25", paths=copies, folder=tmp_path)
    assert len(domain.train_dataset) == 20 and len(domain.selection_dataset) == 5 and len(domain.eval_dataset) == 6


@pytest.mark.parametrize(
    "options, message",
    [
        ({"source": "gsm8k"}, r"domain 'math', source: expected one of \['aime25', 'openr1-math', 'reasoning-gym'\]"),
        ({"source": "openr1-math", "paths": {"openr1-math": "none.jsonl"}}, "'none.jsonl' is neither a local file"),
        ({"tasks": {"no_such_task": {}}}, "reasoning-gym refuses 'no_such_task'"),
        ({"tasks": {"chain_sum": {"min_terms": -1}}}, "reasoning-gym refuses 'chain_sum'"),
        ({"tasks": ["calendar_arithmetic"]}, "expected a task whose answers are numbers, found 'calendar_arithmetic'"),
        ({"sizes": {"validation": 5}}, r"sizes: expected sizes of \['selection', 'test', 'train'\]"),
        ({"sizes": {"train": -1, "test": 5}}, "sizes, train: expected a number of rows, found -1"),
    ],
)
def test_what_cannot_be(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        math_domain(folder=tmp_path, **options)


def test_columns_that_are_not_there(tmp_path):
    Dataset.from_list([{"question": "1+1?", "gold": "2", "kind": "x"}] * 3).to_json(tmp_path / "rows.jsonl")
    paths = {"openr1-math": "rows.jsonl"}
    with pytest.raises(
        ValueError, match=r"expected the columns \['answer', 'problem', 'question_type'\] in 'rows.jsonl'"
    ):
        math_domain(source="openr1-math", paths=paths, folder=tmp_path)
    columns = {"question": "question", "answer": "gold", "question_type": "kind"}
    domain = math_domain(source="openr1-math", paths=paths, columns=columns, folder=tmp_path, sizes={"test": 1})
    assert domain.eval_dataset["answer"] == ["2"]


def test_missing_package(monkeypatch):
    monkeypatch.setattr("trl_interfere.extras.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"'math_verify', which is not installed: pip install 'trl-interfere\[math\]'"
    ):
        math_domain()
