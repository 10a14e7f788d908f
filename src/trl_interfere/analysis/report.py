"""The result of an analysis."""

import json
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ..models import local_folder
from ..revision import published_checkpoint, split_revision
from ..run import read_json, write_atomically
from .claims import claims_table, report_claims


if TYPE_CHECKING:
    from matplotlib.figure import Figure


SCHEMA_VERSION = 3
REPORT_NAME = "report.json"
REPORT_FOLDER = "interference"  # of a repository
ROUTES_NAME = "routes.safetensors"
DIRECTIONS = "subspace_directions"  # in the file of the routes
TOP_SHARES = (0.01, 0.02, 0.05, 0.1, 0.32)


@dataclass
class InterferenceReport:
    """
    What an update did to an earlier domain, and through which routes.

    Losses are mean negative log-likelihoods of reference completions, in nats per token. "before" is the checkpoint
    before the update, "after" the one after it.

    Args:
        before (`str`, *optional*):
            Folder or Hub id of the checkpoint before the update; `None` in a report that [`joint_report`] has put
            together.
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
            domain and the mean gradient of the later ones; `"by_domain"` holds the same for each later domain, with
            the `"interval"` of the whole-model cosine and the `"ceiling"` that noise sets it; `"pairs"` the
            whole-model cosine of every pair of domains, and `"reliability"` that of each domain's gradient (see
            [`GradientProducts`]).
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
            The conflict subspace: `"update"` and `"random"` (a random update of equal norm in every tensor), each with
            the fields of [`Spectrum`], `"references"` and `"seed"`. `None` if it was not asked for.
        directions (`numpy.ndarray` of shape `(found, num_routes)`, *optional*):
            Eigenvectors of `subspace["update"]` on route space, in the order of its eigenvalues.
        updates (`dict[str, dict]`, *optional*):
            Fields of [`~analysis.updates.UpdateStatistics`] for `"update"` and, with a base, for `"earlier"`, the
            edit of the earlier domain's own training. `None` for models that were not read from files.
        identical_in_bfloat16 (`float`, *optional*):
            Share of the parameters that would not differ if both checkpoints were stored in bfloat16: the control of
            every sparsity.
        overlaps (`dict[str, Any]`):
            Jaccard indices of top routes as [`~analysis.overlap.Overlap`] by kind of route: `"changed"`, by the edit
            of the earlier domain's own training and the update (with a base), and `"active"`, by activity on two
            domains, as `{first: {second: ...}}`.
        route_counts (`dict[str, list[int]]`):
            Number of routes of each kind in each layer. Routes are numbered by kind, then by layer.
        computed_in (`str`, *optional*):
            Data type that losses and gradients were computed in; their sums are in float32 or more.
        switching (`float`, *optional*):
            Damage by tokens that change experts. In a model with routers all other terms are those of the loss with
            the experts that `before` chooses; `None` in one without.
        switched (`int`, *optional*):
            Number of completion tokens of the earlier domain that change experts.
        digests (`dict[str, dict[str, str]]`, *optional*):
            SHA-256 of the tensors of each layer, and outside layers, in each checkpoint.
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
    digests: dict[str, dict[str, str]] | None = None

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
        values, sums, start = self.routes[measure], {}, 0
        for kind, counts in self.route_counts.items():
            ends = start + np.cumsum(counts, dtype=int)
            starts = ends - counts
            sums[kind] = np.array([values[a:b].sum() for a, b in zip(starts, ends, strict=True)])
            start = int(ends[-1])
        return sums

    def plot(self, kind: str) -> "Figure":
        """
        One of the figures.

        Args:
            kind (`str`):
                `"module_cosines"`, `"sparsity"`, `"overlaps"`, `"damage_concentration"`, `"damage_by_layer"` or
                `"eigenvalues"`.

        Returns:
            [`matplotlib.figure.Figure`]: The figure.

        Raises:
            `ValueError`: If there is no such figure, or the report lacks what it shows.
        """
        from ..reporting.plots import PLOTS

        if kind not in PLOTS:
            raise ValueError(f"kind: expected one of {sorted(PLOTS)}, found {kind!r}")
        return PLOTS[kind](self)

    def save_figures(self, folder: str | Path) -> list[Path]:
        """
        Write every figure that the report has the measures for, as PNG.

        Args:
            folder (`str` or `pathlib.Path`):
                The folder.

        Returns:
            `list[pathlib.Path]`: Their files.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        missing = {"sparsity": self.updates is None, "eigenvalues": self.subspace is None}
        missing["damage_by_layer"] = not self.route_counts
        missing["overlaps"] = not self.overlaps.get("active")
        from ..reporting.plots import PLOTS

        files = []
        for kind in PLOTS:
            if not missing.get(kind, False):
                files.append(folder / f"{kind}.png")
                self.plot(kind).savefig(files[-1], dpi=150)
        return files

    def extreme_module(self, conflicting: bool) -> dict[str, Any]:
        """
        The module with the lowest or the highest cosine.

        Args:
            conflicting (`bool`):
                Whether to return the most conflicting module instead of the most synergistic one.

        Returns:
            `dict`: `module` and `cosine`.
        """
        modules = self.cosines["modules"]
        if not modules:
            return {"module": "none", "cosine": None}
        name = (min if conflicting else max)(modules, key=modules.get)
        return {"module": name, "cosine": modules[name]}

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays, as it stands in `report.json`."""
        arrays = ("routes", "directions")
        content = asdict(replace(self, routes={}, directions=None))
        content = {key: value for key, value in content.items() if key not in arrays}
        derived = {"residual": self.residual, "concentration": self.concentration}
        claims = [claim.to_dict() for claim in report_claims(self)]
        return {"schema_version": SCHEMA_VERSION, **content, **derived, "claims": claims}

    def save_pretrained(self, folder: str | Path) -> None:
        """
        Write `report.json`, `routes.safetensors` and `report.md`.

        Args:
            folder (`str` or `pathlib.Path`):
                The folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = self.routes if self.directions is None else {**self.routes, DIRECTIONS: self.directions}
        save_file({name: np.ascontiguousarray(values) for name, values in arrays.items()}, folder / ROUTES_NAME)
        write_atomically(folder / "report.md", self.to_markdown())
        write_atomically(folder / REPORT_NAME, json.dumps(self.to_dict(), indent=2) + "\n")

    def push_to_hub(self, repo_id: str, **kwargs) -> Any:
        """
        Publish the report under `interference/` of a model repository, see [`~trl_interfere.hub.push.push_report`].

        Args:
            repo_id (`str`):
                The repository, `user/repo`; it is made if there is none.
            **kwargs:
                Further arguments of [`~trl_interfere.hub.push.push_report`].

        Returns:
            [`~trl_interfere.hub.push.PushResult`]: Where it lies.
        """
        from ..hub.push import push_report

        return push_report(self, repo_id, **kwargs)

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
        folder, repo_id = _report_folder(folder, subfolder)
        for name in (REPORT_NAME, ROUTES_NAME):
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: expected a report with {name}, found none")
        content = read_json(folder / REPORT_NAME, SCHEMA_VERSION)
        for name in ("schema_version", "residual", "concentration", "claims"):
            content.pop(name, None)
        known = {entry.name: entry for entry in fields(cls)}
        needed = [name for name, entry in known.items() if entry.default is entry.default_factory is MISSING]
        missing, unknown = [name for name in needed if name not in content], sorted(content.keys() - known.keys())
        if missing or unknown:
            raise ValueError(
                f"{folder / REPORT_NAME}: expected all fields of a report and no others, found {missing} missing and "
                f"{unknown} unknown"
            )
        if repo_id is not None:
            content |= {key: published_checkpoint(content[key], repo_id) for key in ("before", "after", "base")}
        try:
            routes = load_file(folder / ROUTES_NAME)
        except SafetensorError as error:
            raise ValueError(f"{folder / ROUTES_NAME}: expected a whole safetensors file ({error})") from error
        return cls(**content, directions=routes.pop(DIRECTIONS, None), routes=routes)

    def to_markdown(self) -> str:
        """The report as a page to read."""
        later = ", ".join(self.later)
        conflicting, synergistic = self.extreme_module(True), self.extreme_module(False)
        share = "no damage by routes"
        if self.concentration:
            share = f"{100 * top_share(self.routes['damage'], 0.02):.1f}% of all attributed damage"
        references = ", ".join(
            f"{name}: {entry['n']} of {entry['considered']} prompts, {entry['tokens']} tokens"
            for name, entry in self.references.items()
        )
        rows = [
            ("loss before, after", f"{self.loss_before:.4f}, {self.loss_after:.4f} nats per token"),
            ("damage", f"{self.damage:+.4f}"),
            ("first order ∇L·δ", f"{self.first_order:+.4f}"),
            ("second order ½ δᵀHδ", self._second_order_cell()),
            ("attributed to routes", f"{self.attributed:+.4f}"),
            ("outside routes", f"{self.outside_routes:+.4f}"),
            ("residual of the quadrature", f"{self.residual:+.2e}"),
            ("damage in the top 2% of routes", share),
            *self._subspace_rows(),
            ("gradient cosine, whole model", _signed(self.cosines["global"])),
            *self._cosine_rows(),
            ("most conflicting module", f"{conflicting['module']} ({_signed(conflicting['cosine'])})"),
            ("most synergistic module", f"{synergistic['module']} ({_signed(synergistic['cosine'])})"),
            ("references", f"{references} ({self.config['reference']})"),
            ("stored dtype", self.dtype),
        ]
        table = "\n".join(f"| {name} | {value} |" for name, value in rows)
        return (
            f"# Interference: {later} on {self.earlier}\n\n| figure | value |\n| --- | --- |\n{table}\n\n"
            f"## The claims of arXiv 2606.02398\n\n{claims_table(report_claims(self))}\n"
        )

    def _second_order_cell(self) -> str:
        if self.second_order_error is None:
            return f"{self.second_order:+.4f}"
        return f"{self.second_order:+.4f} ± {self.second_order_error:.1e} (step {self.difference_step:.2g} δ)"

    def _cosine_rows(self) -> list[tuple[str, str]]:
        rows = []
        for name, entry in self.cosines.get("by_domain", {}).items():
            if entry.get("interval") is not None:
                low, high = entry["interval"]
                ceiling = "undefined" if entry["ceiling"] is None else f"{entry['ceiling']:.3f}"
                value = f"{_signed(entry['global'])} [{low:+.3f}, {high:+.3f}], noise allows ±{ceiling}"
                rows.append((f"gradient cosine, {self.earlier} and {name}", value))
        return rows

    def _subspace_rows(self) -> list[tuple[str, str]]:
        if self.subspace is None:
            return []
        found, random = self.subspace["update"], self.subspace["random"]
        count = len(found["eigenvalues"])

        def share(entry: dict[str, Any]) -> str:
            return f"{100 * sum(entry['shares']):.1f}%" if entry["shares"] else "undefined"

        def top(entry: dict[str, Any]) -> str:
            return f"{100 * entry['top_routes']['0.02']:.1f}%" if entry["top_routes"] else "undefined"

        def dimension(entry: dict[str, Any]) -> str:
            return f"{entry['effective_dimension']:.2f}"

        return [
            (f"{name} (random update)", f"{value(found)} ({value(random)})")
            for name, value in (
                (f"second order in the top {count} directions", share),
                ("second order in the top 2% of routes", top),
                (f"effective dimension of {count} eigenvalues", dimension),
            )
        ]


def top_share(damage: np.ndarray, share: float) -> float:
    """
    Share of the attributed damage that lies in the most damaged routes.

    Args:
        damage (`numpy.ndarray` of shape `(num_routes,)`):
            Damage of each route.
        share (`float`):
            Share of the routes, most damaged first.

    Returns:
        `float`: Their damage over the sum of all damage; above 1 where other routes were improved.
    """
    top = np.sort(damage)[::-1][: max(1, round(share * len(damage)))]
    return float(top.sum() / damage.sum())


def _signed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.3f}"


def _report_folder(name: str | Path, subfolder: str) -> tuple[Path, str | None]:
    """Folder of a report, and the Hub id if it was fetched from the Hub."""
    if Path(name).is_dir():
        return Path(name), None
    try:
        folder = local_folder(name, files=(f"{subfolder}/*",)) / subfolder
    except ValueError as error:
        raise ValueError(f"{name}: expected a report with report.json, found none ({error})") from error
    if not (folder / REPORT_NAME).is_file():
        raise ValueError(f"{name}: expected a report with {subfolder}/{REPORT_NAME}, found none")
    return folder, split_revision(name)[0]
