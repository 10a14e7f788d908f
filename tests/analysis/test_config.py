import json

import pytest

from trl_interfere.analysis.config import InterferenceConfig


def test_round_trips(tmp_path):
    config = InterferenceConfig(
        reference="dataset",
        reference_column="answer",
        correct_threshold=0.75,
        max_prompts=3,
        max_new_tokens=9,
        batch_size=5,
        quadrature_nodes=6,
        later_quadrature_nodes=12,
        difference_step=0.125,
        check_prompts=7,
        objective="grpo",
        num_generations=10,
        temperature=0.625,
        seed=11,
        subspace_size=13,
        subspace_prompts=14,
        active_share=0.375,
        gradient_checkpointing=True,
        offload=True,
        data_parallel=True,
    )
    defaults = InterferenceConfig().to_dict()
    assert all(value != defaults[name] for name, value in config.to_dict().items())
    assert InterferenceConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save_pretrained(tmp_path / "new" / "folder")
    assert InterferenceConfig.from_pretrained(tmp_path / "new" / "folder") == config
    assert InterferenceConfig.from_dict({"max_prompts": 7}) == InterferenceConfig(max_prompts=7)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"reference": "wrong"}, "reference: expected 'correct' or 'dataset', found 'wrong'"),
        ({"max_prompts": 0}, "max_prompts: expected at least 1, found 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, found 0"),
        ({"batch_size": -1}, "batch_size: expected at least 1, found -1"),
        ({"quadrature_nodes": 0}, "quadrature_nodes: expected at least 1, found 0"),
        ({"difference_step": 0}, "difference_step: expected a share above 0 and up to 1, found 0"),
        ({"objective": "ppo"}, r"objective: expected one of \['grpo', 'kl', 'nll'\], found 'ppo'"),
        ({"later_quadrature_nodes": 0}, "later_quadrature_nodes: expected at least 1, found 0"),
        ({"check_prompts": -1}, "check_prompts: expected at least 0, found -1"),
        ({"num_generations": 1}, "num_generations: expected at least 2, found 1"),
        ({"temperature": 0.0}, "temperature: expected a number above 0, found 0.0"),
        ({"subspace_size": -1}, "subspace_size: expected at least 0, found -1"),
        ({"subspace_prompts": 0}, "subspace_prompts: expected at least 1, found 0"),
        ({"active_share": 1.5}, "active_share: expected a share above 0 and up to 1, found 1.5"),
        ({"active_shar": 0.5}, r"unknown settings \['active_shar'\], expected some of .*'active_share'"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        InterferenceConfig.from_dict(settings)
