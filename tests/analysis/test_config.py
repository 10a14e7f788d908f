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
        difference_step=0.125,
        active_share=0.25,
    )
    assert set(config.to_dict().values()).isdisjoint(InterferenceConfig().to_dict().values())  # no default left
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
        ({"active_share": 1.5}, "active_share: expected a share above 0 and up to 1, found 1.5"),
        ({"active_shar": 0.5}, r"unknown settings \['active_shar'\], expected some of .*'active_share'"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        InterferenceConfig.from_dict(settings)
