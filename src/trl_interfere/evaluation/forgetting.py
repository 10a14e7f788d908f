"""Forgetting: what a domain has lost since its peak."""

from .bootstrap import Interval, average
from .score_matrix import ScoreMatrix


def forgetting(matrix: ScoreMatrix, domain: str | None = None, stage: int = -1) -> Interval:
    """
    Forgetting of one domain, or the average over the domains that were trained before the last one.

    ```
    f_j = max_(l < k) R_(l,j) - R_(k,j)        F_k = 1/(k-1) sum_(j < k) f_j
    ```

    (Chaudhry et al., Riemannian Walk for Incremental Learning, ECCV 2018: the forgetting measure), with `R_(l,j)` the
    score of domain j after stage l, and k the stage asked for. The base model counts as stage 0, since a pre-trained
    model may know a domain before it is trained on it. A refresh counts as a stage l, but not as the training of a new
    domain. A negative value is a gain. The peak stage is found once, on all prompts, and the difference from it is
    paired.

    Args:
        matrix ([`ScoreMatrix`]):
            The scores.
        domain (`str`, *optional*):
            Name of the domain. Defaults to the average.
        stage (`int`, *optional*, defaults to `-1`):
            Position of stage k; negative positions count from the end.

    Returns:
        [`Interval`]: Points of 100; undefined (`nan`) for the domain trained last, and where a score is missing.
    """
    final, latest = matrix.position(stage), matrix.last_training(stage)
    losses = []
    for name in matrix.domains if domain is None else [domain]:
        trained = any(matrix.stage_kind(row) == ("train", name) for row in range(final))
        newest = latest is not None and matrix.stage_kind(latest) == ("train", name)
        scored = name in matrix.values[final] and any(name in values for values in matrix.values[:final])
        if scored and not newest and (trained or domain is not None):
            losses.append(matrix.values[matrix.peak(name, final - 1)][name] - matrix.values[final][name])
    return average(losses)
