"""InterferenceAnalyzer: what an update did to an earlier domain, and through which routes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import reduce
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import __version__
from ..adapters import ExpertAdapterError
from ..checkpoint import Checkpoint, check_comparable
from ..domain import Domain
from ..models import exact_experts, load_model, load_tokenizer
from .activity import ActivityMeter, route_activity
from .architectures import Architecture
from .attribution import (
    UpdatePath,
    attribution,
    difference_step,
    dot,
    first_order,
    second_order,
    second_order_error,
)
from .comparable import (
    check_finite,
    check_fits,
    check_same_shape,
    count_buffers_that_differ,
    identical,
    model_name,
)
from .config import InterferenceConfig
from .conflict_subspace import conflict_subspace, random_update
from .cosines import GradientProducts
from .gradients import Batches, Shard, Tensors, checkpointed, mean_gradient, mean_loss, num_tokens
from .objectives import ForwardKL, Objective, grpo, nll
from .opposition import opposed_edits
from .overlap import active_overlaps, overlaps
from .references import References, collect_references, collect_rollouts
from .report import InterferenceReport
from .room import Room
from .routes import RouteMap
from .routing import HeldRouting
from .weight_diff import identical_when_stored, update_statistics


@dataclass
class _DomainBatches:
    """Batches of the references of one domain: of both halves, of all, and those of this process."""

    halves: list[Batches]
    all: Batches
    mine: Batches


class InterferenceAnalyzer:
    """
    Measures how an update, from one checkpoint to a later one, damaged an earlier domain.

    Example:

    ```python
    >>> from trl_interfere import InterferenceAnalyzer

    >>> analyzer = InterferenceAnalyzer.from_pretrained(before="out/stages/2-math", after="out/stages/3-qa")
    >>> report = analyzer.analyze(earlier=math, later=qa)
    >>> report.damage, report.cosines["global"]
    ```

    Args:
        before ([`~transformers.PreTrainedModel`]):
            Model before the update.
        after ([`~transformers.PreTrainedModel`]):
            Model after it, of the same architecture.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Their tokenizer.
        base ([`~transformers.PreTrainedModel`], *optional*):
            Model that the earlier domain's own training started from. Without it there is no `route_conflict`.
        config ([`InterferenceConfig`], *optional*):
            Settings.
        description ([`Architecture`], *optional*):
            Description of the architecture, if it is none of those that are known.
        checkpoints (`list[Checkpoint]`, *optional*):
            The files of before and after, or of base, before and after, from which the sparsity of the update is
            taken. [`~InterferenceAnalyzer.from_pretrained`] passes them.

    Raises:
        `ValueError`: If the checkpoints differ in architecture or shapes, hold NaN or infinity, or are identical.
    """

    def __init__(
        self,
        before: PreTrainedModel,
        after: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        base: PreTrainedModel | None = None,
        config: InterferenceConfig | None = None,
        description: Architecture | None = None,
        checkpoints: list[Checkpoint] | None = None,
    ):
        self.config = config or InterferenceConfig()
        self.checkpoints = checkpoints
        self.tokenizer = tokenizer
        self.before, self.after, self.base = before.eval(), after.eval(), None if base is None else base.eval()
        check_finite(before, "before")
        models = [before, after] if base is None else [before, after, base]
        for label, model in zip(("after", "base"), models[1:], strict=False):
            check_same_shape(before, model, label)
        count_buffers_that_differ(models)
        for model in models:
            exact_experts(model)
        for label, model in zip(("after", "base"), models[1:], strict=False):
            if identical(before, model):
                raise ValueError(
                    f"{label}: expected another checkpoint than before, {model_name(before)}; {model_name(model)} is "
                    "identical to it"
                )
        self.route_map = RouteMap(before.config, description)
        names = [name for name, _ in before.named_parameters()]
        on_disk = [name for checkpoint in checkpoints or [] for name in checkpoint.tensors]
        self.route_map.check(names, model_name(before), all_known=False)
        if on_disk:
            self.route_map.check(on_disk, f"{checkpoints[-1].name} on disk", all_known=False)
            self.route_map.check([*names, *on_disk], model_name(before))

    @classmethod
    def from_pretrained(
        cls,
        before: str | Path,
        after: str | Path,
        base: str | Path | None = None,
        config: InterferenceConfig | None = None,
        dtype: str | torch.dtype = "float32",
        device_map: str | dict | None = None,
        trust_remote_code: bool = False,
        description: Architecture | None = None,
        max_memory: dict | None = None,
    ) -> "InterferenceAnalyzer":
        """
        Load the checkpoints.

        Args:
            before (`str` or `pathlib.Path`):
                Folder or Hub id of the checkpoint before the update.
            after (`str` or `pathlib.Path`):
                Folder or Hub id of the checkpoint after it.
            base (`str` or `pathlib.Path`, *optional*):
                Checkpoint that the earlier domain's own training started from.
            config ([`InterferenceConfig`], *optional*):
                Settings.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`):
                Data type to compute in.
            device_map (`str` or `dict`, *optional*):
                Placement, as in transformers.
            trust_remote_code (`bool`, *optional*, defaults to `False`):
                Whether to run code that comes with the checkpoint.
            description ([`Architecture`], *optional*):
                Description of the architecture, if it is none of those that are known.
            max_memory (`dict`, *optional*):
                Memory of each device that `device_map` may use, as in transformers.

        Returns:
            [`InterferenceAnalyzer`]: The analyzer.
        """
        config = config or InterferenceConfig()
        given = [name for name in (base, before, after) if name is not None]
        try:
            checkpoints = [Checkpoint(name, trust_remote_code=trust_remote_code) for name in given]
        except ExpertAdapterError:  # its update is not one of the tensors in the files of its model
            checkpoints = None
        for checkpoint in (checkpoints or [])[:-1]:
            check_comparable(checkpoint, checkpoints[-1])
        # With `offload` one model computes; of the others only the weights are read, tensor by tensor. The base model
        # never computes, but for the divergence from it.
        placed = {"before": True, "after": not config.offload, "base": config.objective == "kl"}
        models = {
            name: None
            if checkpoint is None
            else load_model(
                checkpoint,
                dtype=dtype,
                device_map=device_map if placed[name] else None,
                trust_remote_code=trust_remote_code,
                max_memory=max_memory if placed[name] else None,
            )
            for name, checkpoint in (("before", before), ("after", after), ("base", base))
        }
        tokenizer = load_tokenizer(before, base=after, trust_remote_code=trust_remote_code)
        return cls(
            models["before"],
            models["after"],
            tokenizer,
            base=models["base"],
            config=config,
            description=description,
            checkpoints=checkpoints,
        )

    def references(self, earlier: Domain, later: list[Domain], others: Sequence[Domain] = ()) -> dict[str, References]:
        """
        The completions that losses are taken on, by domain: those of the earlier domain and of the others come from
        `before`, those of the later ones from `after`.
        """
        references = {
            domain.name: collect_references(self.before, self.tokenizer, domain, self.config)
            for domain in (earlier, *others)
        }
        path = None
        if self.config.reference == "correct" and self.after.device != self.before.device:
            path = UpdatePath(self.before, dict(self.after.named_parameters()), self.config.offload)
        try:
            writer = self.after if path is None else path.move(1.0)
            for domain in later:
                references[domain.name] = collect_references(writer, self.tokenizer, domain, self.config)
        finally:
            if path is not None:
                path.move(0.0)
        for entry in references.values():
            check_fits(self.before, entry)
        return references

    def batches(self, references: dict[str, References]) -> dict[str, Batches]:
        """References by domain as padded batches on the device of the model, one half after the other."""
        return {name: self._split(entry).all for name, entry in references.items()}

    def passes(self, later: int = 1, others: int = 0) -> dict[str, float]:
        """
        Gradient passes of each part of an analysis, by the names that `progress` is called with, in their order.

        A pass over the references of any domain counts the same, and a forward pass alone as a third of one. Reading
        the files and writing references are no passes.
        """
        config, domains = self.config, 1 + later + others
        parts = {"reference completions": 0.0}
        if self.checkpoints is not None:
            parts["files of the checkpoints"] = 0.0
        if not self._shares_passes:
            parts["activity"] = domains / 3
        parts[self._gradient_part] = float(domains)
        check = 8 * min(1.0, config.check_prompts / config.max_prompts)
        parts["damage of the earlier domain"] = 2 + check + config.quadrature_nodes
        parts["damage of the later domains"] = config.later_quadrature_nodes * later + domains / 3
        if config.subspace_size:
            share = min(1.0, config.subspace_prompts / config.max_prompts)
            parts["conflict subspace"] = 2 * share * 2 * (2 * config.subspace_size + 2)
        return parts

    @property
    def _shares_passes(self) -> bool:
        # The passes of the gradients measure activity too, if each of them computes every reference once.
        config = self.config
        return config.objective == "nll" and not config.gradient_checkpointing and not config.data_parallel

    @property
    def _gradient_part(self) -> str:
        return "gradients and activity of the domains" if self._shares_passes else "gradients of the domains"

    def analyze(
        self,
        earlier: Domain,
        later: Domain | list[Domain],
        progress: Callable[[str], None] = lambda _: None,
        others: Sequence[Domain] = (),
    ) -> InterferenceReport:
        """
        Analyse the update.

        Args:
            earlier ([`Domain`]):
                Domain that may have been damaged.
            later ([`Domain`] or `list[Domain]`):
                Domains that the update was trained on.
            progress (`Callable[[str], None]`, *optional*):
                Called with the name of each part when it begins.
            others (`Sequence[Domain]`, *optional*):
                Domains whose activity and gradients are compared too, one gradient each; the update was not trained
                on them, and no damage of theirs is attributed.

        Returns:
            [`InterferenceReport`]: The figures, and one array per measure over routes.

        Raises:
            `ValueError`: If a domain has no references, or the objective is `"kl"` and there is no base.
        """
        later = [later] if isinstance(later, Domain) else list(later)
        config = self.config
        if config.objective == "kl" and self.base is None:
            raise ValueError("objective: 'kl' needs `base`, from which the divergence is taken, found none")
        names = [domain.name for domain in (earlier, *later, *others)]
        if not later or len(set(names)) != len(names):
            raise ValueError(f"domains: expected an earlier one and at least one later one, each once, found {names}")
        progress("reference completions")
        references = self.references(earlier, later, others)
        with checkpointed(self.before, config.gradient_checkpointing):
            return self._analyze(earlier, later, others, references, progress)

    def _analyze(
        self,
        earlier: Domain,
        later: list[Domain],
        others: Sequence[Domain],
        references: dict[str, References],
        progress: Callable[[str], None],
    ) -> InterferenceReport:
        config, route_map, later_names = self.config, self.route_map, [domain.name for domain in later]
        batches = {name: self._split(entry) for name, entry in references.items()}
        updates, digests = self._files(progress)
        activity, losses, halves = self._gradients([earlier, *later, *others], batches, progress)
        products = GradientProducts(halves, route_map, self.before.device)
        gradient = None
        if config.objective == "nll":
            gradient, loss_before = _sum(halves[earlier.name]), losses
        else:
            loss_before = {name: mean_loss(self.before, entry.mine) for name, entry in batches.items()}
        del halves
        for name, loss in loss_before.items():
            if not np.isfinite(loss):
                dtype = str(self.before.dtype).removeprefix("torch.")
                raise ValueError(f"before: expected a finite loss on {name!r}, found {loss} in {dtype}: use float32")

        progress("damage of the earlier domain")
        damaged = batches[earlier.name].mine
        check = self._thinned(references[earlier.name], config.check_prompts)
        few = self._thinned(references[earlier.name], config.subspace_prompts) if config.subspace_size else []
        routing = HeldRouting(self.before, damaged[0] if damaged else batches[earlier.name].all[0])
        for part in (damaged, check, few, *(batches[name].mine for name in later_names)):
            routing.record(part)
        path = UpdatePath(self.before, dict(self.after.named_parameters()), config.offload)
        subspace, directions, held = None, None, None
        try:
            first = first_order(path, damaged, route_map, gradient)
            del gradient  # of the size of the model, and reduced to routes
            step = difference_step(path) if config.difference_step is None else config.difference_step
            with routing.held():
                second = second_order(path, damaged, route_map, step)
                error = None
                if check and second.total:
                    error = abs(second.total) * second_order_error(path, check, route_map, step)
                damage = attribution(path, damaged, route_map, config.quadrature_nodes)
                progress("damage of the later domains")
                terms = {
                    name: attribution(path, batches[name].mine, route_map, config.later_quadrature_nodes)
                    for name in later_names
                }
                path.move(1.0)
                if routing.routers:
                    held = mean_loss(self.before, damaged)
            loss_after = {name: mean_loss(self.before, entry.mine) for name, entry in batches.items()}
            switched = self._switched(routing, damaged)
            if config.subspace_size:
                progress("conflict subspace")
                with routing.held():
                    subspace, directions = self._subspace(path, few, len(references[earlier.name].prompts), step)
        finally:
            path.move(0.0)

        routes = {
            "damage": damage.routes,
            "first_order": first.routes,
            "second_order": second.routes,
            "later_damage": np.mean([entry.routes for entry in terms.values()], axis=0),
            "edit_size": np.sqrt(dot(route_map, path.delta, path.delta).routes),
            "activity_earlier": activity[earlier.name],
            "activity_later": np.mean([activity[name] for name in later_names], axis=0),
        }
        overlap = {"active": active_overlaps(activity, route_map)}
        if self.base is not None:
            routes |= opposed_edits(route_map, self.base, path.start, path.delta)
            changed = overlaps(routes["earlier_edit_size"], routes["edit_size"], route_map)
            overlap["changed"] = {kind: entry.to_dict() for kind, entry in changed.items()}
        return InterferenceReport(
            before=model_name(self.before),
            after=model_name(self.after),
            base=None if self.base is None else model_name(self.base),
            earlier=earlier.name,
            later=later_names,
            dtype=str(self.before.config.dtype).removeprefix("torch."),
            computed_in=str(self.before.dtype).removeprefix("torch."),
            references={
                name: {
                    "kind": config.reference,
                    "n": len(entry.completions),
                    "considered": entry.considered,
                    "tokens": entry.num_tokens,
                }
                for name, entry in references.items()
            },
            loss_before=loss_before[earlier.name],
            loss_after=loss_after[earlier.name],
            first_order=first.total,
            second_order=second.total,
            second_order_error=error,
            difference_step=step,
            attributed=float(damage.routes.sum()),
            outside_routes=damage.outside,
            switching=None if held is None else loss_after[earlier.name] - held,
            switched=switched,
            later_loss_before={name: loss_before[name] for name in later_names},
            later_loss_after={name: loss_after[name] for name in later_names},
            later_residual={name: loss_after[name] - loss_before[name] - entry.total for name, entry in terms.items()},
            cosines=products.figures(earlier.name, later_names),
            subspace=subspace,
            directions=directions,
            updates=updates,
            digests=digests,
            identical_in_bfloat16=identical_when_stored(path.start, path.end, torch.bfloat16),
            overlaps=overlap,
            route_counts={kind: list(counts) for kind, counts in route_map.counts.items()},
            config=config.to_dict(),
            versions={
                "trl-interfere": __version__,
                **{package: version(package) for package in ("torch", "transformers")},
            },
            routes=routes,
        )

    def _files(self, progress: Callable[[str], None]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Statistics of the updates and digests of the checkpoints, from their files."""
        if self.checkpoints is None:
            return None, None
        progress("files of the checkpoints")
        found = update_statistics(self.checkpoints)
        names = ("update",) if len(found) == 1 else ("earlier", "update")
        places = ("base", "before", "after")[-len(self.checkpoints) :]
        digests = {place: entry.digest() for place, entry in zip(places, self.checkpoints, strict=True)}
        return {name: entry.to_dict() for name, entry in zip(names, found, strict=True)}, digests

    def _gradients(
        self, domains: list[Domain], batches: dict[str, _DomainBatches], progress: Callable[[str], None]
    ) -> tuple[dict[str, np.ndarray], dict[str, float], dict[str, list[Tensors]]]:
        """Activity, loss, and the gradients of both halves, of every domain."""
        shared, activity = self._shares_passes, {}
        if not shared:
            progress("activity")
            for name, entry in batches.items():
                activity[name] = route_activity(self.before, entry.all, self.route_map)
        progress(self._gradient_part)
        objective, rollouts = self._objective(domains)
        sources = batches if rollouts is None else {name: self._split(entry) for name, entry in rollouts.items()}
        losses, halves = {}, {}
        for name, entry in sources.items():
            if shared:
                with ActivityMeter(self.before, self.route_map) as meter:
                    losses[name], halves[name] = self._half_gradients(entry, _observed(objective, meter))
                activity[name] = meter.activity()
            else:
                losses[name], halves[name] = self._half_gradients(entry, objective)
        return activity, losses, halves

    def _switched(self, routing: HeldRouting, batches: Batches) -> int | None:
        if not routing.routers:
            return None
        count = torch.tensor(routing.switched(batches), device=self.before.device)
        return int(reduce(count, "sum") if isinstance(batches, Shard) else count)

    def _split(self, references: References) -> _DomainBatches:
        size, pad_id = self.config.batch_size, self.tokenizer.pad_token_id or 0
        parts = [half.batches(size, pad_id, self.before.device) for half in references.halves()]
        whole = [batch for part in parts for batch in part]
        if not self.config.data_parallel:
            return _DomainBatches(parts, whole, whole)
        return _DomainBatches([Shard(part) for part in parts], whole, Shard(whole))

    def _thinned(self, references: References, count: int) -> Batches:
        """Batches of some references, evenly spread over their lengths."""
        order = sorted(range(len(references.prompts)), key=lambda index: len(references.completions[index]))
        chosen = [
            order[index] for index in np.unique(np.linspace(0, len(order) - 1, min(count, len(order)), dtype=int))
        ]
        return self._split(references.take(chosen)).mine if chosen else []

    def _objective(self, domains: list[Domain]) -> tuple[Objective, dict[str, References] | None]:
        if self.config.objective == "kl":
            return ForwardKL(self.base), None
        if self.config.objective == "nll":
            return nll, None
        return grpo, {
            domain.name: collect_rollouts(self.before, self.tokenizer, domain, self.config) for domain in domains
        }

    def _half_gradients(self, batches: _DomainBatches, objective: Objective) -> tuple[float, list[Tensors]]:
        tokens, total, gradients = num_tokens(batches.mine), 0.0, []
        for half in batches.halves:
            room = Room(self.before)
            loss, gradient = mean_gradient(self.before, half, objective, tokens)
            # The way to host memory and back can take as long as a pass.
            if not room.for_another():
                gradient = {name: gradient.pop(name).cpu() for name in list(gradient)}
            total += loss
            gradients.append(gradient)
        return total, gradients

    def _subspace(
        self, path: UpdatePath, batches: Batches, references: int, step: float
    ) -> tuple[dict[str, Any], np.ndarray]:
        config, route_map = self.config, self.route_map
        size = min(config.subspace_size, route_map.num_routes - 1)
        found, directions = {}, {}
        for name, update in (("update", path.delta), ("random", random_update(path, config.seed))):
            spectrum, directions[name] = conflict_subspace(path, batches, route_map, size, update, step, config.seed)
            found[name] = spectrum.to_dict()
        figures = {"references": min(config.subspace_prompts, references), "seed": config.seed}
        return {**found, **figures}, directions["update"]


def _observed(objective: Objective, meter: ActivityMeter) -> Objective:
    def compute(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        meter.observe(batch)
        return objective(model, batch)

    return compute


def _sum(parts: list[Tensors]) -> Tensors:
    """The gradient of a domain, in the memory of its first part."""
    gradient, *rest = parts
    for part in rest:
        for name, tensor in part.items():
            gradient[name] += tensor.to(gradient[name].device)
    return gradient
