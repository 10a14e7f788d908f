"""Refresh by distillation: the loss, its teachers, and the stages of a run."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_refresh import DROPPED, history
from tiny_runs import AskOnce, build, math_domain, text_reward, weights, writing_domain

from trl_interfere import RefreshCallback
from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.models import load_model
from trl_interfere.training.callbacks import HealCallback
from trl_interfere.training.distillation import TEACHER, Distillation, mixed, reverse_kl
from trl_interfere.training.refresh import distillation


TEACHERS = {"math": "1-math", "writing": "0-base"}
LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}


def dense(student, teacher, temperature):
    """Σ_v p_v (log p_v - log q_v), written out."""
    p, q = ((logits.double() / temperature).softmax(-1) for logits in (student, teacher))
    return (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_divergence_and_its_gradient(dtype, tolerance, temperature):
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(3, 5, 11, generator=generator).to(dtype) for _ in range(2)]
    students = [given[0].clone().requires_grad_() for _ in range(2)]
    found, expected = reverse_kl(students[0], given[1], temperature), dense(students[1], given[1], temperature)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for divergence in (found, expected):
        (divergence * torch.arange(15).view(3, 5)).sum().backward()
    rounding = {} if dtype != torch.bfloat16 else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(students[0].grad, students[1].grad, **rounding)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    trainer = build(tmp_path_factory.mktemp("run"), max_steps=2)
    trainer.train()
    return trainer


def test_loss_of_several_teachers_and_its_gradient(trained):
    rows = [row for domain in trained.domains.values() for row in domain.train_dataset.select(range(2)).to_list()]
    rows = [row for row in rows for _ in range(4)]
    trained._distillation, trained._stage = Distillation(trained, TEACHERS), (3, distillation(TEACHERS, {}))
    trained.current_gradient_accumulation_steps = 1
    try:
        trained.model.train()
        trained._use_rewards(set(TEACHERS))
        inputs = trained._generate_and_score_completions(rows)
        trained.model.zero_grad()
        loss = trained._compute_loss(trained.model, inputs)
        loss.backward()
    finally:
        trained._distillation = trained._stage = None
    assert inputs[TEACHER].tolist() == [0] * 8 + [1] * 8
    assert trained._metrics["train"].keys() >= {"kl/math", "kl/writing"}
    # Each completion by itself, without padding.
    student = load_model(trained.run.folder / "stages/2-writing", dtype="float64")
    teachers = [load_model(trained.run.weights(name), dtype="float64") for name in TEACHERS.values()]
    total, tokens = 0.0, 0
    for row in range(len(rows)):
        prompt, answer = (
            inputs[f"{part}_ids"][row][inputs[f"{part}_mask"][row].bool()] for part in ("prompt", "completion")
        )
        ids, at = torch.cat([prompt, answer])[None], slice(len(prompt) - 1, -1)
        with torch.no_grad():
            target = teachers[inputs[TEACHER][row]](ids).logits[:, at]
        total = total + dense(student(ids).logits[:, at], target, 1.0).sum()
        tokens += len(answer)
    expected = total / tokens
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and loss.item() > 1e-4
    for (name, ours), theirs in zip(trained.model.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5, msg=name)
    trained.model.zero_grad()


@pytest.mark.parametrize("per_stage", [False, True])
def test_teachers_of_a_lora_are_its_stages(tmp_path, per_stage):
    ask = AskOnce(distillation(TEACHERS, {"max_steps": 1}))
    settings = {"adapter_per_stage": per_stage, "peft_config": LoraConfig(**LORA), "learning_rate": 1e-2}
    trainer = build(tmp_path, callbacks=[ask], max_steps=1, **settings)
    trainer.train()
    assert trainer.run.stages[-1].name == "3-refresh"
    batch = {"prompt_ids": torch.tensor([[3, 4]]), "completion_ids": torch.tensor([[5, 6, 7]])}
    batch |= {name.replace("ids", "mask"): torch.ones_like(ids) for name, ids in batch.items()}
    found = Distillation(trainer, {**TEACHERS, "qa": "2-writing"})
    for domain, folder in (("math", "stages/1-math"), ("qa", "stages/2-writing"), ("writing", None)):
        place = MODEL_FOLDER if folder is None else tmp_path / folder
        expected = load_model(place, base=None if folder is None else MODEL_FOLDER)(torch.tensor([[3, 4, 5, 6, 7]]))
        logits = found._teacher(trainer.model, domain, batch, torch.tensor([0]))
        torch.testing.assert_close(logits, expected.logits[:, 1:-1], rtol=1e-4, atol=1e-4)


def test_a_run_heals_by_distillation_without_rewards(tmp_path):
    called, runs = [], {}

    def reward(completions, **kwargs):
        called.append(len(completions))
        return text_reward(completions)

    for weight in (0.0, 0.5):
        stage = distillation(TEACHERS, {"max_steps": 3, "learning_rate": 3e-3}, weight)
        domains = [make(reward_funcs=reward, metric=text_reward) for make in (math_domain, writing_domain)]
        settings = {"max_steps": 1, "per_device_train_batch_size": 16}
        runs[weight] = build(tmp_path / str(weight), domains, [AskOnce(stage)], **settings)
        runs[weight].train(max_stages=2)
        called.clear()
        runs[weight].train(resume_from_checkpoint=True)
        assert len(called) >= 3 if weight else not called  # once a step for each domain in the batch
    trainer = runs[0.0]
    record = trainer.run.stages[-1]
    assert (record.name, record.domain, record.domains) == ("3-refresh", None, ["math", "writing"])
    logs = [entry for entry in trainer.log_history if entry["stage"] == 3 and "loss" in entry]
    assert all({"kl/math", "kl/writing"} & entry.keys() for entry in logs)
    assert not any(name.startswith(("reward", "frac_reward")) for entry in logs for name in entry)
    assert any(not torch.equal(tensor, weights(runs[0.5])[name]) for name, tensor in weights(trainer).items())


def test_teachers_that_do_not_fit(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(trained.run, "folder", shutil.copytree(trained.run.folder, tmp_path / "run"))
    folder = trained.run.folder / "stages" / "1-math"
    teacher = load_model(folder)
    teacher.resize_token_embeddings(teacher.config.vocab_size + 1)
    teacher.save_pretrained(tmp_path / "wide")  # its weights are mapped from the file that is replaced
    shutil.copytree(tmp_path / "wide", folder, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="teacher 1-math: tensor .*expected"):
        Distillation(trained, {"math": "1-math"})
    words = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match="teacher 1-math: expected the vocabulary"):
        Distillation(trained, {"math": "1-math"})


def test_all_damaged_domains_at_once_the_worst_first():
    def ask(*shares):
        records, matrix = history(*DROPPED, ("refresh", None, shares, 6))
        records[-1].overrides.update(stage.overrides)
        return callback.request_stage(records, matrix, True)

    callback = RefreshCallback(method="distill", max_steps=10, steps_per_check=6, reward_weight=0.1)
    stage = callback.request_stage(*history(*DROPPED), True)
    assert (stage.domain, stage.domains) == (None, ["code", "math"])
    assert stage.overrides == {"max_steps": 6, "teachers": {"code": "2-code", "math": "1-math"}, "reward_weight": 0.1}
    assert stage.reason["code"]["peak"] == "2-code" and stage.reason["math"]["refreshes"] == 0
    later = ask(0.9, 0.9, 0.7)  # math is back
    assert (later.domain, later.overrides["max_steps"]) == ("code", 4)
    assert later.overrides["teachers"] == {"code": "2-code"}
    assert ask(0.9, 0.5, 0.7) is None  # qa pays


@pytest.mark.parametrize("method", ["grpo", "distill"])
def test_heal_then_refresh(method):
    healed = [*DROPPED, ("heal", None, (0.8, 0.9, 0.7), 0)]
    callback = RefreshCallback(method=method, max_drop=5.0, max_steps=10, steps_per_check=5)
    stage = callback.request_stage(*history(*healed), True)
    reason = stage.reason if method == "grpo" else stage.reason["code"]
    assert reason["damaged"] == "4-heal" and reason["drop"]["value"] == pytest.approx(20) and not reason["steps"]
    refreshed = history(*healed, ("refresh", "code", (0.8, 0.9, 0.89), 5))
    assert callback.request_stage(*refreshed, True).domains == ["math"]
    assert HealCallback().request_stage(*refreshed, True) is None  # it has healed


def test_prompts_of_several_domains_in_equal_shares():
    domains = [math_domain(), writing_domain(train_dataset=Dataset.from_list([{"prompt": str(n)} for n in range(9)]))]
    assert [row["domain"] for row in mixed(domains).select(range(6))] == ["math", "writing"] * 3
