import copy

import numpy as np
import pytest

from trl_interfere.evaluation.score_matrix import ScoreMatrix
from trl_interfere.training.manifest import StageRecord
from trl_interfere.training.refresh import RefreshCallback
from trl_interfere.training.schedule import Stage


def right(share, n=100):
    """Scores of `n` prompts, of which the first ones are right: a later set differs on few prompts only."""
    return (np.arange(n) < share * n).astype(float)


def history(*stages, domains=("math", "qa", "code")):
    """Records and scores of a run: `(kind, domain, shares)` for each stage."""
    records, matrix = [], ScoreMatrix(list(domains))
    for index, (kind, domain, shares) in enumerate(stages):
        record = StageRecord(index, kind, domain, None, 10, 1.0, {}, 0, {}, {})
        records.append(record)
        values = [share if isinstance(share, np.ndarray) else right(share) for share in shares]
        matrix.append(record.name, dict(zip(domains, values, strict=True)))
    return records, matrix


# math falls by 30 points and code by 50; qa, trained last, is at its peak.
DROPPED = [
    ("base", None, (0.1, 0.1, 0.1)),
    ("train", "math", (0.9, 0.1, 0.1)),
    ("train", "code", (0.8, 0.2, 0.9)),
    ("train", "qa", (0.6, 0.9, 0.4)),
]


def ask(callback, *stages, schedule_finished=True):
    return callback.request_stage(*history(*stages), schedule_finished)


def test_worst_first_once_per_domain():
    callback = RefreshCallback(max_steps=7, overrides={"learning_rate": 1e-6})
    stages = list(DROPPED)
    requested = []
    while (stage := ask(callback, *stages)) is not None:
        assert stage == Stage(stage.domain, "refresh", {"max_steps": 7, "learning_rate": 1e-6})
        requested.append(stage.domain)
        stages.append(("refresh", stage.domain, (0.6, 0.9, 0.4)))  # the refresh is of no use
    assert requested == ["code", "math"]


def test_a_refresh_that_cures_the_other_domain_too():
    assert ask(RefreshCallback(), *DROPPED, ("refresh", "code", (0.9, 0.9, 0.9))) is None


def test_a_refresh_that_damages_another_domain():
    stage = ask(RefreshCallback(), *DROPPED, ("refresh", "code", (0.9, 0.5, 0.9)))
    assert stage.domain == "qa"


def test_refreshed_domains_may_be_refreshed_again_after_another_stage():
    later = [("refresh", "code", (0.6, 0.9, 0.9)), ("train", "qa", (0.8, 0.9, 0.3))]
    callback = RefreshCallback(at="stage")
    assert ask(callback, *DROPPED, later[0], schedule_finished=False).domain == "math"
    assert ask(callback, *DROPPED, *later, schedule_finished=False).domain == "code"


@pytest.mark.parametrize(
    "at, schedule_finished, expected", [("end", False, None), ("end", True, "code"), ("stage", False, "code")]
)
def test_when_it_asks(at, schedule_finished, expected):
    stage = ask(RefreshCallback(at=at), *DROPPED, schedule_finished=schedule_finished)
    assert (stage and stage.domain) == expected


def test_only_watched_domains():
    assert ask(RefreshCallback(domains=["math"]), *DROPPED).domain == "math"
    assert ask(RefreshCallback(domains=["qa"]), *DROPPED) is None
    assert ask(RefreshCallback(domains=[]), *DROPPED) is None


def test_domains_that_were_never_trained_are_not_watched():
    stages = [("base", None, (0.1, 0.9, 0.9)), ("train", "math", (0.9, 0.2, 0.1))]
    assert ask(RefreshCallback(), *stages) is None


@pytest.mark.parametrize("max_drop, asks", [(29.9, True), (30.0, False), (0.0, True), (35.0, False)])
def test_tolerated_drop(max_drop, asks):
    stages = [("base", None, (0.1,)), ("train", "math", (0.9,)), ("train", "qa", (0.6,))]
    records, matrix = history(*stages, domains=("math",))
    stage = RefreshCallback(max_drop=max_drop).request_stage(records, matrix, True)
    assert (stage is not None) == asks


def test_only_significant_drops():
    rng = np.random.default_rng(0)
    before = rng.uniform(size=100) < 0.6
    noisy = rng.permutation(before)  # as many right, but others
    noisy[np.flatnonzero(noisy)[:5]] = False
    few = before.copy()
    few[np.flatnonzero(before)[:6]] = False  # a drop as small, but of the same prompts
    assert 0 < before.sum() - noisy.sum() < 6
    for after, asks in ((noisy, False), (few, True)):
        stages = [("train", "math", (before.astype(float),)), ("train", "qa", (after.astype(float),))]
        stage = RefreshCallback(max_drop=2.0).request_stage(*history(*stages, domains=("math",)), True)
        assert (stage is not None) == asks


def test_peak_is_the_highest_score_of_the_run():
    # The base model was better than the stage that trained the domain, and the drop is from there.
    stages = [("base", None, (0.9,)), ("train", "math", (0.6,))]
    records, matrix = history(*stages, domains=("math",))
    assert RefreshCallback(max_drop=25).request_stage(records, matrix, True).domain == "math"


def test_a_function_of_its_arguments_alone():
    callback = RefreshCallback()
    records, matrix = history(*DROPPED)
    kept = copy.deepcopy(matrix.values)
    first = callback.request_stage(records, matrix, True)
    ask(callback, *DROPPED, ("refresh", "code", (0.9, 0.9, 0.9)))
    assert (
        callback.request_stage(records, matrix, True)
        == first
        == RefreshCallback().request_stage(records, matrix, True)
    )
    first.overrides["max_steps"] = 99  # what it hands out is not what it keeps
    assert callback.request_stage(records, matrix, True).overrides == {"max_steps": 10}
    assert all(np.array_equal(a[name], b[name]) for a, b in zip(kept, matrix.values, strict=True) for name in a)
    assert len(records) == len(matrix.stages) == 4


def test_nothing_to_refresh():
    assert ask(RefreshCallback(), ("base", None, (0.5, 0.5, 0.5))) is None
    assert ask(RefreshCallback(), *DROPPED[:2]) is None


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"at": "begin"}, "at: expected 'end' or 'stage', found 'begin'"),
        ({"max_steps": 0}, "max_steps: expected at least 1, found 0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        RefreshCallback(**settings)
