"""
What it costs to fit a subspace rollback, in plain forward passes and in whole models.

    python benchmarks/heal_cost.py

Three domains of `--references` references each, of random tokens; two of them have a peak of their own, the third
counts with the final checkpoint. δ is random, of 5% of the norm of every tensor. Two figures for each model:

- `fit_over_forward`: seconds of `SubspaceRollback.fit` on given references, over those of the plain forward passes on
  the same batches through the peak of each domain and through the final model. Passes are timed before and after each
  fit, and the median over `--rounds` is printed;
- `peak_over_model`: the highest resident memory of the first fit above the level before it, over that of two whole
  models. Nothing but the package is loaded then.

The lab model is the one that ships with the package, and the large one random weights of the shape of
SmolLM2-135M if `--model` names no other. A shape of `shapes.py` is measured on the accelerator, if there is one, and
its memory is that of the device. `--clock processor` takes the processor time of this program, for machines
that others use too. The last line is one JSON object, with the worse ratio of both models and the memory of the
larger one.
"""

import argparse
import ctypes
import gc
import json
import os
import random
import tempfile
import threading
import time
from pathlib import Path
from statistics import median


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "rope_theta": 100000.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--models", default="lab,large", help="models to measure (default: %(default)s)")
    parser.add_argument("--model", help="folder or Hub id of the large one")
    parser.add_argument("--references", type=int, default=64, help="references a domain (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=40, help="mean length of a reference (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=64, help="rank of the repair (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the lab model; the large one has one")
    parser.add_argument("--threads", type=int, default=1, help="threads (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="layers of a shape, if fewer")
    parser.add_argument("--dtype", default="float32", help="data type of a shape and its passes")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what seconds are those of")
    arguments = parser.parse_args()

    os.environ.setdefault("HF_HUB_OFFLINE", "1" if arguments.model is None else "0")
    import torch
    import transformers

    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    figures = [measure(name, arguments) for name in arguments.models.split(",")]
    # The lab model is smaller than one batch.
    largest = max(figures, key=lambda entry: entry["size"])
    ratio = max(entry["fit_over_forward"] for entry in figures)
    print(json.dumps({"fit_over_forward": round(ratio, 3), "peak_over_model": round(largest["peak_over_model"], 3)}))


def measure(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """The figures of one model."""
    import torch
    from accelerate import PartialState

    from trl_interfere import Domain, SubspaceRollback
    from trl_interfere.analysis.references import References
    from trl_interfere.models import load_model

    device, shape = PartialState().device, name not in ("lab", "large")
    on_device, dtype = device.type == "cuda", arguments.dtype if shape else "float32"

    def clock() -> float:
        if on_device:
            torch.cuda.synchronize()
        return CLOCKS[arguments.clock]()

    with tempfile.TemporaryDirectory() as folder:
        places = write_checkpoints(name, arguments, Path(folder))
        vocabulary, size = places.pop("vocabulary"), places.pop("size")
        domains = [Domain(domain, metric=lambda completions, **_: [0.0] * len(completions)) for domain in "abc"]
        references = {d.name: random_references(References, d.name, vocabulary, arguments) for d in domains}
        rollback = SubspaceRollback(rank=arguments.rank, dtype=dtype)
        peaks = {"a": places["a"], "b": places["b"]}

        def fit() -> float:
            begin = clock()
            rollback.fit(places["final"], peaks, domains, references)
            return clock() - begin

        with ResidentMemory() as memory:
            fit()
        if on_device:
            memory.peak = torch.cuda.max_memory_allocated()
        batches = {d: found.batches(rollback.batch_size, 0, device) for d, found in references.items()}

        @torch.no_grad()
        def forward() -> float:
            total = 0.0
            for place, path in places.items():
                model = load_model(path, dtype=dtype).to(device)
                final = place == "final"  # all domains, and once more those that have no peak
                mine = [*batches, *(batches.keys() - peaks.keys())] if final else [place]
                begin = clock()
                for domain in mine:
                    for batch in batches[domain]:
                        model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
                total += clock() - begin
            return total

        ratios = []
        for _ in range(arguments.rounds if name == "lab" else 1):
            before, fitting, after = forward(), fit(), forward()
            ratios.append(2 * fitting / (before + after))
            print(f"{name}: forward {before:.2f} and {after:.2f} s, fit {fitting:.2f} s", flush=True)
    print(
        f"{name}: {memory.peak / 2**20:.0f} MiB above the level before, a model has {size / 2**20:.0f} MiB", flush=True
    )
    return {"fit_over_forward": median(ratios), "peak_over_model": memory.peak / (2 * size), "size": size}


def write_checkpoints(name: str, arguments: argparse.Namespace, folder: Path) -> dict:
    """Save the final checkpoint and two peaks; their folders, the size of the vocabulary and that of the weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from trl_interfere.lab import MODEL_FOLDER
    from trl_interfere.models import load_model

    model = arguments.model
    if name not in ("lab", "large"):
        from shapes import random_model

        weights = random_model(name, getattr(torch, arguments.dtype), "cpu", arguments.layers)
    elif name == "lab" or model is not None:
        weights = load_model(MODEL_FOLDER if name == "lab" else model)
    else:
        torch.manual_seed(0)
        weights = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMOLLM2), dtype=torch.float32)
    places = {"vocabulary": weights.config.get_text_config().vocab_size}
    places["size"] = sum(parameter.numel() * parameter.element_size() for parameter in weights.parameters())
    generator = torch.Generator().manual_seed(0)
    for place in ("a", "b", "final"):
        with torch.no_grad():
            for parameter in weights.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(noise * (0.05 * parameter.norm() / noise.norm()))
        weights.save_pretrained(folder / place)
        places[place] = folder / place
    return places


def random_references(kind: type, domain: str, vocabulary: int, arguments: argparse.Namespace):
    """References of random tokens; those of a domain come from a third of the vocabulary."""
    rng = random.Random(domain)
    tokens = range("abc".index(domain), vocabulary, 3)
    lengths = [rng.randint(arguments.tokens * 3 // 4, arguments.tokens * 5 // 4) for _ in range(arguments.references)]
    rows = [rng.choices(tokens, k=length) for length in lengths]
    return kind(domain, [row[:10] for row in rows], [row[10:] for row in rows], len(rows))


class ResidentMemory:
    """The highest resident memory of this process above its level at the start, in bytes, seen every 2 ms."""

    def __enter__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else what was freed before counts as part of the level, and can be reused
        self.start, self.peak, self._over = self._now(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _watch(self):
        while not self._over.wait(0.002):
            self.peak = max(self.peak, self._now() - self.start)

    @staticmethod
    def _now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
