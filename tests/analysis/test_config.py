import pytest

from trl_interfere.analysis.config import InterferenceConfig


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"reference": "wrong"}, "reference: expected 'correct' or 'dataset', found 'wrong'"),
        ({"difference_step": 0}, "difference_step: expected a share above 0 and up to 1, found 0"),
        ({"objective": "ppo"}, r"objective: expected one of \['grpo', 'kl', 'nll'\], found 'ppo'"),
        ({"check_prompts": -1}, "check_prompts: expected at least 0, found -1"),
        ({"temperature": 0.0}, "temperature: expected a number above 0, found 0.0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        InterferenceConfig(**settings)
