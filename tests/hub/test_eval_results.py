import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results

from trl_interfere import Domain
from trl_interfere.benchmark import parse_benchmark
from trl_interfere.hub.eval_results import eval_result_files, model_index
from trl_interfere.reporting.card import analysis_card


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b", ("a/b", None, "default")),
        ("a/b:task", ("a/b", None, "task")),
        ("a/b@0123abc:c/d", ("a/b", "0123abc", "c/d")),
    ],
)
def test_names(name, expected):
    assert parse_benchmark(name) == expected


@pytest.mark.parametrize("name", ["b", "a/b/c", "a/b:", "a b/c", ""])
def test_bad_names_end_with_the_domain(name):
    with pytest.raises(ValueError, match="domain 'math', benchmark: expected user/dataset"):
        Domain("math", metric=lambda **kwargs: [], benchmark=name)


def test_one_file_for_each_domain_that_names_a_benchmark(run):
    assert eval_result_files(run) == {}
    run.manifest.about["benchmarks"] = {"math": "opencompass/AIME2025@abc:aime"}
    ((path, content),) = eval_result_files(run, source_url="https://huggingface.co/u/r").items()
    assert path == ".eval_results/math.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(content))
    score = run.stages[-1].scores["math"]
    assert (entry.dataset_id, entry.dataset_revision, entry.task_id) == ("opencompass/AIME2025", "abc", "aime")
    assert entry.value == score["value"] and entry.source_url == "https://huggingface.co/u/r"
    assert f"n={score['n']}" in entry.notes and "temperature 1" in entry.notes and run.stages[-1].name in entry.notes


def test_the_legacy_form_is_an_option(run):
    run.manifest.about["benchmarks"] = {"math": "opencompass/AIME2025"}
    assert "model-index" not in str(analysis_card(run.manifest, "u/r"))
    card = ModelCard(str(analysis_card(run.manifest, "u/r", eval_results=model_index(run))))
    _, (result,) = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert result.dataset_type == "opencompass/AIME2025"
    assert result.metric_value == run.stages[-1].scores["math"]["value"]
