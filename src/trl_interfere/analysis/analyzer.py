"""InterferenceAnalyzer: what an update did to an earlier domain, and through which routes."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .. import __version__
from ..domains.domain import Domain
from .activity import route_activity
from .architectures import Architecture
from .config import InterferenceConfig
from .damage import RouteTerms, UpdatePath, _dot, attribution, second_order
from .gradients import Batches, Tensors, cosines, mean_gradient, mean_loss
from .references import References, collect_references
from .report import InterferenceReport
from .routes import RouteMap


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

    Raises:
        `ValueError`: If the checkpoints differ in architecture or shapes, or are identical.
    """

    def __init__(
        self,
        before: PreTrainedModel,
        after: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        base: PreTrainedModel | None = None,
        config: InterferenceConfig | None = None,
        description: Architecture | None = None,
    ):
        self.config = config or InterferenceConfig()
        self.tokenizer = tokenizer
        self.before, self.after, self.base = before.eval(), after.eval(), None if base is None else base.eval()
        for label, model in (("after", after), ("base", base)):
            if model is not None:
                _check_same_shape(before, model, label)
        self.route_map = RouteMap(before.config, description)
        if all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)):
            raise ValueError(f"{_name(before)} and {_name(after)} are identical: there is no update to analyse")

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

        Returns:
            [`InterferenceAnalyzer`]: The analyzer.
        """
        models = [
            None if checkpoint is None else load_model(checkpoint, dtype, device_map, trust_remote_code)
            for checkpoint in (before, after, base)
        ]
        tokenizer = AutoTokenizer.from_pretrained(str(before), trust_remote_code=trust_remote_code)
        return cls(models[0], models[1], tokenizer, base=models[2], config=config, description=description)

    def references(self, earlier: Domain, later: list[Domain]) -> dict[str, References]:
        """
        The completions that losses are taken on.

        Args:
            earlier ([`Domain`]):
                Its completions come from `before`.
            later (`list[Domain]`):
                Their completions come from `after`.

        Returns:
            `dict[str, References]`: References by domain.
        """
        references = {earlier.name: collect_references(self.before, self.tokenizer, earlier, self.config)}
        for domain in later:
            references[domain.name] = collect_references(self.after, self.tokenizer, domain, self.config)
        return references

    def batches(self, references: dict[str, References]) -> dict[str, Batches]:
        """References by domain as padded batches on the device of the model."""
        pad_id = self.tokenizer.pad_token_id or 0
        return {
            name: entry.batches(self.config.batch_size, pad_id, self.before.device)
            for name, entry in references.items()
        }

    def analyze(
        self, earlier: Domain, later: Domain | list[Domain], progress: Callable[[str], None] = lambda _: None
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

        Returns:
            [`InterferenceReport`]: The figures, and one array per measure over routes.

        Raises:
            `ValueError`: If a domain has no references.
        """
        later = [later] if isinstance(later, Domain) else list(later)
        config, route_map = self.config, self.route_map
        progress("reference completions")
        references = self.references(earlier, later)
        batches = self.batches(references)

        progress("activity")
        activity = {name: route_activity(self.before, entry, route_map) for name, entry in batches.items()}

        progress("gradients of the domains")
        loss_before, gradient = mean_gradient(self.before, batches[earlier.name])
        by_domain, mean_later, later_loss_before = {}, {}, {}
        for domain in later:
            later_loss_before[domain.name], other = mean_gradient(self.before, batches[domain.name])
            by_domain[domain.name] = cosines(gradient, other)
            for name, tensor in other.items():
                mean_later[name] = mean_later.get(name, 0) + tensor / len(later)
        loss_after = mean_loss(self.after, batches[earlier.name])
        later_loss_after = {domain.name: mean_loss(self.after, batches[domain.name]) for domain in later}

        progress("damage of the earlier domain")
        path = UpdatePath(self.before, dict(self.after.named_parameters()))
        try:
            first = _dot(route_map, gradient, path.delta)
            second = second_order(path, batches[earlier.name], route_map, config.difference_step)
            damage = attribution(path, batches[earlier.name], route_map, config.quadrature_nodes)
            progress("damage of the later domains")
            later_damage = RouteTerms(np.zeros(route_map.num_routes), 0.0)
            for domain in later:
                terms = attribution(path, batches[domain.name], route_map, config.quadrature_nodes)
                later_damage.routes += terms.routes / len(later)
        finally:
            path.move(0.0)

        routes = {
            "damage": damage.routes,
            "first_order": first.routes,
            "second_order": second.routes,
            "later_damage": later_damage.routes,
            "edit_size": np.sqrt(_dot(route_map, path.delta, path.delta).routes),
            "activity_earlier": activity[earlier.name],
            "activity_later": np.mean([activity[domain.name] for domain in later], axis=0),
        }
        if self.base is not None:
            routes |= opposed_edits(route_map, self.base, path.start, path.delta)
        return InterferenceReport(
            before=_name(self.before),
            after=_name(self.after),
            base=None if self.base is None else _name(self.base),
            earlier=earlier.name,
            later=[domain.name for domain in later],
            dtype=str(self.before.config.dtype).removeprefix("torch."),
            references={
                name: {
                    "kind": config.reference,
                    "n": len(entry.completions),
                    "considered": entry.considered,
                    "tokens": entry.num_tokens,
                }
                for name, entry in references.items()
            },
            loss_before=loss_before,
            loss_after=loss_after,
            first_order=first.total,
            second_order=second.total,
            attributed=float(damage.routes.sum()),
            outside_routes=damage.outside,
            later_loss_before=later_loss_before,
            later_loss_after=later_loss_after,
            cosines={**cosines(gradient, mean_later), "by_domain": by_domain},
            config=config.to_dict(),
            versions={
                "trl-interfere": __version__,
                **{package: version(package) for package in ("torch", "transformers")},
            },
            routes=routes,
        )


def opposed_edits(route_map: RouteMap, base: PreTrainedModel, start: Tensors, delta: Tensors) -> dict[str, np.ndarray]:
    """
    How far the update opposes, on each route, what the earlier domain's own training had done.

    ```
    opposed_r = max(0, -<δ_A,r , δ_r> / |δ_A,r|)        δ_A = before - base
    ```

    Args:
        route_map ([`RouteMap`]):
            The routes.
        base ([`~transformers.PreTrainedModel`]):
            Model that the earlier domain's training started from.
        start (`dict[str, torch.Tensor]`):
            Parameters before the update.
        delta (`dict[str, torch.Tensor]`):
            The update δ.

    Returns:
        `dict[str, numpy.ndarray]`: `opposed` and `earlier_edit_size`, each of shape `(num_routes,)`.
    """
    parameters = dict(base.named_parameters())
    earlier = {name: tensor - parameters[name].detach().to(tensor) for name, tensor in start.items()}
    size = np.sqrt(_dot(route_map, earlier, earlier).routes)
    inner = _dot(route_map, earlier, delta).routes
    opposed = np.divide(-inner, size, out=np.zeros_like(inner), where=size > 0).clip(min=0)
    return {"opposed": opposed, "earlier_edit_size": size}


def load_model(
    checkpoint: str | Path,
    dtype: str | torch.dtype = "float32",
    device_map: str | dict | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """
    Load a causal language model from safetensors, with a clear error if it cannot be.

    Args:
        checkpoint (`str` or `pathlib.Path`):
            Folder or Hub id.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`):
            Data type of the parameters.
        device_map (`str` or `dict`, *optional*):
            Placement, as in transformers.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the checkpoint.

    Returns:
        [`~transformers.PreTrainedModel`]: The model, in evaluation mode. `config.dtype` keeps the stored data type.

    Raises:
        `ValueError`: If there is no such checkpoint, or it holds no safetensors.
    """
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            str(checkpoint),
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
        stored = AutoConfig.from_pretrained(str(checkpoint), trust_remote_code=trust_remote_code).dtype
    except (OSError, ImportError, SafetensorError) as error:
        raise ValueError(
            f"{checkpoint}: expected a folder or Hub repository with config.json and whole, unquantised safetensors "
            f"weights ({error})"
        ) from error
    for problem in ("missing_keys", "mismatched_keys"):
        if loading[problem]:
            raise ValueError(
                f"{checkpoint}: {problem.replace('_keys', ' tensors')}: {sorted(map(str, loading[problem]))}"
            )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{checkpoint}: tensor {name}: expected finite values, found NaN or infinity")
    if stored is not None:
        model.config.dtype = stored
    return model.eval()


def _name(model: PreTrainedModel) -> str:
    return model.config._name_or_path or type(model).__name__


def _check_same_shape(before: PreTrainedModel, other: PreTrainedModel, label: str) -> None:
    for setting in ("model_type", "num_attention_heads", "num_key_value_heads"):
        expected, found = (getattr(model.config, setting, None) for model in (before, other))
        if found != expected:
            raise ValueError(
                f"{label} checkpoint {_name(other)}: expected {setting} {expected!r} as in {_name(before)}, "
                f"found {found!r}"
            )
    shapes = {name: tuple(parameter.shape) for name, parameter in before.named_parameters()}
    found = {name: tuple(parameter.shape) for name, parameter in other.named_parameters()}
    for name in sorted(shapes.keys() | found.keys()):
        if shapes.get(name) != found.get(name):
            raise ValueError(
                f"{label} checkpoint {_name(other)}: tensor {name}: expected shape {shapes.get(name)} as in "
                f"{_name(before)}, found {found.get(name)}"
            )
