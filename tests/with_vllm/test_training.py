"""Training with `use_vllm`: at every generation the engine holds the weights of the trainer."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_runs import AskOnce, Interrupt, assert_same, build, math_domain, text_reward, weights, writing_domain

from trl_interfere.evaluation.scorer import Scorer
from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.training.refresh import distillation


pytestmark = [
    pytest.mark.usefixtures("shared_engine"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]

VLLM = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 128, "max_steps": 2}
EVAL = {"per_device_eval_batch_size": 16, "num_generations_eval": 1}
ADAPTER = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
LORA = {"learning_rate": 1e-2, "peft_config": ADAPTER}


def engine_weights(trainer):
    runner = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner
    return {name: tensor.detach() for name, tensor in runner.model.named_parameters()}


def effective_weights(trainer):
    """Weights of the trainer in the layout of the engine, with the adapters added by hand."""
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in weights(trainer).items()}
    plain = {}
    for name, tensor in state.items():
        if ".lora_" not in name:
            layer = name.removesuffix(".base_layer.weight")
            for key in state:
                if layer != name and key.startswith(f"{layer}.lora_A."):
                    config = trainer.model.peft_config[key.split(".")[-2]]
                    tensor = (
                        tensor + config.lora_alpha / config.r * state[key.replace("lora_A", "lora_B")] @ state[key]
                    )
            plain[name.replace(".base_layer", "")] = tensor
    fused = {}
    for name, tensor in plain.items():
        for whole, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
            if f".{parts[0]}." in name:
                fused[name.replace(parts[0], whole)] = torch.cat([plain[name.replace(parts[0], p)] for p in parts])
            if any(f".{part}." in name for part in parts):
                break
        else:
            fused[name] = tensor
    return fused


def distance(trainer):
    """Largest difference between a weight in the engine and in the trainer."""
    expected, found = effective_weights(trainer), engine_weights(trainer)
    if trainer.model.config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
        found.pop("lm_head.weight", None)
    assert expected.keys() == found.keys()
    # rows of the vocabulary are padded
    return max((found[name][: len(tensor)] - tensor).abs().max().item() for name, tensor in expected.items())


def watch(trainer):
    """List that gets, at each generation, the stage, the step, the distance, and the sum of all weights."""
    seen, generate = [], trainer.vllm_generation.generate

    def watched(*args, **kwargs):
        total = sum(tensor.double().abs().sum().item() for tensor in effective_weights(trainer).values())
        stage = None if trainer._stage is None else trainer._stage[0]
        seen.append((stage, trainer.state.global_step, distance(trainer), total))
        return generate(*args, **kwargs)

    trainer.vllm_generation.generate = watched
    return seen


@pytest.mark.parametrize("adapters", ["none", "one", "each stage"])
def test_every_stage_and_the_refresh(tmp_path, adapters):
    settings = {"none": {}, "one": LORA, "each stage": {**LORA, "adapter_per_stage": True}}[adapters]
    trainer = build(tmp_path, callbacks=[AskOnce()], **VLLM, **settings)
    seen = watch(trainer)
    trainer.train()
    assert [record.name for record in trainer.run.stages] == ["0-base", "1-math", "2-writing", "3-refresh-math"]
    assert [entry[:2] for entry in seen] == [(stage, step) for stage in (1, 2, 3) for step in (0, 1)]
    # PEFT adds an adapter in place, in another order of the sums.
    assert max(entry[2] for entry in seen) <= (0 if adapters == "none" else 1e-6)
    assert distance(trainer) > 1e-4  # the last step came after the last generation
    changed = [abs(after[3] - before[3]) for before, after in zip(seen, seen[1:], strict=False)]
    assert min(changed) > 1e-4
    name = "sampling/sampling_logp_difference/max"
    differences = [entry[name] for entry in trainer.log_history if name in entry]
    assert len(differences) == 6 and max(differences) < 1e-3


def evaluated(trainer):
    """Greedy completions of the engine in `trainer.evaluate`, and those of transformers with the same weights."""
    engine, outputs = trainer.vllm_generation, []
    generate, engine.temperature = engine.generate, 0.0

    def recorded(prompts, *args, **kwargs):
        output = generate(prompts, *args, **kwargs)
        outputs.extend(zip(prompts, output[1], strict=True))
        return output

    engine.generate = recorded
    trainer.evaluate("math")
    engine.generate, engine.temperature = generate, trainer.temperature
    scorer = Scorer(trainer.processing_class, max_new_tokens=trainer.max_completion_length)
    expected = scorer.complete_ids(trainer.model, [trainer.processing_class.decode(ids) for ids, _ in outputs])
    return [list(ids) for _, ids in outputs], expected


@pytest.mark.parametrize("adapters", [{}, LORA], ids=["none", "one"])
def test_a_refresh_by_distillation(tmp_path, adapters):
    teachers = {"math": "1-math", "writing": "0-base"}
    trainer = build(tmp_path, callbacks=[AskOnce(distillation(teachers, {"max_steps": 2}))], **VLLM, **adapters)
    seen = watch(trainer)
    trainer.train()
    assert [entry[:2] for entry in seen if entry[0] == 3] == [(3, 0), (3, 1)]
    assert max(entry[2] for entry in seen) <= (1e-6 if adapters else 0)  # the student samples, never a teacher
    assert any(name.startswith("kl/") for entry in trainer.log_history for name in entry)


@torch.no_grad()
def put_back(model, before, share):
    for name, parameter in model.named_parameters():
        if "mlp" in name:
            parameter.lerp_(before[name], share)


def test_greedy_tokens_after_a_stage_and_after_a_rollback_of_the_live_model(tmp_path):
    trainer = build(tmp_path, **VLLM, **EVAL, learning_rate=3e-3)
    trainer.train(max_stages=1)
    trained, expected = evaluated(trainer)
    assert trained == expected and len(set(map(tuple, trained))) > 4
    assert distance(trainer) == 0

    before = load_file(MODEL_FOLDER / "model.safetensors")
    put_back(trainer.model, before, 1.0)
    stale, expected = evaluated(trainer)
    assert stale == trained != expected  # without a word to the trainer, TRL goes on with the weights it has
    assert distance(trainer) > 1e-3

    trainer.sync_weights()
    fresh, expected = evaluated(trainer)
    assert fresh == expected != trained
    assert distance(trainer) == 0

    put_back(trainer.model, before, 0.5)
    seen = watch(trainer)
    trainer.train(resume_from_checkpoint=True)  # a stage begins with a synchronisation
    assert [entry[:3] for entry in seen] == [(2, 0, 0), (2, 1, 0)]


@pytest.mark.parametrize("adapters", ["none", "one"])
def test_a_resume_in_the_middle_of_a_stage(tmp_path, adapters):
    settings = {**VLLM, "max_steps": 3, **(LORA if adapters == "one" else {})}
    whole = build(tmp_path / "whole", **settings)
    first = watch(whole)
    base = {name: tensor for name, tensor in weights(whole).items() if "lora_" not in name}
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", callbacks=[Interrupt("2-writing", 2)], **settings).train()
    other = build(tmp_path / "other", domains=[writing_domain()], **settings)
    other.train()  # leaves weights of another run in the engine

    resumed = build(tmp_path / "cut", **settings)
    seen = watch(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert [entry[:2] for entry in seen] == [(2, 2)]
    assert seen[0] == first[-1]
    assert_same(weights(whole), weights(resumed))
    if adapters == "one":  # an adapter goes to the engine without a trace in the weights below it
        assert_same(base, {name: tensor for name, tensor in weights(whole).items() if "lora_" not in name})


OPTIONS = {
    "importance sampling": {"vllm_importance_sampling_mode": "token_mask"}
    | {"vllm_importance_sampling_clip_max": 1.5, "vllm_importance_sampling_clip_min": 0.5},
    "no importance sampling": {"vllm_importance_sampling_correction": False},
    "regular expression": {"vllm_structured_outputs_regex": r" [0-4]{3}"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(tmp_path, name):
    found = []

    def reward(completions, **kwargs):
        found.extend(completions)
        return text_reward(completions)

    domains = [make(reward_funcs=reward, metric=text_reward) for make in (math_domain, writing_domain)]
    overrides = {"writing": {"max_completion_length": 4}}
    trainer = build(tmp_path, domains=domains, **{**VLLM, "max_steps": 1, **OPTIONS[name]}, stage_overrides=overrides)
    trainer.train()
    log = [entry for entry in trainer.log_history if "reward" in entry]
    assert [entry["stage"] for entry in log] == [1, 2]
    assert log[1]["completions/max_length"] <= 4 < log[0]["completions/max_length"]
    ratio = [entry.get("sampling/importance_sampling_ratio/mean") for entry in log]
    assert (ratio == [None, None]) == (name == "no importance sampling")
    if name == "regular expression":
        assert all(set(text) <= set(" 01234") for text in found[-8:])


def test_a_server_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="The vLLM server can't be reached at"):
        build(tmp_path, use_vllm=True, vllm_mode="server", vllm_server_port=1, vllm_server_timeout=0.5)
