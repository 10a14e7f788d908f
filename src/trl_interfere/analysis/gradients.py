"""Loss, gradient, and the cosines between the gradients of domains."""

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .routes import module_of


Tensors = dict[str, torch.Tensor]
Batches = list[dict[str, torch.Tensor]]


def mean_loss(model: PreTrainedModel, batches: Batches) -> float:
    """
    Mean negative log-likelihood of the completion tokens, in nats.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        batches (`list[dict[str, torch.Tensor]]`):
            Batches of [`References`].

    Returns:
        `float`: The loss.
    """
    total, tokens = 0.0, sum(int((batch["labels"] != -100).sum()) for batch in batches)
    with torch.no_grad():
        for batch in batches:
            total += _summed_loss(model, batch).item()
    return total / tokens


def mean_gradient(model: PreTrainedModel, batches: Batches) -> tuple[float, Tensors]:
    """
    Gradient of [`mean_loss`] with respect to every parameter.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, in evaluation mode.
        batches (`list[dict[str, torch.Tensor]]`):
            Batches of [`References`].

    Returns:
        `tuple[float, dict[str, torch.Tensor]]`: The loss in nats per token, and the gradient by parameter name.
    """
    tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    parameters = dict(model.named_parameters())
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = _summed_loss(model, batch) / tokens
        loss.backward()
        total += loss.item()
    gradient = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in parameters.items()
    }
    model.zero_grad(set_to_none=True)
    return total, gradient


def _summed_loss(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = batch["labels"][:, 1:]
    chosen = targets != -100
    return F.cross_entropy(logits[:, :-1][chosen], targets[chosen], reduction="sum")


def cosines(first: Tensors, second: Tensors) -> dict[str, dict[str, float] | float]:
    """
    Cosines between two gradients: of each tensor, of each module, and of the whole model.

    ```
    cos = <g_A, g_B> / (|g_A| |g_B|)
    ```

    Args:
        first (`dict[str, torch.Tensor]`):
            Gradient of one domain.
        second (`dict[str, torch.Tensor]`):
            Gradient of another.

    Returns:
        `dict`: `"tensors"` and `"modules"` by name, and `"global"`. A part in which either gradient is zero has no
        cosine and is left out; a whole without one is `None`.
    """
    sums: dict[str, dict[str, torch.Tensor]] = {"tensors": {}, "modules": {}, "global": {}}
    for name, a in first.items():
        b = second[name]
        a, b = a.flatten().double(), b.flatten().double()
        products = torch.stack([a @ b, a @ a, b @ b])
        for level, key in (("tensors", name), ("modules", module_of(name)), ("global", "")):
            sums[level][key] = sums[level].get(key, 0) + products
    result = {
        level: {
            key: (products[0] / (products[1] * products[2]).sqrt()).item()
            for key, products in parts.items()
            if products[1] > 0 and products[2] > 0
        }
        for level, parts in sums.items()
    }
    return {**result, "global": result["global"].get("")}
