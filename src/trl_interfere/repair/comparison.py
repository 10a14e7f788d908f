"""Repairs of one checkpoint side by side: every arm by one protocol."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..analysis.references import References
from ..analysis.report import InterferenceReport
from ..domain import Domain
from ..evaluation.bootstrap import difference
from ..evaluation.scorer import Scorer
from ..models import load_model
from .heal import Scores, account, scores_of
from .repair import Repair
from .route_rollback import RouteRollback
from .subspace_rollback import SubspaceRollback


# Steps of a rollback of routes, and shares of all weights, that are chosen from.
ROUTE_STEPS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
Candidates = dict[Any, Callable[[], PreTrainedModel]]


@dataclass
class Comparison:
    """
    One protocol for all arms: of the candidates of an arm, the one with the highest mean score on the selection split
    is taken, among those with which no domain loses more than `max_drop` points there. Where there is none, the one
    with the smallest loss is taken, and the row says so. All figures of the row are from the test split. An arm
    with one candidate has nothing to choose. `scores` are those of each test prompt at the peaks and at the end.
    """

    final: str | Path
    peaks: dict[str, str | Path]
    domains: Sequence[Domain]
    scorer: Scorer
    scores: tuple[Scores, Scores]
    max_drop: float = 1.0

    @cached_property
    def before(self) -> Scores:
        """Scores of the final checkpoint on the selection split."""
        return scores_of(self.scorer, load_model(self.final), self.domains, "selection")

    def arm(self, name: str, candidates: Candidates, cost: dict[str, Any] | None = None, **labels: Any) -> dict:
        """Choose one of the candidates and measure it."""

        def rank(build: Callable[[], PreTrainedModel]) -> tuple[bool, float]:
            after = scores_of(self.scorer, build(), self.domains, "selection")
            changes = [difference(after[domain], self.before[domain]).value for domain in after]
            keeps = min(changes) >= -self.max_drop
            return keeps, np.mean(changes) if keeps else min(changes)

        chosen, within = next(iter(candidates)), None
        if len(candidates) > 1:
            ranks = {candidate: rank(build) for candidate, build in candidates.items()}
            chosen = max(ranks, key=ranks.get)
            within = ranks[chosen][0]
        return self.row(name, candidates[chosen](), cost, chosen=chosen, within_max_drop=within, **labels)

    def row(self, name: str, model: PreTrainedModel, cost: dict[str, Any] | None = None, **labels: Any) -> dict:
        """Figures of a model on the test split."""
        healed = scores_of(self.scorer, model, self.domains, "test")
        return {"arm": name, **labels, "cost": cost, **account(*self.scores, healed, list(self.peaks))}

    def subspace(
        self, name: str = "subspace", given: dict[str, References] | None = None, **settings: Any
    ) -> tuple[dict, Repair]:
        """A subspace rollback, on given references or those that it samples: its row, and the repair."""
        repair = SubspaceRollback(**settings).fit(self.final, self.peaks, self.domains, given)
        shown = {key: value for key, value in settings.items() if key not in ("max_new_tokens", "batch_size")}
        figures = repair.record["layers"]
        for key in ("effective_dimension", "effective_dimension_random"):
            shown[key] = float(np.mean([layer[key] for layer in figures if key in layer]))
        return self.row(name, repair.merge(), repair.record["cost"], **shown), repair

    def routes(
        self, report: InterferenceReport, criterion: str, budget: float, scope: str, protection: float = 0.0
    ) -> dict:
        """A rollback of routes at its own best step."""
        labels = {"criterion": criterion, "budget": budget, "scope": scope, "protection": protection}

        def fit(step: float) -> Repair:
            rollback = RouteRollback(step=step, **labels)
            return rollback.fit(report, before=self.peaks[report.earlier], after=self.final)

        steps = {step: lambda step=step: fit(step).merge() for step in ROUTE_STEPS}
        return self.arm("routes", steps, fit(1.0).record["cost"], **labels)

    def interpolation(self, domain: str) -> dict:
        """All weights moved back towards one peak (WiSE-FT, arXiv 2109.01903)."""

        def interpolated(share: float) -> PreTrainedModel:
            model, earlier = load_model(self.final), dict(load_model(self.peaks[domain]).named_parameters())
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.lerp_(earlier[name].to(parameter), share)
            return model

        return self.arm("interpolation", {share: partial(interpolated, share) for share in SHARES}, toward=domain)
