"""Reference completions: the text on which the loss of a domain is taken."""

import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..domain import Domain
from ..evaluation.scorer import Scorer, apply_metric
from .config import InterferenceConfig


@dataclass
class References:
    """
    Prompts with their reference completions, as token ids, taken from `considered` prompts. Completions end with the
    end token; those of GRPO have advantages, and the `group_size` completions of a prompt stand next to each other.
    """

    domain: str
    prompts: list[list[int]]
    completions: list[list[int]]
    considered: int
    advantages: list[float] | None = None
    group_size: int = 1

    @property
    def num_tokens(self) -> int:
        """Number of completion tokens that are predicted: without a prompt the first one is not."""
        return sum(map(len, self.completions)) - sum(not prompt for prompt in self.prompts)

    @property
    def counts(self) -> dict[str, int]:
        """What a report says of them."""
        return {"n": len(self.completions), "considered": self.considered, "tokens": self.num_tokens}

    def batches(self, batch_size: int, pad_id: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
        """Padded batches, longest sequences first."""
        pairs = list(zip(self.prompts, self.completions, strict=True))
        order = sorted(range(len(pairs)), key=lambda index: -sum(map(len, pairs[index])))
        batches = []
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids = [torch.tensor(sum(pairs[row], []), dtype=torch.long) for row in rows]
            labels = [torch.tensor([-100] * len(pairs[row][0]) + pairs[row][1]) for row in rows]
            batch = {
                "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
                "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
                "labels": pad_sequence(labels, batch_first=True, padding_value=-100).long(),
            }
            batch["labels"][:, 0] = -100  # nothing predicts a first token
            if self.advantages is not None:
                batch["advantages"] = torch.tensor([self.advantages[index] for index in rows], dtype=torch.float32)
            batches.append({key: value.to(device) for key, value in batch.items()})
        return batches

    def halves(self) -> list["References"]:
        """Two disjoint halves, of like lengths; completions of one prompt stay together."""
        groups = range(len(self.prompts) // self.group_size)
        if len(groups) < 2:
            return [self]
        members = [range(group * self.group_size, (group + 1) * self.group_size) for group in groups]
        order = sorted(groups, key=lambda group: -sum(len(self.completions[i]) for i in members[group]))
        halves = (order[0::2], order[1::2])
        return [
            replace(self.take([row for group in half for row in members[group]]), considered=len(half))
            for half in halves
        ]

    def take(self, rows: list[int]) -> "References":
        """Some of the completions."""
        return replace(
            self,
            prompts=[self.prompts[index] for index in rows],
            completions=[self.completions[index] for index in rows],
            advantages=self.advantages and [self.advantages[index] for index in rows],
        )


def collect_references(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    domain: Domain,
    config: InterferenceConfig,
    dataset: Dataset | None = None,
) -> References:
    """Reference completions of a domain on its selection split, else on its evaluation split, as `config` says."""
    rows = _rows(tokenizer, domain, config, dataset)
    scorer = Scorer(tokenizer, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size)
    prompts = _encoded_prompts(scorer, domain, rows)
    if config.reference == "dataset":
        column = config.reference_column
        if column not in rows[0]:
            raise ValueError(f"domain {domain.name!r}: expected the column {column!r}, found {list(rows[0])}")
        texts = [_text(row[column], domain, column) for row in rows]
        completions = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        _check_encoding(tokenizer, domain, column, texts, completions)
        completions = [completion + [tokenizer.eos_token_id] for completion in completions]
        return References(domain.name, prompts, completions, len(rows))
    completions = _complete(scorer, model, rows, config)
    values = apply_metric(domain, rows, tokenizer.batch_decode(completions, skip_special_tokens=True), completions)
    kept = np.flatnonzero(values >= config.correct_threshold)
    if len(kept) == 0:
        raise ValueError(
            f"domain {domain.name!r}: none of {len(rows)} completions scores {config.correct_threshold} or more "
            f"(highest {values.max():.3f}); lower correct_threshold or set reference='dataset'"
        )
    return References(domain.name, [prompts[i] for i in kept], [completions[i] for i in kept], len(rows))


def collect_rollouts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, domain: Domain, config: InterferenceConfig
) -> References:
    """
    Sampled completions of a domain with their advantages, as GRPO takes them (arXiv 2402.03300).

    ```
    A_i = (r_i - mean(r)) / (std(r) + 1e-4)        over the completions of one prompt
    ```

    with the sample standard deviation, as in TRL. Prompts whose advantages are zero count among the tokens.
    """
    size = config.num_generations
    rows = [row for row in _rows(tokenizer, domain, config) for _ in range(size)]
    sampling = {"temperature": config.temperature, "seed": config.seed}
    scorer = Scorer(tokenizer, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size, **sampling)
    completions = _complete(scorer, model, rows, config)
    scored = replace(domain, metric=None) if domain.reward_funcs else domain
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    rewards = apply_metric(scored, rows, texts, completions).reshape(-1, size)
    advantages = rewards - rewards.mean(axis=1, keepdims=True)
    advantages /= rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4
    if not advantages.any():
        raise ValueError(
            f"domain {domain.name!r}: the {size} completions of each of {len(rewards)} prompts have equal rewards, so "
            "that GRPO has no gradient; raise num_generations, temperature or max_prompts, or set objective='nll'"
        )
    prompts = _encoded_prompts(scorer, domain, rows)
    return References(domain.name, prompts, completions, len(rewards), advantages.ravel().tolist(), size)


def _rows(
    tokenizer: PreTrainedTokenizerBase, domain: Domain, config: InterferenceConfig, dataset: Dataset | None = None
) -> list[dict]:
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: expected an eos_token, with which every reference completion ends, found none")
    dataset = dataset or domain.selection_dataset or domain.eval_dataset
    if dataset is None:
        raise ValueError(f"domain {domain.name!r}: expected a selection_dataset or an eval_dataset, found neither")
    return list(dataset.select(range(min(config.max_prompts, len(dataset)))))


def _encoded_prompts(scorer: Scorer, domain: Domain, rows: list[dict]) -> list[list[int]]:
    prompts = [scorer.encode_prompt(row["prompt"]) for row in rows]
    plain = [row["prompt"] if isinstance(row["prompt"], str) else None for row in rows]
    _check_encoding(scorer.tokenizer, domain, "prompt", plain, prompts)
    return prompts


def _text(completion: str | list[dict] | None, domain: Domain, column: str) -> str:
    if isinstance(completion, str):
        return completion
    if isinstance(completion, list) and all(isinstance(part, dict) and "content" in part for part in completion):
        return "".join(part["content"] or "" for part in completion)
    raise ValueError(f"domain {domain.name!r}: column {column!r}: expected text or messages, found {completion!r}")


def _check_encoding(
    tokenizer: PreTrainedTokenizerBase, domain: Domain, column: str, texts: list[str | None], ids: list[list[int]]
) -> None:
    """Refuse text that becomes no tokens, and warn once of text that does not come back from them."""
    where, changed = f"domain {domain.name!r}: column {column!r}:", []
    for text, tokens in zip(texts, ids, strict=True):
        if not tokens and (text is None or text.strip()):
            raise ValueError(f"{where} expected tokens for {text!r}, found none")
        decoded = tokenizer.decode(tokens, skip_special_tokens=True)
        if text is not None and "".join(decoded.split()).casefold() != "".join(text.split()).casefold():
            changed.append(f"{where} the tokenizer makes {decoded!r} of {text!r}")
    if changed:
        warnings.warn(changed[0], stacklevel=2)


def _complete(scorer: Scorer, model: PreTrainedModel, rows: list[dict], config: InterferenceConfig) -> list[list[int]]:
    prompts = [row["prompt"] for row in rows]
    state = PartialState() if config.data_parallel else None
    if state is None or state.num_processes == 1:
        return scorer.complete_ids(model, prompts)
    scorer.seed += state.process_index  # else processes sample alike
    mine = np.array_split(np.arange(len(prompts)), state.num_processes)[state.process_index]
    return gather_object(scorer.complete_ids(model, [prompts[index] for index in mine]) if len(mine) else [])
