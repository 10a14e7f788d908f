"""RouteRollback: put the routes that carry the damage back to where they were."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..analysis.architectures import Architecture
from ..analysis.report import InterferenceReport
from ..analysis.routes import SCOPES, RouteMap
from ..checkpoint import Checkpoint, check_comparable
from .block_stream import BlockStream, skeleton
from .criteria import CRITERIA, IN_NATS, matched_routes, route_scores
from .layers import is_transposed
from .repair import Factors, Repair, recorded


# Steps that a search tries. Beyond 1 a route moves past its earlier state.
STEPS = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)


@dataclass
class RouteRollback:
    """
    The paper's experiment: put the most damaged routes back toward where they were.

    ```
    θ_r ← θ1_r - α (θ1_r - θ0_r)        for the chosen routes r
    ```

    The change of k channels has rank k in gate, up and down, that of heads the rank of their rows, so that a LoRA
    adapter holds it exactly.

    Example:

    ```python
    >>> from trl_interfere import InterferenceReport, RouteRollback

    >>> report = InterferenceReport.from_pretrained("out/analysis/math")
    >>> repair = RouteRollback(criterion="damage", budget=0.02, scope="mlp").fit(report)
    >>> repair.save_pretrained("rollback")
    ```

    Args:
        criterion (`str`, *optional*, defaults to `"damage"`):
            What routes are ranked by, see `trl_interfere.repair.criteria.CRITERIA`.
        budget (`float`, *optional*, defaults to `0.02`):
            Share of the routes of the scope that is rolled back.
        scope (`str`, *optional*, defaults to `"mlp"`):
            `"mlp"`, `"attention"` or `"joint"`.
        step (`float` or `str`, *optional*, defaults to `1.0`):
            α. 1 restores the routes, more goes beyond them. `"optimal"` takes the one of `STEPS` at which the
            `objective` of [`~RouteRollback.fit`] is lowest.
        protection (`float`, *optional*, defaults to `0.0`):
            Weight of what the later domains owe a route, which is subtracted from its score (criteria in nats only).
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random criteria.

    Raises:
        `ValueError`: If a setting is out of range.
    """

    criterion: str = "damage"
    budget: float = 0.02
    scope: str = "mlp"
    step: float | str = 1.0
    protection: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion: expected one of {sorted(CRITERIA)}, found {self.criterion!r}")
        if self.scope not in SCOPES:
            raise ValueError(f"scope: expected one of {sorted(SCOPES)}, found {self.scope!r}")
        if not 0 <= self.protection < np.inf or (self.protection and self.criterion not in IN_NATS):
            found = f"{self.protection!r} with {self.criterion!r}"
            raise ValueError(f"protection: expected 0, or more with a criterion of {IN_NATS}, found {found}")
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget: expected a share above 0 and up to 1, found {self.budget!r}")
        if self.step != "optimal" and not (isinstance(self.step, Real) and 0 < self.step < np.inf):
            raise ValueError(f"step: expected a number above 0 or 'optimal', found {self.step!r}")

    def select(self, report: InterferenceReport, route_map: RouteMap) -> np.ndarray:
        """
        Routes to roll back.

        Args:
            report ([`InterferenceReport`]):
                The analysis.
            route_map ([`RouteMap`]):
                The routes of the model.

        Returns:
            `numpy.ndarray` of shape `(chosen,)`: Indices of routes, highest score first. `"random_matched"` has fewer
            than asked for where a layer has not as many others.

        Raises:
            `ValueError`: If the report is of another number of routes, or nothing is left to match.
        """
        if (count := len(report.routes["damage"])) != route_map.num_routes:
            raise ValueError(f"report: expected {route_map.num_routes} routes as in the model, found {count}")
        scores = route_scores(self.criterion, report, route_map, self.protection, self.seed)
        candidates = np.flatnonzero(route_map.scope(self.scope))
        ranked = candidates[np.argsort(-scores[candidates], kind="stable")]
        chosen = ranked[: max(1, round(self.budget * len(ranked)))]
        if self.criterion == "random_matched":
            chosen = matched_routes(chosen, report, route_map, seed=self.seed)
            if not len(chosen):
                raise ValueError(f"budget: expected one that leaves routes to match with, found {self.budget:g}")
        return chosen

    def fit(
        self,
        report: InterferenceReport,
        objective: Callable[[PreTrainedModel], float] | None = None,
        before: str | Path | None = None,
        after: str | Path | None = None,
        base: str | Path | None = None,
        description: Architecture | None = None,
        progress: bool = False,
    ) -> Repair:
        """
        Make the repair.

        Args:
            report ([`InterferenceReport`]):
                The analysis; it names both checkpoints.
            objective (`Callable[[PreTrainedModel], float]`, *optional*):
                What `step="optimal"` minimises, such as a loss, or minus a score, on the selection split.
            before (`str` or `pathlib.Path`, *optional*):
                Where the checkpoint before the update lies, if not where the report says.
            after (`str` or `pathlib.Path`, *optional*):
                Where the checkpoint after it lies, likewise: the one that is repaired.
            base (`str` or `pathlib.Path`, *optional*):
                Model that adapters stand on. Defaults to the one that they name.
            description ([`Architecture`], *optional*):
                Description of the architecture, if it is none of those that are known.
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show progress bars.

        Returns:
            [`Repair`]: The repair. What a LoRA adapter cannot hold, the biases of a route, stays as it is; its record
            says how much of the routes' update that is.

        Raises:
            `ValueError`: If the report is of other checkpoints, the repair would change nothing, or an objective is
                missing or nowhere finite.
        """
        started = time.perf_counter()
        if self.step == "optimal" and objective is None:
            raise ValueError("objective: expected what step='optimal' minimises, such as a loss, found none")
        peak, final = (Checkpoint(place, base=base) for place in (before or report.before, after or report.after))
        check_comparable(peak, final)
        places = recorded(final, {report.earlier: peak})
        for name, place in (("before", places["peaks"][report.earlier]), ("after", places["final"])):
            if (report.digests or {}).get(name) not in (None, place["digest"]):
                raise ValueError(f"report: expected one of {place['path']}, found one of other weights: analyze again")
        route_map = RouteMap(final.config, description)
        routes = self.select(report, route_map)
        factors, taken, left = _route_factors(peak, final, route_map, routes, progress)
        if not taken:
            raise ValueError(f"scope: expected one with weights that were trained, found none in {len(routes)} routes")

        def repair(step: float, record: dict[str, Any]) -> Repair:
            return Repair({name: (step * b, a) for name, (b, a) in factors.items()}, final, record)

        step, searched = self.step, {}
        if step == "optimal":
            for tried in tqdm(STEPS, desc="steps", disable=not progress):
                searched[tried] = float(objective(repair(tried, {}).merge()))
            finite = {tried: value for tried, value in searched.items() if np.isfinite(value)}
            if not finite:
                raise ValueError(f"objective: expected a finite value at one of the steps {STEPS}, found none")
            step = min(finite, key=finite.get)
        chosen: dict[str, dict[str, list[int]]] = {}
        for route in np.sort(routes):
            kind, layer, position = route_map.locate(int(route))
            chosen.setdefault(kind, {}).setdefault(str(layer), []).append(position)
        carried = float(report.routes["damage"][routes].sum())
        record = {
            "method": "routes",
            **{name: value for name, value in asdict(self).items() if name != "step"},
            "step": step,
            "searched": [{"step": tried, "objective": value} for tried, value in searched.items()],
            "routes": chosen,
            "carried_damage": {"nats": carried, "share": carried / report.attributed if report.attributed else None},
            "checkpoints": places,
            "left_as_it_is": {report.earlier: left / (taken + left)},
            "cost": self._cost(report) | {"seconds": round(time.perf_counter() - started, 2)},
        }
        return repair(step, record)

    def _cost(self, report: InterferenceReport) -> dict[str, int]:
        """Sequences that the criterion has put through a forward and a backward pass in the analysis."""
        domains = [report.earlier, *(report.later if self.protection else [])]
        nodes = report.config.get("quadrature_nodes", 0)
        passes = {"damage": nodes, "random_matched": nodes, "first_order": 1, "second_order": 2}.get(self.criterion, 0)
        count = passes * sum(report.references.get(name, {}).get("n", 0) for name in domains)
        return {"sequences_forward": count, "sequences_backward": count}


def _route_factors(
    before: Checkpoint, after: Checkpoint, route_map: RouteMap, routes: np.ndarray, progress: bool = False
) -> tuple[Factors, float, float]:
    """
    Factors of -δ on the slices of routes, and the squared norms of what they hold and of what no adapter can.

    k rows of a matrix are `(columns of the identity) (rows of -δ)`, and k columns `(columns of -δ) (rows of the
    identity)`: a product of rank k.
    """
    model, chosen = skeleton(after), np.zeros(route_map.num_routes)
    chosen[routes] = 1.0
    settings = {"dtype": torch.float64, "device": torch.device("cpu"), "adapted": False}
    sources = [BlockStream(checkpoint, model, **settings) for checkpoint in (before, after)]
    factors, taken, left = {}, 0.0, 0.0
    parameters = [(name, value) for name, value in model.named_parameters() if route_map.cut(name) is not None]
    for name, parameter in tqdm(parameters, desc="routes", unit="tensor", disable=not progress):
        mask = route_map.spread(name, chosen, torch.empty(parameter.shape, dtype=torch.float64))
        if not mask.any():
            continue
        start, end = (source.tensor(name) for source in sources)
        change = mask * (start - end)
        for sign, checkpoint in ((1, before), (-1, after)):
            pair = checkpoint.factors(name)
            if pair is not None:
                change += sign * mask * (torch.from_numpy(pair[0]).double() @ torch.from_numpy(pair[1]).double())
        size = float(change.square().sum())
        module = model.get_submodule(name.rpartition(".")[0])
        experts = parameter.ndim == 3 and len(route_map.cut(name).axes) == 2
        if not experts and not (parameter.ndim == 2 and isinstance(module, (nn.Linear, Conv1D))):
            left += size
        elif size:
            taken += size
            if is_transposed(module):
                change, mask = change.mT, mask.mT
            factors[name if experts else name.removesuffix(".weight")] = _split(change.float(), mask != 0)
    return factors, taken, left


def _split(change: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of a matrix, or of one for each expert, that is 0 but for some rows, or some columns."""
    outputs, inputs = change.shape[-2:]
    if mask.shape[-1] > 1:  # columns
        right, left = _split(change.mT, mask.mT)
        return left.mT.contiguous(), right.mT.contiguous()
    rows = mask[..., 0]
    rank = int(rows.sum(-1).max())
    if rank >= inputs:
        return change.contiguous(), torch.eye(inputs).expand(*change.shape[:-2], -1, -1).contiguous()
    # Where an expert has fewer than another, rows that are 0 fill up.
    places = rows.int().argsort(dim=-1, descending=True, stable=True)[..., :rank]
    selection = nn.functional.one_hot(places, outputs).float().mT.contiguous()
    return selection, torch.take_along_dim(change, places[..., None], dim=-2)
