"""Transfer: what the stages of other domains do to a domain, after its own stage and before it."""

from .bootstrap import Interval, average
from .score_matrix import ScoreMatrix


def backward_transfer(matrix: ScoreMatrix, domain: str | None = None, stage: int = -1) -> Interval:
    """
    Backward transfer to one domain, or the average over the domains that were trained before the last one.

    ```
    BWT = 1/(T-1) sum_(i < T) R_(T,i) - R_(i,i)
    ```

    (Lopez-Paz and Ranzato, Gradient Episodic Memory, NeurIPS 2017, equation 3), with `R_(j,i)` the score of domain i
    after the stage of domain j, and T the stage asked for. Where a domain was trained several times, `R_(i,i)` is its
    score after the last of them; refreshes are repairs and do not count. A negative value is damage.

    Args:
        matrix ([`ScoreMatrix`]):
            The scores.
        domain (`str`, *optional*):
            Name of the domain. Defaults to the average.
        stage (`int`, *optional*, defaults to `-1`):
            Position of stage T; negative positions count from the end.

    Returns:
        [`Interval`]: Points of 100; undefined (`nan`) for the domain trained last, for one that was not trained, and
        where a score is missing.
    """
    final, latest = matrix.position(stage), matrix.last_training(stage)
    changes = []
    for name in matrix.domains if domain is None else [domain]:
        own = [row for row in range(final + 1) if matrix.stage_kind(row) == ("train", name)]
        if own and own[-1] != latest and name in matrix.values[own[-1]] and name in matrix.values[final]:
            changes.append(matrix.values[final][name] - matrix.values[own[-1]][name])
    return average(changes)


def forward_transfer(matrix: ScoreMatrix, domain: str | None = None, stage: int = -1) -> Interval:
    """
    Forward transfer to one domain, or the average over the domains that were trained after the first one.

    ```
    FWT = 1/(T-1) sum_(i > 1) R_(i-1,i) - b_i
    ```

    (Lopez-Paz and Ranzato, Gradient Episodic Memory, NeurIPS 2017, equation 4), with `R_(i-1,i)` the score of domain i
    right before its first training. There `b_i` is the score at random initialisation; here it is the score of the
    base model, where the run begins.

    Args:
        matrix ([`ScoreMatrix`]):
            The scores.
        domain (`str`, *optional*):
            Name of the domain. Defaults to the average.
        stage (`int`, *optional*, defaults to `-1`):
            Position of the last stage to look at; negative positions count from the end.

    Returns:
        [`Interval`]: Points of 100; undefined (`nan`) for the domain trained first, for one that was not trained, and
        where a score is missing.
    """
    final = matrix.position(stage)
    based = matrix.stage_kind(0)[0] == "base"
    changes = []
    for name in matrix.domains if domain is None else [domain]:
        before = next((row - 1 for row in range(final + 1) if matrix.stage_kind(row) == ("train", name)), 0)
        if based and before > 0 and name in matrix.values[before] and name in matrix.values[0]:
            changes.append(matrix.values[before][name] - matrix.values[0][name])
    return average(changes)
