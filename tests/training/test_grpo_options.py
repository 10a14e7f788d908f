"""Every option of GRPOConfig works through the stages, is refused with a reason, or cannot be run here."""

from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_runs import SETTINGS, assert_same, build, config, math_domain, slow_but, text_reward, writing_domain
from trl import GRPOConfig, GRPOTrainer

from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.lab.domains import lab_rows


EVAL = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 64}

# Options that are run together, a theme a line, with values that are not the defaults of GRPOConfig.
RUNS = {
    "optimizer": {"learning_rate": 1e-3, "lr_scheduler_type": "cosine_with_min_lr", "warmup_steps": 1}
    | {"optim": "adamw_torch", "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6}
    | {"lr_scheduler_kwargs": {"min_lr": 1e-5}, "max_grad_norm": 0.5, "average_tokens_across_devices": False}
    | {"gradient_accumulation_steps": 2, "max_steps": 2},  # the first of them at a rate of 0
    "batches": {"per_device_train_batch_size": 4, "num_generations": 4, "generation_batch_size": 16}
    | {"num_iterations": 2, "shuffle_dataset": False, "dataloader_drop_last": True, "ddp_timeout": 60, "seed": 3},
    "passes": {"num_train_epochs": 1.0, "max_steps": -1, "per_device_train_batch_size": 192, "save_strategy": "epoch"},
    "sampling": {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1}
    | {"generation_kwargs": {"min_new_tokens": 5}, "max_completion_length": 6, "steps_per_generation": 2}
    | {"cache_implementation": "static", "use_cache": True, "pad_to_multiple_of": 8}
    | {"chat_template_kwargs": {"enable_thinking": False}},
    "loss grpo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "scale_rewards": "batch"}
    | {"beta": 0.1, "use_bias_correction_kl": False}
    | {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 2.0, "num_iterations": 2},
    "loss sapo": {"loss_type": "sapo", "sapo_temperature_neg": 1.2, "sapo_temperature_pos": 1.1},
    "loss vespo": {"loss_type": "vespo", "vespo_k_pos": 2.5, "vespo_lambda_pos": 2.5}
    | {"vespo_k_neg": 2.5, "vespo_lambda_neg": 2.5},
    "loss dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"}
    | {"mask_truncated_completions": True, "max_completion_length": 16},
    "loss cispo": {"loss_type": "cispo", "epsilon_high": 5.0, "multi_objective_aggregation": "normalize_then_sum"},
    "loss luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "loss bnpo": {"loss_type": "bnpo", "top_entropy_quantile": 0.5, "off_policy_mask_threshold": 0.5},
    "entropy": {"use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_target": 5.0}
    | {"entropy_coef_min": 0.001, "entropy_coef_max": 0.5, "entropy_coef_delta": 0.01},
    "evaluation": {**EVAL, "eval_on_start": True, "eval_delay": 1, "num_generations_eval": 2, "do_eval": True}
    | {"prediction_loss_only": True, "eval_do_concat_batches": False, "eval_use_gather_object": True}
    | {"eval_accumulation_steps": 1, "batch_eval_metrics": True},
    "best at the end": {**EVAL, "load_best_model_at_end": True, "max_steps": 3, "save_total_limit": 1}
    | {"metric_for_best_model": "reward", "greater_is_better": True},
    "checkpoints": {"save_only_model": True, "save_steps": 1, "save_on_each_node": True}
    | {"restore_callback_states_from_checkpoint": True, "resume_from_checkpoint": "unused, as in transformers"},
    "logging": {"log_completions": True, "num_completions_to_print": 1, "log_unique_prompts": True}
    | {"logging_first_step": True, "logging_strategy": "epoch", "logging_steps": 3, "logging_nan_inf_filter": False}
    | {"log_level": "error", "log_level_replica": "error", "log_on_each_node": False, "log_multimodal": False}
    | {"disable_tqdm": True, "run_name": "run", "include_num_input_tokens_seen": "all"},
    "data": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 1}
    | {"dataloader_multiprocessing_context": "fork", "dataloader_in_order": False, "dataloader_pin_memory": True}
    | {"remove_unused_columns": True, "accelerator_config": {"even_batches": False}}
    | {"label_names": ["labels"], "length_column_name": "size"},
    "model": {"model_init_kwargs": {"attn_implementation": "eager"}, "trust_remote_code": True}
    | {"disable_dropout": True, "cast_lm_head_to_fp32": True, "neftune_noise_alpha": 5.0}
    | {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    "machine": {"bf16": True, "use_cpu": True, "full_determinism": True, "torch_empty_cache_steps": 1}
    | {"debug": "underflow_overflow", "do_train": True, "do_predict": True, "max_tool_calling_iterations": 2},
    "memory": {"skip_memory_metrics": False},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "loss dapo": {"loss_type": "dapo", "epsilon_high": 0.28, "num_iterations": 2},
    "loss bnpo, clipped twice": {"loss_type": "bnpo", "delta": 1.5, "num_iterations": 2, "beta": 0.02},
    "loss cispo, sequences": {"loss_type": "cispo", "importance_sampling_level": "sequence", "num_iterations": 2},
    "loss grpo, entropy bonus": {"loss_type": "grpo", "entropy_coef": 0.1},
    "scale of the batch": {"scale_rewards": "batch", "multi_objective_aggregation": "normalize_then_sum"},
    "no scale": {"scale_rewards": "none", "num_generations": 2},
    "one group": {"num_generations": 8, "mask_truncated_completions": True},
    "a block of four": {"steps_per_generation": 4, "max_steps": 4, "num_iterations": 2},
    "a block of two, accumulated": {"steps_per_generation": 2, "gradient_accumulation_steps": 4, "max_steps": 2},
    "accumulation over blocks": {"steps_per_generation": 1, "gradient_accumulation_steps": 3, "max_steps": 2},
    "adafactor": {"optim": "adafactor", "learning_rate": 1e-2},
    "sgd": {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"},
    "rmsprop": {"optim": "rmsprop", "lr_scheduler_type": "polynomial", "max_steps": 2},
    "adagrad": {"optim": "adagrad", "lr_scheduler_type": "inverse_sqrt", "max_steps": 2},
    "restarts": {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}}
    | {"max_steps": 3},
    "hot": {"temperature": 1.5, "top_k": 50, "max_completion_length": 4},
    "cold": {"temperature": 0.3, "top_p": 0.8, "min_p": 0.2, "repetition_penalty": 0.9},
    "half a pass": {"num_train_epochs": 0.5, "max_steps": -1, "per_device_train_batch_size": 96},
    "saved and evaluated by epoch": {**EVAL, "eval_strategy": "epoch", "save_strategy": "epoch", "beta": 0.05},
}

REFUSED = {
    "auto_find_batch_size": True,
    "bf16_full_eval": True,
    "data_seed": 1,
    "enable_jit_checkpoint": True,
    "fp16_full_eval": True,
    "ignore_data_skip": True,
    "include_for_metrics": ["loss"],
    "label_smoothing_factor": 0.1,
    "log_completions_hub_repo": "me/completions",
    "reward_weights": [1.0],
    "sync_ref_model": True,
    "train_sampling_strategy": "group_by_length",
}

# Options that cannot be run here, by reason.
NOT_HERE = {
    "differs in every run, or is set by the launcher": "output_dir local_rank",
    "needs several processes": (
        "ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph "
        "deepspeed ds3_gather_for_generation fsdp fsdp_config parallelism_config"
    ),
    "needs a GPU or a compiler": "fp16 liger_kernel_config tf32 torch_compile_mode use_liger_kernel",
    "is the deprecated name of another option": (
        "gradient_checkpointing gradient_checkpointing_kwargs use_transformers_paged vllm_importance_sampling_cap"
    ),
    "is tried against a local Hub, in tests/hub/test_trainer_push.py": (
        "hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token push_to_hub"
    ),
    "needs an optimizer or a tracker that is not a dependency": (
        "optim_args optim_target_modules project report_to trackio_bucket_id trackio_space_id trackio_static_space_id"
    ),
    "belongs to sync_ref_model, which is refused": "ref_model_mixup_alpha ref_model_sync_steps",
    "needs a mixture of experts": "router_aux_loss_coef",
    "takes 20 seconds on a CPU": "transformers_continuous_batching_config use_transformers_continuous_batching",
    "needs vLLM, see tests/with_vllm": (
        "use_vllm vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_group_port "
        "vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min "
        "vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_max_model_length vllm_mode "
        "vllm_model_impl vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout "
        "vllm_structured_outputs_regex vllm_tensor_parallel_size"
    ),
}


def domains():
    rewards = {"reward_funcs": [text_reward, length_reward]}
    return [math_domain(**rewards), writing_domain(**rewards)]


def length_reward(completions, **kwargs):
    return [len(completion) / 40 for completion in completions]


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    """Options that outlive their run: environment variables and torch's mode."""
    for name in ("DYNAMO_BACKEND", "DYNAMO_MODE", "MIXED_PRECISION"):
        monkeypatch.setenv(f"ACCELERATE_{name}", "no")
        monkeypatch.delenv(f"ACCELERATE_{name}")
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "0")
    yield
    torch.use_deterministic_algorithms(False)


def test_every_option_is_known():
    known = [*{name for options in RUNS.values() for name in options}, *REFUSED, *" ".join(NOT_HERE.values()).split()]
    assert len(known) == len(set(known)), "an option stands in two lists"
    names = {field.name for field in fields(GRPOConfig)}
    assert names <= set(known), (
        f"GRPOConfig has new options {sorted(names - set(known))}: find out whether they work through the stages, and "
        "put them into RUNS, or into REFUSED here and REFUSED_OPTIONS in training/config.py, or into NOT_HERE"
    )
    assert set(known) <= names, f"GRPOConfig no longer has {sorted(set(known) - names)}"


@pytest.mark.parametrize("name", slow_but(RUNS, "optimizer", "batches", "sampling", "logging"))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_options_run_through_two_stages(tmp_path, name):
    options = {"max_steps": 1, "keep_checkpoints": True, **RUNS[name]}
    own = domains()
    if name == "data":  # the columns are removed before a reward sees them
        own = [make(reward_funcs=text_reward, metric=length_reward) for make in (math_domain, writing_domain)]
    trainer = build(tmp_path, domains=own, **options)
    trainer.train()
    steps = max(options["max_steps"], 1)
    assert [record.steps for record in trainer.run.stages] == [0, steps, steps]
    base = load_file(MODEL_FOLDER / "model.safetensors")
    first, second = (load_file(tmp_path / "stages" / stage / "model.safetensors") for stage in ("1-math", "2-writing"))
    assert base.keys() == first.keys() == second.keys()
    assert any(not torch.equal(base[key], first[key]) for key in base)
    assert any(not torch.equal(first[key], second[key]) for key in base)
    if name == "evaluation":
        evaluated = [(entry["stage"], entry["step"]) for entry in trainer.log_history if "eval_reward" in entry]
        assert evaluated == [(1, 0), (1, 1), (2, 0), (2, 1)]
    # A penalty of the second stage measures from the base model, as only the first of GRPOTrainer's does.
    for stage, domain in enumerate(own[:1] if options.get("beta") else own, start=1):
        assert_same(
            plain_grpo(tmp_path / f"plain-{stage}", trainer, stage, domain, options), [first, second][stage - 1]
        )


def plain_grpo(folder, trainer, stage, domain, options):
    """What GRPOTrainer makes of the weights of the stage before."""
    settings = {**SETTINGS, **options, "seed": trainer.run.stages[stage].seed}
    del settings["keep_checkpoints"]
    plain = GRPOTrainer(
        model=str(trainer.run.weights(stage - 1)),
        reward_funcs=domain.reward_funcs,
        args=GRPOConfig(str(folder), **settings),
        train_dataset=domain.train_dataset,
        eval_dataset=domain.eval_dataset,
    )
    plain.train()
    plain.save_model(str(folder / "last"))
    return load_file(folder / "last" / "model.safetensors")


@pytest.mark.parametrize("name", REFUSED)
def test_options_are_refused_with_a_reason(tmp_path, name):
    more = {"log_completions": True} if name == "log_completions_hub_repo" else {}
    with pytest.raises(ValueError, match=rf"{name}.*(not supported\W+\w+ \w+|belong to the domains)"):
        build(tmp_path / "run", **{name: REFUSED[name]}, **more)
    assert not (tmp_path / "run" / "stages.json").exists()


def test_batches_cannot_be_dispatched(tmp_path):
    with pytest.raises(ValueError, match="accelerator_config: dispatch_batches=True is not supported"):
        config(tmp_path, accelerator_config={"dispatch_batches": True})


def test_a_resumed_run_may_have_another_server(tmp_path):
    settings = {"max_steps": 1, "vllm_server_host": "first", "vllm_group_port": 1, "vllm_gpu_memory_utilization": 0.5}
    build(tmp_path, **settings).train(max_stages=1)
    settings |= {"vllm_server_host": "second", "vllm_group_port": 2, "vllm_gpu_memory_utilization": 0.2}
    trainer = build(tmp_path, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert [record.steps for record in trainer.run.stages] == [0, 1, 1]


def test_a_stream_after_a_dataset(tmp_path):
    rows = [{"prompt": row["prompt"]} for row in lab_rows("writing", "train", 48)]
    stream = writing_domain(reward_funcs=text_reward, train_dataset=Dataset.from_list(rows).to_iterable_dataset())
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 1}
    trainer = build(tmp_path, domains=[math_domain(), stream], max_steps=1, **workers)
    trainer.train()
    assert [record.steps for record in trainer.run.stages] == [0, 1, 1]
    assert trainer.args.dataloader_num_workers == 1


def test_the_loss_scaler_begins_anew_with_each_stage(tmp_path):
    trainer = build(tmp_path)
    trainer.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer._scaler_state = scaler.state_dict()
    scaler.scale(torch.ones(1))
    scaler.update(new_scale=2.0)
    assert scaler.get_scale() == 2.0
    trainer._reset()
    assert trainer.accelerator.scaler.get_scale() == 4.0
