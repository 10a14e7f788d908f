"""Cheap measures of a repair on the selection split, without sampling."""

import torch
from transformers import PreTrainedModel

from ..analysis.gradients import Batches
from ..analysis.objectives import completion_logits


def reference_probability(model: PreTrainedModel, batches: Batches) -> float:
    """
    Mean probability that the model writes the whole reference completion of a prompt.

    Where a reward accepts one completion of a prompt, this is the expected score of completions sampled at temperature
    1, without the noise of sampling and for one forward pass; where it accepts more, a lower bound.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        batches (`list[dict[str, torch.Tensor]]`):
            References of a domain.

    Returns:
        `float`: The probability, 0 to 1.

    Raises:
        `ValueError`: If there are no references.
    """
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            logits, targets = completion_logits(model, batch)
            chosen = batch["labels"] != -100
            logs = logits.float().log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1).double()
            rows = chosen.nonzero()[:, 0].to(logs.device)
            sums = torch.zeros(len(chosen), dtype=torch.float64, device=logs.device).index_add_(0, rows, logs)
            total += float(sums.exp().sum())
            count += len(chosen)
    if not count:
        raise ValueError("batches: expected at least one reference, found none")
    return total / count
