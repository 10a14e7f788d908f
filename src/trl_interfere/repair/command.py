"""The command `trl-interfere rollback`."""

import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..analysis.report import InterferenceReport
from ..models import is_adapter
from ..recipe import load_run_file
from .choice import RouteChoice, choose_routes, locate_checkpoint
from .folder import apply_delta, revert_delta, roll_back_folder, undo_rollback
from .rollback import PER_ROUTE, RouteRollback


@dataclass
class Request:
    """
    What the command line asks for: one of a rollback, `undo`, `apply_delta` and `revert_delta`.

    Args:
        reports (`list[pathlib.Path]`, *optional*):
            Folders of analyses, one for each earlier domain that is repaired.
        weights (`str`, *optional*):
            Weights of these domains, as `math=2,qa=1`. Defaults to 1 each.
        before (`str`, *optional*):
            Checkpoint before the update. Defaults to the one in the report.
        after (`str`, *optional*):
            Checkpoint after it. Defaults to the one in the report.
        base (`str`, *optional*):
            Where the model of an adapter lies.
        output_dir (`pathlib.Path`, *optional*):
            Folder of the result.
        rollback (`dict`, *optional*):
            Settings of [`RouteRollback`]; `step` as text.
        config (`pathlib.Path`, *optional*):
            YAML file with the domains.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Data type that a search of steps computes in.
        later_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the loss of each later domain in a search.
        max_drop (`float`, *optional*):
            Points that a searched step may cost a domain of the reports.
        delta (`pathlib.Path`, *optional*):
            Delta file to write.
        undo (`pathlib.Path`, *optional*):
            Folder whose last rollback is undone.
        apply_delta (`pathlib.Path`, *optional*):
            Delta file to apply.
        revert_delta (`pathlib.Path`, *optional*):
            Delta file to revert.
        model (`str`, *optional*):
            Folder that a delta file is applied to or reverted in.
        given (`list[str]`, *optional*):
            Names of the options that were given. What is not a rollback refuses those that it would not look at.

    Raises:
        `ValueError`: If more than one thing is asked for, a part of it is missing, an option has no meaning for it, or
            the delta file cannot be written.
    """

    reports: list[Path] = field(default_factory=list)
    weights: str | None = None
    before: str | None = None
    after: str | None = None
    base: str | None = None
    output_dir: Path | None = None
    rollback: dict[str, Any] = field(default_factory=dict)
    config: Path | None = None
    dtype: str = "float32"
    later_weight: float = 1.0
    max_drop: float | None = None
    delta: Path | None = None
    undo: Path | None = None
    apply_delta: Path | None = None
    revert_delta: Path | None = None
    model: str | None = None
    given: list[str] = field(default_factory=list)

    def __post_init__(self):
        others = ("undo", "apply_delta", "revert_delta")
        asked = [name for name in others if getattr(self, name) is not None]
        needed = {*asked, "output_dir", "model", "threads"}
        given = [name for name in self.given if asked and name not in needed]
        if len(asked) > 1 or (asked and given):
            raise ValueError(f"expected {_option(asked[0])} without {_option([*asked[1:], *given][0])}")
        if asked and asked != ["undo"] and self.model is None:
            raise ValueError(f"{_option(asked[0])}: expected --model, the folder to change")
        if self.model is not None and asked in ([], ["undo"]):
            instead = "--undo names the folder itself" if asked else "a rollback takes --after"
            raise ValueError(f"--model: expected with --apply-delta or --revert-delta; {instead}")
        if not asked:
            if len(self.reports) > 1 and self.before is not None:
                raise ValueError("--before: expected one --report with it, each of several reports names its own")
            if self.weights is not None and len(self.reports) < 2:
                raise ValueError("--weights: expected several --report, one for each earlier domain")
            if not self.reports and self.after is None:
                raise ValueError(
                    "expected --report, or --before and --after, or one of --undo, --apply-delta and --revert-delta"
                )
            if self.output_dir is None:
                raise ValueError("--output-dir: expected the folder of the result, found none")
            if self.delta is not None:
                self._check_delta()

    def _check_delta(self) -> None:
        # A checkpoint is not written for a delta file that cannot be.
        if self.delta.exists():
            raise ValueError(f"{self.delta}: expected a new file, found one")
        place = self.delta.absolute().parent
        if self.output_dir.absolute() in (self.delta.absolute(), place, *place.parents):
            raise ValueError(
                f"{self.delta}: expected a file outside the new checkpoint {self.output_dir}, whose rollback/ has one"
            )
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(f"{self.delta}: expected a folder that can be written to, found {there}")


def carry_out(request: Request, console: Console, progress: bool = False) -> dict[str, Any]:
    """
    Do what the command line asks for, and say what was done.

    Args:
        request ([`Request`]):
            What is asked for.
        console ([`~rich.console.Console`]):
            Where to print.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show progress bars.

    Returns:
        `dict`: The record of the rollback.

    Raises:
        `ValueError`: If the input is bad; nothing is written then.
    """
    if request.undo is not None:
        record = undo_rollback(request.undo, request.output_dir, progress)
        console.print(f"Undone: {_place(request.undo, request.output_dir)}.", soft_wrap=True)
        return record
    if request.apply_delta is not None:
        record = apply_delta(request.apply_delta, request.model, request.output_dir, progress)
        console.print(f"Applied: {_place(request.model, request.output_dir)}.", soft_wrap=True)
        return record
    if request.revert_delta is not None:
        record = revert_delta(request.revert_delta, request.model, request.output_dir, progress)
        console.print(f"Reverted: {_place(request.model, request.output_dir)}.", soft_wrap=True)
        return record
    return _roll_back(request, console, progress)


def _roll_back(request: Request, console: Console, progress: bool) -> dict[str, Any]:
    output_dir = request.output_dir
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{output_dir}: expected an empty or a new folder")  # before anything is computed
    rollback = RouteRollback(**{**request.rollback, "step": _step(request.rollback.get("step", "1.0"))})
    reports = [InterferenceReport.from_pretrained(folder) for folder in request.reports]
    weights = None if request.weights is None else _weights(request.weights)
    left_out = [report.earlier for report in reports if weights is not None and report.earlier not in weights]
    if left_out:
        raise ValueError(
            f"--weights: expected a number for each report, 0 for a domain that is only spared, found none for "
            f"{left_out}"
        )
    before, after = request.before, request.after
    if reports:
        # An adapter that stands in for the checkpoint of the report is rolled back to its own model.
        if before is None and not (after is not None and is_adapter(after)):
            places = zip(reports, request.reports, strict=True)
            before = [locate_checkpoint(report.before, folder) for report, folder in places]
            before = before[0] if len(before) == 1 else before
        if after is None:
            places = zip(reports, request.reports, strict=True)
            ends = [locate_checkpoint(report.after, folder) for report, folder in places]
            different = {str(Path(end).resolve()) if Path(end).is_dir() else end for end in ends}
            if len(different) > 1:
                raise ValueError(
                    f"--report: expected the same checkpoint after the update in all, found {sorted(different)}; "
                    "--after says which one it is"
                )
            after = ends[0]
        reports = [replace(report, after=str(after)) for report in reports]
    if request.delta is not None and isinstance(before, str) and is_adapter(before) and is_adapter(after):
        raise ValueError(
            f"{request.delta}: an adapter that is rolled back to an earlier one has another rank and no delta file; "
            "it is itself the small file"
        )
    run = None if request.config is None else load_run_file(request.config)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress) as bar:
        task = bar.add_task("choose routes")
        choice = choose_routes(
            rollback,
            before,
            after,
            reports,
            run,
            base=request.base,
            dtype=request.dtype,
            progress=lambda part: bar.update(task, description=part),
            later_weight=request.later_weight,
            max_drop=request.max_drop,
            weights=weights,
        )
    record = roll_back_folder(
        before,
        after,
        output_dir,
        choice.routes,
        choice.step,
        base=request.base,
        settings=choice.settings,
        progress=progress,
        target=choice.target,
    )
    console.print(_summary(record, choice))
    if choice.explanation is not None:
        console.print(Markdown(choice.explanation.to_markdown()))
    console.print(f"The checkpoint is in {output_dir}; undo it with --undo {output_dir}.", soft_wrap=True)
    if request.delta is not None:
        request.delta.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = request.delta.with_name(f".{request.delta.name}.{os.getpid()}.tmp")
        shutil.copyfile(output_dir / record["file"], temporary)
        os.replace(temporary, request.delta)
        size = request.delta.stat().st_size / 1e6
        console.print(f"The delta file is {request.delta} ({size:.2f} MB).", soft_wrap=True)
    return record


def _weights(text: str) -> dict[str, float]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        found = {name: float(value) for name, value in (part.rsplit("=", 1) for part in parts)}
    except ValueError as error:
        raise ValueError(f"--weights: expected domain=number separated by commas, found {text!r}") from error
    if len(found) < len(parts):
        raise ValueError(f"--weights: expected each domain once, found {text!r}")
    return found


def _step(text: str) -> float | str:
    if text in ("optimal", *PER_ROUTE):
        return text
    try:
        return float(text)
    except ValueError as error:
        known = ", ".join(repr(name) for name in ("optimal", *PER_ROUTE))
        raise ValueError(f"--step: expected a number of 0 or more or one of {known}, found {text!r}") from error


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _place(model: str | Path, output_dir: Path | None) -> str:
    return str(model) if output_dir is None else f"{model}, into {output_dir}"


def _summary(record: dict[str, Any], choice: RouteChoice) -> Table:
    table = Table(title="Rollback", show_header=False)
    by_kind = {kind: sum(layers.values()) for kind, layers in record["routes_by_layer"].items()}
    layers = sorted({int(layer) for part in record["routes_by_layer"].values() for layer in part})
    steps = record["step"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in by_kind.items())
    table.add_row("routes", f"{len(record['routes'])} ({kinds})")
    table.add_row("layers", ", ".join(map(str, layers)))
    table.add_row("criterion, scope", f"{choice.settings['criterion']}, {choice.settings['scope']}")
    table.add_row("step", f"{min(steps):.3g} to {max(steps):.3g}" if isinstance(steps, list) else f"{steps:g}")
    if choice.settings.get("damage", 1) <= 0:
        table.add_row("note", "the report found no damage: there was nothing to repair")
    if "tensors" in record:
        entries = record["tensors"].values()
        table.add_row("tensors", str(len(entries)))
        table.add_row("elements touched", f"{sum(entry['elements'] for entry in entries):,}")
        table.add_row("of them changed", f"{sum(entry['changed'] for entry in entries):,}")
    if "rank" in record:
        table.add_row("rank of the new adapter", str(record["rank"]))
    for name, entry in choice.settings.get("search", {}).get("scores", {}).items():
        change = entry["difference"]
        table.add_row(
            f"{name}, selection split (n={change['n']})",
            f"{change['value']:+.1f} points [{change['low']:+.1f}, {change['high']:+.1f}]",
        )
    return table
