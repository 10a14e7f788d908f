"""What a run is refused for before anything is loaded; `--dry-run` refuses the same."""

import logging
from collections import ChainMap
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from trl.data_utils import is_conversational
from trl.import_utils import is_vllm_available

from ..domain import Domain, check_columns
from .config import SequentialGRPOConfig
from .schedule import Stage, build_schedule


logger = logging.getLogger(__name__)


def check_run(domains: list[Domain], args: SequentialGRPOConfig, extras: dict[str, Any] | None = None) -> list[Stage]:
    """The schedule of a run that can be trained, with these further arguments of the trainer."""
    if not domains:
        raise ValueError("domains: expected at least one Domain, found none")
    by_name = {domain.name: domain for domain in domains}
    if len(by_name) != len(domains):
        raise ValueError(f"domains: expected unique names, found {[domain.name for domain in domains]}")
    trainable = [name for name, domain in by_name.items() if domain.train_dataset is not None]
    schedule = build_schedule(trainable, args.order, args.stage_overrides)
    for stage in schedule:
        settings = ChainMap(args.stage_settings(stage.overrides, f"stage_overrides[{stage.domain!r}]"), vars(args))
        domain = by_name[stage.domain]
        if (settings["eval_strategy"] != "no" or args.eval_on_start) and domain.eval_dataset is None:
            raise ValueError(f"eval_strategy, eval_on_start: expected an eval_dataset of domain {domain.name!r}")
        prompts = settings["generation_batch_size"] // settings["num_generations"]
        if isinstance(domain.train_dataset, Dataset) and len(domain.train_dataset) < prompts:
            found = f"at least {prompts} prompts, one generation batch, found {len(domain.train_dataset)}"
            raise ValueError(f"domain {domain.name!r}, train_dataset: expected {found}")
    turns = [name for name in ("tools", "rollout_func", "environment_factory") if (extras or {}).get(name)]
    for domain in domains:
        sets = [domain.train_dataset, domain.eval_dataset]
        if all(isinstance(rows, Dataset) and "prompt" in rows.column_names for rows in sets):
            if sets[0]["prompt"][:] == sets[1]["prompt"][:]:
                logger.warning("domain %r: eval_dataset holds the prompts that are trained on", domain.name)
        trained = domain.name in [stage.domain for stage in schedule]
        if trained and not domain.reward_funcs and "environment_factory" not in turns:
            raise ValueError(f"domain {domain.name!r}: expected reward functions to train on, found none")
        if domain.eval_dataset is not None and domain.metric is None:
            if turns:
                raise ValueError(
                    f"domain {domain.name!r}: expected a `metric` or no eval_dataset, scoring has no {turns[0]}"
                )
            if any(not callable(reward) or isinstance(reward, torch.nn.Module) for reward in domain.reward_funcs):
                raise ValueError(f"domain {domain.name!r}: a reward model cannot score it, expected a `metric`")
        if "rollout_func" not in turns:  # it may hand more to the rewards than the columns
            check_columns(domain)
    if args.kl_reference == "stage" and args.adapter_per_stage:
        raise ValueError("kl_reference: 'stage' is not supported with adapter_per_stage, TRL takes one adapter")
    if args.use_vllm and not is_vllm_available():
        raise ImportError("use_vllm: expected vLLM, which is not installed: pip install 'trl-interfere[vllm]'")
    return schedule


def with_prompts(domains: list[Domain], args: SequentialGRPOConfig, environment: Any) -> list[Domain]:
    """Domains with TRL's empty prompts where an environment owns the data."""
    if environment is None or isinstance(environment, dict):
        return domains
    owned = [d for d in domains if d.train_dataset is None and (len(domains) == 1 or d.name in (args.order or []))]
    for domain in owned:
        if args.max_steps <= 0:
            raise ValueError(f"max_steps: expected a number, as domain {domain.name!r} has no train_dataset")
    rows = [{"prompt": [{"role": "user", "content": ""}]}] * (args.generation_batch_size // args.num_generations)
    return [replace(d, train_dataset=Dataset.from_list(rows)) if d in owned else d for d in domains]


def check_template(domains: list[Domain], tokenizer: Any) -> None:
    """Refuse conversations that the tokenizer has no chat template for, before the first of them is met."""
    for domain in domains if getattr(tokenizer, "chat_template", None) is None else []:
        for field in ("train_dataset", "eval_dataset"):
            dataset = getattr(domain, field)
            if isinstance(dataset, Dataset) and is_conversational({"prompt": dataset[0].get("prompt", "")}):
                raise ValueError(f"domain {domain.name!r}, {field}: expected a chat template, found conversations")
