"""Overlap of the routes that are largest by two measures, beside what chance would give."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import signal, stats

from ..evaluation.bootstrap import bootstrap
from .routes import KINDS, RouteMap


@dataclass(frozen=True)
class Overlap:
    r"""
    Jaccard index `|A ∩ B| / |A ∪ B|` of two sets of routes, beside two levels that it would have by chance.

    Args:
        value (`float`):
            The index; `nan` if both sets are empty.
        low (`float`):
            Lower end of its 95% interval.
        high (`float`):
            Upper end.
        over (`str`):
            What the interval is taken over: `"layers"` or `"references"`.
        units (`int`):
            Number of layers or of references.
        routes (`int`):
            Number of routes that the sets are chosen from.
        first (`int`):
            Size of the first set.
        second (`int`):
            Size of the second set.
        common (`int`):
            Number of routes in both.
        chance (`float`):
            Expected index of random sets of these sizes: 0.053 for twice 10% of many routes.
        shuffled (`float`):
            Expected index if the values of one measure are shuffled within each layer and kind. It is above `chance`
            where both sets lie in the same layers.
        shuffled_low (`float`):
            The 2.5% point of the index under such shuffles.
        shuffled_high (`float`):
            The 97.5% point.
    """

    value: float
    low: float
    high: float
    over: str
    units: int
    routes: int
    first: int
    second: int
    common: int
    chance: float
    shuffled: float
    shuffled_low: float
    shuffled_high: float

    def to_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


def overlaps(
    first: np.ndarray,
    second: np.ndarray,
    route_map: RouteMap,
    share: float = 0.1,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Overlap]:
    """
    Overlap of the top routes by two measures: edit sizes of two updates, or activities on two domains.

    The interval is a percentile bootstrap. With one value per route it is over layers: the sets stay as they are, and
    layers are drawn again with their shares of union and intersection. It says how even the overlap is over the depth
    of the model, and nothing about other prompts or seeds. With one row of values per reference it is over references:
    these are drawn again for each measure by itself, and the sets are chosen anew from their mean. The rankings of a
    resample hold more noise than those of the data, so that this interval tends to lie low.

    Args:
        first (`numpy.ndarray` of shape `(num_routes,)` or `(references, num_routes)`):
            A measure, not negative.
        second (`numpy.ndarray` of shape `(num_routes,)` or `(references, num_routes)`):
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
        `dict[str, Overlap]`: Overlap by kind of route, and under `"all"` that of the sets of all kinds together.
        Routes are ranked within their kind, since one of another kind owns another number of elements.

    Raises:
        `ValueError`: If the arrays do not have one column per route, hold NaN or negative values, or the share is not
            between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected a share between 0 and 1, found {share}")
    measures = {"first": np.asarray(first), "second": np.asarray(second)}
    for label, values in measures.items():
        if values.ndim not in (1, 2) or values.shape[-1] != route_map.num_routes or not values.size:
            raise ValueError(
                f"{label}: expected shape (num_routes,) or (references, num_routes) with {route_map.num_routes} "
                f"routes, found {values.shape}"
            )
        if not (values >= 0).all():
            raise ValueError(f"{label}: expected values of 0 and above, found NaN or negative ones")
    kinds = {kind: route_map.of_kind(kind) for kind in KINDS}
    kinds = {kind: routes for kind, routes in kinds.items() if routes.stop > routes.start}
    strata = {kind: _layers(route_map, kind) for kind in kinds}
    means = [values if values.ndim == 1 else values.mean(axis=0) for values in measures.values()]
    sets = [top_routes(values, kinds, share) for values in means]
    labels = {**{kind: [kind] for kind in kinds}, "all": list(kinds)}
    chosen = {
        label: np.concatenate([np.arange(kinds[kind].start, kinds[kind].stop) for kind in members])
        for label, members in labels.items()
    }
    references = [len(values) for values in measures.values() if values.ndim == 2]
    if references:
        resampled = _resampled(list(measures.values()), kinds, chosen, share, resamples, seed)
    results = {}
    for label, members in labels.items():
        routes = chosen[label]
        layers = np.concatenate([strata[kind] for kind in members])
        kind_ids = np.repeat(np.arange(len(members)), [len(strata[kind]) for kind in members])
        a, b = sets[0][routes], sets[1][routes]
        if not (a | b).any():
            low = high = float("nan")
        elif references:
            low, high = np.nanquantile(resampled[label], [0.025, 0.975])
        else:
            _, rows = np.unique(layers, return_inverse=True)
            interval = bootstrap(
                _ratio, np.bincount(rows, a & b), np.bincount(rows, a | b), resamples=resamples, seed=seed
            )
            low, high = interval.low, interval.high
        shuffled, shuffled_low, shuffled_high = _chance(a, b, kind_ids * route_map.num_layers + layers)
        results[label] = Overlap(
            value=jaccard(a, b),
            low=float(low),
            high=float(high),
            over="references" if references else "layers",
            units=min(references) if references else len(np.unique(layers)),
            routes=len(routes),
            first=int(a.sum()),
            second=int(b.sum()),
            common=int((a & b).sum()),
            chance=_chance(a, b, kind_ids)[0],
            shuffled=shuffled,
            shuffled_low=shuffled_low,
            shuffled_high=shuffled_high,
        )
    return results


def active_overlaps(activity: dict[str, np.ndarray], route_map: RouteMap) -> dict[str, dict[str, dict]]:
    """Overlap of the most active routes of every pair of domains, as `{first: {second: {kind: figures}}}`."""
    names = list(activity)
    return {
        first: {
            second: {
                kind: entry.to_dict() for kind, entry in overlaps(activity[first], activity[second], route_map).items()
            }
            for second in names[index + 1 :]
        }
        for index, first in enumerate(names[:-1])
    }


def top_routes(values: np.ndarray, kinds: dict[str, slice], share: float = 0.1) -> np.ndarray:
    """The largest routes of each kind."""
    chosen = np.zeros(len(values), dtype=bool)
    for routes in kinds.values():
        part = values[routes]
        count = max(1, round(share * len(part)))
        least = np.partition(part, len(part) - count)[len(part) - count]
        larger, equal = part > least, np.flatnonzero(part == least)
        chosen[routes] = larger
        chosen[routes.start + equal[: count - np.count_nonzero(larger)]] = True
    return chosen & (values > 0)


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Jaccard index of two sets, `|A ∩ B| / |A ∪ B|`."""
    union = int(np.count_nonzero(first | second))
    return int(np.count_nonzero(first & second)) / union if union else float("nan")


def _chance(first: np.ndarray, second: np.ndarray, strata: np.ndarray) -> tuple[float, float, float]:
    """
    Mean and 95% interval of the Jaccard index if B is drawn at random with as many routes in each stratum as it has.

    ```
    P(|A ∩ B| = x) = convolution over strata s of Hypergeometric(x; n_s, |A_s|, |B_s|)        J = x / (|A| + |B| - x)
    ```

    This is the distribution under shuffles of a measure within strata, without drawing any.
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


def _layers(route_map: RouteMap, kind: str) -> np.ndarray:
    # Layer of each route of a kind.
    routes = route_map.of_kind(kind)
    layers = np.zeros(routes.stop - routes.start, dtype=np.int64)
    for layer in range(route_map.num_layers):
        layers[route_map.of_layer(kind, layer)[routes]] = layer
    return layers


def _ratio(common: np.ndarray, union: np.ndarray, axis: int) -> np.ndarray:
    return common.sum(axis=axis) / union.sum(axis=axis)


def _resampled(
    measures: Sequence[np.ndarray],
    kinds: dict[str, slice],
    chosen: dict[str, np.ndarray],
    share: float,
    resamples: int,
    seed: int,
) -> dict[str, list[float]]:
    # Jaccard indices by label after the references of each measure have been drawn again.
    rng = np.random.default_rng(seed)
    indices: dict[str, list[float]] = {label: [] for label in chosen}
    for _ in range(resamples):
        sets = []
        for values in measures:
            if values.ndim == 2:
                count = len(values)
                values = rng.multinomial(count, np.full(count, 1 / count)) / count @ values
            sets.append(top_routes(values, kinds, share))
        for label, routes in chosen.items():
            indices[label].append(jaccard(sets[0][routes], sets[1][routes]))
    return indices
