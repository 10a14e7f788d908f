"""Settings on the command line: only what was given, with its type, and the nearest name for what does not exist."""

import re

import pytest

from trl_interfere.training.options import options_parser, parse_options


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--learning_rate", "1e-5", "--max-steps", "-1"], {"learning_rate": 1e-5, "max_steps": -1}),
        (["--bf16", "false", "--use_cpu"], {"bf16": False, "use_cpu": True}),
        (["--no_gradient_checkpointing"], {"gradient_checkpointing": False}),
        (["--order", "qa", "math"], {"order": ["qa", "math"]}),
        (["--order", "qa,math"], {"order": ["qa", "math"]}),
        (["--stage_overrides", '{"qa": {"max_steps": 5}}'], {"stage_overrides": {"qa": {"max_steps": 5}}}),
        (["--model-init-kwargs", '{"dtype": "bfloat16"}'], {"model_init_kwargs": {"dtype": "bfloat16"}}),
    ],
)
def test_only_what_is_given(arguments, expected):
    options = parse_options(arguments)
    assert options == expected
    assert [type(value) for value in options.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rat=1"], "unknown option 'learning_rat', did you mean 'learning_rate'"),
        (["--dry_rum"], "unknown option 'dry_rum', did you mean 'dry_run'"),
        (["--learning_rate", "fast"], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        (["twice", "--max_steps", "3"], "expected options, found 'twice'"),
        (["--stage_overrides", "[1]"], "--stage_overrides: expected settings by name"),
        (["--model_init_kwargs", "{dtype"], "--model_init_kwargs: expected JSON, found '{dtype'"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_options(arguments, known=["dry_run"])


def test_help_shows_names_and_defaults():
    text = options_parser().format_help()
    assert "--score_samples" in text and "(default: 64)" in text and "of the domains in" in text
