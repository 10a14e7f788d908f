"""Heals as stages of a run."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from test_refresh import DROPPED, history, refreshed
from tiny_runs import assert_same, build, scripted_domains, weights

from trl_interfere import HealCallback, Repair, Run


HEALED = [*DROPPED, ("heal", None, (0.6, 0.9, 0.4))]
NOISE = [*DROPPED[:2], ("train", "qa", (0.89, 0.9, 0.1))]


@pytest.mark.parametrize(
    "at, finished, stages, asks",
    [
        ("end", True, DROPPED, True),
        ("end", False, DROPPED, False),
        ("stage", False, DROPPED, True),
        ("end", True, [*DROPPED, refreshed("code")], True),
        ("end", True, HEALED, False),  # once is enough
        ("end", True, NOISE, False),
        ("stage", False, DROPPED[:1], False),
    ],
)
def test_when_it_asks(at, finished, stages, asks):
    stage = HealCallback(at=at, max_drop=0.5, rank=8).request_stage(*history(*stages), finished)
    assert (stage is not None) == asks
    if asks:
        assert (stage.kind, stage.domain) == ("heal", None)
        assert stage.overrides == {"rank": 8, "max_drop": 0.5, "names": None}
        assert HealCallback(at=at, domains=["qa"]).request_stage(*history(*stages), finished) is None


@pytest.mark.parametrize("rank", [0, True])
def test_ranks_out_of_range(rank):
    with pytest.raises(ValueError, match="^rank: "):
        HealCallback(rank=rank)


def damaged_run(folder, callbacks, **settings):
    """Math is at its best after its own stage and lost after the next one."""
    domains = scripted_domains(folder, {"math": [0.2, 0.9, 0.3], "writing": [0.5]})
    return build(folder, domains=domains, callbacks=callbacks, max_steps=1, **settings)


@pytest.mark.parametrize("at", ["end", "stage"])
def test_a_heal_is_a_stage_of_the_run(tmp_path, at):
    order = ["math", "writing", "math"][: 2 + (at == "stage")]
    trainer = damaged_run(tmp_path, [HealCallback(at=at)], order=order)
    trainer.train(max_stages=3)
    names = ["0-base", "1-math", "2-writing", "3-heal"]
    run = Run(tmp_path)
    assert [record.name for record in run.stages] == trainer.score_matrix.stages == names
    assert run.final.name == "2-writing" and run.stages[3].folder == "repair"
    healed, final = weights(trainer), load_file(tmp_path / "stages" / "2-writing" / "model.safetensors")
    assert any(not torch.equal(tensor, final[name]) for name, tensor in healed.items() if name in final)
    assert_same(healed, Repair.from_pretrained(tmp_path / "repair").merge().state_dict())
    # a process that goes on has the healed weights
    resumed = damaged_run(tmp_path, [HealCallback(at=at)], order=order)
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.run.stages) == 4 + (at == "stage")
    if at == "end":
        assert_same(weights(resumed), healed)


def test_a_heal_in_the_middle_resumes_to_the_same_bits(tmp_path):
    whole, first, resumed = (
        damaged_run(tmp_path / folder, [HealCallback(at="stage")], order=["math", "writing", "writing"])
        for folder in ("whole", "run", "run")
    )
    whole.train()
    first.train(max_stages=3)
    resumed.train(resume_from_checkpoint=True)
    assert [r.name for r in resumed.run.stages] == [r.name for r in whole.run.stages]
    assert_same(weights(resumed), weights(whole))


def test_with_lora_at_the_end_alone(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="gaussian")
    trainer = damaged_run(tmp_path / "end", [HealCallback()], peft_config=lora)
    trainer.train()
    assert trainer.run.stages[-1].name == "3-heal" and trainer.model.active_adapter == "healed"
    resumed = damaged_run(tmp_path / "end", [HealCallback()], peft_config=lora)
    resumed.train(resume_from_checkpoint=True)
    names = [name for name in weights(trainer) if ".healed." in name]
    assert names and all(torch.equal(weights(trainer)[name], weights(resumed)[name]) for name in names)
    with pytest.raises(ValueError, match="at='end'"):
        order = ["math", "writing", "math"]
        damaged_run(tmp_path / "s", [HealCallback(at="stage")], peft_config=lora, order=order).train()


def test_a_loss_that_the_selection_split_does_not_show_is_left_alone(tmp_path, caplog, monkeypatch):
    # On the selection split the later stage has made math better.
    monkeypatch.setattr("trl_interfere.repair.heal.run_peaks", lambda run, domains, scorer: {})
    trainer = damaged_run(tmp_path, [HealCallback()])
    trainer.train()
    assert [record.kind for record in trainer.run.stages] == ["base", "train", "train"]
    assert "selection split" in caplog.text and trainer.next_stage() is None
