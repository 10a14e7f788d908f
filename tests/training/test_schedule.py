import pytest

from trl_interfere.training.schedule import Stage, build_schedule


DOMAINS = ("code", "math", "qa")


def test_order_and_overrides():
    overrides = {"math": {"max_steps": 3}, "qa": {"learning_rate": 1e-6}}
    assert build_schedule(iter(DOMAINS), None, None) == [Stage("code"), Stage("math"), Stage("qa")]
    schedule = build_schedule(DOMAINS, ["math", "code", "math"], overrides)
    assert [(stage.domain, stage.kind, stage.overrides) for stage in schedule] == [
        ("math", "train", {"max_steps": 3}),
        ("code", "train", {}),
        ("math", "train", {"max_steps": 3}),
    ]
    schedule[0].overrides["max_steps"] = 9
    assert schedule[2].overrides == {"max_steps": 3} and overrides["math"] == {"max_steps": 3}


@pytest.mark.parametrize(
    "order, overrides, message",
    [
        ([], None, "order: expected at least one domain, found none"),
        (["math", "art"], None, r"order: unknown domain 'art', expected .*\['code', 'math', 'qa'\]"),
        (None, {"art": {}}, "stage_overrides: unknown domain 'art', expected one"),
        (None, {"qa": 5}, r"stage_overrides\['qa'\]: expected settings by name, found 5"),
        (None, {"qa": {"beta": 0.1}}, r"stage_overrides\['qa'\].*may differ .*: unknown option 'beta'"),
    ],
)
def test_schedules_that_cannot_be_run(order, overrides, message):
    with pytest.raises(ValueError, match=message):
        build_schedule(DOMAINS, order, overrides)
