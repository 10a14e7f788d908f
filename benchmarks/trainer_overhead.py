"""
What SequentialGRPOTrainer costs over a hand-written loop of GRPOTrainers.

    python benchmarks/trainer_overhead.py --pairs 3 --steps 20
    python benchmarks/trainer_overhead.py --pairs 1 --steps 4 --device cuda --shape qwen3-1.7b --threads 16

Side A trains the lab model on three lab domains with one `SequentialGRPOTrainer` in one process. Side B does the same
with plain `trl.GRPOTrainer`s, one after the other in fresh processes, each starting from the weights that the one
before has saved. Model, data, order, steps and seeds are the same, and so must be the final weights, to the bit. The
sides run in turn, A B A B, pinned to the same cores.

Time is that from the beginning of the first to the end of the last optimizer step of each stage, as seen by a callback
that both sides have, divided by the number of steps: generation, rewards, forward, backward, optimizer and logging.
Imports, construction, checkpoints (none are written), scoring (there is none) and saving a stage are not in it. Memory
is the peak resident memory of the process, of the largest one on side B; imports are most of it with this small model.

`--shape` trains random weights of a larger shape in bfloat16, optimizer included, with gradient checkpointing. With
`--device cuda` memory is what is allocated on the accelerator at its peak, and both sides set `full_determinism`,
without which two runs of the same do not end with the same weights there; the first step of a stage does not count.
The reward is then one that differs between nearly any two completions, whatever the model says.

Prints a line per pair, and on the last line the medians over pairs of A / B as one JSON object. Where other programs
use the same cores, wall-clock time is mostly theirs: the lines give the ratio of processor time as well.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median


DOMAINS = ["code", "math", "writing"]
SEED = 0


def settings(folder: Path, arguments: argparse.Namespace) -> dict:
    """
    Options that both sides share.

    Args:
        folder (`pathlib.Path`):
            Folder of the run.
        arguments (`argparse.Namespace`):
            What the benchmark was called with.

    Returns:
        `dict`: Options of [`~trl.GRPOConfig`].
    """
    return {
        "output_dir": str(folder),
        "max_steps": arguments.steps,
        "learning_rate": 1e-4,
        "per_device_train_batch_size": arguments.batch,
        "num_generations": 8,
        "max_completion_length": arguments.completion,
        "bf16": False,
        "use_cpu": arguments.device == "cpu",
        "full_determinism": arguments.device != "cpu",
        "gradient_checkpointing": arguments.shape is not None,
        "model_init_kwargs": {"dtype": "float32" if arguments.shape is None else "bfloat16"},
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
    }


def work(arguments: argparse.Namespace) -> None:
    """Train one side, or one stage of side B, in this process, and leave `figures.json` in its folder."""
    import torch
    from datasets import disable_progress_bars
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from trl_interfere import Domain, SequentialGRPOConfig, SequentialGRPOTrainer
    from trl_interfere.lab.domains import REWARDS, Dataset, lab_rows

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    disable_progress_bars()
    imported = peak_memory()

    class Clock(TrainerCallback):
        """Wall-clock and processor time of the steps of a stage."""

        def __init__(self):
            self.wall = self.processor = 0.0

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == skipped(arguments):
                self.began = time.perf_counter(), time.process_time()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == state.max_steps:
                self.wall += time.perf_counter() - self.began[0]
                self.processor += time.process_time() - self.began[1]

    def of_ids(completion_ids, **kwargs):
        return [sum(ids) % 97 / 97 for ids in completion_ids]

    rewards = REWARDS if arguments.shape is None else dict.fromkeys(DOMAINS, of_ids)
    clock = Clock()
    options = settings(arguments.worker, arguments)
    if arguments.stage is None:
        trainer = SequentialGRPOTrainer(
            model=str(arguments.model),
            args=SequentialGRPOConfig(**options, seed=SEED),
            domains=[
                Domain(name, Dataset.from_list(lab_rows(name, "train", arguments.rows)), rewards[name])
                for name in arguments.domains
            ],
            callbacks=[clock],
        )
    else:
        name = arguments.domains[arguments.stage]
        trainer = GRPOTrainer(
            model=str(arguments.model),
            args=GRPOConfig(**options, seed=SEED + arguments.stage),
            reward_funcs=rewards[name],
            train_dataset=Dataset.from_list(lab_rows(name, "train", arguments.rows)),
            callbacks=[clock],
        )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if arguments.stage is not None:
        trainer.save_model()
    peak = peak_memory() if arguments.device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    figures = {"wall": clock.wall, "processor": clock.processor, "imported": imported, "peak": peak}
    (arguments.worker / "figures.json").write_text(json.dumps(figures))


def skipped(arguments: argparse.Namespace) -> int:
    """Steps of a stage that do not count: the first one on an accelerator, which sets up what a process needs once."""
    return int(arguments.device != "cpu")


def peak_memory() -> float:
    """Peak resident memory of this process in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def start(folder: Path, model: Path, stage: int | None, arguments: argparse.Namespace, cores: list[int]) -> dict:
    folder.mkdir(parents=True)
    command = [sys.executable, __file__, "--worker", str(folder), "--model", str(model)]
    command += ["--steps", str(arguments.steps), "--batch", str(arguments.batch), "--rows", str(arguments.rows)]
    command += ["--device", arguments.device, "--completion", str(arguments.completion)]
    command += ["--domains", *arguments.domains]
    command += [] if arguments.shape is None else ["--shape", arguments.shape]
    command += ["--cores", *map(str, cores)] + ([] if stage is None else ["--stage", str(stage)])
    # Threads must be known before the first import of a library that starts some.
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores)), "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{folder.name} failed:\n{result.stderr}")
    return json.loads((folder / "figures.json").read_text())


def sequential(folder: Path, arguments: argparse.Namespace, cores: list[int]) -> tuple[dict, list[Path]]:
    """Side A: its figures, and the folders of its stages."""
    figures = start(folder, arguments.model, None, arguments, cores)
    return figures, [folder / "stages" / f"{index}-{name}" for index, name in enumerate(arguments.domains, start=1)]


def loop(folder: Path, arguments: argparse.Namespace, cores: list[int]) -> tuple[dict, list[Path]]:
    """Side B: its figures, summed or the largest of its processes, and the folders of its stages."""
    parts, folders, model = [], [], arguments.model
    for stage, name in enumerate(arguments.domains):
        folders.append(folder / name)
        parts.append(start(folders[-1], model, stage, arguments, cores))
        model = folders[-1]
    combine = {"wall": sum, "processor": sum, "imported": max, "peak": max}
    return {name: how(part[name] for part in parts) for name, how in combine.items()}, folders


def written(arguments: argparse.Namespace, folder: Path) -> Path:
    """A model of the shape, with random weights."""
    import torch
    from shapes import random_model, save_with_tokenizer

    save_with_tokenizer(random_model(arguments.shape, torch.bfloat16, arguments.device, arguments.layers), folder)
    if arguments.device != "cpu":
        torch.cuda.empty_cache()
    return folder


def assert_same(first: Path, second: Path) -> None:
    import torch
    from safetensors.torch import load_file

    first, second = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    different = [name for name in first if not torch.equal(first[name], second[name])]
    if first.keys() != second.keys() or different:
        raise SystemExit(f"the sides did not train the same: {different or first.keys() ^ second.keys()} differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="how often both sides run")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a stage")
    parser.add_argument("--batch", type=int, default=32, help="completions of a step")
    parser.add_argument("--rows", type=int, default=1000, help="training prompts of a domain")
    parser.add_argument("--threads", type=int, default=1, help="cores that both sides are pinned to")
    parser.add_argument("--model", type=Path, default=None, help="folder of a model. Defaults to that of the lab")
    parser.add_argument("--completion", type=int, default=16, help="tokens of a completion at most")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--shape", default=None, help="random weights of this shape instead of a model")
    parser.add_argument("--layers", type=int, default=None, help="layers, if fewer than those of the shape")
    parser.add_argument("--domains", nargs="+", default=DOMAINS, help="domains (default: %(default)s)")
    for name, kind in (
        ("--worker", {"type": Path}),
        ("--stage", {"type": int}),
        ("--cores", {"type": int, "nargs": "+"}),
    ):
        parser.add_argument(name, **kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        os.sched_setaffinity(0, arguments.cores)
        work(arguments)
        return
    if arguments.shape is None and arguments.model is None:
        from trl_interfere.lab import MODEL_FOLDER

        arguments.model = MODEL_FOLDER
    cores = sorted(os.sched_getaffinity(0))[-arguments.threads :]
    steps = (arguments.steps - skipped(arguments)) * len(arguments.domains)
    ratios = []
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.shape is not None:
            arguments.model = written(arguments, Path(scratch) / "model")
        for pair in range(arguments.pairs):
            ours, our_stages = sequential(Path(scratch) / f"{pair}-a", arguments, cores)
            theirs, their_stages = loop(Path(scratch) / f"{pair}-b", arguments, cores)
            for first, second in zip(our_stages, their_stages, strict=True):
                assert_same(first, second)
            ratios.append({name: ours[name] / theirs[name] for name in ours})
            print(
                f"pair {pair + 1}: same weights; "
                f"ms per step {1000 * ours['wall'] / steps:.1f} / {1000 * theirs['wall'] / steps:.1f} "
                f"= {ratios[-1]['wall']:.4f}; of processor time {ratios[-1]['processor']:.4f}; "
                f"peak MiB {ours['peak']:.1f} / {theirs['peak']:.1f} = {ratios[-1]['peak']:.4f} "
                f"({ours['imported']:.1f} / {theirs['imported']:.1f} after the imports)",
                flush=True,
            )
    print(json.dumps({f"{name}_ratio": round(median(ratio[key] for ratio in ratios), 4)
                      for name, key in (("time", "wall"), ("memory", "peak"))}))  # fmt: skip


if __name__ == "__main__":
    main()
