"""InterferenceAnalyzer: what an update did to an earlier domain, and through which routes."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import __version__
from ..checkpoint import Checkpoint, check_comparable, open_merged
from ..domain import Domain
from ..models import exact_experts, load_model, load_tokenizer
from .activity import ActivityMeter, route_activity
from .architectures import Architecture
from .attribution import UpdatePath, dot, first_order
from .comparable import check_fits, check_models, model_name
from .config import InterferenceConfig
from .cosines import GradientProducts
from .damage import measure_damage, opposed_edits
from .gradients import Batches, Shard, Tensors, checkpointed, half_gradients, mean_loss, summed
from .objectives import ForwardKL, grpo, nll
from .overlap import overlaps, pairwise_overlaps
from .references import References, collect_references, collect_rollouts
from .report import InterferenceReport
from .routes import RouteMap
from .weight_diff import identical_when_stored, update_statistics


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
            The files of before and after, or of base, before and after, for the sparsity of the update.
            [`~InterferenceAnalyzer.from_pretrained`] passes them.

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
        others = {label: model for label, model in (("after", after), ("base", base)) if model is not None}
        check_models(before, others)
        for model in (before, *others.values()):
            exact_experts(model)
        self.route_map = RouteMap(before.config, description)
        on_disk = [name for checkpoint in checkpoints or [] for name in checkpoint.tensors]
        self.route_map.check([name for name, _ in before.named_parameters()], model_name(before), on_disk)

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
        checkpoints = [open_merged(name, trust_remote_code=trust_remote_code) for name in given]
        for checkpoint in checkpoints[:-1]:
            check_comparable(checkpoint, checkpoints[-1])

        def load(name: str | Path | None, computes: bool) -> PreTrainedModel | None:
            placement = {"device_map": device_map, "max_memory": max_memory} if computes else {}
            return name and load_model(name, dtype=dtype, trust_remote_code=trust_remote_code, **placement)

        # With `offload` one model computes; of the others only the weights are read, tensor by tensor. The base model
        # never computes, but for the divergence from it.
        return cls(
            load(before, True),
            load(after, not config.offload),
            load_tokenizer(before, base=after, trust_remote_code=trust_remote_code),
            base=load(base, config.objective == "kl"),
            config=config,
            description=description,
            checkpoints=checkpoints,
        )

    def references(self, earlier: Domain, later: list[Domain], others: Sequence[Domain] = ()) -> dict[str, References]:
        """Completions by domain that losses are taken on: from `after` for the later domains, else from `before`."""

        def collect(model: PreTrainedModel, domains: Sequence[Domain]) -> dict[str, References]:
            return {entry.name: collect_references(model, self.tokenizer, entry, self.config) for entry in domains}

        references = collect(self.before, [earlier, *others])
        if self.config.reference == "dataset" or self.after.device == self.before.device:
            references |= collect(self.after, later)
        else:
            with self._path() as path:
                references |= collect(path.move(1.0), later)
        for entry in references.values():
            check_fits(self.before, entry)
        return references

    def batches(self, references: dict[str, References]) -> dict[str, Batches]:
        """References by domain as padded batches on the device of the model, one half after the other."""
        return {name: sum(self._halves(entry), []) for name, entry in references.items()}

    def passes(self, later: int = 1, others: int = 0) -> dict[str, float]:
        """
        Gradient passes over references by the names that `progress` is called with, in their order; a forward pass
        alone counts as a third of one.
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
        parts["damage of the later domains"] = config.later_quadrature_nodes * later + (1 + later) / 3
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
        return f"gradients {'and activity ' * self._shares_passes}of the domains"

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
                Domains whose activity and gradients are compared too; no damage of theirs is attributed.

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
        updates = digests = None
        if self.checkpoints is not None:
            progress("files of the checkpoints")
            found = [entry.to_dict() for entry in update_statistics(self.checkpoints)]
            updates = dict(zip(("earlier", "update")[-len(found) :], found, strict=True))
            places = ("base", "before", "after")[-len(self.checkpoints) :]
            digests = {name: entry.digest() for name, entry in zip(places, self.checkpoints, strict=True)}
        later_names, route_map = [domain.name for domain in later], self.route_map
        with checkpointed(self.before, config.gradient_checkpointing):
            activity, loss_before, halves = self._gradients([earlier, *later, *others], references, progress)
            cosines = GradientProducts(halves, route_map, self.before.device).figures(earlier.name, later_names)
            gradient = [summed(halves[earlier.name])] if config.objective == "nll" else []
            del halves
            fields, routes = self._damage(earlier.name, later_names, references, gradient, loss_before, progress)
        routes["activity_earlier"] = activity[earlier.name]
        routes["activity_later"] = np.mean([activity[name] for name in later_names], axis=0)
        overlap = {"active": pairwise_overlaps(activity, route_map)}
        if self.base is not None:
            overlap["changed"] = overlaps(routes["earlier_edit_size"], routes["edit_size"], route_map)
        shapes = {name: entry.shape for name, entry in self.before.named_parameters()}
        return InterferenceReport(
            before=model_name(self.before),
            after=model_name(self.after),
            base=None if self.base is None else model_name(self.base),
            earlier=earlier.name,
            later=later_names,
            dtype=str(self.before.config.dtype).removeprefix("torch."),
            computed_in=str(self.before.dtype).removeprefix("torch."),
            references={name: {"kind": config.reference, **entry.counts} for name, entry in references.items()},
            loss_before=loss_before[earlier.name],
            later_loss_before={name: loss_before[name] for name in later_names},
            **fields,
            cosines=cosines,
            updates=updates,
            digests=digests,
            overlaps=overlap,
            outside_weights=route_map.outside(shapes),
            route_counts={kind: list(counts) for kind, counts in route_map.counts.items()},
            config=asdict(config),
            versions={"trl-interfere": __version__, **{name: version(name) for name in ("torch", "transformers")}},
            routes=routes,
        )

    def _path(self) -> UpdatePath:
        return UpdatePath(self.before, dict(self.after.named_parameters()), self.config.offload)

    def _damage(
        self,
        earlier: str,
        later: list[str],
        references: dict[str, References],
        gradient: list[Tensors],
        loss_before: dict[str, float],
        progress: Callable[[str], None],
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Fields of the report, and measures of routes, along the update; `gradient` is emptied when it was used."""
        config, route_map = self.config, self.route_map
        progress("damage of the earlier domain")
        named = {name: references[name] for name in (earlier, *later)}
        batches = {name: self._mine(part) for name, part in self.batches(named).items()}
        with self._path() as path:
            # The gradient has the size of the model, and is reduced to routes.
            first = first_order(path, batches[earlier], route_map, gradient.pop() if gradient else None)
            few = config.subspace_prompts if config.subspace_size else 0
            parts = [self._thinned(references[earlier], count) for count in (config.check_prompts, few)]
            fields, routes = measure_damage(path, batches, *parts, route_map, config, loss_before, progress)
        if "subspace" in fields:
            fields["subspace"] |= {"references": min(few, len(references[earlier].prompts)), "seed": config.seed}
        fields["first_order"], routes["first_order"] = first.total, first.routes
        fields["identical_in_bfloat16"] = identical_when_stored(path.start, path.end, torch.bfloat16)
        routes["edit_size"] = np.sqrt(dot(route_map, path.delta, path.delta).routes)
        if self.base is not None:
            routes |= opposed_edits(route_map, self.base, path.start, path.delta)
        return fields, routes

    def _gradients(
        self, domains: list[Domain], references: dict[str, References], progress: Callable[[str], None]
    ) -> tuple[dict[str, np.ndarray], dict[str, float], dict[str, list[Tensors]]]:
        """Activity, loss, and the gradients of both halves, of every domain."""
        shared, activity = self._shares_passes, {}
        if not shared:
            progress("activity")
            for name, batches in self.batches(references).items():
                activity[name] = route_activity(self.before, batches, self.route_map)
        progress(self._gradient_part)
        objective, sources = nll, references
        if self.config.objective == "kl":
            objective = ForwardKL(self.base)
        elif self.config.objective == "grpo":
            written = [collect_rollouts(self.before, self.tokenizer, domain, self.config) for domain in domains]
            objective, sources = grpo, {entry.domain: entry for entry in written}
        losses, gradients = {}, {}
        for name, entry in sources.items():
            halves = [self._mine(half) for half in self._halves(entry)]
            if not shared:
                losses[name], gradients[name] = half_gradients(self.before, halves, objective)
                continue
            with ActivityMeter(self.before, self.route_map) as meter:

                def observed(model, batch, meter=meter):
                    meter.observe(batch)
                    return objective(model, batch)

                losses[name], gradients[name] = half_gradients(self.before, halves, observed)
            activity[name] = meter.activity()
        if self.config.objective != "nll":  # damage is one of the token loss
            for name, batches in self.batches(references).items():
                losses[name] = mean_loss(self.before, self._mine(batches))
        for name, loss in losses.items():
            if not np.isfinite(loss):
                raise ValueError(
                    f"before: expected a finite loss on {name!r}, found {loss} in "
                    f"{str(self.before.dtype).removeprefix('torch.')}: use float32"
                )
        return activity, losses, gradients

    def _halves(self, references: References) -> list[Batches]:
        size, pad_id = self.config.batch_size, self.tokenizer.pad_token_id or 0
        return [half.batches(size, pad_id, self.before.device) for half in references.halves()]

    def _mine(self, batches: Batches) -> Batches:
        """The batches of this process."""
        return Shard(batches) if self.config.data_parallel else batches

    def _thinned(self, references: References, count: int) -> Batches:
        """Batches of some references, evenly spread over their lengths."""
        order = sorted(range(len(references.prompts)), key=lambda index: len(references.completions[index]))
        places = np.unique(np.linspace(0, len(order) - 1, min(count, len(order)), dtype=int))
        rows = references.take([order[place] for place in places])
        return self._mine(sum(self._halves(rows), [])) if len(places) else []
