"""
What an analysis costs, in gradient passes.

    python benchmarks/damage_cost.py --prompts 128 --rounds 5

A gradient pass is one `mean_gradient` of the mean token loss over the references of a domain. Each round times a pass,
then a figure, then a pass more, and divides by the mean of the two passes; the medians over rounds are printed:

- `second_order_passes`: `second_order` by route with a given step, two passes and what it takes to move and to sum;
- `attribution_passes`: `attribution` with 4 nodes;
- `pair_passes`: all of `InterferenceAnalyzer.analyze` for one earlier and one later domain with the defaults, without
  the writing of references: they are a column of the data set. Their number is smaller, and so in proportion is that
  of those on which the error of the second order is estimated. The pass that it is divided by is the mean of those
  of both domains;
- `double_backward_passes`: the exact product of Hessian and update by differentiating twice (torch.autograd) with
  eager attention, without a split by route.

The lab model is the one that ships with the package. The large one is SmolLM2-135M-Instruct from `--large`, and random
weights of its shape where that folder is missing; the output says which. δ is random, of 1% of the norm of every
tensor. Models are on the processor. Where other programs use the same cores, wall-clock time is partly theirs:
`--clock processor` takes the processor time of this program. Prints a line per round, and on the last line the worse
of both models for each figure as one JSON object.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median


CLOCK = time.perf_counter
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
    parser.add_argument(
        "--large", type=Path, default=Path("models/smollm2-135m-instruct"), help="folder of the weights"
    )
    parser.add_argument("--prompts", type=int, default=128, help="references of each domain (default: %(default)s)")
    parser.add_argument("--large-prompts", type=int, default=32, help="the same for the large model")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences of a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the lab model (default: %(default)s)")
    parser.add_argument("--large-rounds", type=int, default=3, help="rounds of the large model")
    parser.add_argument("--threads", type=int, default=1, help="threads, each pinned to a core (default: %(default)s)")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="what seconds are those of")
    arguments = parser.parse_args()
    if arguments.clock == "processor":
        global CLOCK
        CLOCK = time.process_time

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    import torch
    import transformers

    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()

    figures = []
    for name in arguments.models.split(","):
        large = name == "large"
        figures.append(
            measure(
                *load(name, arguments.large),
                prompts=arguments.large_prompts if large else arguments.prompts,
                batch_size=min(arguments.batch_size, 8) if large else arguments.batch_size,
                rounds=arguments.large_rounds if large else arguments.rounds,
            )
        )
    print(json.dumps({key: round(max(entry[key] for entry in figures), 3) for key in figures[0]}))


def load(name: str, folder: Path) -> tuple:
    """
    One of the two models.

    Args:
        name (`str`):
            `"lab"` or `"large"`.
        folder (`pathlib.Path`):
            Folder of the large one.

    Returns:
        `tuple`: A label, the model before the update, the tokenizer.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from trl_interfere.lab import MODEL_FOLDER

    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    if name == "lab":
        return "lab model", AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval(), tokenizer
    if (folder / "config.json").is_file():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return f"SmolLM2-135M-Instruct, {folder}", model.eval(), AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMOLLM2), dtype=torch.float32)
    return "random weights of the shape of SmolLM2-135M", model.eval(), tokenizer


def measure(label: str, before, tokenizer, prompts: int, batch_size: int, rounds: int) -> dict[str, float]:
    """
    The figures of one model.

    Args:
        label (`str`):
            What the model is called in the output.
        before ([`~transformers.PreTrainedModel`]):
            The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`int`):
            References of each domain.
        batch_size (`int`):
            Sequences of a batch.
        rounds (`int`):
            Rounds.

    Returns:
        `dict[str, float]`: Medians over rounds, in gradient passes.
    """
    import copy

    import torch

    from trl_interfere import InterferenceAnalyzer, InterferenceConfig
    from trl_interfere.analysis.attribution import UpdatePath, attribution, second_order
    from trl_interfere.analysis.gradients import mean_gradient, num_tokens
    from trl_interfere.lab.domains import lab_domain

    after = copy.deepcopy(before)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in after.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.01 * parameter.norm() / noise.norm()))
    config = InterferenceConfig(
        reference="dataset",
        reference_column="answer",
        max_prompts=prompts,
        batch_size=batch_size,
        check_prompts=max(1, prompts * InterferenceConfig.check_prompts // InterferenceConfig.max_prompts),
    )
    analyzer = InterferenceAnalyzer(before, after, tokenizer, config=config)
    domains = [lab_domain(name, prompts) for name in ("math", "writing")]
    references = analyzer.references(domains[0], domains[1:])
    # The writing of references, which is not measured, is no more than tokenization here; nor is that.
    analyzer.references = lambda earlier, later, others=(): references
    batches = analyzer.batches(references)
    mine = batches[domains[0].name]
    sizes = {name: num_tokens(entry) for name, entry in batches.items()}
    parameters = sum(parameter.numel() for parameter in before.parameters())
    print(f"{label}: {parameters / 1e6:.1f}M parameters, {prompts} references, completion tokens {sizes}", flush=True)

    path = UpdatePath(before, dict(after.named_parameters()))
    steps = {
        "second_order_passes": lambda: second_order(path, mine, analyzer.route_map, 0.02),
        "attribution_passes": lambda: attribution(path, mine, analyzer.route_map, 4),
        "double_backward_passes": lambda: double_backward(before, mine, path.delta),
    }
    entries: dict[str, list[float]] = {name: [] for name in (*steps, "pair_passes")}
    mean_gradient(path.move(0.0), mine)
    for index in range(rounds):
        for name, step in steps.items():
            one = seconds(lambda: mean_gradient(path.move(0.0), mine))
            took = seconds(step)
            path.move(0.0)
            two = seconds(lambda: mean_gradient(before, mine))
            entries[name].append(took / ((one + two) / 2))
        if index == rounds - 1:
            del path, steps, step  # of two sets of weights, before the analyzer makes its own
        passes = [seconds(lambda entry=entry: mean_gradient(before, entry)) for entry in batches.values()]
        took = seconds(lambda: analyzer.analyze(domains[0], domains[1]))
        passes += [seconds(lambda entry=entry: mean_gradient(before, entry)) for entry in batches.values()]
        entries["pair_passes"].append(took / (sum(passes) / len(passes)))
        print(
            f"  round {index}: pass {sum(passes) / len(passes):.3f} s, pair {took:.2f} s, "
            + ", ".join(f"{name} {values[-1]:.2f}" for name, values in entries.items()),
            flush=True,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  peak resident memory so far {peak:.2f} GiB", flush=True)
    return {name: median(values) for name, values in sorted(entries.items(), reverse=True)}


def double_backward(model, batches, delta) -> float:
    """
    ½ δᵀHδ by differentiating twice, with eager attention, which has a second derivative.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        batches (`list[dict[str, torch.Tensor]]`):
            References.
        delta (`Mapping[str, torch.Tensor]`):
            δ.

    Returns:
        `float`: The second order of the damage.
    """
    import torch

    from trl_interfere.analysis.gradients import num_tokens
    from trl_interfere.analysis.objectives import nll

    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    named = dict(model.named_parameters())
    parameters, tokens, total = list(named.values()), num_tokens(batches), 0.0
    try:
        for batch in batches:
            loss = nll(model, batch) / tokens
            gradient = torch.autograd.grad(loss, parameters, create_graph=True)
            inner = sum((g * delta[name]).sum() for name, g in zip(named, gradient, strict=True))
            product = torch.autograd.grad(inner, parameters)
            total += sum((h * delta[name]).sum() for name, h in zip(named, product, strict=True)).item() / 2
    finally:
        model.set_attn_implementation(attention)
    return total


def seconds(function: Callable) -> float:
    """Seconds that a call takes, by the clock that was chosen."""
    begin = CLOCK()
    function()
    return CLOCK() - begin


if __name__ == "__main__":
    main()
