"""A bench for repairs: both checkpoints of an update in memory, and what scores a repair."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from ..analysis.architectures import Architecture
from ..analysis.gradients import Tensors
from ..analysis.report import InterferenceReport
from ..analysis.routes import RouteMap
from ..checkpoint import Checkpoint
from ..domain import Domain
from ..evaluation.bootstrap import Interval, difference
from ..evaluation.metrics import recovered
from ..evaluation.scorer import Scorer
from ..models import load_model, load_tokenizer
from ..recipe import RunFile
from .choice import sampling_settings, training_settings
from .merging import held
from .rollback import rolled_back, route_parameters
from .staleness import check_not_stale


_FIELDS = {"selection": "selection_dataset", "test": "eval_dataset"}
SPLITS = tuple(_FIELDS)
Scores = dict[str, np.ndarray]
# (model, split) -> score of each prompt, by domain
Score = Callable[[PreTrainedModel, str], Scores]


def domain_scorer(scorer: Scorer, domains: list[Domain]) -> Score:
    """
    Scores by domain on a split: `"selection"` is `selection_dataset`, `"test"` is `eval_dataset`.

    Args:
        scorer ([`Scorer`]):
            Completes the prompts.
        domains (`list[Domain]`):
            The domains, each with both splits.

    Returns:
        `Callable`: Function of a model and a split.

    Raises:
        `ValueError`: If a domain lacks a split: what is chosen on one must be reported on the other.
    """
    for domain in domains:
        for field in _FIELDS.values():
            if getattr(domain, field) is None:
                raise ValueError(f"domain {domain.name!r}: expected a {field}, found none")

    def score(model: PreTrainedModel, split: str) -> Scores:
        return {domain.name: scorer.score(model, domain, getattr(domain, _FIELDS[split])).values for domain in domains}

    return score


class RepairBench:
    """
    Measures repairs of an update: chosen on the selection split, reported on the test split.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model after the update. After each measurement it is as it was, to the bit.
        before (`dict[str, torch.Tensor]`):
            Parameters before the update, by name.
        report ([`InterferenceReport`]):
            The analysis.
        score (`Callable[[PreTrainedModel, str], dict[str, numpy.ndarray]]`):
            Score of each prompt, 0 to 1, by domain, of a model on a split, see [`domain_scorer`].
        measure (`Callable[[PreTrainedModel], dict[str, float]]`, *optional*):
            What choices are made by: points of 100 by domain, on the selection split. Defaults to the mean scores.
        peaks (`dict[str, dict[str, torch.Tensor]]`, *optional*):
            Parameters at the peak of each damaged domain. Defaults to `before` for the report's earlier domain.
        description ([`Architecture`], *optional*):
            Description of the architecture, if it is none of those that are known.
        known (`dict[str, dict[str, numpy.ndarray]]`, *optional*):
            Scores on the test split that are not to be measured again, such as those of the training: `"after"` of the
            model, and by damaged domain those at its peak.
        data (`dict`, *optional*):
            What is scored and how, as JSON values: a sweep of other data is not continued.

    Attributes:
        earlier (`list[str]`):
            Names of the damaged domains.
        damaged (`dict[str, float]`):
            The measure after the update, by domain.
        left_out (`list[str]`):
            Domains of a YAML file that are not scored, since they lack a split.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        before: Tensors,
        report: InterferenceReport,
        score: Score,
        measure: Callable[[PreTrainedModel], dict[str, float]] | None = None,
        peaks: dict[str, Tensors] | None = None,
        description: Architecture | None = None,
        known: dict[str, Scores] | None = None,
        data: dict[str, Any] | None = None,
    ):
        self.model, self.before, self.report, self.score = model, before, report, score
        self.measure = measure or self._mean_scores
        self.route_map = RouteMap(model.config, description)
        self.parameters = route_parameters(model, self.route_map)
        self.peaks = {report.earlier: before} if peaks is None else peaks
        self.earlier, self.data, self.left_out = list(self.peaks), data, []
        self._kept: dict[Any, Any] = {}
        name = [name for name, _ in model.named_parameters() if self.route_map.cut(name) is not None][-1]
        self._mark = name, model.get_parameter(name).detach().clone()
        for name, scores in (known or {}).items():
            place = ("test", b"", b"") if name == "after" else ("peak", name, "test")
            self._kept[place] = scores if name == "after" else scores[name]
        self.damaged = self.measured(np.array([], dtype=int), 1.0)
        unknown = sorted(set(self.earlier) - set(self.damaged))
        if unknown:
            raise ValueError(f"peaks: expected domains that are scored, {sorted(self.damaged)}, found {unknown}")

    @classmethod
    def from_run(
        cls,
        run: RunFile,
        report: InterferenceReport,
        before: str | Path | None = None,
        after: str | Path | None = None,
        progress: bool = False,
    ) -> "RepairBench":
        """
        A bench from the YAML file of a training and a report.

        Args:
            run ([`RunFile`]):
                Names the domains, and the settings of scoring. Domains with both splits are scored; those that the
                report names need them, the others are `left_out` without.
            report ([`InterferenceReport`]):
                The analysis.
            before (`str` or `pathlib.Path`, *optional*):
                Checkpoint before the update. Defaults to the one that the report names.
            after (`str` or `pathlib.Path`, *optional*):
                Checkpoint after it. Defaults to the one that the report names.
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar over prompts.

        Returns:
            [`RepairBench`]: The bench.

        Raises:
            `ValueError`: If a domain of the report lacks a split, or the checkpoints are not those of the report.
        """
        domains = [domain for domain in run.domains if all(getattr(domain, field) for field in _FIELDS.values())]
        scored = [domain.name for domain in domains]
        for name in (report.earlier, *report.later):
            if name not in scored:
                raise ValueError(
                    f"domain {name!r} of the report: expected it in the file with selection and eval data sets, found "
                    f"both for {scored}"
                )
        settings, sampling = training_settings(run), sampling_settings(run)
        device = PartialState(cpu=bool(settings["use_cpu"])).device
        name, first = str(report.after if after is None else after), report.before if before is None else before
        last = Checkpoint(name)
        check_not_stale(report, RouteMap(last.config), Checkpoint(first), last)
        model, start = load_model(name).to(device), load_model(first)
        template = settings["chat_template_kwargs"]
        scorer = Scorer(load_tokenizer(name), chat_template_kwargs=template, progress=progress, **sampling)
        # A batch is as large as the memory of a machine allows: another size is no other measurement.
        scoring = {name: value for name, value in sampling.items() if name != "batch_size"} | {"template": template}
        rows = {
            domain.name: {split: _digest(getattr(domain, field)) for split, field in _FIELDS.items()}
            for domain in domains
        }
        score = domain_scorer(scorer, domains)
        bench = cls(model, dict(start.named_parameters()), report, score, data={"scoring": scoring, "rows": rows})
        bench.left_out = [domain.name for domain in run.domains if domain.name not in scored]
        return bench

    def _mean_scores(self, model: PreTrainedModel) -> dict[str, float]:
        return {name: 100 * float(values.mean()) for name, values in self.score(model, "selection").items()}

    def measured(self, routes: np.ndarray, steps: float | np.ndarray) -> dict[str, float]:
        """The measure by domain with routes rolled back; measured once."""
        return self._with("measure", self.measure, routes, steps)

    def scores(self, routes: np.ndarray, steps: float | np.ndarray, split: str = "test") -> Scores:
        """Score of each prompt by domain with routes rolled back; scored once."""
        return self._with(split, lambda model: self.score(model, split), routes, steps)

    def _with(self, key: str, function: Callable, routes: np.ndarray, steps: float | np.ndarray) -> Any:
        routes = np.asarray(routes, dtype=int)
        steps = np.broadcast_to(np.asarray(steps, dtype=float), routes.shape)
        order = np.argsort(routes)
        place = (key, routes[order].tobytes(), steps[order].tobytes())
        if place not in self._kept:
            name, values = self._mark
            if not torch.equal(self.model.get_parameter(name), values):
                raise ValueError(
                    f"model: expected it as it is after the update, found {name} changed: a repair is measured when "
                    "the weights of another one have been put back"
                )
            with rolled_back(self.model, self.before, self.route_map, routes, steps) as model:
                self._kept[place] = function(model)
        return self._kept[place]

    def peak(self, domain: str, split: str = "test") -> np.ndarray:
        """Score of each prompt of a damaged domain at its peak."""
        place = ("peak", domain, split)
        if place not in self._kept:
            with held(self.model, self.peaks[domain]) as model:
                self._kept[place] = self.score(model, split)[domain]
        return self._kept[place]

    def choose(self, candidates: list[dict[str, float]], max_drop: float) -> int:
        """
        The candidate that repairs most and spares the others.

        Among those with no domain more than `max_drop` points below its value after the update, the one with the
        highest mean over the damaged domains; if there are none, the one with the highest mean over all domains. A
        choice by the damaged domains alone would take any step that pays with another one, and of several damaged
        domains the one that has lost much would be repaired with what is left of the others.

        Args:
            candidates (`list[dict[str, float]]`):
                Measures of each candidate by domain.
            max_drop (`float`):
                Points of 100.

        Returns:
            `int`: Position of the candidate.
        """
        allowed = [position for position, found in enumerate(candidates) if self.spares(found, max_drop)]
        names = self.earlier if allowed else list(self.damaged)
        return max(
            allowed or range(len(candidates)),
            key=lambda position: np.mean([candidates[position][name] for name in names]),
        )

    def spares(self, found: dict[str, float], max_drop: float) -> bool:
        """
        Whether a repair costs no domain more than it may.

        Args:
            found (`dict[str, float]`):
                The measure with the repair, by domain.
            max_drop (`float`):
                Points of 100 that a domain may lose against its value after the update.

        Returns:
            `bool`: Whether every domain keeps to that.
        """
        return all(found[name] >= value - max_drop for name, value in self.damaged.items())

    def figures(self, scores: list[Scores], split: str = "test") -> dict[str, Any]:
        """
        Recovered share and collateral of a repair, with paired bootstrap intervals over prompts.

        Args:
            scores (`list[dict[str, numpy.ndarray]]`):
                Scores of each draw of the repair, which are averaged prompt by prompt.
            split (`str`, *optional*, defaults to `"test"`):
                Their split.

        Returns:
            `dict`: `recovered`, `low`, `high`, `n`, `by_domain` (the same of each damaged domain), `by_draw`,
            `collateral` (change of every other domain, in points), `worst` (the lowest of them), `changes` (collateral
            with intervals), `own_changes` (the same of the damaged domains), `mean_score` (change of the mean score of
            all domains), `draws` and `split`.
        """
        mean = {name: np.mean([entry[name] for entry in scores], axis=0) for name in scores[0]}
        damaged = self.scores(np.array([], dtype=int), 1.0, split)
        shares = {name: recovered(mean[name], damaged[name], self.peak(name, split)) for name in self.earlier}
        first = shares[self.earlier[0]]
        if len(shares) > 1:
            # Of all that the domains have lost together; their prompts are different ones, so that intervals are given
            # by domain only.
            lost = {name: self.peak(name, split).mean() - damaged[name].mean() for name in self.earlier}
            back = {name: mean[name].mean() - damaged[name].mean() for name in self.earlier}
            whole = sum(lost.values())
            value = sum(back.values()) / whole if whole > 0 else np.nan
            first = Interval(value, np.nan, np.nan, sum(share.n for share in shares.values()))
        changes = {
            name: difference(values, damaged[name]) for name, values in mean.items() if name not in self.earlier
        }
        by_draw = [
            recovered_value(entry[self.earlier[0]], damaged[self.earlier[0]], self.peak(self.earlier[0], split))
            for entry in scores
        ]
        return {
            **share_fields(first),
            "by_domain": {name: share_fields(share) for name, share in shares.items()},
            "by_draw": [None if not np.isfinite(value) else value for value in by_draw],
            "collateral": {name: change.value for name, change in changes.items()},
            "worst": min((change.value for change in changes.values()), default=None),
            "changes": {name: change.to_dict() for name, change in changes.items()},
            "own_changes": {name: difference(mean[name], damaged[name]).to_dict() for name in self.earlier},
            "mean_score": 100
            * float(np.mean([values.mean() - damaged[name].mean() for name, values in mean.items()])),
            "draws": len(scores),
            "split": split,
        }


def _digest(dataset: Any) -> str:
    rows = json.dumps(dataset.to_list(), sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(rows.encode()).hexdigest()


def recovered_value(repaired: np.ndarray, damaged: np.ndarray, peak: np.ndarray) -> float:
    """The recovered share without its interval; `nan` where nothing was lost."""
    lost = peak.mean() - damaged.mean()
    return float((repaired.mean() - damaged.mean()) / lost) if lost > 0 else float("nan")


def share_fields(share: Interval) -> dict[str, float | None]:
    """`recovered`, `low`, `high` and `n` as JSON values: `None` where it is undefined."""
    fields = {"recovered": share.value, "low": share.low, "high": share.high}
    return {**{name: value if np.isfinite(value) else None for name, value in fields.items()}, "n": share.n}
