"""Forgetting: what domains have lost since their best stage."""

import datasets
import evaluate
import numpy as np

from trl_interfere.evaluation.metrics import forgetting
from trl_interfere.evaluation.score_matrix import ScoreMatrix


_DESCRIPTION = """
The forgetting measure of continual learning: for each domain that was trained before the last one, its highest score
after an earlier stage minus its score after the last stage, in points of 100, and the average over these domains. All
come with 95% intervals (paired bootstrap over prompts). A negative value is a gain.
"""

_KWARGS_DESCRIPTION = """
Each row is one stage and one domain.

Args:
    stages (`list[str]`): Names of the stages: `"0-base"`, then `"<index>-<domain>"` or `"<index>-refresh-<domain>"`.
    domains (`list[str]`): Names of the domains that were scored.
    scores (`list[list[float]]`): Score of each prompt, 0 to 1, in the same order of prompts after every stage.

Returns:
    `dict`: `forgetting`, `low`, `high`, `n` of the average, and `by_domain` with the same for each domain.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("metrics/forgetting")
    >>> results = metric.compute(
    ...     stages=["0-base", "0-base", "1-math", "1-math", "2-qa", "2-qa"],
    ...     domains=["math", "qa", "math", "qa", "math", "qa"],
    ...     scores=[[0, 0, 1, 0], [0, 0], [1, 1, 1, 0], [0, 1], [1, 0, 0, 0], [1, 1]],
    ... )
    >>> results["forgetting"], list(results["by_domain"])
    (50.0, ['math'])
"""

_CITATION = """
@inproceedings{chaudhry2018riemannian,
  title     = {Riemannian Walk for Incremental Learning: Understanding Forgetting and Intransigence},
  author    = {Arslan Chaudhry and Puneet K. Dokania and Thalaiyasingam Ajanthan and Philip H. S. Torr},
  booktitle = {ECCV},
  year      = {2018}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Forgetting(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "stages": datasets.Value("string"),
                    "domains": datasets.Value("string"),
                    "scores": datasets.Sequence(datasets.Value("float64")),
                }
            ),
        )

    def _compute(self, stages, domains, scores):
        matrix = ScoreMatrix(list(dict.fromkeys(domains)))
        for name in dict.fromkeys(stages):
            rows = [row for row, stage in enumerate(stages) if stage == name]
            matrix.append(name, {domains[row]: np.asarray(scores[row], dtype=np.float64) for row in rows})
        average = forgetting(matrix)
        by_domain = {domain: forgetting(matrix, domain) for domain in matrix.domains}
        return {
            "forgetting": average.value,
            **{name: getattr(average, name) for name in ("low", "high", "n")},
            "by_domain": {name: figure.to_dict() for name, figure in by_domain.items() if np.isfinite(figure.value)},
        }
