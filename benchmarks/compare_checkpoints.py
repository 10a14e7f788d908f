"""
What the statistics of an update cost over reading the two checkpoints, and beside loading both models.

    python benchmarks/compare_checkpoints.py --gib 4 --dtype bfloat16 --workers 2

Generates two Llama-like checkpoints in shards of 1 GB in a temporary folder, which is removed at the end: 15% of the
elements of the second differ, by 1%. Each side is a fresh process that reads both, tensor by tensor:

- read: through safetensors, and nothing else, in the same number of threads. Slices of the size that the statistics
  read, from files that are mapped (`get_slice`, copied into a buffer that is used again: a mapped slice is not read
  before it is touched). And whole tensors by the `pread` backend, where a slice costs a read of the whole tensor. The
  faster of the two is what the statistics are compared with.
- statistics: `update_statistics`: sparsity of each tensor by three definitions and the edit size of each route.
- load both: both models with `AutoModelForCausalLM.from_pretrained`, then per parameter the difference in float32, its
  norm, and the elements with |δ| < 1e-7. No routes, no other definition. Cold and once only.

Cold: the pages of all files are dropped before each run (`posix_fadvise` after `fsync`; the host of a virtual machine
may still hold them). This is the state that the last line is about: a pair that is compared once comes from the disk.
Warm: all files are read once before each run, so that reading is copying from memory, and the statistics are bound by
the processor. Time is that from opening the files to the result, without imports. The sides run in turn, `--repeats`
times, and medians are taken. Memory is the peak resident memory of the process (`ru_maxrss`, mapped pages included),
imports and all; beside it the largest anonymous part that was seen.

The last line: throughput of the statistics / of reading, peak memory of the statistics in GiB, and time and memory of
the statistics / of loading both.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median


GIB = 2**30
SIDES = ("read slices (mmap)", "read tensors (pread)", "statistics", "load both")


def generate(folder: Path, gib: float, dtype: str) -> None:
    """
    Write the two checkpoints.

    Args:
        folder (`pathlib.Path`):
            Where to: `before` and `after` in it.
        gib (`float`):
            Size of each in GiB, roughly.
        dtype (`str`):
            Data type of the tensors.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    small = gib < 0.5
    settings = {"hidden_size": 512, "intermediate_size": 1536} if small else {}
    settings = {"hidden_size": 2560, "intermediate_size": 9728, "vocab_size": 32000} | settings
    heads = settings["hidden_size"] // 64
    config = LlamaConfig(**settings, num_attention_heads=heads, num_key_value_heads=heads // 4, dtype=dtype)
    width = getattr(torch, dtype).itemsize

    def size(layers: int) -> int:
        config.num_hidden_layers = layers
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return sum(parameter.numel() for parameter in model.parameters()) * width

    one, two = size(1), size(2)
    config.num_hidden_layers = max(1, round((gib * GIB - one) / (two - one)) + 1)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).named_parameters()}
    shards, filled = [{}], 0
    for name, shape in shapes.items():
        if filled + shape.numel() * width > 10**9:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += shape.numel() * width
    generator = torch.Generator().manual_seed(0)
    for side in ("before", "after"):
        (folder / side).mkdir()
        config.save_pretrained(folder / side)
    weight_map = {}
    for index, names in enumerate(shards, start=1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, shape in names.items():
            tensors[name] = torch.randn(shape, generator=generator).mul_(0.02).to(getattr(torch, dtype))
            weight_map[name] = file
        save_file(tensors, folder / "before" / file, metadata={"format": "pt"})
        for tensor in tensors.values():
            changed = torch.rand(tensor.shape, generator=generator) < 0.15
            tensor.mul_(changed.float().mul_(0.01).add_(1))
        save_file(tensors, folder / "after" / file, metadata={"format": "pt"})
    for side in ("before", "after"):
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / side / "model.safetensors.index.json").write_text(json.dumps(index))


def read_slices(folder: Path, workers: int) -> dict:
    from concurrent.futures import ThreadPoolExecutor
    from contextlib import ExitStack

    import torch
    from safetensors import safe_open

    from trl_interfere.checkpoint import READ_BYTES

    torch.set_num_threads(1)
    memory = threading.local()
    with ExitStack() as stack:
        sides = []
        for side in ("before", "after"):
            files = json.loads((folder / side / "model.safetensors.index.json").read_text())["weight_map"]
            opened = {
                file: stack.enter_context(safe_open(folder / side / file, framework="pt"))
                for file in sorted(set(files.values()))
            }
            sides.append({name: opened[file] for name, file in files.items()})

        def read(name: str) -> int:
            if not hasattr(memory, "buffers"):
                memory.buffers = [torch.empty(READ_BYTES, dtype=torch.uint8) for _ in sides]
            slices = [side[name].get_slice(name) for side in sides]
            rows = slices[0].get_shape()[0]
            done, step = 0, None
            start = 0
            while start < rows:
                for part, buffer in zip(slices, memory.buffers, strict=True):
                    if step is None:
                        step = max(1, READ_BYTES // part[:1].nbytes)
                    piece = part[start : start + step].contiguous().view(-1).view(torch.uint8)
                    buffer[: len(piece)].copy_(piece)
                    done += len(piece)
                start += step
            return done

        with ThreadPoolExecutor(max_workers=workers) as pool:
            return {"bytes": sum(pool.map(read, sides[0]))}


def read_tensors(folder: Path, workers: int) -> dict:
    from concurrent.futures import ThreadPoolExecutor
    from contextlib import ExitStack

    from safetensors import safe_open

    with ExitStack() as stack:
        sides = []
        for side in ("before", "after"):
            files = json.loads((folder / side / "model.safetensors.index.json").read_text())["weight_map"]
            opened = {
                file: stack.enter_context(safe_open(folder / side / file, framework="pt", backend="pread"))
                for file in sorted(set(files.values()))
            }
            sides.append({name: opened[file] for name, file in files.items()})
        with ThreadPoolExecutor(max_workers=workers) as pool:
            return {
                "bytes": sum(
                    pool.map(lambda name: sum(side[name].get_tensor(name).nbytes for side in sides), sides[0])
                )
            }


def statistics(folder: Path, workers: int) -> dict:
    from trl_interfere.analysis.routes import RouteMap
    from trl_interfere.analysis.weight_diff import update_statistics
    from trl_interfere.checkpoint import Checkpoint

    checkpoints = [Checkpoint(folder / side) for side in ("before", "after")]
    (update,) = update_statistics(checkpoints, RouteMap(checkpoints[0].config))
    whole = update.tensors.drop(columns="dtype").sum()
    return {
        "bytes": sum(checkpoint.nbytes for checkpoint in checkpoints),
        "below_absolute": int(whole.below_absolute),
        "norm": whole.squared_norm**0.5,
        "identical": whole.identical / whole.elements,
    }


def load_both(folder: Path, workers: int) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(workers)
    before, after = (AutoModelForCausalLM.from_pretrained(folder / side) for side in ("before", "after"))
    below, squares, size = 0, 0.0, 0
    with torch.no_grad():
        for first, second in zip(before.parameters(), after.parameters(), strict=True):
            delta = second.float() - first.float()
            below += int((delta.abs() < 1e-7).sum())
            squares += float(delta.square().sum(dtype=torch.float64))
            size += 2 * first.nbytes
    return {"bytes": size, "below_absolute": below, "norm": squares**0.5}


def work(arguments: argparse.Namespace) -> None:
    """Run one side in this process and print its figures."""
    if arguments.worker == "generate":
        generate(arguments.folder, arguments.gib, arguments.dtype)
        return
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import trl_interfere.analysis.weight_diff  # noqa: F401

    if arguments.worker == "load both":
        from transformers import LlamaForCausalLM  # noqa: F401
    side = {
        "read slices (mmap)": read_slices,
        "read tensors (pread)": read_tensors,
        "statistics": statistics,
        "load both": load_both,
    }[arguments.worker]
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    finished, anonymous = threading.Event(), [0]

    def watch() -> None:
        while not finished.wait(0.02):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    anonymous[0] = max(anonymous[0], int(line.split()[1]))

    watcher = threading.Thread(target=watch)
    if sys.platform == "linux":
        watcher.start()
    began, processor = time.perf_counter(), time.process_time()
    figures = side(arguments.folder, arguments.workers)
    figures["seconds"] = time.perf_counter() - began
    figures["processor"] = time.process_time() - processor
    finished.set()
    scale = 1 if sys.platform == "darwin" else 1024
    figures["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / GIB
    print(json.dumps(figures | {"imported": imported, "anonymous": anonymous[0] * 1024 / GIB}))


def start(worker: str, arguments: argparse.Namespace, folder: Path) -> dict:
    command = [sys.executable, __file__, "--worker", worker, "--folder", str(folder)]
    command += ["--gib", str(arguments.gib), "--dtype", arguments.dtype, "--workers", str(arguments.workers)]
    # A library of linear algebra must know its threads before it is imported.
    threads = str(arguments.workers) if worker in ("generate", "load both") else "1"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{worker} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1]) if result.stdout else {}


def set_cache(folder: Path, cache: str) -> None:
    """Drop the pages of all files, or read them all."""
    buffer = bytearray(2**23)
    for file in sorted(folder.glob("*/*.safetensors")):
        with open(file, "rb", buffering=0) as stream:
            if cache == "cold":
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while stream.readinto(buffer):
                    pass


def check_room(arguments: argparse.Namespace) -> None:
    needed = 2 * arguments.gib * 1.1 * GIB
    free = shutil.disk_usage(arguments.folder or tempfile.gettempdir()).free
    if free < needed + 2 * GIB:
        raise SystemExit(
            f"expected {needed / GIB + 2:.0f} GiB of free disk, found {free / GIB:.0f}: use --gib or --folder"
        )
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if Path("/proc/meminfo").is_file():
        lines = Path("/proc/meminfo").read_text().splitlines()
        memory = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    if memory < 2 * needed:
        raise SystemExit(
            f"expected {2 * needed / GIB:.0f} GiB of free memory, for both models and the pages of their files, "
            f"found {memory / GIB:.0f}: use --gib"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="size of each checkpoint")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--workers", type=int, default=2, help="threads of each side")
    parser.add_argument("--repeats", type=int, default=3, help="how often each side runs")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the temporary folder")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments)
        return
    check_room(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        start("generate", arguments, folder)
        size = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
        shards = len(list(folder.glob("*/*.safetensors")))
        print(
            f"two checkpoints, {arguments.dtype}, {size / GIB:.2f} GiB in {shards} shards, {arguments.workers} threads"
        )
        medians = {}
        for cache in ("cold", "warm"):
            runs = {side: [] for side in SIDES}
            for repeat in range(arguments.repeats):
                for side in SIDES:
                    if side == "load both" and (cache == "warm" or repeat > 0):
                        continue
                    set_cache(folder, cache)
                    runs[side].append(start(side, arguments, folder))
            for side, results in runs.items():
                if not results:
                    continue
                figures = {name: median(result[name] for result in results) for name in results[0]}
                medians[cache, side] = figures
                print(
                    f"{cache} {side:21} {figures['seconds']:7.2f} s ({min(r['seconds'] for r in results):.2f} to "
                    f"{max(r['seconds'] for r in results):.2f}; processor {figures['processor']:.2f})  "
                    f"{size / figures['seconds'] / 1e9:6.2f} GB/s  peak {figures['peak']:.3f} GiB, anonymous "
                    f"{figures['anonymous']:.3f}, {figures['imported']:.3f} after the imports",
                    flush=True,
                )
        ours, theirs = medians["cold", "statistics"], medians["cold", "load both"]
        if ours["below_absolute"] != theirs["below_absolute"] or abs(ours["norm"] / theirs["norm"] - 1) > 1e-4:
            raise SystemExit(f"the sides disagree: {ours} and {theirs}")
        print(f"identical elements: {ours['identical']:.4f}; both sides agree on |δ| < 1e-7 and on the norm")
        ratios = {}
        for cache in ("cold", "warm"):
            reading = min(medians[cache, side]["seconds"] for side in SIDES[:2])
            ratios[cache] = reading / medians[cache, "statistics"]["seconds"]
            print(f"{cache}: throughput of the statistics / of reading {ratios[cache]:.3f}")
        figures = {
            "throughput_ratio": ratios["cold"],
            "peak_gib": max(medians[cache, "statistics"]["peak"] for cache in ("cold", "warm")),
            "time_vs_load_both": ours["seconds"] / theirs["seconds"],
            "memory_vs_load_both": ours["peak"] / theirs["peak"],
        }
        print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
