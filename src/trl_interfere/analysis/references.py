"""Reference completions: the text on which the loss of a domain is taken."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..domain import Domain
from ..evaluation.scorer import Scorer, apply_metric
from .config import InterferenceConfig


@dataclass
class References:
    """
    Prompts with their reference completions, as token ids.

    Args:
        domain (`str`):
            Name of the domain.
        prompts (`list[list[int]]`):
            Token ids of the prompts.
        completions (`list[list[int]]`):
            Token ids of the completions, with the end token.
        considered (`int`):
            Number of prompts from which these were taken.
        advantages (`list[float]`, *optional*):
            Advantage of each completion, for the objective `"grpo"`.
        group_size (`int`, *optional*, defaults to `1`):
            Completions of each prompt, which stand next to each other.
    """

    domain: str
    prompts: list[list[int]]
    completions: list[list[int]]
    considered: int
    advantages: list[float] | None = None
    group_size: int = 1

    @property
    def num_tokens(self) -> int:
        """Number of completion tokens."""
        return sum(len(completion) for completion in self.completions)

    def batches(self, batch_size: int, pad_id: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
        """
        Padded batches, longest sequences first.

        Args:
            batch_size (`int`):
                Number of sequences in a batch.
            pad_id (`int`):
                Token to pad with, on the right.
            device (`torch.device`):
                Device of the tensors.

        Returns:
            `list[dict[str, torch.Tensor]]`: `input_ids`, `attention_mask` and `labels`, each of shape
            `(batch, length)`; labels are -100 outside completions. With advantages also `advantages`, of shape
            `(batch,)`.
        """
        order = sorted(range(len(self.prompts)), key=lambda i: -len(self.prompts[i]) - len(self.completions[i]))
        batches = []
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            width = len(self.prompts[rows[0]]) + len(self.completions[rows[0]])
            ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
            mask = torch.zeros_like(ids)
            labels = torch.full_like(ids, -100)
            for row, index in enumerate(rows):
                prompt, completion = self.prompts[index], self.completions[index]
                length = len(prompt) + len(completion)
                ids[row, :length] = torch.tensor(prompt + completion)
                mask[row, :length] = 1
                labels[row, len(prompt) : length] = torch.tensor(completion)
            batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
            if self.advantages is not None:
                batch["advantages"] = torch.tensor([self.advantages[index] for index in rows], dtype=torch.float32)
            batches.append({key: value.to(device) for key, value in batch.items()})
        return batches

    def halves(self) -> list["References"]:
        """
        Two disjoint halves, of like lengths; completions of one prompt stay together.

        Returns:
            `list[References]`: Every other prompt, by length. One part only where there is but one prompt.
        """
        groups = range(len(self.prompts) // self.group_size)
        if len(groups) < 2:
            return [self]
        members = [range(group * self.group_size, (group + 1) * self.group_size) for group in groups]
        order = sorted(groups, key=lambda group: -sum(len(self.completions[i]) for i in members[group]))
        return [
            self.take([index for group in order[first::2] for index in members[group]], len(order[first::2]))
            for first in (0, 1)
        ]

    def take(self, rows: list[int], considered: int | None = None) -> "References":
        """
        Some of the completions.

        Args:
            rows (`list[int]`):
                Their positions.
            considered (`int`, *optional*):
                Number of prompts from which they were taken. Defaults to that of the whole.

        Returns:
            [`References`]: Their prompts, completions and advantages, in this order.
        """
        return replace(
            self,
            prompts=[self.prompts[index] for index in rows],
            completions=[self.completions[index] for index in rows],
            considered=self.considered if considered is None else considered,
            advantages=None if self.advantages is None else [self.advantages[index] for index in rows],
        )


def collect_references(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domain: Domain,
    config: InterferenceConfig,
    dataset: Dataset | None = None,
) -> References:
    """
    Reference completions of a domain.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Writes the completions when `config.reference` is `"correct"`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        domain ([`Domain`]):
            The domain.
        config ([`InterferenceConfig`]):
            Kind and number of references.
        dataset ([`~datasets.Dataset`], *optional*):
            Prompts. Defaults to the selection split of the domain, else to its evaluation split.

    Returns:
        [`References`]: The references.

    Raises:
        `ValueError`: If the domain has no prompts, or no completion counts as correct.
    """
    dataset = _prompts(domain, dataset)
    rows = list(dataset.select(range(min(config.max_prompts, len(dataset)))))
    scorer = Scorer(tokenizer, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size)
    prompts = [scorer.encode_prompt(row["prompt"]) for row in rows]
    if config.reference == "dataset":
        if config.reference_column not in dataset.column_names:
            raise ValueError(
                f"domain {domain.name!r}: expected the column {config.reference_column!r} with reference completions, "
                f"found {dataset.column_names}"
            )
        completions = [
            tokenizer(row[config.reference_column], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            for row in rows
        ]
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domain: Domain,
    config: InterferenceConfig,
    dataset: Dataset | None = None,
) -> References:
    """
    Sampled completions of a domain with their advantages, as GRPO takes them (arXiv 2402.03300).

    ```
    A_i = (r_i - mean(r)) / (std(r) + 1e-4)        over the completions of one prompt
    ```

    with the sample standard deviation, as in TRL. Prompts whose completions all get the same reward have advantages of
    zero; they stay, because they count among the tokens that the surrogate is averaged over.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The policy, at which the gradient is to be taken.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        domain ([`Domain`]):
            The domain; its rewards count, and its metric only where it has none.
        config ([`InterferenceConfig`]):
            `max_prompts`, `num_generations`, `temperature`, `max_new_tokens`, `batch_size` and `seed`.
        dataset ([`~datasets.Dataset`], *optional*):
            Prompts. Defaults to the selection split of the domain, else to its evaluation split.

    Returns:
        [`References`]: The completions, those of a prompt next to each other.

    Raises:
        `ValueError`: If the domain has no prompts, or no prompt has completions of different rewards.
    """
    dataset = _prompts(domain, dataset)
    size = config.num_generations
    rows = [row for row in dataset.select(range(min(config.max_prompts, len(dataset)))) for _ in range(size)]
    scorer = Scorer(
        tokenizer,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        temperature=config.temperature,
        seed=config.seed,
    )
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
    prompts = [scorer.encode_prompt(row["prompt"]) for row in rows]
    return References(domain.name, prompts, completions, len(rewards), advantages.ravel().tolist(), size)


def _prompts(domain: Domain, dataset: Dataset | None) -> Dataset:
    dataset = dataset or domain.selection_dataset or domain.eval_dataset
    if dataset is None:
        raise ValueError(f"domain {domain.name!r}: expected a selection_dataset or an eval_dataset, found neither")
    return dataset


def _complete(scorer: Scorer, model: PreTrainedModel, rows: list[dict], config: InterferenceConfig) -> list[list[int]]:
    prompts = [row["prompt"] for row in rows]
    state = PartialState() if config.data_parallel else None
    if state is None or state.num_processes == 1:
        return scorer.complete_ids(model, prompts)
    mine = [
        prompts[index] for index in np.array_split(np.arange(len(prompts)), state.num_processes)[state.process_index]
    ]
    scorer.seed += state.process_index  # else processes sample alike
    return gather_object(scorer.complete_ids(model, mine) if mine else [])
