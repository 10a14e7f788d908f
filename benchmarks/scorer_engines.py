"""
Tokens per second of the two engines of the Scorer, transformers and vLLM.

    make test-vllm        # makes the environment with vLLM for a CPU
    .venv-vllm/bin/python benchmarks/scorer_engines.py --prompts 256 --repeats 3

Both sides greedily complete the same prompts of the lab's four domains (or of `--prompts-file`, JSON lines with a
`prompt`) with the same checkpoint, in float32 unless `--dtype` says otherwise, each in a process of its own, in turn
A B A B. Time is that of `Scorer.complete_ids`, after one batch to warm up; loading is given apart. Tokens are those of
the completions, without the prompts. `--batch-size` is the number of prompts that transformers completes at once, and
the most sequences that vLLM runs at once.

Prints a line per run, and on the last line the medians as one JSON object, with the share of prompts whose completions
are the same token by token.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median


ENGINES = ("transformers", "vllm")
LAB_DOMAINS = ("code", "math", "qa", "writing")


def read_prompts(arguments: argparse.Namespace) -> list:
    """Prompts of the file, or of the lab's domains in equal parts."""
    if arguments.prompts_file is not None:
        lines = arguments.prompts_file.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["prompt"] for line in lines if line.strip()][: arguments.prompts]
    from trl_interfere.lab.domains import lab_rows

    each = -(-arguments.prompts // len(LAB_DOMAINS))
    return [row["prompt"] for name in LAB_DOMAINS for row in lab_rows(name, "test", each)][: arguments.prompts]


def work(arguments: argparse.Namespace) -> None:
    """Complete all prompts with one engine, and write tokens and times to `--output`."""
    import torch

    from trl_interfere.evaluation.scorer import Scorer
    from trl_interfere.evaluation.vllm_engine import VLLMEngine
    from trl_interfere.lab import MODEL_FOLDER
    from trl_interfere.models import load_model, load_tokenizer

    name = str(arguments.model or MODEL_FOLDER)
    tokenizer = load_tokenizer(name)
    scorer = Scorer(tokenizer, max_new_tokens=arguments.max_new_tokens, batch_size=arguments.batch_size)
    prompts = read_prompts(arguments)
    start = time.perf_counter()
    if arguments.worker == "vllm":
        longest = max(len(scorer.encode_prompt(prompt)) for prompt in prompts)
        model = VLLMEngine(
            name, dtype=arguments.dtype, max_length=longest + scorer.max_new_tokens, max_num_seqs=scorer.batch_size
        )
    else:
        model = load_model(name, dtype=arguments.dtype, merge=False)
        if torch.cuda.is_available():
            model = model.to("cuda")
    loaded = time.perf_counter()
    scorer.complete_ids(model, prompts[: arguments.batch_size])
    began = time.perf_counter()
    completed = scorer.complete_ids(model, prompts)
    seconds = time.perf_counter() - began
    result = {"load": loaded - start, "seconds": seconds, "completions": completed}
    arguments.output.write_text(json.dumps(result), encoding="utf-8")
    if arguments.worker == "vllm":
        model.close()


def measure(engine: str, output: Path) -> dict:
    """Run one side in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", engine, "--output", str(output)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise SystemExit(f"{engine} failed:\n{run.stderr[-4000:]}")
    return json.loads(output.read_text(encoding="utf-8"))


def main() -> None:
    """Run both sides in turn and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a checkpoint; the lab's model if left out")
    parser.add_argument("--prompts-file", type=Path, help="JSON lines with a `prompt`; the lab's if left out")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    rates: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    loads: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    completions = {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(arguments.repeats):
            for engine in ENGINES:
                result = measure(engine, Path(folder) / "result.json")
                completions[engine] = result["completions"]
                tokens = sum(map(len, result["completions"]))
                rates[engine].append(tokens / result["seconds"])
                loads[engine].append(result["load"])
                load = os.getloadavg()[0]
                print(
                    f"{repeat} {engine:12} {tokens} tokens {result['seconds']:.2f} s "
                    f"{rates[engine][-1]:.0f} tokens/s, load of the model {result['load']:.1f} s, "
                    f"load of the machine {load:.1f}",
                    flush=True,
                )
    same = [first == second for first, second in zip(*completions.values(), strict=True)]
    figures = {
        "dtype": arguments.dtype,
        "prompts": len(same),
        "same_tokens": sum(same) / len(same),
        "tokens_per_second": {engine: round(median(values), 1) for engine, values in rates.items()},
        "seconds_to_load": {engine: round(median(values), 1) for engine, values in loads.items()},
        "ratio": round(median(rates["vllm"]) / median(rates["transformers"]), 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
