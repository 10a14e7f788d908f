"""Pushes of the trainer: at its end, on its way, and over TRL's own card."""

import logging

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from tiny_runs import AskOnce, assert_same, build, config, math_domain, writing_domain
from tiny_runs import weights as all_weights

from trl_interfere import HubCallback, SequentialGRPOTrainer
from trl_interfere.hub.push import PushError


REPO = "tester/run"
PUSH = {"push_to_hub": True, "hub_model_id": REPO, "max_steps": 2}


def weights(folder, stage):
    return (folder / "stages" / stage / "model.safetensors").read_bytes()


def test_the_card_is_filled_during_training(tmp_path):
    class Watch(HubCallback):
        seen = []

        def on_save(self, args, state, control, **kwargs):
            self.seen.append((self.run.folder / "README.md").read_text())

    watch = Watch()
    trainer = build(tmp_path, callbacks=[watch, AskOnce()], max_steps=2)
    trainer.train()
    text = (tmp_path / "README.md").read_text()
    assert len(watch.seen) == 6 and all("trl-interfere" in card for card in watch.seen)  # after TRL wrote its own
    assert "| 0-base |" in watch.seen[0] and "| 1-math |" not in watch.seen[0]
    for stage in ("0-base", "1-math", "2-writing", "3-refresh-math"):
        assert f"| {stage} |" in text
    assert "math (n=16)" in text
    assert not list(tmp_path.glob("checkpoints/**/README.md"))
    trainer.create_model_card(model_name="other", tags=["x"])  # what TRL calls
    assert (tmp_path / "README.md").read_text() == text


def test_a_report_of_another_version_does_not_stop_the_training(tmp_path, caplog):
    (tmp_path / "analysis" / "old").mkdir(parents=True)
    (tmp_path / "analysis" / "old" / "report.json").write_text('{"schema_version": 1}')
    (tmp_path / "analysis" / "old" / "routes.safetensors").touch()
    with caplog.at_level(logging.WARNING):
        build(tmp_path, max_steps=1, order=["math"], callbacks=[HubCallback()]).train()
    assert "expected schema_version" in caplog.text and (tmp_path / "stages" / "1-math").is_dir()


def test_push_to_hub(hub, tmp_path):
    trainer = build(tmp_path, max_steps=2, hub_model_id=REPO, callbacks=[HubCallback()])
    with pytest.raises(FileNotFoundError, match="stages.json"):
        trainer.push_to_hub()
    trainer.train()
    plan = trainer.push_to_hub(dry_run=True)
    assert hub.repos == {}
    result = trainer.push_to_hub(private=True, collection="A study")
    assert set(plan.branches) == set(result.commits) == {"main", "stage-1-math", "stage-2-writing"}
    assert hub.repo(REPO).private and hub.files(REPO)["model.safetensors"] == weights(tmp_path, "2-writing")


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_strategies(hub, tmp_path, strategy):
    seen = []

    class Watch(HubCallback):
        def on_stage_begin(self, index, stage):
            repo = hub.repos.get(("model", REPO))
            seen.append({} if repo is None else {name: len(commit.files) for name, commit in repo.branches.items()})

    build(tmp_path, callbacks=[Watch()], hub_strategy=strategy, **PUSH).train()
    assert seen[0] == {}
    if strategy == "end":
        assert seen[1] == {}
    else:
        assert seen[1].keys() == {"main", "stage-1-math"} and seen[1]["main"] == 1  # nothing on main before the end
        titles = ["Branch stage-1-math", "Stage 1-math, step 2", "Stage 1-math, step 1", "initial commit"]
        assert hub.repo(REPO).titles("stage-1-math") == titles
    for stage in ("1-math", "2-writing"):
        assert hub.files(REPO, f"stage-{stage}")["model.safetensors"] == weights(tmp_path, stage)
    assert hub.files(REPO)["model.safetensors"] == weights(tmp_path, "2-writing")
    assert "interference/stages.json" in hub.files(REPO)


def test_a_hub_that_fails_does_not_stop_the_training(hub, tmp_path, no_waits, caplog):
    hub.fail("POST", "/commit/", 500, times=10_000)
    with caplog.at_level(logging.WARNING), pytest.raises(PushError, match="run again:\n  trl-interfere push"):
        build(tmp_path, callbacks=[HubCallback()], hub_strategy="every_save", save_steps=2, **PUSH).train()
    assert "The training goes on" in caplog.text
    hub.failures.clear()
    resumed = build(tmp_path, callbacks=[HubCallback()], hub_strategy="every_save", save_steps=2, **PUSH)
    resumed.train(resume_from_checkpoint=True)  # nothing is left to train, but to push
    assert [record.name for record in resumed.run.stages] == ["0-base", "1-math", "2-writing"]
    assert hub.files(REPO)["model.safetensors"] == weights(tmp_path, "2-writing")


def test_a_run_from_a_revision(hub, tmp_path):
    first = build(tmp_path / "first", order=["math"], hub_strategy="end", callbacks=[HubCallback()], **PUSH)
    first.train()
    name = f"{REPO}@stage-1-math"
    args = config(tmp_path / "second", max_steps=1, order=["writing"])
    trainer = SequentialGRPOTrainer(name, args, [math_domain(), writing_domain()], callbacks=[HubCallback()])
    assert_same(all_weights(first), all_weights(trainer))
    trainer.train()
    assert trainer.run.identity["base_model"] == name
    card = (tmp_path / "second" / "README.md").read_text()
    assert f"base_model: {REPO}\n" in card and "revision `stage-1-math`" in card


def test_benchmarks_reach_the_hub(hub, tmp_path):
    domains = [math_domain(benchmark="opencompass/AIME2025@abc:aime"), writing_domain()]
    trainer = build(tmp_path, domains, [HubCallback()], order=["math"], hub_strategy="end", **PUSH)
    trainer.train()
    files = hub.files(REPO)
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/math.yaml"]))
    score = trainer.run.final.scores["math"]
    assert (entry.dataset_id, entry.dataset_revision, entry.task_id) == ("opencompass/AIME2025", "abc", "aime")
    assert entry.value == score["value"] and f"n={score['n']}" in entry.notes
    assert ".eval_results/writing.yaml" not in files and "- opencompass/AIME2025" in files["README.md"].decode()


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="hub_strategy: .*'checkpoint'"):
        build(tmp_path, hub_strategy="checkpoint", **PUSH)
    trainer = build(tmp_path, hub_strategy="end", **PUSH)
    for call in (trainer.train, trainer.push_to_hub):
        with pytest.raises(ValueError, match="HubCallback"):
            call()
    assert not (tmp_path / "stages.json").exists()
