"""Scores of checkpoints on the domains of a run."""

import json
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from ..domain import Domain
from ..models import load_model, load_tokenizer
from ..recipe import RunFile
from ..run import write_atomically, write_scores
from ..training.config import SequentialGRPOConfig
from .bootstrap import difference, score
from .scorer import Scorer
from .vllm_engine import VLLMEngine


SCHEMA_VERSION = 1
ENGINES = ("transformers", "vllm")


def evaluate_checkpoints(
    run: RunFile,
    models: list[str],
    output_dir: str | Path,
    domains: list[str] | None = None,
    split: str = "eval",
    progress: bool = False,
    engine: str = "transformers",
    **sampling: Any,
) -> dict[str, Any]:
    """
    Score checkpoints one after the other, and compare them with the first one.

    Writes `scores.json`, and for each checkpoint and domain a file with the score and the completions of each prompt.

    Args:
        run ([`RunFile`]):
            Names the domains, and the settings of scoring that `sampling` leaves open.
        models (`list[str]`):
            Folders or Hub ids of models or adapters.
        output_dir (`str` or `pathlib.Path`):
            Folder of the files; a new or an empty one.
        domains (`list[str]`, *optional*):
            Domains to score. Defaults to all that have the split.
        split (`str`, *optional*, defaults to `"eval"`):
            `"eval"` or `"selection"`.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar over prompts.
        engine (`str`, *optional*, defaults to `"transformers"`):
            What completes the prompts: `"transformers"` or `"vllm"`. A vLLM engine holds the weights in the precision
            of the training; `vllm_tensor_parallel_size` and `vllm_model_impl` of the file are those of the engine.
        **sampling:
            `temperature`, `num_samples`, `batch_size` and `max_new_tokens` of the [`Scorer`].

    Returns:
        `dict`: The content of `scores.json`.

    Raises:
        `ValueError`: If the folder is not empty, a domain or checkpoint does not exist, or the engine is unknown or
            not installed.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {list(ENGINES)}, found {engine!r}")
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{output_dir}: expected an empty or a new folder")
    chosen = _chosen_domains(run, domains, split)
    settings = training_settings(run)
    sampling = {**sampling_settings(run), **sampling}
    # In the precision of the training, so that a stage gets the scores that it got there.
    precision = "float16" if settings["fp16"] else "float32" if settings["bf16"] is False else "bfloat16"
    dtype = (settings["model_init_kwargs"] or {}).get("dtype", "float32")
    if engine == "vllm":  # which has no autocast
        dtype = precision = dtype if precision == "float32" else precision
    for name in models:  # a name that does not exist must not cost the scores of those before it
        load_tokenizer(name, trust_remote_code=bool(settings["trust_remote_code"]))
    results: list[dict[str, Any]] = []
    values: list[dict[str, np.ndarray]] = []
    for position, name in enumerate(models):
        with ExitStack() as stack:
            trust = bool(settings["trust_remote_code"])
            if engine == "vllm":
                tokenizer = load_tokenizer(name, trust_remote_code=trust)
            else:
                model = load_model(name, dtype=dtype, trust_remote_code=trust, merge=False)
                tokenizer = load_tokenizer(name, trust_remote_code=trust)
            scorer = Scorer(
                tokenizer, chat_template_kwargs=settings["chat_template_kwargs"], progress=progress, **sampling
            )
            if engine == "vllm":
                prompts = (scorer.encode_prompt(row["prompt"]) for _, dataset in chosen for row in dataset)
                model = VLLMEngine(
                    name,
                    dtype=dtype,
                    max_length=max(map(len, prompts)) + scorer.max_new_tokens,
                    trust_remote_code=trust,
                    max_num_seqs=scorer.batch_size,
                    model_impl=settings["vllm_model_impl"],
                    tensor_parallel_size=settings["vllm_tensor_parallel_size"],
                )
                stack.enter_context(model)
            else:
                device = PartialState(cpu=bool(settings["use_cpu"])).device
                model = model.to(device)
                stack.enter_context(
                    torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")
                )
            scores = {}
            values.append({})
            for domain, dataset in chosen:
                result = scorer.score(model, domain, dataset)
                label = f"{position}-{Path(name).name}"
                file = write_scores(
                    output_dir, label, domain.name, result.values, result.completions, dataset["prompt"][:]
                )
                scores[domain.name] = {**score(result.values).to_dict(), "file": file}
                values[-1][domain.name] = result.values
        changes = (
            {}
            if position == 0
            else {domain: difference(values[-1][domain], values[0][domain]).to_dict() for domain in scores}
        )
        results.append({"model": name, "scores": scores, "difference_from_first": changes})
        del model
    evaluation = {
        "schema_version": SCHEMA_VERSION,
        "split": split,
        "engine": engine,
        "sampling": sampling,
        "precision": {"weights": dtype, "autocast": precision},
        "models": results,
    }
    write_atomically(output_dir / "scores.json", json.dumps(evaluation, indent=2) + "\n")
    return evaluation


def training_settings(run: RunFile) -> dict[str, Any]:
    """
    Settings of the training, those that a run file leaves open at their defaults.

    Args:
        run ([`RunFile`]):
            The file.

    Returns:
        `dict`: All settings of [`SequentialGRPOConfig`] by name.
    """
    return {field.name: field.default for field in fields(SequentialGRPOConfig)} | run.training


def sampling_settings(run: RunFile) -> dict[str, Any]:
    """
    How completions are sampled when a run is scored.

    Args:
        run ([`RunFile`]):
            The file.

    Returns:
        `dict`: `temperature`, `num_samples`, `batch_size` and `max_new_tokens` of the [`Scorer`].
    """
    settings = training_settings(run)
    return {
        "temperature": settings["score_temperature"],
        "num_samples": settings["score_samples"],
        "batch_size": settings["score_batch_size"],
        "max_new_tokens": settings["score_max_new_tokens"] or settings["max_completion_length"],
    }


def analysis_settings(run: RunFile) -> dict[str, Any]:
    """
    Settings of an analysis: those of the file; completions are as long as in the training, where it does not say
    otherwise.

    Args:
        run ([`RunFile`]):
            The file.

    Returns:
        `dict`: Fields of [`InterferenceConfig`].
    """
    longest = run.training.get("max_completion_length")
    return {**({"max_new_tokens": longest} if longest else {}), **run.analysis}


def print_evaluation(evaluation: dict[str, Any], console: Console) -> None:
    """
    Print scores, and differences from the first checkpoint if there are several.

    Args:
        evaluation (`dict`):
            Result of [`evaluate_checkpoints`].
        console ([`~rich.console.Console`]):
            Where to.
    """
    titles = {
        "scores": f"Score on the {evaluation['split']} split (0 to 100, 95% interval)",
        "difference_from_first": "Difference from the first model (points, 95% interval, paired over prompts)",
    }
    for part, title in titles.items():
        rows = [entry for entry in evaluation["models"] if entry[part]]
        if not rows:
            continue
        table = Table(title=title)
        table.add_column("model", overflow="fold")
        for domain, entry in rows[0][part].items():
            table.add_column(f"{domain} (n={entry['n']})", justify="right")
        for row in rows:
            cells = row[part].values()
            table.add_row(row["model"], *(f"{c['value']:.1f} [{c['low']:.1f}, {c['high']:.1f}]" for c in cells))
        console.print(table)


def _chosen_domains(run: RunFile, names: list[str] | None, split: str) -> list[tuple[Domain, Any]]:
    available = {domain.name: (domain, getattr(domain, f"{split}_dataset")) for domain in run.domains}
    for name in names or []:
        if name not in available:
            raise ValueError(f"domains: unknown domain {name!r}, expected some of {sorted(available)}")
        if available[name][1] is None:
            raise ValueError(f"domains: domain {name!r} has no {split} prompts")
    chosen = [available[name] for name in names or available if available[name][1] is not None]
    if not chosen:
        raise ValueError(f"domains: expected at least one with {split} prompts, found {sorted(available)} without")
    return chosen
