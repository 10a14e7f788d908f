import json
from dataclasses import fields

import pytest
import yaml
from datasets import Dataset, DatasetDict

from trl_interfere.domain import Domain
from trl_interfere.lab.math import math_reward
from trl_interfere.recipe import (
    BUILT_IN_REWARDS,
    SHIPPED_DOMAINS,
    build_dataclass,
    load_function,
    load_prompts,
    load_run_file,
)
from trl_interfere.rewards.text import contains_words, exact_match
from trl_interfere.training.config import SequentialGRPOConfig


ROWS = [{"question": f"{index}+{index}", "answer": str(2 * index), "level": index} for index in range(6)]
TABLE = Dataset.from_list(ROWS)
DATA = {"path": "rows.jsonl", "columns": {"prompt": "question"}}


@pytest.fixture
def folder(tmp_path):
    """The same six rows in every form that can be read."""
    TABLE.to_json(tmp_path / "rows.jsonl")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    TABLE.to_csv(tmp_path / "rows.csv")
    TABLE.to_csv(tmp_path / "rows.tsv", sep="\t")
    TABLE.to_parquet(tmp_path / "rows.parquet")
    TABLE.save_to_disk(tmp_path / "dataset")
    DatasetDict({"train": TABLE.select([5]), "test": TABLE}).save_to_disk(tmp_path / "splits")
    (tmp_path / "plain").mkdir()
    TABLE.select([5]).to_json(tmp_path / "plain" / "train.jsonl")
    TABLE.to_json(tmp_path / "plain" / "test.jsonl")
    return tmp_path


@pytest.mark.parametrize("name", [*BUILT_IN_REWARDS.values(), *SHIPPED_DOMAINS.values()])
def test_every_name_leads_to_a_function(name):
    assert callable(load_function(name, "here"))


FORMS = [*(f"rows.{kind}" for kind in ("jsonl", "json", "csv", "tsv", "parquet")), "dataset", "splits", "plain"]


@pytest.mark.parametrize("path", FORMS)
def test_forms_of_data(path, folder):
    split = {"split": "test"} if path in ("splits", "plain") else {}
    dataset = load_prompts({"path": path, **split, "columns": {"prompt": "question"}}, "here", folder)
    assert dataset.column_names == ["prompt", "answer", "level"]
    assert dataset["prompt"] == [row["question"] for row in ROWS]
    assert [str(answer) for answer in dataset["answer"]] == [row["answer"] for row in ROWS]  # a csv has no types
    assert [int(level) for level in dataset["level"]] == list(range(6))


@pytest.mark.parametrize(
    "name, content, answers",
    [
        ("a.csv", "prompt,answer\np1,007\np2,NA\np3,null\np4,yes\n", ["007", "NA", "null", "yes"]),
        ("e.tsv", "prompt\tanswer\np1\t1.10\n", ["1.10"]),
        ("o.jsonl", '{"prompt": "1", "answer": "2024-01-02"}\n', ["2024-01-02"]),
        ("r.json", '[{"prompt": "p", "answer": 1}, {"prompt": "q", "answer": 2.5}]', ["1", "2.5"]),
        ("s.jsonl", '{"prompt": "a\u2028b", "answer": "x"}\n{"prompt": "b", "answer": null, "more": 1}', ["x", None]),
    ],
)
def test_a_file_keeps_its_answers(name, content, answers, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert load_prompts(name, "here", tmp_path)["answer"] == answers


def test_prompt_template(folder):
    source = {"path": "rows.csv", "prompt": "Level {level}: {question} = {{?}}"}
    plain = load_prompts(source, "here", folder)
    assert plain[2]["prompt"] == [{"role": "user", "content": "Level 2: 2+2 = {?}"}]
    assert plain["question"] == TABLE["question"]  # the columns that the reward needs are still there
    with_system = load_prompts({**source, "system": "Answer briefly."}, "here", folder)
    assert with_system[2]["prompt"] == [{"role": "system", "content": "Answer briefly."}, *plain[2]["prompt"]]


@pytest.mark.parametrize(
    "source, message",
    [
        ({"split": "train"}, "'path'"),
        ({"path": "rows.jsonl", "colums": {}}, "'colums'.*'columns'"),
        *((f"empty.{kind}", f"empty.{kind}") for kind in ("json", "csv", "tsv")),
        ("notes.txt", r"\['.csv', '.json', .*\].*notes.txt"),
        ("broken.jsonl", "broken.jsonl"),
        ("no/such-dataset", "'no/such-dataset'.*Hub"),
        ({"path": "splits", "split": "dev"}, r"'dev', found \['test', 'train'\]"),
        ("rows.jsonl", r"'prompt', found \['question', 'answer', 'level'\]"),
        ({**DATA, "columns": {"prompt": "problem"}}, r"columns: .*'problem', found \['question', 'answer', 'level'\]"),
        ({"path": "rows.jsonl", "prompt": "Solve {problem}"}, "prompt: "),
        ({**DATA, "skip": -2}, "skip: "),
        ({**DATA, "skip": 6}, "none of 6"),
    ],
)
def test_data_that_cannot_be_used(source, message, folder):
    broken = {"notes.txt": "text", "empty.json": "[]", "empty.csv": "", "empty.tsv": "prompt\tanswer\n"}
    for name, text in {**broken, "broken.jsonl": '{"prompt": "1"}\n{"prompt": \n'}.items():
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"here.*{message}"):
        load_prompts(source, "here", folder)


def write(folder, content):
    path = folder / "run.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_run_file(folder):
    (folder / "model").mkdir()
    math = {"name": "math", "metric": "lab_math", "settings": {"max_steps": 5}, "reward_weights": [1.0, 0.25]}
    math |= {"train_dataset": {**DATA, "limit": 4}, "eval_dataset": {**DATA, "skip": 4}}
    math |= {"selection_dataset": {**DATA, "skip": 3, "limit": 1}}
    math |= {"reward_funcs": ["exact_match", "trl_interfere.rewards.text.contains_words"]}
    Dataset.from_dict({"prompt": ["?"], "answer": ["!"]}).to_json(folder / "prompts.jsonl")
    content = {
        "model": "model",
        "training": {"learning_rate": 1e-5, "stage_overrides": {"1": {"max_steps": 2}}},
        "domains": [math, {"name": 1, "eval_dataset": "prompts.jsonl", "reward_funcs": "exact_match"}],
    }
    settings = {"peft": {"r": 8}, "refresh": {"max_drop": 3.0}, "heal": {"rank": 8}, "analysis": {"max_prompts": 16}}
    run = load_run_file(write(folder, content | settings))
    assert run.model == str(folder / "model")
    overrides = {"1": {"max_steps": 2}, "math": {"max_steps": 5}}
    assert run.training == {"learning_rate": 1e-5, "stage_overrides": overrides}
    assert {name: getattr(run, name) for name in settings} == settings
    math, qa = run.domains
    assert math.name == "math" and qa.name == "1"
    parts = (math.train_dataset, math.eval_dataset, math.selection_dataset)
    assert [part["level"][:] for part in parts] == [[0, 1, 2, 3], [4, 5], [3]]
    assert math.reward_funcs == [exact_match, contains_words] and math.reward_weights == [1.0, 0.25]
    assert math.metric is math_reward and qa.metric is None
    assert qa.train_dataset is None and qa.reward_funcs == [exact_match]


def made(name="made", size=2, folder=None):
    """A function that a YAML file can name in place of a shipped domain."""
    table = TABLE.select(range(size)).rename_column("question", "prompt")
    return Domain(name=name, train_dataset=table, reward_funcs=exact_match)


def not_made():
    return "a domain"


def test_shipped_domains(folder):
    content = {
        "model": "some/model",
        "domains": [
            {"domain": "writing", "options": {"sizes": {"train": 4, "test": 2}}, "settings": {"max_steps": 3}},
            {"name": "letters", "domain": "writing", "options": {"sizes": {"selection": 3}, "seed": 1}},
            {"name": "other", "domain": f"{__name__}.made", "options": {"size": 3}},
        ],
    }
    run = load_run_file(write(folder, content))
    assert [domain.name for domain in run.domains] == ["writing", "letters", "other"]
    writing, letters, other = run.domains
    assert (len(writing.train_dataset), len(writing.eval_dataset), writing.selection_dataset) == (4, 2, None)
    assert (letters.train_dataset, len(letters.selection_dataset), len(other.train_dataset)) == (None, 3, 3)
    assert run.training == {"stage_overrides": {"writing": {"max_steps": 3}}}


def domain(**settings):
    return {"name": "qa", "eval_dataset": DATA, "reward_funcs": "exact_match", **settings}


# What stands in the list of domains, and what the message names.
DOMAINS = [
    ("qa", "expected .*'qa'"),
    ({"eval_dataset": DATA}, "'name'"),
    (domain(name="q/a"), "name 'q/a'"),
    (domain(reward_funcs="exact_mach"), "reward_funcs: 'exact_mach'.*exact_match"),
    (domain(reward_funcs="no_such_package.reward"), "reward_funcs: .*no_such_package.reward'.*ModuleNotFoundError"),
    (domain(metric="trl_interfere.recipe.BUILT_IN_REWARDS"), "metric: .*dict"),
    (domain(settings=[1]), "settings: "),
    (domain(train=DATA), "'train'.*'train_dataset'"),  # the name in earlier versions
    ({"domain": "maths"}, r"domain: 'maths' is neither a shipped domain \(code, math, qa, "),
    ({"domain": "writing", "train_dataset": "x"}, "unknown option 'train_dataset'"),
    ({"domain": "writing", "options": {"siezs": {}}}, "options: unknown option 'siezs', did you mean 'sizes'?"),
    ({"domain": "writing", "options": {"sizes": {"train": "all"}}}, "sizes: .*'train': 'all'"),
    ({"domain": f"{__name__}.not_made"}, "expected a function that returns a Domain, found"),
]


@pytest.mark.parametrize(
    "content, message",
    [
        ("model: [", "YAML"),
        ("model: a\ntraining: {max_steps: 1, 'max_steps': 2}\ndomains: []", "'max_steps' stands twice"),
        ({"domains": [domain()]}, "'model'"),
        ({"model": "m", "domains": []}, r", domains: .*\[\]"),
        ({"model": "m", "domian": []}, "'domian'.*'domains'"),
        ({"model": "m", "domains": [domain()], "refresh": True}, ", refresh: .*True"),
        ({"model": "m", "domains": [domain()], "training": {"stage_overrides": "qa"}}, "stage_overrides.*'qa'"),
        *(({"model": "m", "domains": [domain(name="fine"), entry]}, rf", domains\[1\].*{m}") for entry, m in DOMAINS),
    ],
)
def test_run_files_that_cannot_be_used(content, message, folder):
    with pytest.raises(ValueError, match=f"run.yaml.*{message}"):
        load_run_file(write(folder, content))


def test_run_file_that_cannot_be_read(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, message in (("absent", r"cannot be read \(No such file or directory\)"), ("binary", "expected YAML")):
        with pytest.raises(ValueError, match=f"{name}.yaml: {message}"):
            load_run_file(tmp_path / f"{name}.yaml")


def test_values_of_settings():
    # YAML 1.1 reads numbers without a point as text.
    given = {"output_dir": "out", "use_cpu": True, "bf16": False, "max_steps": "3", "learning_rate": "5e-3"}
    config = build_dataclass(SequentialGRPOConfig, given, "here")
    assert (config.max_steps, config.learning_rate) == (3, 5e-3)
    with pytest.raises(ValueError, match="here: unknown option 'max_step'"):
        build_dataclass(SequentialGRPOConfig, {"max_step": 3}, "here")


def test_a_dry_run_imports_nothing_from_elsewhere(folder, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "spy_of_a_stranger.py").write_text("raise SystemExit('imported')")
    (folder / "beside_the_recipe.py").write_text("def reward(completions, **kwargs):\n    return [0]")
    monkeypatch.syspath_prepend(elsewhere)
    names = ["spy_of_a_stranger.reward", "beside_the_recipe.reward", "math_verify", "exact_match"]
    path = write(folder, {"model": "m", "domains": [domain(reward_funcs=names)]})
    (found,) = load_run_file(path, dry=True).domains
    assert [reward.__name__ for reward in found.reward_funcs][1:] == ["reward", "accuracy_reward", "exact_match"]
    with pytest.raises(SystemExit):
        load_run_file(path)
    with pytest.raises(ValueError, match="dry run"):
        load_run_file(write(folder, {"model": "m", "domains": [{"domain": "spy_of_a_stranger.make"}]}), dry=True)


VALUES = [None, [1], {"a": 1}, "text", -1, 0, True, float("nan"), float("inf"), 2**70, ""]


@pytest.mark.parametrize("name", [field.name for field in fields(SequentialGRPOConfig) if field.init])
def test_any_value_of_a_setting_is_taken_or_refused_by_name(name, tmp_path):
    """No other error than ValueError or, for an extra that is not installed, ImportError."""
    for value in VALUES:
        settings = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "bf16": False, name: value}
        try:
            build_dataclass(SequentialGRPOConfig, settings, "training")
        except ValueError as error:
            assert str(error).startswith("training"), (value, error)
        except ImportError as error:
            assert name in str(error), (value, error)


UNFIT = {
    "learning_rate": float("nan"),
    "per_device_train_batch_size": 2.5,
    "temperature": 0,
    "seed": 2**70,
    "beta": -1,
}
UNFIT |= {"learning_rate": float("nan"), "max_steps": 0, "score_temperature": -1, "num_generations": 1}


@pytest.mark.parametrize("name", UNFIT)
def test_settings_that_nothing_can_be_trained_with(name):
    with pytest.raises(ValueError, match=name):
        build_dataclass(SequentialGRPOConfig, {"output_dir": "out", "use_cpu": True, name: UNFIT[name]}, "training")


@pytest.mark.parametrize("name", [field.name for field in fields(Domain)] + ["settings"])
def test_any_value_of_a_domain_is_taken_or_refused(name, folder):
    for value in VALUES:
        try:
            load_run_file(write(folder, {"model": "m", "domains": [domain(**{name: value})]}))
        except ValueError as error:
            assert "domains[0]" in str(error), (value, error)
