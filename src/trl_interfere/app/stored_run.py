"""A run or a report as it lies on disk, read as far as it is looked at."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..analysis.report import DIRECTIONS, REPORT_NAME, ROUTES_NAME, SCHEMA_VERSION, InterferenceReport
from ..run import STAGES_NAME, read_json, stage_name


RESULTS_NAME = "results.json"
HUB_FOLDER = "interference"  # of a repository that `trl-interfere push` filled
CARDS = ("README.md", "report.md")
MAX_JSON_BYTES = 64 * 2**20
MAX_CARD_BYTES = 2**20
MAX_NAMES = 64  # domains, reports and kinds of routes; more of them no figure could show
MAX_STAGES = 256
MAX_LAYERS = 1024


class StoredRoutes(Mapping):
    """
    Measures of the routes, read from their file one by one when they are asked for.

    Args:
        path (`pathlib.Path`):
            The file `routes.safetensors`, which may be missing.
    """

    def __init__(self, path: Path):
        self.path = path
        self._names: tuple[str, ...] | None = None
        self._last: tuple[str, np.ndarray] | None = None

    def _open(self):
        try:
            return safe_open(self.path, framework="np")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path.name}: expected the measures of the routes, found none ({error})") from error

    def _list(self) -> tuple[str, ...]:
        if self._names is None:
            if not self.path.is_file():
                raise ValueError(f"expected {ROUTES_NAME} beside {REPORT_NAME}, found none")
            with self._open() as file:
                self._names = tuple(name for name in file.keys() if name != DIRECTIONS)
        return self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._list())

    def __len__(self) -> int:
        return len(self._list())

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._list():
            raise KeyError(name)
        if self._last is None or self._last[0] != name:
            with self._open() as file:
                try:
                    values = file.get_tensor(name)
                except (SafetensorError, TypeError) as error:
                    raise ValueError(f"{self.path.name}: tensor {name!r} is not readable ({error})") from error
            if values.ndim != 1 or not np.isfinite(values).all():
                raise ValueError(f"{self.path.name}: expected finite values for {name!r}, one per route")
            self._last = (name, values)
        return self._last[1]


def read_report(folder: Path) -> InterferenceReport:
    """
    Read a report without its arrays, which follow when they are asked for.

    Args:
        folder (`pathlib.Path`):
            Folder with `report.json` and, for figures over routes, `routes.safetensors`.

    Returns:
        [`InterferenceReport`]: The report. Its `directions` are left out.

    Raises:
        `ValueError`: If there is no report, it is of another schema version, or holds something else.
    """
    path = folder / REPORT_NAME
    content = _read(path, SCHEMA_VERSION)
    for name in ("schema_version", "residual", "concentration", "claims"):
        content.pop(name, None)
    known = {entry.name: entry for entry in fields(InterferenceReport)}
    kinds = _report_kinds()
    for name, value in content.items():
        if name not in known:
            raise ValueError(f"{REPORT_NAME}: unknown field {name!r:.80}")
        _check(name, value, kinds[name])
    missing = [name for name in ("earlier", "later", "loss_before", "loss_after", "cosines") if name not in content]
    if missing:
        raise ValueError(f"{REPORT_NAME}: expected the fields {missing}, found none of that name")
    try:
        report = InterferenceReport(**content)
    except TypeError as error:
        raise ValueError(f"{REPORT_NAME}: expected the fields of a report ({error})") from error
    _check_report(report)
    report.routes = StoredRoutes(folder / ROUTES_NAME)
    return report


def _report_kinds() -> dict[str, tuple[type, ...]]:
    numbers = ("loss_before", "loss_after", "first_order", "second_order", "attributed", "outside_routes")
    names = ("before", "after", "earlier", "dtype")
    tables = (
        "references",
        "later_loss_before",
        "later_loss_after",
        "later_residual",
        "cosines",
        "config",
        "versions",
        "routes",
        "overlaps",
        "route_counts",
    )
    return {
        **{name: (int, float) for name in numbers},
        **{name: (str,) for name in names},
        **{name: (dict,) for name in tables},
        "base": (str, type(None)),
        "later": (list,),
        "second_order_error": (int, float, type(None)),
        "difference_step": (int, float, type(None)),
        "identical_in_bfloat16": (int, float, type(None)),
        "subspace": (dict, type(None)),
        "directions": (list, type(None)),
        "updates": (dict, type(None)),
    }


def _check_report(report: InterferenceReport) -> None:
    if not report.later or len(report.later) > MAX_NAMES or not all(isinstance(name, str) for name in report.later):
        raise ValueError(f"{REPORT_NAME}, later: expected 1 to {MAX_NAMES} names of domains")
    modules = report.cosines.get("modules")
    _check("cosines.modules", modules, (dict,))
    _check("cosines.global", report.cosines.get("global"), (int, float, type(None)))
    for name, value in modules.items():
        _check(f"cosines.modules.{name[:80]}", value, (int, float, type(None)))
    if len(modules) > 4 * MAX_LAYERS:
        raise ValueError(f"{REPORT_NAME}, cosines: expected at most {4 * MAX_LAYERS} modules, found {len(modules)}")
    for kind, counts in report.route_counts.items():
        _check("route_counts", counts, (list,))
        if len(counts) > MAX_LAYERS or not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"{REPORT_NAME}, route_counts, {kind!r:.80}: expected at most {MAX_LAYERS} counts")
    check_overlaps(report.overlaps.get("active") or {}, REPORT_NAME)


def check_overlaps(overlaps: Any, where: str) -> None:
    """
    Refuse overlaps that no figure could show.

    Args:
        overlaps (`dict`):
            Fields of [`~analysis.overlap.Overlap`] by first domain, second domain and kind of route.
        where (`str`):
            Their file, for the error.

    Raises:
        `ValueError`: If they are something else.
    """
    _check(f"{where}, overlaps", overlaps, (dict,))
    for row in overlaps.values():
        _check(f"{where}, overlaps", row, (dict,))
        for kinds in row.values():
            _check(f"{where}, overlaps", kinds, (dict,))
            _check(f"{where}, overlaps", kinds.get("mlp"), (dict,))
            for name in ("value", "low", "high", "chance", "shuffled"):
                _check(f"{where}, overlaps, {name}", kinds["mlp"].get(name), (int, float, type(None)))
    if len(overlaps) > MAX_NAMES or any(len(row) > MAX_NAMES for row in overlaps.values()):
        raise ValueError(f"{where}, overlaps: expected at most {MAX_NAMES} domains")


def _check(name: str, value: Any, kinds: tuple[type, ...]) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not isinstance(value, kinds) or isinstance(value, bool) or (number and not _finite(value)):
        expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{name:.120}: expected {expected}, found {str(value)[:60]!r}")


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def _read(path: Path, schema_version: int) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"expected a report with {path.name}, found none")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(
            f"{path.name}: expected at most {MAX_JSON_BYTES >> 20} MB, found {path.stat().st_size:,} bytes"
        )
    try:
        return read_json(path, schema_version)
    except RecursionError as error:
        raise ValueError(f"{path.name}: expected JSON of moderate depth, found a deeper one") from error
    except ValueError as error:  # the page names the file, not where it lies on the server
        raise ValueError(str(error).replace(str(path), path.name)) from error


@dataclass
class StoredRun:
    """
    A run, or one report, to compare with others.

    Args:
        name (`str`):
            Name that it is shown under.
        folder (`pathlib.Path`):
            Its folder.
        stages (`list[dict]`):
            Finished stages: `index`, `kind`, `domain`, `steps` and `scores`, for each domain `value`, `low`, `high`
            and `n`. Empty for a report without a run.
        reports (`dict[str, pathlib.Path]`):
            Folders of its reports, by name.
        results (`dict`):
            What the lab, or a repair, measured: `rollback` (rows), `refresh`, `edits`, as far as it is there.
        card (`pathlib.Path`, *optional*):
            Its page.
    """

    name: str
    folder: Path
    stages: list[dict[str, Any]] = field(default_factory=list)
    reports: dict[str, Path] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    card: Path | None = None

    @classmethod
    def read(cls, folder: Path, name: str, boundary: Path | None = None) -> "StoredRun":
        """
        Read what a folder holds, without its reports.

        Args:
            folder (`pathlib.Path`):
                Folder of a run, of a report, or of a repository that was pushed.
            name (`str`):
                Name that it is shown under.
            boundary (`pathlib.Path`, *optional*):
                Folder that links may not leave. Defaults to the folder itself.

        Returns:
            [`StoredRun`]: The run.

        Raises:
            `ValueError`: If the folder holds neither a run nor a report, or one that is broken.
        """
        boundary = (boundary or folder).resolve()
        places = [folder / HUB_FOLDER, folder] if (folder / HUB_FOLDER).is_dir() else [folder]

        def find(*names: str) -> Path | None:
            paths = (place / name for name in names for place in places)
            return next((path for path in paths if path.is_file() and path.resolve().is_relative_to(boundary)), None)

        reports: dict[str, Path] = {}
        for depth in ("", "*/", "*/*/"):
            for path in sorted(places[0].glob(depth + REPORT_NAME)):
                inside = path.resolve().is_relative_to(boundary)
                routes = (path.parent / ROUTES_NAME).resolve().is_relative_to(boundary)
                if inside and routes and len(reports) < MAX_NAMES:
                    reports[path.parent.relative_to(places[0]).name or "report"] = path.parent
        results_path, manifest_path = find(RESULTS_NAME), find(STAGES_NAME)
        if not (reports or results_path or manifest_path):
            expected = f"{REPORT_NAME}, {RESULTS_NAME} or {STAGES_NAME}"
            raise ValueError(f"{name}: expected a run or a report ({expected}), found none")
        results = _read(results_path, 1) if results_path else {}
        stages = results.get("stages")
        if stages is None and manifest_path:
            stages = _read(manifest_path, 1).get("stages")
        repair_path = find("repair/rollback.json")
        if "rollback" not in results and repair_path:
            results["rollback"] = _read(repair_path, 1).get("rows")
        run = cls(name, folder, [], reports, {}, find(*CARDS))
        run.stages = _checked_stages([] if stages is None else stages)
        run.results = {
            "rollback": _checked_rollback(results.get("rollback", [])),
            "refresh": _checked_refresh(results.get("refresh")),
            "changed": _checked_changed(results.get("edits")),
            "seed": results.get("seed") if isinstance(results.get("seed"), int) else None,
        }
        return run

    @property
    def domains(self) -> list[str]:
        """Names of the scored domains, in the order in which they appear."""
        return list(dict.fromkeys(name for stage in self.stages for name in stage["scores"]))

    @property
    def stage_names(self) -> list[str]:
        """Names of the stages."""
        return [stage_name(stage["index"], stage["kind"], stage["domain"]) for stage in self.stages]

    def report(self, name: str) -> InterferenceReport:
        """
        One of its reports.

        Args:
            name (`str`):
                One of `reports`.

        Returns:
            [`InterferenceReport`]: The report, whose arrays are read when they are asked for.

        Raises:
            `ValueError`: If there is no such report, or it is broken.
        """
        if name not in self.reports:
            raise ValueError(f"{self.name}: expected one of the reports {sorted(self.reports)}, found {name!r:.80}")
        try:
            return read_report(self.reports[name])
        except ValueError as error:
            raise ValueError(f"{self.name}, {name}: {error}") from error

    def read_card(self) -> str:
        """
        The text of its page.

        Returns:
            `str`: Markdown, cut off after a megabyte; a sentence that says so where there is none.
        """
        if self.card is None:
            return "This run has no card."
        with open(self.card, encoding="utf-8", errors="replace") as file:
            return file.read(MAX_CARD_BYTES)


def _checked_stages(stages: Any) -> list[dict[str, Any]]:
    _check("stages", stages, (list,))
    if len(stages) > MAX_STAGES:
        raise ValueError(f"stages: expected at most {MAX_STAGES}, found {len(stages)}")
    checked = []
    for stage in stages:
        _check("stages", stage, (dict,))
        _check("stages, index", stage.get("index"), (int,))
        _check("stages, kind", stage.get("kind"), (str,))
        _check("stages, domain", stage.get("domain"), (str, type(None)))
        _check("stages, scores", stage.get("scores"), (dict,))
        if len(stage["scores"]) > MAX_NAMES:
            raise ValueError(f"stages, scores: expected at most {MAX_NAMES} domains")
        for entry in stage["scores"].values():
            _check("stages, scores", entry, (dict,))
            for name in ("value", "low", "high", "n"):
                _check(f"stages, scores, {name}", entry.get(name), (int, float))
        kept = {name: stage.get(name) for name in ("index", "kind", "domain", "steps", "scores")}
        kept["steps"] = kept["steps"] if isinstance(kept["steps"], int) else None
        checked.append(kept)
    return checked


def _checked_rollback(rows: Any) -> list[dict[str, Any]]:
    _check("rollback", rows, (list,))
    for row in rows:
        _check("rollback", row, (dict,))
        for name in ("criterion", "scope", "step_rule"):
            _check(f"rollback, {name}", row.get(name), (str,))
        for name in ("budget", "step"):
            _check(f"rollback, {name}", row.get(name), (int, float))
        row.setdefault("pair", 0)
        _check_share(row, "rollback")
    return rows[: MAX_NAMES * MAX_NAMES]


def _checked_refresh(refresh: Any) -> dict[str, Any] | None:
    if refresh is None:
        return None
    _check("refresh", refresh, (dict,))
    _check("refresh, domain", refresh.get("domain"), (str,))
    _check("refresh, steps", refresh.get("steps"), (int,))
    _check_share(refresh, "refresh")
    return refresh


def _check_share(row: dict[str, Any], where: str) -> None:
    for name in ("recovered", "low", "high"):
        _check(f"{where}, {name}", row.get(name), (int, float, type(None)))
    _check(f"{where}, collateral", row.setdefault("collateral", {}), (dict,))
    for value in row["collateral"].values():
        _check(f"{where}, collateral", value, (int, float))


def _checked_changed(edits: Any) -> dict[str, Any]:
    changed = edits.get("changed") if isinstance(edits, dict) else None
    check_overlaps(changed or {}, RESULTS_NAME)
    return changed or {}
