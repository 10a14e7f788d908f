"""The result of an analysis."""

import json
import math
import tempfile
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np
from huggingface_hub import HfApi
from huggingface_hub.dataclasses import type_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ..models import local_folder
from ..revision import published_checkpoint, split_revision
from ..run import read_json, write_atomically


if TYPE_CHECKING:
    from pandas import DataFrame


SCHEMA_VERSION = 3
REPORT_NAME = "report.json"
REPORT_FOLDER = "interference"  # of a repository
ROUTES_NAME = "routes.safetensors"
DIRECTIONS = "subspace_directions"  # in the file of the routes
TOP_SHARES = (0.01, 0.02, 0.05, 0.1, 0.32)


@dataclass(repr=False)
class InterferenceReport:
    """
    What an update did to an earlier domain, and through which routes.

    Losses are mean negative log-likelihoods of reference completions, in nats per token. "before" is the checkpoint
    before the update, "after" the one after it.

    Args:
        before (`str`, *optional*):
            Folder or Hub id of the checkpoint before the update; `None` in a report put together by [`joint_report`].
        after (`str`):
            Folder or Hub id of the checkpoint after it.
        base (`str`, *optional*):
            Checkpoint that the earlier domain's own training started from.
        earlier (`str`):
            Name of the earlier domain.
        later (`list[str]`):
            Names of the domains that the update was trained on.
        dtype (`str`):
            Data type in which both checkpoints are stored.
        references (`dict[str, dict]`):
            For each domain `kind`, `n` (references), `considered` (prompts) and `tokens`.
        loss_before (`float`):
            Loss of the earlier domain before the update.
        loss_after (`float`):
            Loss of the earlier domain after it.
        first_order (`float`):
            ∇L(θ0)·δ.
        second_order (`float`):
            ½ δᵀHδ at θ0.
        attributed (`float`):
            Sum of the damage attributed to routes.
        outside_routes (`float`):
            Damage attributed to parameters outside routes.
        later_loss_before (`dict[str, float]`):
            Loss of each later domain before the update.
        later_loss_after (`dict[str, float]`):
            Loss of each later domain after it.
        cosines (`dict`):
            `"global"`, `"layers"`, `"modules"` and `"tensors"`: cosines at θ0 between the gradient of the earlier
            domain and the mean gradient of the later ones; `"by_domain"`: the same for each later domain, with the
            `"interval"` of the whole-model cosine and the `"ceiling"` that noise sets it; `"pairs"`: the whole-model
            cosine of every pair of domains; `"reliability"`: that of each domain's gradient.
        config (`dict`):
            Settings of the analysis.
        versions (`dict[str, str]`):
            Versions of the packages.
        routes (`dict[str, numpy.ndarray]`):
            Arrays of shape `(num_routes,)`: `damage`, `first_order`, `second_order`, `later_damage`, `edit_size`,
            `activity_earlier`, `activity_later` and, with a base, `opposed` and `earlier_edit_size`.
        second_order_error (`float`, *optional*):
            Estimated error of `second_order`.
        difference_step (`float`, *optional*):
            ε of the central difference behind it, as a share of the update.
        later_residual (`dict[str, float]`, *optional*):
            For each later domain, the part of its damage that its attribution misses.
        subspace (`dict`, *optional*):
            The conflict subspace, if it was asked for: `"update"` and `"random"` (a random update of equal norm in
            every tensor), each with the figures of `conflict_subspace`, `"references"` and `"seed"`.
        directions (`numpy.ndarray` of shape `(found, num_routes)`, *optional*):
            Eigenvectors of `subspace["update"]` on route space, in the order of its eigenvalues.
        updates (`dict[str, dict]`, *optional*):
            Figures of [`UpdateStatistics`] for `"update"` and, with a base, for `"earlier"`, the edit of the earlier
            domain's own training. `None` for models that were not read from files.
        identical_in_bfloat16 (`float`, *optional*):
            Share of the parameters that would not differ if both checkpoints were stored in bfloat16: the control of
            every sparsity.
        overlaps (`dict[str, Any]`):
            Figures of [`overlaps`]: `"changed"`, by the edit of the earlier domain's own training and the update (with
            a base), and `"active"`, by activity on two domains, as `{first: {second: ...}}`.
        route_counts (`dict[str, list[int]]`):
            Number of routes of each kind in each layer. Routes are numbered by kind, then by layer.
        computed_in (`str`, *optional*):
            Data type that losses and gradients were computed in; their sums are in float32 or more.
        switching (`float`, *optional*):
            In a model with routers, damage by tokens that change experts; all other terms are those of the loss with
            the experts that `before` chooses.
        switched (`int`, *optional*):
            Number of completion tokens of the earlier domain that change experts.
        digests (`dict[str, str]`, *optional*):
            SHA-256 of the weights of each checkpoint.
        outside_weights (`dict[str, float]`, *optional*):
            Share of all weights that no route owns, by the part that holds them: `"embed_tokens"`, `"mamba"`, ...
    """

    before: str | None
    after: str
    base: str | None
    earlier: str
    later: list[str]
    dtype: str
    references: dict[str, dict[str, Any]]
    loss_before: float
    loss_after: float
    first_order: float
    second_order: float
    attributed: float
    outside_routes: float
    later_loss_before: dict[str, float]
    later_loss_after: dict[str, float]
    cosines: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]
    routes: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    second_order_error: float | None = None
    difference_step: float | None = None
    later_residual: dict[str, float] = field(default_factory=dict)
    subspace: dict[str, Any] | None = None
    directions: np.ndarray | None = field(default=None, repr=False)
    updates: dict[str, dict[str, Any]] | None = None
    identical_in_bfloat16: float | None = None
    overlaps: dict[str, Any] = field(default_factory=dict)
    route_counts: dict[str, list[int]] = field(default_factory=dict)
    computed_in: str | None = None
    switching: float | None = None
    switched: int | None = None
    digests: dict[str, str] | None = None
    outside_weights: dict[str, float] = field(default_factory=dict)

    @property
    def damage(self) -> float:
        """L(θ1) - L(θ0) of the earlier domain."""
        return self.loss_after - self.loss_before

    @property
    def residual(self) -> float:
        """Part of the damage that the attribution misses: the error of its quadrature, and rounding."""
        return self.damage - self.attributed - self.outside_routes - (self.switching or 0.0)

    @property
    def concentration(self) -> dict[str, float]:
        """Share of the attributed damage in the most damaged routes, by share of the routes; empty without damage."""
        if not self.routes["damage"].sum() > 0:
            return {}
        return {f"{share:g}": top_share(self.routes["damage"], share) for share in TOP_SHARES}

    def by_layer(self, measure: str) -> dict[str, np.ndarray]:
        """
        Sums of a measure over the routes of each layer.

        Args:
            measure (`str`):
                One of `routes`, e.g. `"damage"`.

        Returns:
            `dict[str, numpy.ndarray]`: By kind of route, of shape `(num_layers,)`.

        Raises:
            `ValueError`: If the report lacks the measure.
        """
        if measure not in self.routes:
            raise ValueError(f"measure: expected one of {sorted(self.routes)}, found {measure!r}")
        counts = [count for layers in self.route_counts.values() for count in layers]
        parts = iter(np.split(self.routes[measure], np.cumsum(counts, dtype=int)))
        return {kind: np.array([next(parts).sum() for _ in layers]) for kind, layers in self.route_counts.items()}

    def __repr__(self) -> str:
        routes = "" if self.damage == 0 else f", {self.attributed / self.damage:.0%} of it through routes"
        share = sum(self.outside_weights.values())
        outside = f"; {share:.0%} of the weights outside routes" if self.outside_weights else ""
        return (
            f"InterferenceReport({', '.join(self.later)} on {self.earlier}: damage {self.damage:+.4f} nats per token"
            f"{routes}{outside}; computed in {self.computed_in or 'an unknown type'})"
        )

    def to_pandas(self) -> "DataFrame":
        """One row for each route, with its kind, layer, position in the layer, and every measure."""
        import pandas as pd

        rows = [(kind, *place) for kind, counts in self.route_counts.items() for place in enumerate(counts)]
        places = [(kind, layer, position) for kind, layer, count in rows for position in range(count)]
        return pd.DataFrame(places, columns=["kind", "layer", "position"]).assign(**self.routes)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays, as it stands in `report.json`; what is undefined is `None`."""
        content = asdict(replace(self, routes={}, directions=None))
        del content["routes"], content["directions"]
        derived = {"residual": self.residual, "concentration": self.concentration}
        return _exchanged({"schema_version": SCHEMA_VERSION, **content, **derived}, None)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """
        Write `report.json` and `routes.safetensors`.

        Args:
            save_directory (`str` or `pathlib.Path`):
                The folder.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Whether to push the report as well, to `repo_id` or to a repository that is named like the folder.
            **kwargs:
                Arguments of [`~InterferenceReport.push_to_hub`].
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = self.routes if self.directions is None else {**self.routes, DIRECTIONS: self.directions}
        save_file({name: np.ascontiguousarray(values) for name, values in arrays.items()}, folder / ROUTES_NAME)
        write_atomically(folder / REPORT_NAME, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Interference report",
        revision: str | None = None,
    ) -> str:
        """
        Push the report under `interference/` of a model repository.

        Args:
            repo_id (`str`):
                The repository, `user/repo`; it is made if there is none.
            private (`bool`, *optional*):
                Whether a new repository is private.
            token (`str`, *optional*):
                Token. Defaults to the one of the environment or of `hf auth login`.
            commit_message (`str`, *optional*, defaults to `"Interference report"`):
                Message of the commit.
            revision (`str`, *optional*):
                Branch. Defaults to the main one.

        Returns:
            `str`: Address of the commit.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=REPORT_FOLDER,
                commit_message=commit_message,
                revision=revision,
            ).commit_url

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str = REPORT_FOLDER) -> "InterferenceReport":
        """
        Read a report.

        Args:
            folder (`str` or `pathlib.Path`):
                Folder with `report.json` and `routes.safetensors`, `user/repo` or `user/repo@revision`. The
                checkpoints of a report from the Hub are the revisions of its repository.
            subfolder (`str`, *optional*, defaults to `"interference"`):
                Folder of the report in a repository.

        Returns:
            [`InterferenceReport`]: The report.

        Raises:
            `ValueError`: If there is no report, or one of another schema version.
        """
        repo_id = None if Path(folder).is_dir() else split_revision(folder)[0]
        if repo_id is not None:
            try:
                folder = local_folder(folder, files=(f"{subfolder}/*",)) / subfolder
            except ValueError as error:
                raise ValueError(f"{folder}: expected a report with {REPORT_NAME}, found none ({error})") from error
        folder = Path(folder)
        for name in (REPORT_NAME, ROUTES_NAME):
            if not (folder / name).is_file():
                raise ValueError(f"{repo_id or folder}: expected a report with {name}, found none")
        content = read_json(folder / REPORT_NAME, SCHEMA_VERSION)
        for name in ("schema_version", "residual", "concentration", "claims"):
            content.pop(name, None)
        known = {entry.name: entry for entry in fields(cls) if entry.name not in ("routes", "directions")}
        needed = {name for name, entry in known.items() if entry.default is entry.default_factory is MISSING}
        missing, unknown = sorted(needed - content.keys()), sorted(content.keys() - known.keys())
        if missing or unknown:
            raise ValueError(
                f"{folder / REPORT_NAME}: expected all fields of a report and no others, found {missing} missing and "
                f"{unknown} unknown"
            )
        hints = get_type_hints(cls)
        for name, value in content.items():
            try:
                json.dumps(value, allow_nan=False)
                type_validator(name, value, hints[name])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{folder / REPORT_NAME}: {name}: expected {hints[name]} ({error})") from error
        # The share of routes in common is undefined where neither of two updates touches any.
        content["overlaps"] = _exchanged(content.get("overlaps", {}), math.nan)
        if repo_id is not None:
            content |= {key: published_checkpoint(content[key], repo_id) for key in ("before", "after", "base")}
        routes = _read_arrays(folder / ROUTES_NAME)
        return cls(**content, directions=routes.pop(DIRECTIONS, None), routes=routes)


def top_share(damage: np.ndarray, share: float) -> float:
    """Share of the attributed damage that lies in the most damaged routes."""
    top = np.sort(damage)[::-1][: max(1, round(share * len(damage)))]
    return float(top.sum() / damage.sum())


def _exchanged(value: Any, other: float | None) -> Any:
    """A value of JSON with `other` in the place of what is undefined, `None` or NaN."""
    if isinstance(value, dict):
        return {key: _exchanged(part, other) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_exchanged(part, other) for part in value]
    return other if value is None or (isinstance(value, float) and math.isnan(value)) else value


def _read_arrays(file: Path) -> dict[str, np.ndarray]:
    """One number for each route by name of the measure, and `DIRECTIONS`."""
    try:
        arrays = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a whole safetensors file ({error})") from error
    for name, values in arrays.items():
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            raise ValueError(f"{file}: {name}: expected finite numbers, found {values.dtype} or NaN or infinity")
    shapes = {name: values.shape for name, values in arrays.items() if name != DIRECTIONS}
    if len({*shapes.values()}) != 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"{file}: expected arrays with one number for each route, found shapes {shapes}")
    return arrays
