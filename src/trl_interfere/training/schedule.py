"""The ordered stages of a run."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ..recipe import check_names
from ..stage_record import stage_domains
from .config import STAGE_OPTIONS


@dataclass(frozen=True)
class Stage:
    """
    One RL pass over one domain, a refresh of one or several, or a heal.

    Args:
        domain (`str`, *optional*):
            Name of the domain; `None` for a heal, and a refresh of several domains.
        kind (`str`, *optional*, defaults to `"train"`):
            `"train"`, `"refresh"` or `"heal"`.
        overrides (`dict`, *optional*):
            Settings that differ from the configuration; of a refresh by distillation also `teachers`, the stage that
            teaches each domain, and `reward_weight`; of a heal `rank`, `max_drop`, `merge`, `names` and `search`.
        reason (`dict`, *optional*):
            Why a callback asked for this stage, as JSON values; it is kept in the manifest.
    """

    domain: str | None
    kind: str = "train"
    overrides: dict[str, Any] = field(default_factory=dict)
    reason: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def domains(self) -> list[str]:
        """Domains that are trained."""
        return stage_domains(self.domain, self.overrides)

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the overrides that are settings of the configuration."""
        return {name: value for name, value in self.overrides.items() if name not in ("teachers", "reward_weight")}


def build_schedule(
    domains: Iterable[str], order: list[str] | None, overrides: dict[str, dict] | None = None
) -> list[Stage]:
    """Stages of a run, in order."""
    domains, overrides = list(domains), overrides or {}
    order = domains if order is None else order
    if not order:
        raise ValueError("order: expected at least one domain, found none")
    for where, names in (("order", order), ("stage_overrides", overrides)):
        for name in names:
            if name not in domains:
                raise ValueError(f"{where}: unknown domain {name!r}, expected one with a train_dataset, {domains}")
    for name, settings in overrides.items():
        if not isinstance(settings, dict):
            raise ValueError(f"stage_overrides[{name!r}]: expected settings by name, found {settings!r}")
        check_names(settings, STAGE_OPTIONS, f"stage_overrides[{name!r}], settings that may differ between stages")
    return [Stage(domain=name, overrides=dict(overrides.get(name, {}))) for name in order]
