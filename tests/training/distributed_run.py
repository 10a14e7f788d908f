"""
A run of two domains and a refresh, in as many processes as it is started with: `distributed_run.py FOLDER [OPTIONS]`.

`tests/training/test_distributed.py` calls `main` in its own process and starts this file under `accelerate launch`.
Every process leaves its weights (`rank-<rank>.safetensors`) and what it generated (`seen-<rank>.json`) in the folder.
"""

import argparse
import json
import os
import signal
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from tiny_runs import SETTINGS, AskOnce, build, math_domain, text_reward, writing_domain
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from trl_interfere import Domain, StageCallback
from trl_interfere.training.refresh import distillation
from trl_interfere.training.schedule import Stage


GLOBAL_BATCH = 8
SCORED = 15  # odd, so that the processes do not get equal shares
TAUGHT = distillation({"math": "1-math", "writing": "0-base"}, {"max_steps": 4, "num_generations": 4})


def make_domains(seen: list[dict] | None = None) -> list[Domain]:
    """Math and writing; `seen` gets what is generated in training, an entry for each call of a reward."""

    def reward(prompts, completions, domain, **kwargs):
        if seen is not None:
            seen.append({"domain": domain[0], "prompts": prompts, "completions": completions})
        return text_reward(completions)

    domains = [make(reward_funcs=reward, metric=text_reward) for make in (math_domain, writing_domain)]
    for made in domains:
        made.eval_dataset = made.eval_dataset.select(range(SCORED))
    return domains


class RefreshWorst(StageCallback):
    """Asks once, when the schedule has finished, for a refresh of the domain with the lowest score."""

    def request_stage(self, stages, score_matrix, schedule_finished):
        if not schedule_finished or any(record.kind == "refresh" for record in stages):
            return None
        worst = min(score_matrix.domains, key=lambda name: score_matrix.values[-1][name].mean())
        return Stage(worst, kind="refresh", overrides={"max_steps": 2})


class Kill(TrainerCallback):
    """Kills one process, as a crash would, at the beginning of one step of one stage."""

    def __init__(self, stage: str, step: str, rank: str):
        self.stage, self.step, self.rank = stage, int(step), int(rank)

    def on_step_begin(self, args, state, control, **kwargs):
        if args.process_index == self.rank and args.output_dir.endswith(self.stage) and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def allow_fsdp_on_cpu() -> None:
    """Makes accelerate heed an FSDP configuration on CPU, where it would silently train with DDP."""
    init = AcceleratorState.__init__

    def with_fsdp(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = kwargs["fsdp_plugin"]
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


def refuse(*args, **kwargs):
    raise AssertionError("only the main process writes the manifest and the scores")


def settings(processes: int) -> dict:
    """Settings of the training in so many processes; one group of completions, so that two share it."""
    batch = {"per_device_train_batch_size": GLOBAL_BATCH // processes, "num_generations": GLOBAL_BATCH}
    return {**SETTINGS, **batch, "max_steps": 2}


def main(folder: Path, resume: bool = False, kill: list[str] | None = None, distill: bool = False) -> None:
    seen = []
    callbacks = [AskOnce(TAUGHT) if distill else RefreshWorst(), *([Kill(*kill)] if kill else [])]
    trainer = build(folder, make_domains(seen), callbacks, **settings(int(os.environ.get("WORLD_SIZE", 1))))
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
    main(arguments.folder, arguments.resume, arguments.kill, arguments.distill)
