"""Scores of checkpoints by name: whole models and adapters, with transformers or in vLLM."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from ..domain import Domain
from ..models import load_model, load_tokenizer
from .scorer import DomainScores, Scorer
from .vllm_engine import VLLMEngine


SPLITS = {"test": "eval_dataset", "selection": "selection_dataset"}
ENGINES = ("transformers", "vllm")


def chosen_domains(domains: list[Domain], names: list[str] | None, split: str) -> list[Domain]:
    """The domains of these names, or all that have prompts of the split."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {list(SPLITS)}, found {split!r}")
    available = [domain for domain in domains if getattr(domain, SPLITS[split]) is not None]
    known = [domain.name for domain in available]
    if not known or {*(names or [])} - {*known}:
        raise ValueError(f"domain: expected some with {split} prompts {sorted(known)}, found {names}")
    return [domain for domain in available if domain.name in (names or known)]


def scorer_of(tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any], progress: bool = False) -> Scorer:
    """The scorer with which a run of these settings of [`SequentialGRPOConfig`] scores its stages."""
    # The autocast of the training; TRL's default is bfloat16.
    autocast = torch.float16 if settings["fp16"] else None if settings["bf16"] is False else torch.bfloat16
    return Scorer(
        tokenizer,
        max_new_tokens=settings["score_max_new_tokens"] or settings["max_completion_length"],
        batch_size=settings["score_batch_size"],
        chat_template_kwargs=settings["chat_template_kwargs"],
        temperature=settings["score_temperature"],
        num_samples=settings["score_samples"],
        progress=progress,
        autocast=autocast,
    )


def score_checkpoint(
    name: str,
    domains: list[Domain],
    settings: Mapping[str, Any],
    split: str = "test",
    revision: str | None = None,
    engine: str = "transformers",
    progress: bool = False,
) -> dict[str, DomainScores]:
    """
    Score a checkpoint on domains, as a run with these settings of [`SequentialGRPOConfig`] scores its stages: in its
    precision, with its sampling and chat template. vLLM, which has no autocast, holds the weights in that precision.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {list(ENGINES)}, found {engine!r}")
    trust = bool(settings["trust_remote_code"])
    dtype = (settings["model_init_kwargs"] or {}).get("dtype", "float32")
    scorer = scorer_of(load_tokenizer(name, revision, trust_remote_code=trust), settings, progress)
    datasets = {domain.name: getattr(domain, SPLITS[split]) for domain in domains}
    with ExitStack() as stack:
        if engine == "vllm":
            prompts = (scorer.encode_prompt(prompt) for dataset in datasets.values() for prompt in dataset["prompt"])
            model = VLLMEngine(
                name,
                revision=revision,
                dtype=dtype if scorer.autocast is None else str(scorer.autocast).removeprefix("torch."),
                max_length=max(map(len, prompts)) + scorer.max_new_tokens,
                trust_remote_code=trust,
                max_num_seqs=scorer.batch_size,
                model_impl=settings["vllm_model_impl"],
                tensor_parallel_size=settings["vllm_tensor_parallel_size"],
            )
            stack.enter_context(model)
        else:
            device = PartialState(cpu=bool(settings["use_cpu"])).device
            model = load_model(name, revision, dtype, trust_remote_code=trust, merge=False).to(device)
        return {domain.name: scorer.score(model, domain, datasets[domain.name]) for domain in domains}
