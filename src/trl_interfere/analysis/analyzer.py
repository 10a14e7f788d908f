"""InterferenceAnalyzer: what an update did to an earlier domain, and through which routes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

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
from .damage import measure_damage
from .gradients import Batches, Shard, Tensors, checkpointed, half_gradients, mean_loss, summed
from .objectives import ForwardKL, grpo, nll
from .opposition import opposed_edits
from .overlap import overlaps, pairwise_overlaps
from .references import References, collect_references, collect_rollouts
from .report import InterferenceReport
from .routes import RouteMap
from .weight_diff import figures_of_files, identical_when_stored


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
        others = {label: model for label, model in (("after", after), ("base", base)) if model is not None}
        check_models(before, others)
        for model in (before, *others.values()):
            exact_experts(model)
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
        updates = digests = None
        if self.checkpoints is not None:
            progress("files of the checkpoints")
            updates, digests = figures_of_files(self.checkpoints)
        activity, loss_before, halves = self._gradients([earlier, *later, *others], batches, progress)
        cosines = GradientProducts(halves, route_map, self.before.device).figures(earlier.name, later_names)
        gradient = summed(halves[earlier.name]) if config.objective == "nll" else None
        del halves
        if gradient is None:
            loss_before = {name: mean_loss(self.before, entry.mine) for name, entry in batches.items()}
        dtype = str(self.before.dtype).removeprefix("torch.")
        for name, loss in loss_before.items():
            if not np.isfinite(loss):
                raise ValueError(f"before: expected a finite loss on {name!r}, found {loss} in {dtype}: use float32")
        progress("damage of the earlier domain")
        path = UpdatePath(self.before, dict(self.after.named_parameters()), config.offload)
        try:
            first = first_order(path, batches[earlier.name].mine, route_map, gradient)
            del gradient  # of the size of the model, and reduced to routes
            check = self._thinned(references[earlier.name], config.check_prompts)
            few = self._thinned(references[earlier.name], config.subspace_prompts) if config.subspace_size else []
            mine = {name: batches[name].mine for name in (earlier.name, *later_names)}
            damage = measure_damage(path, mine, check, few, route_map, config, progress)
        finally:
            path.move(0.0)
        terms, loss_after = damage.terms, damage.loss_after
        routes = {
            "damage": terms[earlier.name].routes,
            "first_order": first.routes,
            "second_order": damage.second_order.routes,
            "later_damage": np.mean([terms[name].routes for name in later_names], axis=0),
            "edit_size": np.sqrt(dot(route_map, path.delta, path.delta).routes),
            "activity_earlier": activity[earlier.name],
            "activity_later": np.mean([activity[name] for name in later_names], axis=0),
        }
        if damage.subspace is not None:
            number = min(config.subspace_prompts, len(references[earlier.name].prompts))
            damage.subspace |= {"references": number, "seed": config.seed}
        overlap = {"active": pairwise_overlaps(activity, route_map)}
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
            computed_in=dtype,
            references={name: {"kind": config.reference, **entry.counts} for name, entry in references.items()},
            loss_before=loss_before[earlier.name],
            loss_after=loss_after[earlier.name],
            first_order=first.total,
            second_order=damage.second_order.total,
            second_order_error=damage.second_order_error,
            difference_step=damage.step,
            attributed=float(routes["damage"].sum()),
            outside_routes=terms[earlier.name].outside,
            switching=damage.switching,
            switched=damage.switched,
            later_loss_before={name: loss_before[name] for name in later_names},
            later_loss_after={name: loss_after[name] for name in later_names},
            later_residual={name: loss_after[name] - loss_before[name] - terms[name].total for name in later_names},
            subspace=damage.subspace,
            directions=damage.directions,
            cosines=cosines,
            updates=updates,
            digests=digests,
            identical_in_bfloat16=identical_when_stored(path.start, path.end, torch.bfloat16),
            overlaps=overlap,
            outside_weights=route_map.outside({name: entry.shape for name, entry in path.start.items()}),
            route_counts={kind: list(counts) for kind, counts in route_map.counts.items()},
            config=config.to_dict(),
            versions={"trl-interfere": __version__, **{name: version(name) for name in ("torch", "transformers")}},
            routes=routes,
        )

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
        objective, sources = nll, batches
        if self.config.objective == "kl":
            objective = ForwardKL(self.base)
        elif self.config.objective == "grpo":
            written = [collect_rollouts(self.before, self.tokenizer, domain, self.config) for domain in domains]
            objective, sources = grpo, {entry.domain: self._split(entry) for entry in written}
        losses, halves = {}, {}
        for name, entry in sources.items():
            if not shared:
                losses[name], halves[name] = half_gradients(self.before, entry.halves, objective)
                continue
            with ActivityMeter(self.before, self.route_map) as meter:

                def observed(model, batch, meter=meter):
                    meter.observe(batch)
                    return objective(model, batch)

                losses[name], halves[name] = half_gradients(self.before, entry.halves, observed)
            activity[name] = meter.activity()
        return activity, losses, halves

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
        places = np.unique(np.linspace(0, len(order) - 1, min(count, len(order)), dtype=int))
        return self._split(references.take([order[place] for place in places])).mine if len(places) else []
