"""Recovery: the share of a lost score that a repair brings back."""

import datasets
import evaluate
import numpy as np

from trl_interfere.evaluation.metrics import recovered


_DESCRIPTION = """
The share of a lost score that a repair brings back, `(repaired - damaged) / (peak - damaged)`, with its 95% interval
(paired bootstrap over prompts). 1 is all of the loss. It is undefined (`nan`) where nothing was lost. A repair can
come by chance or at the cost of other domains: report a control and the change of the other domains beside it.
"""

_KWARGS_DESCRIPTION = """
Args:
    repaired (`list[float]`): Score of each prompt, 0 to 1, after the repair.
    damaged (`list[float]`): Score of the same prompts before the repair.
    peak (`list[float]`): Score of the same prompts at the best stage.

Returns:
    `dict`: `recovered`, `low`, `high` and `n`.

Examples:
    >>> import evaluate
    >>> metric = evaluate.load("metrics/recovery")
    >>> results = metric.compute(repaired=[1, 1, 0, 0], damaged=[1, 0, 0, 0], peak=[1, 1, 1, 0])
    >>> results["recovered"], results["n"]
    (0.5, 4)
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


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Recovery(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({name: datasets.Value("float64") for name in ("repaired", "damaged", "peak")}),
        )

    def _compute(self, repaired, damaged, peak):
        share = recovered(*(np.asarray(values, dtype=np.float64) for values in (repaired, damaged, peak)))
        return {"recovered": share.value, "low": share.low, "high": share.high, "n": share.n}
