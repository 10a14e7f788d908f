"""What a run knows of one of its stages."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, get_origin


KINDS = ("base", "train", "refresh", "heal")


@dataclass
class StageRecord:
    """
    A finished stage.

    Args:
        index (`int`):
            Position in the run; 0 is the base model.
        kind (`str`):
            `"base"`, `"train"`, `"refresh"` or `"heal"`.
        domain (`str`, *optional*):
            Domain that was trained; `None` for the base model, a heal, and a refresh of several domains.
        folder (`str`, *optional*):
            Folder of the weights, relative to the folder of the run; `None` for the base model.
        steps (`int`):
            Optimizer steps.
        seconds (`float`):
            Training time; a resumed stage counts only its last part.
        scores (`dict[str, dict]`):
            For each domain `value`, `low`, `high`, `n` and `file`, the per-prompt scores.
        seed (`int`):
            Seed of the stage.
        overrides (`dict`):
            Settings in which the stage differed from the configuration; of a refresh by distillation, also its
            `teachers`, stages by domain, and its `reward_weight`.
        versions (`dict[str, str]`):
            Versions of the packages that ran it.
        reason (`dict`, *optional*):
            Why a callback asked for this stage.
    """

    index: int
    kind: str
    domain: str | None
    folder: str | None
    steps: int
    seconds: float
    scores: dict[str, dict]
    seed: int
    overrides: dict[str, Any]
    versions: dict[str, str]
    reason: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the stage and of its folder, such as `0-base`, `2-math`, `5-refresh-math` or `6-heal`."""
        return stage_name(self.index, self.kind, self.domain)

    @property
    def parts(self) -> list[str]:
        """Its files of scores and its folder of weights, relative to the folder of the run."""
        return [entry["file"] for entry in self.scores.values()] + ([self.folder] if self.folder else [])

    @property
    def domains(self) -> list[str]:
        """Domains that were trained; a refresh by distillation may have several."""
        return stage_domains(self.domain, self.overrides)


def stage_domains(domain: str | None, overrides: dict[str, Any]) -> list[str]:
    return list(overrides.get("teachers", [] if domain is None else [domain]))


def stage_name(index: int, kind: str, domain: str | None) -> str:
    return "-".join([str(index), *([] if kind == "train" else [kind]), *([] if domain is None else [domain])])


_FIELDS = {entry.name: get_origin(entry.type) or entry.type for entry in fields(StageRecord)}
_FIELDS |= {"domain": str | None, "folder": str | None, "seconds": int | float}
_SCORE = {"value": int | float, "low": int | float, "high": int | float, "n": int, "file": str}


def read_record(entry: Any, where: str) -> StageRecord:
    """A stage of `stages.json`, with the type of every field looked at once."""
    if not isinstance(entry, dict) or not {*_FIELDS} - {"reason"} <= {*entry} <= {*_FIELDS}:
        raise ValueError(f"{where}: expected a stage with the fields {[*_FIELDS]}, found {entry!r:.200}")
    _check_types({"reason": {}, **entry}, _FIELDS, where)
    if entry["kind"] not in KINDS:
        raise ValueError(f"{where}, kind: expected one of {KINDS}, found {entry['kind']!r}")
    for domain, figures in entry["scores"].items():
        _check_types(figures if isinstance(figures, dict) else {}, _SCORE, f"{where}, scores, {domain}")
    return StageRecord(**entry)


def _check_types(values: dict[str, Any], types: dict[str, Any], where: str) -> None:
    for name, kind in types.items():
        value = values.get(name)
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if not fits or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{where}, {name}: expected {getattr(kind, '__name__', kind)}, found {value!r:.100}")
