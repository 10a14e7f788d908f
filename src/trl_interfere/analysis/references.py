"""Reference completions: the text on which the loss of a domain is taken."""

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..domains.domain import Domain
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
    """

    domain: str
    prompts: list[list[int]]
    completions: list[list[int]]
    considered: int

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
            `(batch, length)`; labels are -100 outside completions.
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
            batches.append(
                {
                    "input_ids": ids.to(device),
                    "attention_mask": mask.to(device),
                    "labels": labels.to(device),
                }
            )
        return batches


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
    dataset = dataset or domain.selection_dataset or domain.eval_dataset
    if dataset is None:
        raise ValueError(f"domain {domain.name!r}: expected a selection_dataset or an eval_dataset, found neither")
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
    completions = scorer.complete_ids(model, [row["prompt"] for row in rows])
    values = apply_metric(domain, rows, tokenizer.batch_decode(completions, skip_special_tokens=True), completions)
    kept = np.flatnonzero(values >= config.correct_threshold)
    if len(kept) == 0:
        raise ValueError(
            f"domain {domain.name!r}: none of {len(rows)} completions scores {config.correct_threshold} or more "
            f"(highest {values.max():.3f}); lower correct_threshold or set reference='dataset'"
        )
    return References(domain.name, [prompts[i] for i in kept], [completions[i] for i in kept], len(rows))
