"""
Analysis, repair and training on an accelerator: what they agree with, and what they take.

    python benchmarks/accelerator.py --parts ceilings agreement analysis --shapes qwen3-4b

- `ceilings`: rate of bfloat16 products, and of copies within the device and to the host and back;
- `agreement`: the lab's model and an update of 1%, analysed on the processor in float64 and, in other ways, on the
  processor and the accelerator in float32: relative errors of routes, damage and cosines; and a rollback of 2% of the
  routes on the accelerator, undone;
- `analysis`: an analysis with random weights of a shape. Its seconds by part, beside what the part's gradient passes
  take (a pass is one `mean_gradient` over the references of a domain, measured before and after); the rate of a pass
  as a share of the ceiling; the memory of the device in sets of weights, at its peak;
- `heal`: what a subspace rollback costs at a shape, see `heal_cost.py`;
- `study`: the GRPO run of `smollm2_study.py` with `--steps` in each stage, healed. It needs the model of
  `recipes/prepare_smollm2.py`, no internet, and goes on where it was stopped.

Ten minutes of one GPU: `--parts heal study --shapes qwen3-4b qwen3-30b-a3b --layers 12`. We have not run these two.

Operations of a pass are those of products of matrices: 6 for each weight of a layer and token (8 with checkpointing,
which computes the layers forward once more), 6 for each weight of the output and completion token, and those of causal
attention. Random weights say nothing of damage; time and memory do not depend on what a model has learnt. Prints
lines, and last all figures as one JSON object. `--device cpu` does the same without an accelerator, for trying.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from statistics import median


GB = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS)[:3], choices=list(PARTS), help="what is done")
    parser.add_argument("--shapes", nargs="+", default=["qwen3-4b"], help="shapes of the analysis")
    parser.add_argument("--device", default="cuda", help="the accelerator (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=64, help="references of each domain (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a reference (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a batch (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="data type of the analysis (default: %(default)s)")
    parser.add_argument("--offload", action="store_true", help="both checkpoints stay in host memory")
    parser.add_argument("--checkpointing", action="store_true", help="backward passes recompute activations")
    parser.add_argument("--steps", type=int, default=200, help="steps of a stage of `study` (default: %(default)s)")
    parser.add_argument("--output-dir", default="smollm2-study-accelerator", help="folder of `study`")
    parser.add_argument("--layers", type=int, default=None, help="layers, if fewer than those of the shape")
    parser.add_argument("--matrix", type=int, default=8192, help="size of the products of `ceilings`")
    parser.add_argument("--rate", type=float, default=None, help="TFLOP/s, if `ceilings` is not among the parts")
    arguments = parser.parse_args()

    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    hardware = "processor" if arguments.device == "cpu" else torch.cuda.get_device_name()
    figures = {"hardware": hardware, "torch": torch.__version__}
    for part in arguments.parts:
        figures[part] = PARTS[part](arguments, figures)
    print(json.dumps(figures))


def synchronized(device: str) -> float:
    """The clock, when the device has done what it was given."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(device: str, function: Callable) -> float:
    """Seconds that a call takes, with what it leaves to the device."""
    begin = synchronized(device)
    function()
    return synchronized(device) - begin


def ceilings(arguments: argparse.Namespace, figures: dict) -> dict[str, float]:
    """Medians of five after two."""
    import torch

    device, size = arguments.device, arguments.matrix
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    b = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    block = torch.empty(size * size * 8, device=device, dtype=torch.bfloat16)
    other, host = torch.empty_like(block), torch.zeros(block.shape, dtype=torch.bfloat16)

    def best(function: Callable) -> float:
        return median([seconds(device, function) for _ in range(7)][2:])

    bytes_of = block.numel() * 2
    found = {
        "tflops": 2 * size**3 / best(lambda: a @ b) / 1e12,
        "device_copy_gb_per_s": 2 * bytes_of / best(lambda: other.copy_(block)) / GB,
        "to_host_gb_per_s": bytes_of / best(lambda: block.to("cpu")) / GB,
        "to_the_same_host_memory_gb_per_s": bytes_of / best(lambda: host.copy_(block)) / GB,
        "from_host_gb_per_s": bytes_of / best(lambda: host.to(device)) / GB,
    }
    print("ceilings: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)
    return {name: round(value, 2) for name, value in found.items()}


def moved_by(model, share: float):
    """A copy of a model, with noise of a share of its norm added to every tensor."""
    import torch

    after = copy.deepcopy(model)
    device = next(after.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in after.parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=device, dtype=torch.float32)
            parameter.add_((noise * (share * parameter.float().norm() / noise.norm())).to(parameter.dtype))
    return after


def agreement(arguments: argparse.Namespace, figures: dict) -> dict[str, dict[str, float]]:
    """Relative errors of analyses against float64 on the processor."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_interfere import InterferenceAnalyzer, InterferenceConfig
    from trl_interfere.lab import MODEL_FOLDER
    from trl_interfere.lab.domains import lab_domain

    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    start = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()
    end = moved_by(start, 0.01)
    domains = [lab_domain(name, 64) for name in ("math", "writing")]

    def analyzed(device: str, dtype: torch.dtype = torch.float32, **settings):
        before, after = (copy.deepcopy(model).to(device, dtype) for model in (start, end))
        if settings.get("offload"):
            after = after.to("cpu")
        config = InterferenceConfig(reference="dataset", reference_column="answer", max_prompts=64, **settings)
        analyzer = InterferenceAnalyzer(before, after, tokenizer, base=copy.deepcopy(start).to(dtype), config=config)
        return analyzer.analyze(*domains)

    expected = analyzed("cpu", torch.float64, subspace_size=2, difference_step=0.05)
    found = {}
    for label, device, dtype, settings in (
        ("processor, float32", "cpu", torch.float32, {"difference_step": 0.05}),
        ("float32", arguments.device, torch.float32, {"difference_step": 0.05, "subspace_size": 2}),
        ("float32, offload", arguments.device, torch.float32, {"difference_step": 0.05, "offload": True}),
        (
            "float32, checkpointing",
            arguments.device,
            torch.float32,
            {"difference_step": 0.05, "gradient_checkpointing": True},
        ),
        ("bfloat16", arguments.device, torch.bfloat16, {}),  # with the step that follows its rounding
    ):
        report = analyzed(device, dtype, **settings)
        errors = {
            f"routes, {name}": np.linalg.norm(report.routes[name] - values) / np.linalg.norm(values)
            for name, values in expected.routes.items()
            if name in report.routes and np.linalg.norm(values) > 0
        }
        for name in ("loss_before", "loss_after", "first_order", "second_order", "attributed", "outside_routes"):
            value = getattr(expected, name)
            errors[name] = abs(getattr(report, name) - value) / abs(value)
        errors["cosine"] = abs(report.cosines["global"] - expected.cosines["global"])
        if report.subspace is not None:
            values = np.array(expected.subspace["update"]["eigenvalues"])
            errors["eigenvalues"] = np.abs(report.subspace["update"]["eigenvalues"] / values - 1).max()
        found[label] = {name: float(f"{value:.3g}") for name, value in errors.items()}
        worst = max(errors, key=errors.get)
        print(f"agreement: {label}: damage of routes {errors['routes, damage']:.2g}, "
              f"worst {errors[worst]:.2g} ({worst})", flush=True)  # fmt: skip
    return found


def long_domain(name: str, prompts: int, tokens: int, tokenizer):
    """A domain whose references are answers of the lab, one after the other, up to a number of tokens."""
    from datasets import Dataset

    from trl_interfere import Domain
    from trl_interfere.lab.domains import REWARDS, lab_rows

    source = lab_rows(name, "train", 1000)
    rows = []
    for index in range(prompts):
        answer, position = [], index
        while len(answer) < tokens - 1:
            answer += tokenizer(source[position % len(source)]["answer"], add_special_tokens=False)["input_ids"]
            position += 1
        rows.append({"prompt": source[index]["prompt"], "answer": tokenizer.decode(answer[: tokens - 1])})
    dataset = Dataset.from_list(rows)
    return Domain(name, dataset, REWARDS[name], eval_dataset=dataset)


def analysis(arguments: argparse.Namespace, figures: dict) -> dict[str, dict]:
    """Analyses of random weights, each shape in turn."""
    return {shape: analysis_of(shape, arguments, figures) for shape in arguments.shapes}


def analysis_of(shape: str, arguments: argparse.Namespace, figures: dict) -> dict:
    """Seconds and memory of an analysis."""
    import torch
    from shapes import VOCABULARY, random_model
    from transformers import AutoTokenizer

    from trl_interfere import InterferenceAnalyzer, InterferenceConfig
    from trl_interfere.analysis.gradients import checkpointed, mean_gradient, num_tokens
    from trl_interfere.lab import MODEL_FOLDER

    device, on_cpu = arguments.device, arguments.device == "cpu"
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    before = random_model(shape, getattr(torch, arguments.dtype), device, arguments.layers)
    after = moved_by(before, 0.01)
    if arguments.offload:
        after = after.to("cpu")
    parameters = sum(parameter.numel() for parameter in before.parameters())
    one_set = sum(parameter.numel() * parameter.element_size() for parameter in before.parameters())
    config = InterferenceConfig(
        reference="dataset",
        reference_column="answer",
        max_prompts=arguments.prompts,
        max_new_tokens=arguments.tokens,
        batch_size=arguments.batch_size,
        check_prompts=max(1, arguments.prompts * InterferenceConfig.check_prompts // InterferenceConfig.max_prompts),
        offload=arguments.offload,
        gradient_checkpointing=arguments.checkpointing,
    )
    analyzer = InterferenceAnalyzer(before, after, tokenizer, config=config)
    domains = [long_domain(name, arguments.prompts, arguments.tokens, tokenizer) for name in ("math", "writing")]
    references = analyzer.references(domains[0], domains[1:])
    analyzer.references = lambda earlier, later, others=(): references
    batches = analyzer.batches(references)

    completion = num_tokens(batches["math"])
    whole = sum(int(batch["attention_mask"].sum()) for batch in batches["math"])
    setting = before.config
    inner = sum(weight.numel() for name, weight in before.named_parameters() if ".layers." in name)
    attention = sum(int((batch["attention_mask"].sum(dim=1) ** 2).sum()) for batch in batches["math"]) * (
        2 * setting.num_attention_heads * setting.head_dim * setting.num_hidden_layers
    )  # forward, half of it causal
    again = 4 if arguments.checkpointing else 3  # a backward pass is two forward passes
    operations = again * (2 * inner * whole + attention) + 6 * VOCABULARY * setting.hidden_size * completion
    print(
        f"{shape}: {parameters / 1e9:.2f}G parameters, {arguments.dtype}, {len(references['math'].prompts)} "
        f"references of {completion} completion tokens in all, {operations / 1e12:.0f} TFLOP a pass",
        flush=True,
    )

    def one_pass() -> float:
        with checkpointed(before, arguments.checkpointing):
            return seconds(device, lambda: mean_gradient(before, batches["math"]))

    def peak() -> float:
        return 0.0 if on_cpu else torch.cuda.max_memory_allocated() / one_set

    one_pass()
    passes = [one_pass()]
    if not on_cpu:
        torch.cuda.reset_peak_memory_stats()
    parts: dict[str, float] = {}
    names: list[str] = []
    clock = [synchronized(device)]

    def progress(name: str) -> None:
        now = synchronized(device)
        if names:
            parts[names[-1]] = now - clock[0]
            print(f"{shape}: {names[-1]} {now - clock[0]:.2f} s", flush=True)
        names.append(name)
        clock[0] = now

    begin = synchronized(device)
    analyzer.analyze(domains[0], domains[1], progress)
    pair = synchronized(device) - begin
    progress("")
    highest = peak()
    passes.append(one_pass())
    took = sum(passes) / len(passes)
    count = analyzer.passes()
    rate = figures.get("ceilings", {}).get("tflops", arguments.rate)
    found = {
        "parameters": parameters,
        "dtype": arguments.dtype,
        "offload": arguments.offload,
        "checkpointing": arguments.checkpointing,
        "references": arguments.prompts,
        "completion_tokens": completion,
        "pass_s": round(took, 3),
        "pass_tflops": round(operations / took / 1e12, 1),
        "share_of_ceiling": None if rate is None else round(operations / took / 1e12 / rate, 3),
        "pair_s": round(pair, 2),
        "pair_passes": round(pair / took, 2),
        "passes_by_count": round(sum(count.values()), 2),
        "parts_s": {name: round(value, 2) for name, value in parts.items()},
        "parts_passes": {name: round(value, 2) for name, value in count.items()},
        "device_sets": round(highest, 2),
        "device_gb": round(highest * one_set / GB, 1),
        "set_gb": round(one_set / GB, 2),
    }
    print(f"{shape}: " + ", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    return found


def heal(arguments: argparse.Namespace, figures: dict) -> dict[str, dict]:
    """Seconds and memory of a fit, each shape in turn."""
    from heal_cost import measure

    settings = argparse.Namespace(
        model=None, references=arguments.prompts, tokens=arguments.tokens, rank=64, rounds=1, clock="wall",
        layers=arguments.layers, dtype=arguments.dtype,
    )  # fmt: skip
    return {shape: measure(shape, settings) for shape in arguments.shapes}


def study(arguments: argparse.Namespace, figures: dict) -> dict:
    """Scores of the stages and the repair."""
    from pathlib import Path

    from smollm2_page import scores
    from smollm2_study import PARTS as STUDY_PARTS
    from smollm2_study import rows_of, warm_up, work

    folder = Path(arguments.output_dir).absolute()
    warm_up(folder, threads=16)
    for part in STUDY_PARTS[1:4]:
        begin = synchronized(arguments.device)
        work(folder, "grpo-0", part, threads=16, steps=arguments.steps)
        print(f"study: {part} {synchronized(arguments.device) - begin:.0f} s", flush=True)
    return scores(rows_of(folder))


PARTS: dict[str, Callable[[argparse.Namespace, dict], dict]] = {
    "ceilings": ceilings,
    "agreement": agreement,
    "analysis": analysis,
    "heal": heal,
    "study": study,
}


if __name__ == "__main__":
    main()
