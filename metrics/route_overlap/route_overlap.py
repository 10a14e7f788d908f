"""Route overlap: how much the largest routes by two measures are the same."""

import datasets
import evaluate
import numpy as np

from trl_interfere.analysis.architectures import KINDS
from trl_interfere.analysis.overlap import overlaps


_DESCRIPTION = """
Jaccard index of the routes (MLP channels, query heads, key/value heads) that are largest by two measures, such as the
edit sizes of two updates or the activities on two domains, by kind of route and for all of them. Beside it stands the
index that random sets of these sizes would have, and the one after shuffling a measure within each layer and kind:
two random sets of 10% of the routes have an index of 0.053.
"""

_KWARGS_DESCRIPTION = """
Each row is one route; the rows are sorted by kind (`"mlp"`, `"query"`, `"key_value"`) and then by layer.

Args:
    first (`list[float]`): A measure of each route, not negative.
    second (`list[float]`): Another one.
    kinds (`list[str]`): Kind of each route.
    layers (`list[int]`): Layer of each route.
    share (`float`, *optional*, defaults to `0.1`): Size of a set as a share of the routes of a kind.

Returns:
    `dict`: `overlap`, `chance` and `shuffled` of all kinds together, and `by_kind` with every figure for each kind and
    for `"all"`: `value`, its interval over layers `low` and `high`, and the levels by chance.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("metrics/route_overlap")
    >>> results = metric.compute(
    ...     first=[9, 8, 1, 2, 0, 0],
    ...     second=[9, 1, 8, 2, 0, 0],
    ...     kinds=["mlp"] * 6,
    ...     layers=[0, 0, 0, 1, 1, 1],
    ...     share=0.34,
    ... )
    >>> round(results["overlap"], 3)
    0.333
"""

_CITATION = """
@misc{yang2026local,
  title         = {A Local Perturbation Theory for Cross-Domain Interference and Recovery in Multi-Domain RL},
  author        = {Lei Yang and Siyu Ding and Deyi Xiong},
  year          = {2026},
  eprint        = {2606.02398},
  archivePrefix = {arXiv}
}
"""


class _Routes:
    # What `overlaps` asks of a route map, from the kinds and layers alone.
    def __init__(self, kinds, layers):
        self.kinds, self.layers = np.asarray(kinds), np.asarray(layers)
        unknown = sorted(set(kinds) - set(KINDS))
        if unknown:
            raise ValueError(f"kinds: expected some of {list(KINDS)}, found {unknown}")
        keys = [(KINDS.index(kind), layer) for kind, layer in zip(kinds, layers, strict=True)]
        if keys != sorted(keys):
            raise ValueError(f"kinds: expected routes sorted by kind {list(KINDS)} and layer, found another order")
        self.num_routes, self.num_layers = len(kinds), int(max(layers, default=-1)) + 1

    def of_kind(self, kind):
        routes = np.flatnonzero(self.kinds == kind)
        return slice(int(routes[0]), int(routes[-1]) + 1) if len(routes) else slice(0, 0)

    def of_layer(self, kind, layer):
        return (self.kinds == kind) & (self.layers == layer)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RouteOverlap(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "first": datasets.Value("float64"),
                    "second": datasets.Value("float64"),
                    "kinds": datasets.Value("string"),
                    "layers": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, first, second, kinds, layers, share=0.1):
        found = overlaps(np.asarray(first), np.asarray(second), _Routes(kinds, layers), share=share)
        whole = found["all"]
        return {
            "overlap": whole["value"],
            **{name: whole[name] for name in ("chance", "shuffled")},
            "by_kind": found,
        }
