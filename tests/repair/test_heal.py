"""heal: who counts as damaged, what the record says, what is chosen, and what a killed heal leaves."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_interfere.evaluation.scorer import Scorer
from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.lab.domains import lab_domain
from trl_interfere.lab.pipeline import Lab
from trl_interfere.models import load_tokenizer
from trl_interfere.repair.comparison import Comparison
from trl_interfere.repair.heal import account, heal_run, lost_beyond_interval, run_peaks
from trl_interfere.repair.repair import Repair
from trl_interfere.run import Run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    lab = Lab(folder, order=["math", "qa"], steps=2, prompts=32)
    lab.train()
    return folder, list(lab.domains.values())


@pytest.fixture
def run(trained, tmp_path):
    """A run of two stages, without a heal."""
    return Run(shutil.copytree(trained[0], tmp_path / "run"))


@pytest.fixture(scope="module")
def scorer():
    return Scorer(load_tokenizer(MODEL_FOLDER), max_new_tokens=16, batch_size=64)


def test_account_by_hand():
    def bits(text: str) -> np.ndarray:
        return np.array([float(character) for character in text])

    peak, final = {"a": bits("1111100000"), "b": bits("1110")}, {"a": bits("1000000001"), "b": bits("1110")}
    healed = {"a": bits("1110100000"), "b": bits("1100")}
    found = account(peak, final, healed, ["a"])
    assert found["recovered_all"]["value"] == pytest.approx((4 - 2) / (5 - 2))
    row = found["domains"]["a"]
    assert (row["peak"], row["final"], row["healed"]) == (50, 20, 40)
    assert row["recovered"] == pytest.approx(2 / 3) and row["n"] == 10
    assert (row["lost"], row["regained"], row["newly_lost"]) == (1, 3, 1)
    assert found["domains"]["b"]["recovered"] is None
    assert found["worst"] == found["domains"]["b"]["change"]["value"] == -25


def test_a_loss_within_its_interval_is_no_damage():
    rng = np.random.default_rng(0)
    peak = rng.integers(0, 2, 400).astype(float)
    noise = np.where(rng.random(400) < 0.02, 1 - peak, peak)
    clear = np.where(rng.random(400) < 0.3, 0, peak)
    assert lost_beyond_interval({"noise": peak, "clear": peak}, {"noise": noise, "clear": clear}) == ["clear"]


def test_the_record_and_the_stage(run, trained):
    repair = heal_run(run, trained[1], names=["math"], rank=8, merge=True)
    record = json.loads((run.repair / "repair.json").read_text())
    assert record["method"] == "subspace" and record["rank"] == 8
    assert record["checkpoints"]["peaks"]["math"]["path"] == "stages/1-math"
    assert set(record["domains"]) == {"math", "qa"}
    assert record["cost"]["sequences_backward"] == 0
    stage = Run(run.folder).stages[-1]
    assert (stage.kind, stage.name, stage.folder) == ("heal", "3-heal", "repair")
    assert stage.scores["math"]["value"] == pytest.approx(record["domains"]["math"]["healed"])
    # The adapter, the merged weights and the repair are one model.
    ids = torch.arange(5, 15)[None]
    merged = AutoModelForCausalLM.from_pretrained(run.repair / "merged")
    expected = repair.merge()(ids).logits
    torch.testing.assert_close(merged(ids).logits, expected)
    torch.testing.assert_close(Repair.from_pretrained(run.repair).merge()(ids).logits, expected)


def test_a_heal_after_a_killed_and_after_a_finished_one(run, trained, monkeypatch):
    def killed(self, folder, **kwargs):
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Repair, "save_pretrained", killed)
        heal_run(run, trained[1], names=["math"], rank=8)
    again = Run(run.folder)
    assert not run.repair.exists() and again.stages[-1].kind == "train"
    first, _, second = (heal_run(again, trained[1], names=["math"], rank=rank) for rank in (8, 4, 8))
    assert [record.kind for record in Run(run.folder).stages] == ["base", "train", "train", "heal"]
    assert json.loads((run.repair / "repair.json").read_text())["rank"] == 8
    for name, factors in first.factors.items():  # the same seed gives the same repair
        assert all(torch.equal(a, b) for a, b in zip(factors, second.factors[name], strict=True))


def test_nothing_was_lost_is_an_answer_and_only_earlier_domains_can_be_named(run, trained, scorer):
    # Two steps teach and damage nothing that 32 prompts would show.
    assert heal_run(run, trained[1]) is None and not run.repair.exists()
    assert set(run_peaks(run, trained[1], scorer)) <= {"math"}
    with pytest.raises(ValueError, match="'qa'"):
        heal_run(run, trained[1], names=["qa"])


def test_an_arm_is_chosen_on_the_selection_split(scorer):
    domain = lab_domain("qa", 64)
    base, broken = (AutoModelForCausalLM.from_pretrained(MODEL_FOLDER).eval() for _ in range(2))
    with torch.no_grad():
        broken.get_output_embeddings().weight.zero_()
    at_end = {"qa": scorer.score(base, domain, domain.eval_dataset).values}
    compare = Comparison(MODEL_FOLDER, {"qa": MODEL_FOLDER}, [domain], scorer, (at_end, at_end))
    row = compare.arm("arm", {"broken": lambda: broken, "kept": lambda: base})
    assert row["chosen"] == "kept" and row["within_max_drop"] and row["worst"] == 0
    row = compare.arm("arm", {"broken": lambda: broken, "broken too": lambda: broken})
    assert not row["within_max_drop"]
