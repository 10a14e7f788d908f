"""What a push brings where: the model to main, each stage to a branch, the analysis under `interference/`."""

import io
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from rich.table import Table

from ..analysis.report import REPORT_FOLDER, REPORT_NAME, InterferenceReport
from ..checkpoint import published_name
from ..evaluation.score_matrix import ScoreMatrix
from ..models import MODEL_FILES
from ..reporting.card import analysis_card, repair_card, report_card, stage_card
from ..reporting.plots import plot_scores
from ..reporting.verdict import REPAIR_NAME, read_repair
from ..revision import parse_benchmark, stage_revision
from ..run import STAGES_NAME, Run, StageRecord, resolve_inside
from ..tables import console_table


Files = dict[str, Path | bytes]

PAGE_NAME = "interference.html"
_TRAINING_FILES = ("trainer_state.json", "resume_state_*", "generation_buffer_*", "entropy_ctrl_state.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")
_REPORT_FILES = ("*.json", "*.safetensors", "*.md", "figures/*.png")


@dataclass
class PushPlan:
    """For each branch, in the order of the uploads, its files by path: where they lie, or their content."""

    repo_id: str
    branches: dict[str, Files] = field(default_factory=dict)

    def to_table(self) -> Table:
        """Branch, path and size of each file."""
        rows = []
        for branch, files in self.branches.items():
            contents = dict(sorted(files.items())).values()
            sizes = [len(one) if isinstance(one, bytes) else one.stat().st_size for one in contents]
            rows += [[branch, path, f"{size:,}"] for path, size in zip(sorted(files), sizes, strict=True)]
            rows.append([branch, f"{len(sizes)} files", f"{sum(sizes):,}"])
        return console_table(f"What goes to {self.repo_id}", ["branch", "file", "bytes"], rows)


def plan_run(
    run: Run,
    repo_id: str,
    stages: bool = True,
    license: str | None = None,
    only: Iterable[str] | None = None,
    page: str | None = None,
) -> PushPlan:
    """
    What a push of a run would bring where; `only` plans the branches of these stages and leaves `main` alone, which
    is the last one otherwise. `page` is a file of HTML for `main`. Nothing is sent.
    """
    trained = [record for record in run.stages if record.folder is not None]
    if not trained:
        raise ValueError(f"{run.folder}: expected at least one finished stage, found none")
    plan = PushPlan(repo_id)
    for record in trained:
        if stages if only is None else record.name in set(only):
            plan.branches[stage_revision(record.name)] = _stage_files(run, record, repo_id, license)
    if only is not None:
        return plan
    if (run.repair / "merged").is_dir():
        plan.branches["healed"] = model_files(run.repair / "merged", run.folder)
        plan.branches["healed"]["README.md"] = str(repair_card(read_repair(run), repo_id, repo_id, license)).encode()
    files = model_files(Path(run.weights(run.final)), run.folder)
    if (run.repair / REPAIR_NAME).is_file():
        files |= {f"repair/{path}": content for path, content in _repair_files(run, run.repair, repo_id).items()}
    analysis, figures = _analysis_files(run)
    files |= analysis | _eval_result_files(run)
    if page is not None:
        figures["page"] = PAGE_NAME
        files[PAGE_NAME] = page.encode()
    card = analysis_card(run, repo_id, license=license, figures=figures, revisions=stages, final=run.final)
    plan.branches["main"] = files | {"README.md": str(card).encode()}
    return plan


def plan_report(folder: str | Path, repo_id: str) -> PushPlan:
    """What the push of a report would bring to `main`."""
    report = InterferenceReport.from_pretrained(folder)
    files, figures = _report_files(Path(folder), Path(folder), REPORT_FOLDER)
    files["README.md"] = str(report_card(report, repo_id, figures)).encode()
    return PushPlan(repo_id, {"main": files})


def model_files(folder: Path, root: Path) -> Files:
    """Files of a checkpoint, all of them inside `root`: no pickle, no hidden file, no state of a training."""

    def wanted(name: str) -> bool:
        if "/" in name and not name.startswith("adapters/"):
            return False
        return _fits(name, MODEL_FILES) and not _fits(name, (*_TRAINING_FILES, *_PICKLES))

    files = _inside(folder, root, wanted)
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(f"{folder}: expected weights as safetensors, found none")
    return files


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _inside(folder: Path, root: Path, wanted: Callable[[str], bool]) -> Files:
    """Files of a folder that are wanted. One that a link or `..` leads out of `root` to is refused by its name."""
    part, files = Path(os.path.relpath(folder, root)), {}
    resolve_inside(root, part.as_posix())
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and wanted(name):
            files[name] = _without_folders(resolve_inside(root, (part / name).as_posix()))
    return files


def _stage_files(run: Run, record: StageRecord, repo_id: str, license: str | None) -> Files:
    folder = Path(run.weights(record))
    if record.kind == "heal":
        card = repair_card(read_repair(run), repo_id, repo_id, license)
        return _repair_files(run, folder, repo_id) | {"README.md": str(card).encode()}
    card = stage_card(run, record, repo_id, license)
    return model_files(folder, run.folder) | {"README.md": str(card).encode()}


def _repair_files(run: Run, folder: Path, repo_id: str) -> Files:
    """The adapter and `repair.json`; the adapter stands on the published model, or on the base model of a LoRA run."""
    files = _inside(folder, run.folder, lambda name: name.endswith((".json", ".safetensors")) and "/" not in name)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    whole = not (Path(run.weights(run.final)) / "adapter_config.json").is_file()
    config["base_model_name_or_path"] = repo_id if whole else run.identity.get("base_model", "unknown")
    return files | {"adapter_config.json": _json(config)}


def _analysis_files(run: Run) -> tuple[Files, dict[str, str]]:
    """Files under `interference/`, and the paths of the figures that the card shows."""
    names = [STAGES_NAME, *(entry["file"] for record in run.stages for entry in record.scores.values())]
    # With the figures of the repair, the folder can be read as a run.
    names += [name for name in ("results.json", f"repair/{REPAIR_NAME}") if (run.folder / name).is_file()]
    files: Files = {f"{REPORT_FOLDER}/{name}": _without_folders(resolve_inside(run.folder, name)) for name in names}
    figures = {}
    if run.domains:
        figures["scores"] = f"{REPORT_FOLDER}/figures/scores.png"
        buffer = io.BytesIO()
        plot_scores(ScoreMatrix.from_run(run)).savefig(buffer, dpi=150, format="png")
        files[figures["scores"]] = buffer.getvalue()
    for position, (name, folder) in enumerate(run.reports.items()):
        # The first report is the one that `InterferenceReport.from_pretrained("user/repo")` reads.
        own, shown = _report_files(folder, run.folder, f"{REPORT_FOLDER}/{name}" if position else REPORT_FOLDER)
        files |= own
        figures |= {f"{name}/{figure}": path for figure, path in shown.items()}
    return files, figures


def _eval_result_files(run: Run) -> dict[str, bytes]:
    """`.eval_results/*.yaml`, which the Hub shows on pages of models and benchmarks: a file for each benchmark."""
    config = run.identity.get("config", {})
    sampling = f"temperature {config['score_temperature']:g}" if "score_temperature" in config else "see the card"
    files, scores = {}, run.final.scores
    for domain, name in run.about.get("benchmarks", {}).items():
        if domain not in scores:
            continue
        (dataset, revision, task), entry = parse_benchmark(name), scores[domain]
        interval = f"95% interval [{entry['low']:.1f}, {entry['high']:.1f}]"
        notes = f"after stage {run.final.name}; n={entry['n']}, {interval}; {sampling}"
        result = EvalResultEntry(dataset, task, entry["value"], dataset_revision=revision, notes=notes)
        text = yaml.safe_dump(eval_result_entries_to_yaml([result]), sort_keys=False)
        files[f".eval_results/{domain}.yaml"] = text.encode()
    return files


def _report_files(folder: Path, root: Path, place: str) -> tuple[Files, dict[str, str]]:
    def wanted(name: str) -> bool:
        return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in _REPORT_FILES)

    files = _inside(folder, root, wanted)
    if REPORT_NAME not in files:
        raise ValueError(f"{folder}: expected a report with {REPORT_NAME}, found none")
    figures = {Path(name).stem: f"{place}/{name}" for name in files if name.endswith(".png")}
    return {f"{place}/{name}": content for name, content in files.items()}, figures


def _without_folders(path: Path) -> Path | bytes:
    """A JSON file without paths of this machine; any other file as it is."""
    if path.suffix != ".json" or path.name == "tokenizer.json":
        return path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, found something else ({error})") from error
    shortened = _shortened(content)
    return path if shortened == content else _json(shortened)


def _shortened(content: Any) -> Any:
    """JSON with the published names of checkpoints."""
    if isinstance(content, dict):
        return {key: _shortened(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_shortened(value) for value in content]
    return published_name(content) if isinstance(content, str) else content


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
