import pytest
from space_run import DATA

from trl_interfere.evaluation.bootstrap import score
from trl_interfere.lab.live import LiveHeal


PROMPTS = 64


@pytest.fixture(scope="module")
def live():
    return LiveHeal(DATA, prompts=PROMPTS)


def test_math_comes_back_and_nearly_nothing_without_its_own_references(live):
    assert live.damaged == ["code", "math", "qa"] == list(live.peaks)
    result, control = (live.heal(["math"], references=32, control=control) for control in (False, True))
    recovered = [one.figures["recovered_all"]["value"] for one in (result, control)]
    assert recovered[0] > 0.6 and recovered[0] > recovered[1] + 0.2
    assert live.heal(["math"], references=32) is result  # kept
    for name, stage in (("math", "2-math"), ("qa", "3-qa")):
        entry = result.figures["domains"][name]
        assert entry["peak"] == score(live.run.scores(stage, name)[:PROMPTS]).value
        assert entry["final"] == score(live.run.scores("4-writing", name)[:PROMPTS]).value
    example = result.examples[0]
    assert (example["peak_score"], example["final_score"], example["healed_score"]) == (1, 0, 1)
    row = next(row for row in live.run.rows("2-math", "math") if row["prompt"] == example["prompt"])
    assert row["completions"][0] == example["peak"]


def test_routes_are_the_second_choice(live):
    routes, random = (live.rollback("math", 0.32, control=control) for control in (False, True))
    assert routes.record["criterion"] == "damage" and random.record["criterion"] == "random"
    recovered = [one.figures["recovered_all"]["value"] for one in (random, routes, live.heal(["math"], references=32))]
    assert recovered == sorted(recovered) and recovered[1] > recovered[0] + 0.1


def test_a_lower_rank_changes_less(live):
    high, low = live.heal(["math"], references=16), live.heal(["math"], references=16, rank=1)
    assert low.record["layers"] != high.record["layers"]
    assert low.figures["recovered_all"]["value"] < high.figures["recovered_all"]["value"]


def test_bad_input(live):
    for domains in ([], ["writing"]):
        with pytest.raises(ValueError, match="domains: expected"):
            live.heal(domains)
    with pytest.raises(ValueError, match="domains: expected one with a report"):
        live.rollback("qa", 0.32)
    with pytest.raises(ValueError, match="control: expected"):
        live.heal(["math"], protect=[], control=True)
