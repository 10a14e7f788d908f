import copy
import json

import numpy as np
import pytest
from datasets import Dataset

from trl_interfere import Domain, SequentialGRPOConfig, SequentialGRPOTrainer
from trl_interfere.evaluation.bootstrap import difference
from trl_interfere.evaluation.metrics import recovered
from trl_interfere.evaluation.score_matrix import ScoreMatrix
from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.run import StageRecord
from trl_interfere.training.callbacks import StageCallback
from trl_interfere.training.refresh import RefreshCallback


def right(share, n=100):
    """Scores of `n` prompts, of which the first ones are right: a later set differs on few prompts only."""
    return (np.arange(n) < share * n).astype(float)


def history(*stages, domains=("math", "qa", "code")):
    """Records and scores of a run: `(kind, domain, shares)` for each stage, and its steps where they are not 10."""
    records, matrix = [], ScoreMatrix(list(domains))
    for index, (kind, domain, shares, *steps) in enumerate(stages):
        record = StageRecord(index, kind, domain, None, *(steps or [10]), 1.0, {}, 0, {}, {})
        records.append(record)
        values = {
            name: share if isinstance(share, np.ndarray) else right(share)
            for name, share in zip(domains, shares, strict=True)
            if share is not None
        }
        matrix.append(record.name, values)
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


def run(callback, stages, effects):
    """Carry out what the callback asks for; each refresh has the next of the effects."""
    stages, asked = list(stages), []
    for shares in effects:
        stage = ask(callback, *stages)
        if stage is None:
            break
        asked.append((stage.domain, stage.overrides["max_steps"]))
        stages.append(("refresh", stage.domain, shares, stage.overrides["max_steps"]))
    else:
        assert ask(callback, *stages) is None
    return asked


NO_USE = (0.6, 0.9, 0.4)


def test_worst_first_once_per_domain():
    callback = RefreshCallback(max_steps=7, overrides={"learning_rate": 1e-6})
    assert run(callback, DROPPED, [NO_USE] * 2) == [("code", 7), ("math", 7)]
    stage = ask(callback, *DROPPED)
    assert stage.kind == "refresh" and stage.overrides == {"max_steps": 7, "learning_rate": 1e-6}


def test_a_refresh_that_cures_the_other_domain_too():
    assert ask(RefreshCallback(), *DROPPED, ("refresh", "code", (0.9, 0.9, 0.9))) is None


def test_taking_turns():
    callback = RefreshCallback(max_steps=10, steps_per_check=4, patience=9)
    steady = [
        (0.6, 0.9, 0.5),  # code
        (0.7, 0.9, 0.5),  # math
        (0.7, 0.9, 0.75),  # code, now the one that lacks less
        (0.75, 0.9, 0.75),  # math
        (0.75, 0.9, 0.76),  # code: 0.14 against 0.15, but math is the first of those with two refreshes
        (0.8, 0.9, 0.76),
    ]
    assert run(callback, DROPPED, steady) == [
        ("code", 4), ("math", 4), ("code", 4), ("math", 4), ("math", 2), ("code", 2)
    ]  # fmt: skip


@pytest.mark.parametrize("max_steps, steps_per_check, expected", [(9, 4, [4, 4, 1]), (8, 4, [4, 4]), (3, 1, [1] * 3)])
def test_the_last_refresh_is_shortened(max_steps, steps_per_check, expected):
    callback = RefreshCallback(domains=["code"], max_steps=max_steps, steps_per_check=steps_per_check, patience=9)
    assert [steps for _, steps in run(callback, DROPPED, [NO_USE] * len(expected))] == expected


def test_steps_that_were_really_taken_count():
    callback = RefreshCallback(domains=["code"], max_steps=10, steps_per_check=5, patience=99)
    short = ("refresh", "code", NO_USE, 2)  # another callback ended it early
    assert ask(callback, *DROPPED, short).overrides["max_steps"] == 5
    assert ask(callback, *DROPPED, short, ("refresh", "code", NO_USE, 5)).overrides["max_steps"] == 3
    assert ask(callback, *DROPPED, *[("refresh", "code", NO_USE, 0)] * 9).overrides["max_steps"] == 1
    assert ask(callback, *DROPPED, *[("refresh", "code", NO_USE, 0)] * 10) is None


@pytest.mark.parametrize("share, asks", [(0.6, True), (0.79, True), (0.80, False), (0.9, False), (1.0, False)])
def test_until_recovered(share, asks):
    # 0.4 to 0.9 was lost: 0.8 of it is 0.80
    callback = RefreshCallback(domains=["code"], until_recovered=0.8, steps_per_check=2)
    stage = ask(callback, *DROPPED, ("refresh", "code", (0.6, 0.9, share), 2))
    assert (stage is not None) == asks
    if asks:
        assert stage.reason["recovered"]["value"] == pytest.approx((share - 0.4) / 0.5)


def test_a_small_rest_is_refreshed_until_recovered_but_not_for_noise():
    callback = RefreshCallback(domains=["code"], until_recovered=1.0, max_drop=8.0, steps_per_check=2)
    assert ask(callback, *DROPPED, ("refresh", "code", (0.6, 0.9, 0.84), 2)) is not None  # 6 points, of them no noise
    assert ask(callback, *DROPPED, ("refresh", "code", (0.6, 0.9, 0.88), 2)) is None  # 2 prompts may be left out


def test_recovered_domains_come_back_when_another_refresh_undoes_it():
    callback = RefreshCallback(max_steps=10, steps_per_check=2)
    stages = [*DROPPED, ("refresh", "code", (0.6, 0.9, 0.9), 2)]
    assert ask(callback, *stages).domain == "math"
    assert ask(callback, *stages, ("refresh", "math", (0.9, 0.9, 0.7), 2)).domain == "code"


@pytest.mark.parametrize(
    "shares, patience, asks",
    [
        ([0.4], 1, False),
        ([0.3], 1, False),
        ([0.41], 1, True),
        ([0.4], 2, True),
        ([0.4, 0.3], 2, False),
        ([0.5, 0.5, 0.5], 2, False),
        ([0.3, 0.39, 0.5], 2, True),
        ([0.5, 0.3, 0.4], 2, False),  # better than the one before, but not than the best
        ([0.5, 0.3, 0.6, 0.5], 2, True),
    ],
)
def test_patience(shares, patience, asks):
    callback = RefreshCallback(domains=["code"], max_steps=50, steps_per_check=1, patience=patience)
    own = [("refresh", "code", (0.6, 0.9, share), 1) for share in shares]
    assert (ask(callback, *DROPPED, *own) is not None) == asks


def test_patience_is_counted_by_domain():
    callback = RefreshCallback(max_steps=50, steps_per_check=1, patience=2)
    effects = [(0.6, 0.9, 0.4), (0.65, 0.9, 0.4), (0.65, 0.9, 0.4), (0.7, 0.9, 0.4), (0.7, 0.9, 0.4), (0.7, 0.9, 0.4)]
    asked = [domain for domain, _ in run(callback, DROPPED, effects)]
    assert asked == ["code", "math", "code", "math", "math", "math"]


def test_a_refresh_that_damages_another_domain_ends_the_round(caplog):
    callback = RefreshCallback()
    assert ask(callback, *DROPPED, ("refresh", "code", (0.6, 0.5, 0.9))) is None
    assert "4-refresh-code: domain 'qa' is -40.0 [" in caplog.text and "max_drop=2.0; no further" in caplog.text
    assert ask(callback, *DROPPED, ("refresh", "code", (0.5, 0.9, 0.9))) is None  # math, itself damaged, pays
    assert ask(callback, *DROPPED, ("refresh", "code", (0.6, 0.89, 0.9))).domain == "math"  # tolerated
    assert (
        ask(RefreshCallback(max_drop=45, steps_per_check=2), *DROPPED, ("refresh", "code", (0.6, 0.5, 0.7), 2))
        is not None
    )
    # A domain that its own refresh makes worse is a matter of patience.
    assert ask(RefreshCallback(steps_per_check=2), *DROPPED, ("refresh", "code", (0.6, 0.9, 0.2), 2)).domain == "math"


def test_a_price_paid_in_small_parts():
    callback = RefreshCallback(max_drop=10, steps_per_check=1, patience=9)
    parts = [("refresh", domain, (0.6, qa, 0.5), 1) for domain, qa in (("code", 0.85), ("math", 0.80), ("code", 0.78))]
    assert ask(callback, *DROPPED, *parts[:2]) is not None
    assert ask(callback, *DROPPED, *parts) is None


def test_a_price_within_the_noise():
    rng = np.random.default_rng(0)
    qa = (rng.uniform(size=100) < 0.6).astype(float)
    noisy = rng.permutation(qa)
    noisy[np.flatnonzero(noisy)[:5]] = 0
    few = qa.copy()
    few[np.flatnonzero(qa)[:6]] = 0
    stages = [*DROPPED[:3], ("train", "qa", (0.6, qa, 0.4))]
    assert ask(RefreshCallback(), *stages, ("refresh", "code", (0.6, noisy, 0.9))).domain == "math"
    assert ask(RefreshCallback(), *stages, ("refresh", "code", (0.6, few, 0.9))) is None


def test_domains_that_were_never_trained_count_as_collateral():
    stages = [
        ("base", None, (0.1, 0.9, 0.1)),
        ("train", "math", (0.9, 0.9, 0.1)),
        ("train", "code", (0.4, 0.9, 0.9)),
    ]
    assert ask(RefreshCallback(steps_per_check=2), *stages, ("refresh", "math", (0.5, 0.9, 0.9), 2)).domain == "math"
    assert ask(RefreshCallback(steps_per_check=2), *stages, ("refresh", "math", (0.5, 0.6, 0.9), 2)) is None


def test_a_new_stage_begins_a_new_round():
    later = [("refresh", "code", (0.6, 0.9, 0.9)), ("train", "qa", (0.8, 0.9, 0.3))]
    callback = RefreshCallback(at="stage")
    assert ask(callback, *DROPPED, later[0], schedule_finished=False).domain == "math"
    stage = ask(callback, *DROPPED, *later, schedule_finished=False)
    assert stage.domain == "code" and stage.overrides["max_steps"] == 10
    assert stage.reason["steps"] == stage.reason["refreshes"] == 0
    # The price of the earlier round is forgotten with it.
    paid = [("refresh", "code", (0.6, 0.5, 0.9)), ("train", "math", (0.9, 0.5, 0.4))]
    assert ask(callback, *DROPPED, paid[0], schedule_finished=False) is None
    assert ask(callback, *DROPPED, *paid, schedule_finished=False).domain == "code"


def test_rows_without_a_value():
    stages = [(kind, domain, (math, None, code)) for kind, domain, (math, _, code) in DROPPED]
    assert ask(RefreshCallback(), *stages).domain == "code"
    assert ask(RefreshCallback(domains=["qa"]), *stages) is None
    # qa came with the second stage; its peak is among the rows that have it.
    late = [DROPPED[0], DROPPED[1], ("train", "qa", (0.9, 0.9, 0.1)), ("train", "code", (0.9, 0.5, 0.9))]
    late[:2] = [(kind, domain, (math, None, code)) for kind, domain, (math, _, code) in late[:2]]
    stage = ask(RefreshCallback(), *late)
    assert stage.domain == "qa" and stage.reason["peak"] == "2-qa"
    # A domain that is only scored from a refresh on can neither be damaged nor pay.
    assert ask(RefreshCallback(), *stages, ("refresh", "code", (0.6, 0.1, 0.9))).domain == "math"


def test_unknown_domains_are_refused_before_the_first_stage():
    with pytest.raises(ValueError, match="RefreshCallback, domains: .*'math', 'qa', 'code'.*found 'mth'"):
        ask(RefreshCallback(domains=["math", "mth"]), DROPPED[0], schedule_finished=False)


def test_the_reason_is_kept():
    stages = [*DROPPED, ("refresh", "code", (0.6, 0.9, 0.4), 4), ("refresh", "math", (0.7, 0.9, 0.5), 4)]
    stage = ask(RefreshCallback(steps_per_check=4), *stages)
    assert json.loads(json.dumps(stage.reason, allow_nan=False)) == stage.reason
    assert stage.reason == {
        "drop": difference(right(0.9), right(0.5)).to_dict(),
        "recovered": recovered(right(0.5), right(0.4), right(0.9)).to_dict(),
        "steps": 4,
        "refreshes": 1,
        "without_improvement": 1,
        "peak": "2-code",
        "damaged": "3-qa",
    }
    assert stage.overrides == {"max_steps": 4}


@pytest.mark.parametrize("at", ["end", "stage"])
def test_prefixes_of_a_finished_run_ask_for_the_same(at):
    plan, stages, answers, trained = ["math", "code", "qa", "math"], [("base", None, (0.1, 0.1, 0.1), 0)], [], 0
    settings = {"at": at, "max_steps": 5, "steps_per_check": 2, "max_drop": 3.0}
    callback = RefreshCallback(**settings)
    while True:
        stage = ask(callback, *stages, schedule_finished=trained == len(plan))
        answers.append(stage)
        if stage is None and trained == len(plan):
            break
        kind, domain, steps = "train", plan[trained % len(plan)], 10
        if stage is not None:
            kind, domain, steps = "refresh", stage.domain, stage.overrides["max_steps"]
        trained += kind == "train"
        before = dict(zip(("math", "qa", "code"), stages[-1][2], strict=True))
        loss = 0.2 if kind == "train" else 0.01
        after = {name: max(share - loss, 0) for name, share in before.items()}
        after[domain] = min(before[domain] + (0.6 if kind == "train" else 0.05), 0.95)
        stages.append((kind, domain, tuple(after.values()), steps))
    assert sum(answer is not None for answer in answers) >= 4
    for order in (range(len(answers)), reversed(range(len(answers)))):
        callback = RefreshCallback(**settings)
        for length in order:
            prefix = stages[: length + 1]
            finished = sum(kind == "train" for kind, *_ in prefix) == len(plan)
            assert ask(callback, *prefix, schedule_finished=finished) == answers[length]


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
    nested = RefreshCallback(overrides={"lr_scheduler_kwargs": {"power": 2}})
    handed = nested.request_stage(records, matrix, True).overrides  # what it hands out is not what it keeps
    handed["max_steps"] = handed["lr_scheduler_kwargs"]["power"] = 99
    expected = {"max_steps": 10, "lr_scheduler_kwargs": {"power": 2}}
    assert nested.request_stage(records, matrix, True).overrides == expected
    assert all(np.array_equal(a[name], b[name]) for a, b in zip(kept, matrix.values, strict=True) for name in a)
    assert len(records) == len(matrix.stages) == 4


def test_nothing_to_refresh():
    assert ask(RefreshCallback(), ("base", None, (0.5, 0.5, 0.5))) is None
    assert ask(RefreshCallback(), *DROPPED[:2]) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"at": "begin"},
        {"max_steps": 0},
        {"max_steps": 2.5},
        {"max_steps": True},
        {"patience": 0},
        {"steps_per_check": 11},
        {"max_drop": -1},
        {"max_drop": float("nan")},
        {"max_drop": "2"},
        {"until_recovered": 0},
        {"until_recovered": 95},
        {"domains": "math"},
        {"overrides": ["max_steps"]},
        {"overrides": {"max_steps": 3}},
        {"overrides": {"learning_rat": 1}},
        {"method": "sft"},
        {"reward_weight": -1},
        {"reward_weight": 0.1},  # without distillation
    ],
)
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))}: .*"):
        RefreshCallback(**settings)


class Stop(StageCallback):
    """Stops a run as a crash would, before one of its stages."""

    def __init__(self, index):
        self.index = index

    def on_stage_begin(self, index, stage):
        if index == self.index:
            raise KeyboardInterrupt


def test_a_run_that_is_stopped_between_refreshes(tmp_path):
    """The scores are scripted by the number of stages in the manifest, and so is the way of the run."""
    script = {"math": [0.1, 0.9, 0.4, 0.6, 0.7], "qa": [0.1, 0.1, 0.8, 0.8, 0.8]}
    manifest = tmp_path / "stages.json"

    def make(name):
        def metric(prompts, **kwargs):
            return right(script[name][len(json.loads(manifest.read_text())["stages"])], len(prompts)).tolist()

        def reward(completions, **kwargs):
            return [float(len(completion)) for completion in completions]

        rows = Dataset.from_dict({"prompt": [f"{number}+1=" for number in range(20)]})
        return Domain(name, rows, reward, eval_dataset=rows, metric=metric)

    def trainer(*callbacks):
        return SequentialGRPOTrainer(
            model=str(MODEL_FOLDER),
            args=SequentialGRPOConfig(
                str(tmp_path), max_steps=1, per_device_train_batch_size=2, num_generations=2, max_completion_length=2,
                bf16=False, use_cpu=True, report_to=[], disable_tqdm=True,
            ),
            domains=[make("math"), make("qa")],
            callbacks=[RefreshCallback(max_steps=3, steps_per_check=2), *callbacks],
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        trainer(Stop(4)).train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.score_matrix.stages == ["0-base", "1-math", "2-qa", "3-refresh-math", "4-refresh-math"]
    records = json.loads(manifest.read_text())["stages"]
    assert [(record["steps"], record["reason"].get("steps")) for record in records[2:]] == [(1, None), (2, 0), (1, 2)]
    assert records[4]["reason"]["recovered"]["value"] == pytest.approx(0.4)
    assert records[4]["reason"]["peak"] == "1-math" and records[4]["reason"]["damaged"] == "2-qa"


def test_a_refresh_that_makes_it_no_better_says_so(caplog):
    for now, said in ((0.4, True), (0.5, True), (0.6, False)):
        caplog.clear()
        rows = [{"math": right(score, 20)} for score in (0.5, now)]
        matrix = ScoreMatrix(["math"], ["2-qa", "3-refresh-math"], rows)
        RefreshCallback().on_stage_end(StageRecord(3, "refresh", "math", None, 1, 1.0, {}, 0, {}, {}), matrix)
        assert ("no better" in caplog.text and "2-qa" in caplog.text) == said
