"""What each stage of a run changed, and how far the edits of two domains lie on the same routes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint import Checkpoint
from .overlap import Overlap, overlaps
from .routes import RouteMap
from .weight_diff import UpdateStatistics, update_statistics


@dataclass
class StageEdits:
    """
    Sparsity of the update of each stage, and the overlap of the routes that two stages changed most.

    Args:
        updates (`dict[str, UpdateStatistics]`):
            Statistics of the update of each stage, by its domain.
        changed (`dict[str, dict[str, dict[str, Overlap]]]`):
            Overlaps by kind of route, for each pair of domains once.
    """

    updates: dict[str, UpdateStatistics]
    changed: dict[str, dict[str, dict[str, Overlap]]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return {
            "updates": {name: update.to_dict() for name, update in self.updates.items()},
            "changed": {
                first: {
                    second: {kind: entry.to_dict() for kind, entry in kinds.items()} for second, kinds in row.items()
                }
                for first, row in self.changed.items()
            },
        }


def stage_edits(
    checkpoints: Sequence[Checkpoint],
    domains: Sequence[str],
    route_map: RouteMap,
    share: float = 0.1,
    progress: Callable[[str], None] = lambda _: None,
) -> StageEdits:
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
        progress (`Callable[[str], None]`, *optional*):
            Called with the domain of each stage when it is done.

    Returns:
        [`StageEdits`]: The figures.

    Raises:
        `ValueError`: If the numbers do not fit, a domain occurs twice, or two neighbours cannot be compared or are
            identical.
    """
    if len(domains) + 1 != len(checkpoints) or len(set(domains)) != len(domains):
        raise ValueError(
            f"domains: expected {len(checkpoints) - 1} different ones for {len(checkpoints)} checkpoints, "
            f"found {list(domains)}"
        )
    updates = {}
    for domain, before, after in zip(domains, checkpoints, checkpoints[1:], strict=False):
        (updates[domain],) = update_statistics([before, after], route_map)
        progress(domain)
    sizes = {domain: update.edit_size for domain, update in updates.items()}
    changed = {
        first: {
            second: overlaps(sizes[first], sizes[second], route_map, share) for second in list(sizes)[position + 1 :]
        }
        for position, first in enumerate(list(sizes)[:-1])
    }
    return StageEdits(updates, changed)
