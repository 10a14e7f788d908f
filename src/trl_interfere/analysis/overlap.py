"""Overlap of the routes that are largest by two measures, beside what chance would give."""

import itertools
from typing import Any

import numpy as np
from scipy import signal, stats

from ..evaluation.bootstrap import bootstrap
from .routes import KINDS, RouteMap


def overlaps(
    first: np.ndarray,
    second: np.ndarray,
    route_map: RouteMap,
    share: float = 0.1,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """
    Overlap of the top routes by two measures: edit sizes of two updates, or activities on two domains.

    The interval is a percentile bootstrap over layers. It says how even the overlap is over the depth of the model,
    and nothing about other prompts or seeds. Routes are ranked within their kind.

    Args:
        first (`numpy.ndarray` of shape `(num_routes,)`):
            A measure, not negative.
        second (`numpy.ndarray` of shape `(num_routes,)`):
            Another one.
        route_map ([`RouteMap`]):
            The routes.
        share (`float`, *optional*, defaults to `0.1`):
            Size of a set as a share of the routes of a kind.
        resamples (`int`, *optional*, defaults to `1000`):
            Number of resamples behind the interval.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.

    Returns:
        `dict[str, dict]`: By kind of route, and under `"all"` for the sets of all kinds together: `value`, the Jaccard
        index `|A ∩ B| / |A ∪ B|` (`nan` if both are empty), with `low` and `high`, the ends of its 95% interval `over`
        `units` layers; `first`, `second` and `common`, the sizes of the sets and of what they share, among `routes`;
        `chance`, the expected index of random sets of these sizes, 0.053 for twice 10% of many routes; `shuffled`,
        with `shuffled_low` and `shuffled_high`, the same if the values of one measure are shuffled within each layer
        and kind, which is above `chance` where both sets lie in the same layers.

    Raises:
        `ValueError`: If an array or the share is out of range.
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected a share between 0 and 1, found {share}")
    count = route_map.num_routes
    measures = {"first": np.asarray(first), "second": np.asarray(second)}
    for label, values in measures.items():
        if values.shape != (count,) or not count:
            raise ValueError(f"{label}: expected shape ({count},), a value for each route, found {values.shape}")
        if not (values >= 0).all():
            raise ValueError(f"{label}: expected values of 0 and above, found NaN or negative ones")
    kinds = {kind: route_map.of_kind(kind) for kind in KINDS}
    kinds = {kind: routes for kind, routes in kinds.items() if routes.stop > routes.start}
    kind_of, layer_of = np.zeros(count, dtype=int), np.zeros(count, dtype=int)
    for number, (kind, routes) in enumerate(kinds.items()):
        kind_of[routes] = number
        for layer in range(route_map.num_layers):
            layer_of[route_map.of_layer(kind, layer)] = layer
    sets = [top_routes(values, kinds, share) for values in measures.values()]
    results = {}
    for label, routes in {**kinds, "all": slice(0, count)}.items():
        (a, b), layers = (chosen[routes] for chosen in sets), layer_of[routes]
        common, union = int((a & b).sum()), int((a | b).sum())
        low = high = float("nan")
        if union:
            _, rows = np.unique(layers, return_inverse=True)
            in_layers = np.bincount(rows, a & b), np.bincount(rows, a | b)
            interval = bootstrap(_ratio, *in_layers, resamples=resamples, seed=seed)
            low, high = float(interval.low), float(interval.high)
        shuffled = _chance(a, b, kind_of[routes] * route_map.num_layers + layers)
        results[label] = {
            "value": common / union if union else float("nan"),
            "low": low,
            "high": high,
            "over": "layers",
            "units": len(np.unique(layers)),
            "routes": len(layers),
            "first": int(a.sum()),
            "second": int(b.sum()),
            "common": common,
            "chance": _chance(a, b, kind_of[routes])[0],
            **dict(zip(("shuffled", "shuffled_low", "shuffled_high"), shuffled, strict=True)),
        }
    return results


def pairwise_overlaps(
    measures: dict[str, np.ndarray], route_map: RouteMap, share: float = 0.1
) -> dict[str, dict[str, dict]]:
    """Overlap of the top routes of every two domains, as `{first: {second: {kind: figures}}}`."""
    found: dict[str, dict[str, dict]] = {first: {} for first in list(measures)[:-1]}
    for first, second in itertools.combinations(measures, 2):
        found[first][second] = overlaps(measures[first], measures[second], route_map, share)
    return found


def top_routes(values: np.ndarray, kinds: dict[str, slice], share: float = 0.1) -> np.ndarray:
    """Mask of the largest routes of each kind, without those of 0; ties go to the lower index."""
    chosen = np.zeros(len(values), dtype=bool)
    for routes in kinds.values():
        order = np.argsort(-values[routes], kind="stable")
        chosen[routes.start + order[: max(1, round(share * len(order)))]] = True
    return chosen & (values > 0)


def _chance(first: np.ndarray, second: np.ndarray, strata: np.ndarray) -> tuple[float, float, float]:
    """
    Mean and 95% interval of the Jaccard index under all shuffles of a measure within strata.

    ```
    P(|A ∩ B| = x) = convolution over strata s of Hypergeometric(x; n_s, |A_s|, |B_s|)        J = x / (|A| + |B| - x)
    ```
    """
    total = np.count_nonzero(first) + np.count_nonzero(second)
    if not total:
        return float("nan"), float("nan"), float("nan")
    sizes, ones, others = (np.bincount(strata, x) for x in (np.ones(len(strata)), first, second))
    probabilities, offset = np.ones(1), 0
    for n, a, b in zip(sizes.astype(int), ones.astype(int), others.astype(int), strict=True):
        if min(a, b) > 0:
            # Beyond twelve standard deviations lies nothing that a float64 could tell.
            mean, reach = a * b / n, 12 * (a * b / n) ** 0.5 + 12
            low, high = max(0, a + b - n, int(mean - reach)), min(a, b, int(mean + reach))
            probabilities = signal.convolve(probabilities, stats.hypergeom.pmf(np.arange(low, high + 1), n, a, b))
            offset += low
    probabilities = probabilities.clip(min=0) / probabilities.clip(min=0).sum()  # of rounding errors of an FFT
    common = offset + np.arange(len(probabilities))
    index = common / (total - common)
    low, high = np.searchsorted(np.cumsum(probabilities), [0.025, 0.975])
    return float(probabilities @ index), float(index[low]), float(index[min(high, len(index) - 1)])


def _ratio(common: np.ndarray, union: np.ndarray, axis: int) -> np.ndarray:
    return common.sum(axis=axis) / union.sum(axis=axis)
