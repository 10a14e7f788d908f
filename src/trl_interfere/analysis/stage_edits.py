"""What each stage of a run changed, and how far the edits of two domains lie on the same routes."""

from collections.abc import Sequence
from typing import Any

from ..checkpoint import Checkpoint
from .overlap import pairwise_overlaps
from .routes import RouteMap
from .weight_diff import update_statistics


def stage_edits(
    checkpoints: Sequence[Checkpoint], domains: Sequence[str], route_map: RouteMap, share: float = 0.1
) -> dict[str, dict[str, Any]]:
    """
    Compare neighbouring checkpoints of a run.

    Args:
        checkpoints (`Sequence[Checkpoint]`):
            The base, and the checkpoint at the end of each stage.
        domains (`Sequence[str]`):
            Domain of each stage, one fewer than there are checkpoints, each once.
        route_map ([`RouteMap`]):
            The routes.
        share (`float`, *optional*, defaults to `0.1`):
            Share of the routes of a kind that count as changed.

    Returns:
        `dict[str, dict]`: `updates`, the figures of [`UpdateStatistics`] by domain, and `changed`, those of the
        [`Overlap`] of the routes that two stages changed most, as `{first: {second: {kind: figures}}}`.

    Raises:
        `ValueError`: If the numbers do not fit, a domain occurs twice, or two neighbours cannot be compared or are
            identical.
    """
    if len(domains) + 1 != len(checkpoints) or len(set(domains)) != len(domains):
        raise ValueError(
            f"domains: expected {len(checkpoints) - 1} different ones for {len(checkpoints)} checkpoints, "
            f"found {list(domains)}"
        )
    pairs = zip(domains, checkpoints, checkpoints[1:], strict=False)
    updates = {domain: update_statistics([before, after], route_map)[0] for domain, before, after in pairs}
    sizes = {domain: update.edit_size for domain, update in updates.items()}
    return {
        "updates": {domain: update.to_dict() for domain, update in updates.items()},
        "changed": pairwise_overlaps(sizes, route_map, share),
    }
