"""Collateral: what the repair of some domains does to every other one."""

from collections.abc import Iterable

from .bootstrap import Interval, difference
from .score_matrix import ScoreMatrix


def collateral(matrix: ScoreMatrix, since: int, repaired: Iterable[str] = (), stage: int = -1) -> dict[str, Interval]:
    """
    Change of every domain that was not repaired, between the damaged and the repaired model.

    ```
    collateral_j = R_(repaired,j) - R_(damaged,j)   for every j that was not repaired
    ```

    The paper (arXiv 2606.02398) reports it beside the recovered share. A negative value is the price of the repair.

    Args:
        matrix ([`ScoreMatrix`]):
            The scores.
        since (`int`):
            Position of the damaged model: the last stage before the repair.
        repaired (`Iterable[str]`, *optional*):
            Names of the domains that were repaired.
        stage (`int`, *optional*, defaults to `-1`):
            Position of the repaired model; negative positions count from the end.

    Returns:
        `dict[str, Interval]`: Change in points of 100, by name of the domain, for those scored at both stages.
    """
    before, after = matrix.values[matrix.position(since)], matrix.values[matrix.position(stage)]
    repaired = set(repaired)
    return {
        domain: difference(after[domain], before[domain])
        for domain in matrix.domains
        if domain in before and domain in after and domain not in repaired
    }
