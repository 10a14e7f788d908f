"""What identifies a run, so that a folder is not continued by another one."""

import hashlib
import json
import os
import platform
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from trl.trainer.utils import get_config_model_id

from .reward_masking import reward_name


if TYPE_CHECKING:
    from .trainer import SequentialGRPOTrainer


# Settings that cannot change the weights; a resumed run may differ in them, and in those with such a name.
_HARMLESS_BEGINNINGS = ("hub_", "logging_", "save_", "trackio_", "vllm_server_")
_HARMLESS = {
    "average_tokens_across_devices", "dataloader_num_workers", "dataloader_persistent_workers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "ddp_timeout", "debug", "disable_tqdm",
    "do_eval", "do_predict", "do_train", "keep_checkpoints", "log_completions", "log_completions_hub_repo",
    "log_level", "log_level_replica", "log_on_each_node", "log_unique_prompts", "num_completions_to_print", "order",
    "output_dir", "project", "push_to_hub", "report_to", "resume_from_checkpoint", "run_name",
    "skip_memory_metrics", "stage_overrides", "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization",
    "vllm_group_port",
}  # fmt: skip


def run_identity(trainer: "SequentialGRPOTrainer") -> dict[str, Any]:
    """What makes it this run and no other; a resumed run must have the same."""
    model_id = trainer._base_model or get_config_model_id(trainer.model.config)
    names = {field.name for field in fields(trainer.args) if not field.name.startswith(_HARMLESS_BEGINNINGS)}
    config = {name: value for name, value in trainer.args.to_dict().items() if name in names - _HARMLESS}
    if is_peft_model(trainer.model):
        config["peft"] = {name: adapter.to_dict() for name, adapter in trainer.model.peft_config.items()}
    return {
        "base_model": Path(model_id).name if os.path.isdir(model_id) else model_id,
        "schedule": [stage.to_dict() for stage in trainer.schedule],
        "domains": {
            domain.name: {
                "train": _digest(domain.train_dataset),
                "eval": _digest(domain.eval_dataset),
                "rewards": [reward_name(reward) for reward in domain.reward_funcs],
                "reward_weights": domain.reward_weights,
            }
            for domain in trainer.domains.values()
        },
        "config": json.loads(json.dumps(config, default=lambda v: sorted(v) if isinstance(v, set) else str(v))),
    }


def about_run(trainer: "SequentialGRPOTrainer") -> dict[str, Any]:
    """What the card says of it, and a resumed run may change."""
    device = trainer.accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
    benchmarks = {domain.name: domain.benchmark for domain in trainer.domains.values() if domain.benchmark}
    return {
        "hardware": {"device": name, "processes": trainer.accelerator.num_processes},
        **({"benchmarks": benchmarks} if benchmarks else {}),
    }


def _digest(dataset: Any) -> dict[str, Any] | None:
    if not isinstance(dataset, Dataset):
        return None
    column = "prompt" if "prompt" in dataset.column_names else "environment"
    content = hashlib.sha256(json.dumps(dataset[column][:], ensure_ascii=False).encode()).hexdigest()
    return {"rows": len(dataset), "prompts_sha256": content}
