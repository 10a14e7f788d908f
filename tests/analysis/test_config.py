import pytest

from trl_interfere.analysis.config import InterferenceConfig


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"reference": "wrong"}, "reference: expected 'correct' or 'dataset', found 'wrong'"),
        ({"max_prompts": 0}, "max_prompts: expected at least 1, found 0"),
        ({"difference_step": 0}, "difference_step: expected a share above 0 and up to 1, found 0"),
        ({"objective": "ppo"}, r"objective: expected one of \['grpo', 'kl', 'nll'\], found 'ppo'"),
        ({"check_prompts": -1}, "check_prompts: expected at least 0, found -1"),
        ({"num_generations": 1}, "num_generations: expected at least 2, found 1"),
        ({"temperature": 0.0}, "temperature: expected a number above 0, found 0.0"),
        ({"active_share": 1.5}, "active_share: expected a share above 0 and up to 1, found 1.5"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        InterferenceConfig(**settings)
