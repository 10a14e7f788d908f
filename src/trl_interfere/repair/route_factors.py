"""The update of routes as a LoRA adapter: two thin matrices of each tensor, which are exact."""

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..analysis.routes import RouteMap
from ..checkpoint import Checkpoint
from .block_stream import BlockStream, skeleton
from .layers import is_transposed


Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def route_factors(
    before: Checkpoint, after: Checkpoint, route_map: RouteMap, routes: np.ndarray, progress: bool = False
) -> tuple[Factors, float, float]:
    """
    Factors of -δ on the slices of routes, and the squared norms of what they hold and of what no adapter can.

    k rows of a matrix are `(columns of the identity) (rows of -δ)`, and k columns `(columns of -δ) (rows of the
    identity)`: a product of rank k.
    """
    model, chosen = skeleton(after), np.zeros(route_map.num_routes)
    chosen[routes] = 1.0
    sources = [
        BlockStream(checkpoint, model, torch.float64, torch.device("cpu"), adapted=False)
        for checkpoint in (before, after)
    ]
    factors, taken, left = {}, 0.0, 0.0
    parameters = [(name, value) for name, value in model.named_parameters() if route_map.cut(name) is not None]
    for name, parameter in tqdm(parameters, desc="routes", unit="tensor", disable=not progress):
        mask = route_map.spread(name, chosen, torch.empty(parameter.shape, dtype=torch.float64))
        if not mask.any():
            continue
        start, end = (source.tensor(name) for source in sources)
        change = mask * (start - end)
        for sign, checkpoint in ((1, before), (-1, after)):
            pair = checkpoint.factors(name)
            if pair is not None:
                change += sign * mask * (torch.from_numpy(pair[0]).double() @ torch.from_numpy(pair[1]).double())
        size = float(change.square().sum())
        module = model.get_submodule(name.rpartition(".")[0])
        experts = parameter.ndim == 3 and len(route_map.cut(name).axes) == 2
        if not experts and not (parameter.ndim == 2 and isinstance(module, (nn.Linear, Conv1D))):
            left += size
        elif size:
            taken += size
            if is_transposed(module):
                change, mask = change.mT, mask.mT
            factors[name if experts else name.removesuffix(".weight")] = _split(change.float(), mask != 0)
    return factors, taken, left


def _split(change: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of a matrix, or of one for each expert, that is 0 but for some rows, or some columns."""
    outputs, inputs = change.shape[-2:]
    if mask.shape[-1] > 1:  # columns
        right, left = _split(change.mT, mask.mT)
        return left.mT.contiguous(), right.mT.contiguous()
    rows = mask[..., 0]
    rank = int(rows.sum(-1).max())
    if rank >= inputs:
        return change.contiguous(), torch.eye(inputs).expand(*change.shape[:-2], -1, -1).contiguous()
    # Where an expert has fewer than another, rows that are 0 fill up.
    places = rows.int().argsort(dim=-1, descending=True, stable=True)[..., :rank]
    selection = nn.functional.one_hot(places, outputs).float().mT.contiguous()
    return selection, torch.take_along_dim(change, places[..., None], dim=-2)
