"""
A run of two domains and a refresh, in as many processes as it is started with: `distributed_run.py FOLDER [OPTIONS]`.

`tests/training/test_distributed.py` calls `main` in its own process and starts this file under `accelerate launch`.
Every process leaves its weights and what it generated beside the run.
"""

import argparse
import json
import os
import signal
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from trl_interfere import Domain, SequentialGRPOConfig, SequentialGRPOTrainer, StageCallback
from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.lab.domains import lab_rows
from trl_interfere.training.refresh import distillation
from trl_interfere.training.schedule import Stage


GLOBAL_BATCH = 8
SCORED = 15  # odd, so that the processes do not get equal shares


def text_reward(completions, **kwargs):
    """Differs between nearly any two texts, so that every step changes the weights."""
    return [sum(map(ord, completion)) % 97 / 97 for completion in completions]


def make_domains(seen: list[dict] | None = None) -> list[Domain]:
    """
    The two domains.

    Args:
        seen (`list[dict]`, *optional*):
            Gets what is generated in training, one entry per call of a reward: domain, prompts, completions.

    Returns:
        `list[Domain]`: math and writing.
    """
    domains = []
    for name in ("math", "writing"):

        def reward(prompts, completions, name=name, **kwargs):
            if seen is not None:
                seen.append({"domain": name, "prompts": prompts, "completions": completions})
            return text_reward(completions)

        reward.__name__ = "reward"
        rows = [{"prompt": row["prompt"]} for row in lab_rows(name, "train", 48 + SCORED)]
        domains.append(
            Domain(name, Dataset.from_list(rows[:48]), reward, Dataset.from_list(rows[48:]), metric=text_reward)
        )
    return domains


class RefreshWorst(StageCallback):
    """Asks once, when the schedule has finished, for a refresh of the domain with the lowest score, or for another."""

    def __init__(self, stage: Stage | None = None):
        self.stage = stage

    def request_stage(self, stages, score_matrix, schedule_finished):
        if not schedule_finished or any(record.kind == "refresh" for record in stages):
            return None
        if self.stage is not None:
            return self.stage
        worst = min(score_matrix.domains, key=lambda name: score_matrix.values[-1][name].mean())
        return Stage(worst, kind="refresh", overrides={"max_steps": 2})


class Kill(TrainerCallback):
    """Kills one process, as a crash would, at the beginning of one step of one stage."""

    def __init__(self, stage: str, step: int, rank: int):
        self.stage, self.step, self.rank = stage, step, rank

    def on_step_begin(self, args, state, control, **kwargs):
        if args.process_index == self.rank and args.output_dir.endswith(self.stage) and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def allow_fsdp_on_cpu() -> None:
    """Makes accelerate heed an FSDP configuration on CPU, where it would silently train with DDP."""
    build = AcceleratorState.__init__

    def build_with_fsdp(self, *args, **kwargs):
        build(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = kwargs["fsdp_plugin"]
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = build_with_fsdp


def refuse(*args, **kwargs):
    raise AssertionError("only the main process writes the manifest and the scores")


def settings(processes: int) -> dict:
    """Settings of the training in so many processes."""
    return {
        "max_steps": 2,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": GLOBAL_BATCH // processes,
        "num_generations": GLOBAL_BATCH,  # one group, so that two processes share it
        "max_completion_length": 8,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_steps": 1,
        "seed": 7,
    }


def main(folder: Path, resume: bool = False, kill: tuple[str, int, int] | None = None, distill: bool = False) -> None:
    """
    Run, and leave `rank-<rank>.safetensors` and `seen-<rank>.json` in the folder.

    Args:
        folder (`pathlib.Path`):
            Folder of the run.
        resume (`bool`, *optional*, defaults to `False`):
            Whether to continue the run in the folder.
        kill (`tuple[str, int, int]`, *optional*):
            Stage, step and process of a crash.
        distill (`bool`, *optional*, defaults to `False`):
            Whether the refresh is one by distillation of both domains, of two prompts a step.
    """
    teachers = {"math": "1-math", "writing": "0-base"}
    refresh = RefreshWorst(distillation(teachers, {"max_steps": 4, "num_generations": 4}) if distill else None)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    seen = []
    trainer = SequentialGRPOTrainer(
        model=str(MODEL_FOLDER),
        args=SequentialGRPOConfig(output_dir=str(folder), **settings(processes)),
        domains=make_domains(seen),
        callbacks=[refresh, *([Kill(*kill)] if kill else [])],
    )
    rank = trainer.accelerator.process_index
    if rank > 0:
        trainer.run.save = trainer.run.write_scores = refuse
    trainer.train(resume_from_checkpoint=resume)
    weights = {
        # Shards are gathered; a clone, because tied weights share their memory, which safetensors refuses.
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in trainer.model.state_dict().items()
    }
    save_file(weights, folder / f"rank-{rank}.safetensors")
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))
    trainer.accelerator.end_training()  # leaves the process group


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--fsdp-on-cpu", action="store_true")
    parser.add_argument("--distill", action="store_true")
    parser.add_argument("--kill", nargs=3, metavar=("STAGE", "STEP", "RANK"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.fsdp_on_cpu:
        allow_fsdp_on_cpu()
    kill = arguments.kill and (arguments.kill[0], int(arguments.kill[1]), int(arguments.kill[2]))
    main(arguments.folder, arguments.resume, kill, arguments.distill)
