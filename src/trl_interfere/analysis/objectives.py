"""Objectives of a domain: what its gradient is taken of. All sum in float32 or more, whatever the logits' type."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel


Batch = dict[str, torch.Tensor]
# Sum over the completion tokens of a batch, in nats, as a scalar that can be differentiated.
Objective = Callable[[PreTrainedModel, Batch], torch.Tensor]
OBJECTIVES = ("nll", "grpo", "kl")


def completion_logits(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that predict the completion tokens, and these tokens."""
    labels = batch["labels"]
    # Logits of prompts are not needed, and with a large vocabulary they are most of the memory of a small model.
    first = max(int((labels != -100).any(dim=0).int().argmax()), 1)
    targets = labels[:, first:]
    chosen = targets != -100
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        logits_to_keep=labels.shape[1] - first + 1,
        use_cache=False,
    ).logits
    logits = logits[:, :-1][chosen]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), targets[chosen]


def nll(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Negative log-likelihood of the completion tokens, summed over them."""
    return F.cross_entropy(*completion_logits(model, batch), reduction="sum")


def grpo(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """
    Surrogate of GRPO (arXiv 2402.03300) at the policy that wrote the completions, summed over their tokens.

    ```
    - Σ_t A_t log π(y_t | x, y_<t)
    ```

    There all probability ratios are 1 and nothing is clipped; TRL's `loss_type="dapo"` divides by the number of all
    tokens, as [`mean_gradient`] does. The batch has `advantages` of shape `(batch,)`.
    """
    logits, targets = completion_logits(model, batch)
    chosen = batch["labels"][:, 1:] != -100
    advantages = batch["advantages"][:, None].expand_as(chosen)[chosen].to(logits.dtype)
    return (advantages * F.cross_entropy(logits, targets, reduction="none")).sum()


class ForwardKL:
    """
    Forward Kullback-Leibler divergence from a reference model on the completions, of whole distributions.

    ```
    Σ_t Σ_v π_ref(v) (log π_ref(v) - log π(v))
    ```
    """

    def __init__(self, reference: PreTrainedModel):
        self.reference = reference

    def __call__(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            device = self.reference.device
            expected = completion_logits(self.reference, {key: value.to(device) for key, value in batch.items()})[0]
            expected = expected.log_softmax(dim=-1)
        found = completion_logits(model, batch)[0].log_softmax(dim=-1)
        return F.kl_div(found, expected.to(found), reduction="sum", log_target=True)
