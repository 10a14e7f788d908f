"""Kill a run with SIGKILL at chosen events, resume it, and compare it with the run that was left alone.

A process of its own, because it forks: the children start with everything imported.
"""

import argparse
import json
import os
import random
import signal
import sys
import traceback
import warnings
from pathlib import Path

import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_runs import AskOnce, build, math_domain, text_reward, writing_domain
from transformers import Trainer
from transformers.trainer_callback import TrainerState

from trl_interfere import Run, StageCallback
from trl_interfere.training import stage_loop
from trl_interfere.training.refresh import distillation


BLOCK = {"max_steps": 6, "save_steps": 2, "save_total_limit": 2, "logging_steps": 1}
BLOCK |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
ADAPTER = {**BLOCK, "peft_config": LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), "learning_rate": 1e-2}
SETTINGS = {
    "full": {**BLOCK, "num_iterations": 2},
    "adapter": ADAPTER,
    "adapters": {**ADAPTER, "adapter_per_stage": True, "beta": 0.05},
    "distill": {**BLOCK, "num_iterations": 2},
}
TEACHERS = {"math": "1-math", "writing": "0-base"}
PHASES = ("generation", "optimizer", "checkpoint", "evaluation", "between", "refresh")


class Events(StageCallback):
    """Counts what happens in a run, and kills the process at one event."""

    def __init__(self, kill_at: int | None):
        self.kill_at, self.log, self.stage = kill_at, [], "start"

    def __call__(self, phase: str, half_written: Path | None = None) -> None:
        self.log.append("refresh" if self.stage == "refresh" and phase != "between" else phase)
        if len(self.log) - 1 == self.kill_at:
            if half_written is not None:
                os.truncate(half_written, half_written.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def on_stage_begin(self, index, stage):
        self.stage = stage.kind
        self("between")

    def on_stage_end(self, record, score_matrix):
        self("between")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self("optimizer")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self("optimizer")

    def around(self, cls: type, name: str, phase: str, written: str | None = None) -> None:
        """Events before and after a method, and one with the file that it wrote cut in half."""
        method = getattr(cls, name)

        def watched(this, *args, **kwargs):
            self(phase)
            result = method(this, *args, **kwargs)
            if written is not None:
                self(phase, half_written=Path(args[0]) / written)
            self(phase)
            return result

        setattr(cls, name, watched)


def run(setting: str, folder: Path, kill_at: int | None) -> Events:
    """One process of a run, new or resumed; it may not return."""
    events = Events(kill_at)

    def reward(completions, **kwargs):
        events("generation")
        return text_reward(completions)

    def metric(completions, **kwargs):
        events("evaluation")
        return text_reward(completions)

    model = "adapter_model.safetensors" if "adapter" in setting else "model.safetensors"
    events.around(Trainer, "save_model", "checkpoint", model)
    events.around(Trainer, "_save_optimizer_and_scheduler", "checkpoint", "optimizer.pt")
    events.around(Trainer, "_save_rng_state", "checkpoint", "rng_state.pth")
    events.around(TrainerState, "save_to_json", "checkpoint", "")
    events.around(Run, "save", "between")
    events.around(stage_loop, "save_stage", "between")
    domains = [make(reward_funcs=reward, metric=metric) for make in (math_domain, writing_domain)]
    ask = AskOnce(distillation(TEACHERS, {"max_steps": 4}, 0.5)) if setting == "distill" else AskOnce()
    trainer = build(folder, domains=domains, callbacks=[ask, events], **SETTINGS[setting])
    trainer.train(resume_from_checkpoint=True)
    return events


def fork(setting: str, folder: Path, kill_at: int | None) -> tuple[int, list[str]]:
    """Run in a child process: its exit status, negative for a signal, and the events if it got to its end."""
    log = folder.with_name(f"{folder.name}.events")
    log.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(folder.with_name(f"{folder.name}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        try:
            log.write_text(json.dumps(run(setting, folder, kill_at).log))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, json.loads(log.read_text()) if log.exists() else []


def results(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All weights of all stages, and all score files."""
    tensors = {
        f"{path.relative_to(folder)}/{name}": tensor
        for path in sorted((folder / "stages").rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    return tensors, {str(path.relative_to(folder)): path.read_text() for path in folder.glob("scores/*/*.jsonl")}


def choose(events: list[str], points: int, generator: random.Random, phases: tuple[str, ...]) -> list[int]:
    """Events spread evenly over the phases, without repetition as long as there are enough."""
    left = {phase: [at for at, name in enumerate(events) if name == phase] for phase in phases}
    for indices in left.values():
        generator.shuffle(indices)
    chosen: list[int] = []
    while len(chosen) < points and any(left.values()):
        for phase in phases:
            if left[phase] and len(chosen) < points:
                chosen.append(left[phase].pop())
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setting", choices=SETTINGS, default="full")
    parser.add_argument("--points", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    arguments.folder.mkdir(parents=True, exist_ok=True)

    status, events = fork(arguments.setting, arguments.folder / "whole", None)
    if status != 0:
        sys.exit(f"the uninterrupted run failed with status {status}")
    weights, scores = results(arguments.folder / "whole")
    generator = random.Random(arguments.seed)
    phases = PHASES if arguments.setting != "distill" else ("refresh",)
    chosen, failed = choose(events, arguments.points, generator, phases), 0
    for number, at in enumerate(chosen):
        folder = arguments.folder / f"point-{number}"
        killed = [at] + ([generator.randrange(1, 12)] if number % 2 else [])  # and once more, soon after the resume
        problems = []
        for turn, kill_at in enumerate([*killed, None]):
            status, _ = fork(arguments.setting, folder, kill_at)
            killed_here, ended = status == -signal.SIGKILL, status == 0
            if not (killed_here and kill_at is not None) and not (ended and turn > 0):
                problems.append(f"status {status} of process {turn + 1}")
        if not problems:
            tensors, values = results(folder)
            problems += {*tensors, *values} ^ {*weights, *scores}
            problems += [name for name in {*tensors} & {*weights} if not torch.equal(weights[name], tensors[name])]
            problems += [name for name in {*values} & {*scores} if scores[name] != values[name]]
        failed += bool(problems)
        row = {"phase": events[at], "killed_at": killed, "of": len(events), "problems": problems}
        print(json.dumps(row), flush=True)
    figures = {"points": len(chosen), "of": sum(phase in phases for phase in events), "failed": failed}
    print(json.dumps({**figures, "tensors": len(weights), "score_files": len(scores)}))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
