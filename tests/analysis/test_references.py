import pytest
import torch
from datasets import Dataset

from trl_interfere.analysis.config import InterferenceConfig
from trl_interfere.analysis.references import References, collect_references
from trl_interfere.domain import Domain
from trl_interfere.evaluation.scorer import Scorer


def test_layout_of_batches():
    references = References("numbers", [[5], [6, 7, 8], [9, 10]], [[11, 1], [12, 1], [13, 14, 15, 1]], considered=4)
    first, second = references.batches(2, pad_id=0, device=torch.device("cpu"))
    assert first["input_ids"].tolist() == [[9, 10, 13, 14, 15, 1], [6, 7, 8, 12, 1, 0]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]
    assert first["labels"].tolist() == [[-100, -100, 13, 14, 15, 1], [-100, -100, -100, 12, 1, -100]]
    assert second["input_ids"].tolist() == [[5, 11, 1]]
    assert second["attention_mask"].tolist() == [[1, 1, 1]]
    assert second["labels"].tolist() == [[-100, 11, 1]]
    assert references.num_tokens == 8


def scored_by(values, prompts):
    """A domain whose metric gives each prompt its value."""
    by_prompt = dict(zip(prompts, values, strict=True))
    return Domain(
        name="numbers",
        selection_dataset=Dataset.from_dict({"prompt": prompts}),
        metric=lambda prompts, completions, **kwargs: [by_prompt[prompt] for prompt in prompts],
    )


def test_only_correct_completions_are_kept(make_model, tokenizer):
    prompts = ["1+1=", "22?", "abc", "3+3=", "hh"]
    domain = scored_by([1.0, 0.5, 1.0, 0.0, 1.0], prompts)
    model = make_model()
    config = InterferenceConfig(max_prompts=4, max_new_tokens=5)
    references = collect_references(model, tokenizer, domain, config)
    written = Scorer(tokenizer, max_new_tokens=5).complete_ids(model, ["1+1=", "abc"])
    assert references.domain == "numbers"
    assert references.prompts == [tokenizer(prompt)["input_ids"] for prompt in ("1+1=", "abc")]
    assert references.completions == written
    assert references.considered == 4
    config = InterferenceConfig(max_prompts=4, max_new_tokens=5, correct_threshold=0.5)
    assert len(collect_references(model, tokenizer, domain, config).prompts) == 3
    config = InterferenceConfig(max_prompts=4, max_new_tokens=5, correct_threshold=2.0)
    with pytest.raises(ValueError, match=r"domain 'numbers': none of 4 completions scores 2.0 or more \(highest 1.0"):
        collect_references(model, tokenizer, domain, config)


def test_completions_of_the_dataset(make_domain, tokenizer):
    domain = make_domain(prompts=["1+1=", "ab"], completion=["2", "cd"])
    config = InterferenceConfig(reference="dataset", max_prompts=1)
    references = collect_references(None, tokenizer, domain, config)
    assert references.prompts == [tokenizer("1+1=")["input_ids"]]
    assert references.completions == [[*tokenizer("2")["input_ids"], tokenizer.eos_token_id]]
    assert references.considered == 1
    config = InterferenceConfig(reference="dataset", reference_column="answer")
    with pytest.raises(ValueError, match=r"domain 'numbers': expected the column 'answer'.*'completion'"):
        collect_references(None, tokenizer, domain, config)


def test_evaluation_split_where_there_is_no_selection_split(make_model, tokenizer):
    rows = Dataset.from_dict({"prompt": ["1"], "completion": ["a"]})
    config = InterferenceConfig(reference="dataset")
    domain = Domain("numbers", eval_dataset=rows, reward_funcs=len)
    assert collect_references(make_model(), tokenizer, domain, config).prompts == [tokenizer("1")["input_ids"]]
    with pytest.raises(ValueError, match="expected a selection_dataset or an eval_dataset, found neither"):
        collect_references(make_model(), tokenizer, Domain("numbers", reward_funcs=len), config)
