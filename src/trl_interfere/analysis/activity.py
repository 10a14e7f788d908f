"""Activity of routes on a domain."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel

from .gradients import Batches
from .routes import _LAYER, RouteMap


def route_activity(model: PreTrainedModel, batches: Batches, route_map: RouteMap) -> np.ndarray:
    """
    Mean size of what each route writes into the residual stream, over completion tokens.

    For an MLP channel |h_r| times the norm of its column of down; for a query head the norm of its contribution after
    o; for a key/value head the mean over the query heads that read it.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        batches (`list[dict[str, torch.Tensor]]`):
            References of the domain.
        route_map ([`RouteMap`]):
            The routes.

    Returns:
        `numpy.ndarray` of shape `(num_routes,)`: Activity.
    """
    activity = np.zeros(route_map.num_routes)
    tokens = 0
    with torch.no_grad(), _captured_inputs(model, route_map) as captured:
        for batch in batches:
            captured.clear()
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            # The state at a token predicts the next one: a completion is computed where its labels are shifted to.
            chosen = batch["labels"][:, 1:] != -100
            tokens += int(chosen.sum())
            for name, (hidden, weight) in captured.items():
                cut = route_map.cut(name)
                hidden = hidden[:, :-1][chosen].float()
                weight = weight.float()
                if hidden.shape[1] == cut.count:
                    size = hidden.abs() * weight.norm(dim=0)
                else:  # heads: the norm of W_h x_h is the root of x_hᵀ (W_hᵀ W_h) x_h
                    hidden = hidden.reshape(len(hidden), cut.count, -1)
                    columns = weight.reshape(weight.shape[0], cut.count, -1)
                    grams = torch.einsum("oha,ohb->hab", columns, columns)
                    size = torch.einsum("tha,hab,thb->th", hidden, grams, hidden).clamp(min=0).sqrt()
                activity[cut.routes] += size.sum(dim=0, dtype=torch.float64).cpu().numpy()
    activity /= max(tokens, 1)
    queries = activity[route_map.scope("attention")]
    num_query = route_map.counts["query"] * route_map.num_layers
    groups = queries[:num_query].reshape(route_map.num_layers, route_map.counts["key_value"], -1)
    activity[len(activity) - len(queries) + num_query :] = groups.mean(axis=-1).ravel()
    return activity


@contextmanager
def _captured_inputs(model: PreTrainedModel, route_map: RouteMap) -> Iterator[dict]:
    # Modules whose columns (axis 1) belong to routes are the ones through which routes write.
    captured, handles = {}, []
    for name, module in model.named_modules():
        cut = route_map.cut(f"{name}.weight") if _LAYER.search(name) else None
        if cut is not None and cut.axis == 1:

            def keep(module, inputs, name=f"{name}.weight"):
                captured[name] = (inputs[0], module.weight)

            handles.append(module.register_forward_pre_hook(keep))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
