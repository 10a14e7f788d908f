"""Publication of runs and reports: the model on main, each stage as a branch, the analysis under `interference/`."""

import io
import json
import shlex
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from matplotlib.figure import Figure
from rich.table import Table

from ..analysis.report import REPORT_FOLDER, REPORT_NAME, ROUTES_NAME, InterferenceReport
from ..checkpoint import published_name
from ..models import MODEL_FILES
from ..reporting.card import TAGS, analysis_card, report_card, stage_card
from ..reporting.plots import plot_rollback, plot_score_matrix
from ..revision import split_revision, stage_revision
from ..run import STAGES_NAME
from .eval_results import eval_result_files, model_index
from .run_folder import RESULTS_NAME, RunFolder
from .upload import PlannedRevision, Uploader


_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "adapters/*")
ROLLBACK_NAME = "rollback.json"
_RESUME_FILES = ("trainer_state.json", "resume_state_*", "generation_buffer_*", "entropy_ctrl_state.json")
_REPAIR_FOLDERS = ("repair", "rollback")


@dataclass
class PushPlan:
    """
    What a push will bring to which branch.

    Args:
        repo_id (`str`):
            The repository.
        revisions (`list[PlannedRevision]`):
            The branches in the order in which they are uploaded; `main` is the last one.
        messages (`dict[str, str]`):
            Message of the commit of each branch.
    """

    repo_id: str
    revisions: list[PlannedRevision] = field(default_factory=list)
    messages: dict[str, str] = field(default_factory=dict)

    def add(self, revision: PlannedRevision, message: str) -> None:
        self.revisions.append(revision)
        self.messages[revision.branch] = message

    def to_table(self) -> Table:
        """
        The plan for the terminal.

        Returns:
            [`rich.table.Table`]: Revision, path and size of each file.
        """
        table = Table(title=f"What goes to {self.repo_id}")
        table.add_column("revision")
        table.add_column("file", overflow="fold")
        table.add_column("bytes", justify="right")
        for revision in self.revisions:
            for path in sorted(revision.files):
                table.add_row(revision.branch, path, f"{revision.size(path):,}")
            table.add_row("", f"{len(revision.files)} files", f"{revision.total:,}", end_section=True)
        return table


@dataclass
class PushResult:
    """
    Where a push has gone.

    Args:
        repo_id (`str`):
            The repository.
        url (`str`):
            Its address.
        commits (`dict[str, str]`):
            The commit that each branch is at.
        collection (`str`, *optional*):
            Slug of the collection that the model is in.
    """

    repo_id: str
    url: str
    commits: dict[str, str]
    collection: str | None = None


def plan_push(
    run: RunFolder,
    repo_id: str,
    stages: bool = False,
    only: Iterable[str] | None = None,
    model: str | Path | None = None,
    repaired: str | None = None,
    license: str | None = None,
    with_model_index: bool = False,
) -> PushPlan:
    """
    What a push of a run would bring where. Nothing is sent.

    Args:
        run ([`RunFolder`]):
            The run.
        repo_id (`str`):
            The repository.
        stages (`bool`, *optional*, defaults to `False`):
            Whether each stage becomes a branch.
        only (`Iterable[str]`, *optional*):
            Names of stages. Plans their branches and leaves `main` alone.
        model (`str` or `pathlib.Path`, *optional*):
            Folder of the model on `main`, such as a repaired one. Defaults to the last stage.
        repaired (`str`, *optional*):
            What was done to that model after the run, for the card.
        license (`str`, *optional*):
            Licence for the card.
        with_model_index (`bool`, *optional*, defaults to `False`):
            Whether the card has the legacy `model-index`.

    Returns:
        [`PushPlan`]: The plan.

    Raises:
        `ValueError`: If the run has no finished stage, or a folder holds no weights.
    """
    if not run.trained:
        raise ValueError(f"{run.folder}: expected at least one finished stage, found none")
    plan = PushPlan(repo_id)
    chosen = run.trained if stages else []
    if only is not None:
        chosen = [record for record in run.trained if record.name in set(only)]
    for record in chosen:
        revision = PlannedRevision(stage_revision(record.name), _model_files(run.weights(record)), managed=["[!.]*"])
        revision.files["README.md"] = _card_bytes(stage_card(run.manifest, record, repo_id, license))
        plan.add(revision, f"Stage {record.name}")
    if only is not None:
        return plan
    final = run.trained[-1]
    main = PlannedRevision("main", managed=[*_WEIGHTS, f"{REPORT_FOLDER}/*", ".eval_results/*"])
    main.files = _model_files(run.weights(final) if model is None else Path(model))
    analysis, figures = _analysis_files(run)
    main.files |= analysis
    if model is not None:
        # What a rollback has recorded beside the weights: it undoes the rollback.
        for path in sorted([*Path(model).glob(ROLLBACK_NAME), *Path(model).glob("rollback/*.safetensors")]):
            main.files[f"{REPORT_FOLDER}/rollback/{path.name}"] = path
        repaired = repaired or (
            "The weights on `main` are a repaired model"
            + (", see `interference/rollback/`." if (Path(model) / ROLLBACK_NAME).is_file() else ".")
        )
    main.files |= eval_result_files(run) if model is None else {}
    card = analysis_card(
        run.manifest,
        repo_id,
        license=license,
        figures=figures,
        revisions=stages,
        final=final,
        repaired=repaired,
        eval_results=model_index(run) if with_model_index and model is None else None,
    )
    main.files["README.md"] = _card_bytes(card)
    plan.add(main, f"Model after {final.name}, with its analysis")
    return plan


def push_run(
    folder: str | Path | RunFolder,
    repo_id: str,
    stages: bool = False,
    private: bool | None = None,
    collection: str | None = None,
    token: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
    only: Iterable[str] | None = None,
    **kwargs,
) -> PushResult:
    """
    Publish a run. Repeated, it sends only what is missing; stopped, `main` is as it was.

    The branches of the stages come first, and `main` gets everything in one commit at the end.

    Args:
        folder (`str` or `pathlib.Path` or [`RunFolder`]):
            Folder of the run.
        repo_id (`str`):
            The repository, `user/repo`; it is made if there is none.
        stages (`bool`, *optional*, defaults to `False`):
            Whether each stage becomes a branch, such as `stage-1-math`.
        private (`bool`, *optional*):
            Whether a new repository is private. Defaults to what the account or organisation has set.
        collection (`str`, *optional*):
            Title of a collection that the model is added to; it is made if there is none.
        token (`str`, *optional*):
            Token. Defaults to the one of the environment or of `hf auth login`.
        license (`str`, *optional*):
            Licence for the card. Defaults to that of the base model, if the Hub knows it.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a model on `main` that was not published by this function.
        only (`Iterable[str]`, *optional*):
            Names of stages to publish as branches, without `main`.
        **kwargs:
            Further arguments of [`plan_push`].

    Returns:
        [`PushResult`]: Where it has gone.

    Raises:
        `ValueError`: If there is nothing to publish, or the repository holds something else.
        [`PushError`]: If the Hub fails. The message has the command that goes on.
    """
    run = folder if isinstance(folder, RunFolder) else RunFolder.read(folder)
    uploader = Uploader(
        repo_id, command=_command(run.folder, repo_id, stages or only is not None, private, collection), token=token
    )
    if license is None:
        license = base_license(run.base_model, uploader.api)
    plan = plan_push(run, repo_id, stages=stages, license=license, only=only, **kwargs)
    url = uploader.create(private)
    if only is None:
        _check_owner(uploader, overwrite)
    commits = {
        revision.branch: uploader.upload(revision, plan.messages[revision.branch]) for revision in plan.revisions
    }
    slug = None if collection is None else add_to_collection(uploader, collection, f"seed {_seed(run)}")
    return PushResult(uploader.repo_id, url, commits, slug)


def push_report(
    report: InterferenceReport | str | Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    command: str | None = None,
) -> PushResult:
    """
    Publish a report under `interference/`. A card that another tool or a push of the run has written is left alone.

    Args:
        report ([`InterferenceReport`] or `str` or `pathlib.Path`):
            The report, or its folder.
        repo_id (`str`):
            The repository, `user/repo`; it is made if there is none.
        private (`bool`, *optional*):
            Whether a new repository is private.
        token (`str`, *optional*):
            Token. Defaults to the one of the environment or of `hf auth login`.
        command (`str`, *optional*):
            Command that goes on after a failure, for its message.

    Returns:
        [`PushResult`]: Where it has gone.

    Raises:
        `ValueError`: If there is no report.
        [`PushError`]: If the Hub fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(report, InterferenceReport):
            report.save_pretrained(folder)
        else:
            folder, report = report, InterferenceReport.from_pretrained(report)
        uploader = Uploader(repo_id, command=command, token=token)
        url = uploader.create(private)
        revision = plan_report(Path(folder), repo_id)
        if "README.md" in uploader.remote_files("main")[0] and _card_kind(uploader) != "report":
            del revision.files["README.md"]
        commit = uploader.upload(revision, f"Report: {report.earlier}, after {', '.join(report.later)}")
    return PushResult(uploader.repo_id, url, {"main": commit})


def plan_report(folder: Path, repo_id: str) -> PlannedRevision:
    """
    What the push of a report would bring to `main`.

    Args:
        folder (`pathlib.Path`):
            Folder of the report.
        repo_id (`str`):
            The repository.

    Returns:
        [`PlannedRevision`]: Its files.
    """
    report = InterferenceReport.from_pretrained(folder)
    files, figures = _report_files(folder, report, REPORT_FOLDER)
    files["README.md"] = _card_bytes(report_card(report, repo_id, figures))
    return PlannedRevision("main", files)


def push_checkpoint(folder: Path, repo_id: str, record_name: str, message: str, token: str | None = None) -> None:
    """
    Bring the weights of a checkpoint in the middle of a stage to the branch of the stage.

    Args:
        folder (`pathlib.Path`):
            Folder of the checkpoint.
        repo_id (`str`):
            The repository.
        record_name (`str`):
            Name of the stage.
        message (`str`):
            Message of the commit.
        token (`str`, *optional*):
            Token.
    """
    files = {
        name: path
        for name, path in _model_files(folder).items()
        if not any(fnmatch(name, pattern) for pattern in _RESUME_FILES)
    }
    revision = PlannedRevision(stage_revision(record_name), files, managed=list(_WEIGHTS))
    Uploader(repo_id, token=token).upload(revision, message)


def add_to_collection(uploader: Uploader, title: str, note: str | None = None) -> str:
    """
    Add the repository to a collection, which is made if there is none.

    Args:
        uploader ([`Uploader`]):
            Of the repository.
        title (`str`):
            Title of the collection.
        note (`str`, *optional*):
            Note on the repository.

    Returns:
        `str`: Slug of the collection.
    """
    namespace = uploader.repo_id.split("/")[0]

    def add() -> str:
        collection = uploader.api.create_collection(title, namespace=namespace, exists_ok=True)
        uploader.api.add_collection_item(
            collection.slug, uploader.repo_id, item_type=uploader.repo_type, note=note, exists_ok=True
        )
        return collection.slug

    return uploader.step(f"adding to the collection {title!r}", add)


def base_license(base_model: str, api: HfApi) -> str | None:
    """
    Licence of a base model.

    Args:
        base_model (`str`):
            Hub id or folder.
        api ([`~huggingface_hub.HfApi`]):
            The client.

    Returns:
        `str` or `None`: Its identifier, if the card of the base model has one and can be read.
    """
    base, revision = split_revision(base_model)
    try:
        if (Path(base) / "README.md").is_file():
            return ModelCard.load(Path(base) / "README.md").data.license
        if "/" not in base or Path(base).exists():
            return None
        card = ModelCard.load(api.hf_hub_download(base, "README.md", revision=revision))
    except (OSError, ValueError, HfHubHTTPError):  # no card, no network, or metadata that are no YAML
        return None
    return card.data.license


def _model_files(folder: Path) -> dict[str, Path | bytes]:
    files: dict[str, Path | bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        known = any(fnmatch(name, pattern) for pattern in MODEL_FILES) and ("/" not in name or name[:9] == "adapters/")
        known = known and name != ROLLBACK_NAME
        if path.is_file() and known and path.suffix not in (".bin", ".pt", ".pth", ".pkl"):
            files[name] = path
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(f"{folder}: expected weights as safetensors, found none")
    return files


def _analysis_files(run: RunFolder) -> tuple[dict[str, Path | bytes], dict[str, str]]:
    """Files under `interference/`, and the paths of the figures that the card shows."""
    files: dict[str, Path | bytes] = {f"{REPORT_FOLDER}/{STAGES_NAME}": run.folder / STAGES_NAME}
    for record in run.stages:
        for entry in record.scores.values():
            files[f"{REPORT_FOLDER}/{entry['file']}"] = run.folder / entry["file"]
    figures = {}
    matrix = run.score_matrix
    if matrix.domains:
        figures["score_matrix"] = f"{REPORT_FOLDER}/figures/score_matrix.png"
        files[figures["score_matrix"]] = _figure(run.folder, "score_matrix", lambda: plot_score_matrix(matrix))
    if run.results is not None:
        files[f"{REPORT_FOLDER}/{RESULTS_NAME}"] = run.folder / RESULTS_NAME
        rows = [row for row in run.results["rollback"] if row["pair"] == 0]
        earlier = run.results["pairs"][0]["earlier"]
        figures["rollback_curve"] = f"{REPORT_FOLDER}/figures/rollback_curve.png"
        files[figures["rollback_curve"]] = _figure(run.folder, "rollback_curve", lambda: plot_rollback(rows, earlier))
    for folder in (run.folder / name for name in _REPAIR_FOLDERS):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in (".json", ".safetensors", ".md"):
                files[f"{REPORT_FOLDER}/{path.relative_to(run.folder).as_posix()}"] = path
    for position, (name, folder) in enumerate(run.reports.items()):
        # The first report is the one that `InterferenceReport.from_pretrained("user/repo")` reads.
        place = REPORT_FOLDER if position == 0 else f"{REPORT_FOLDER}/{name}"
        report = InterferenceReport.from_pretrained(folder)
        own, shown = _report_files(folder, report, place)
        files |= own
        figures |= {f"{name}/{figure}": path for figure, path in shown.items()}
    return files, figures


def _report_files(
    folder: Path, report: InterferenceReport, place: str
) -> tuple[dict[str, Path | bytes], dict[str, str]]:
    files: dict[str, Path | bytes] = {
        f"{place}/{name}": folder / name
        for name in (REPORT_NAME, ROUTES_NAME, "report.md")
        if (folder / name).is_file()
    }
    content = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
    shortened = _without_folders(content)
    if shortened != content:
        files[f"{place}/{REPORT_NAME}"] = (json.dumps(shortened, indent=2) + "\n").encode()
    contents = {path.stem: path for path in sorted((folder / "figures").glob("*.png"))}
    if not contents:
        with tempfile.TemporaryDirectory() as scratch:
            contents = {path.stem: path.read_bytes() for path in report.save_figures(scratch)}
    figures = {name: f"{place}/figures/{name}.png" for name in contents}
    return files | {figures[name]: content for name, content in contents.items()}, figures


def _without_folders(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_folders(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_folders(value) for value in content]
    return published_name(content) if isinstance(content, str) else content


def _figure(folder: Path, name: str, draw) -> Path | bytes:
    path = folder / "figures" / f"{name}.png"
    return path if path.is_file() else _png(draw())


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    return buffer.getvalue()


def _card_bytes(card: ModelCard) -> bytes:
    return str(card).encode()


def _card_kind(uploader: Uploader) -> str:
    """Whose card is on main: "run" and "report" are ours."""
    read = uploader.step(
        "reading the card",
        lambda: Path(uploader.api.hf_hub_download(uploader.repo_id, "README.md", revision="main")).read_text(
            encoding="utf-8"
        ),
    )
    card = ModelCard(read, ignore_metadata_errors=True)
    if TAGS[0] not in (card.data.tags or []):
        return "other"
    return "report" if card.data.library_name == "trl-interfere" else "run"


def _check_owner(uploader: Uploader, overwrite: bool) -> None:
    remote, _ = uploader.remote_files("main")
    foreign = any(path.endswith(".safetensors") for path in remote)
    if foreign and f"{REPORT_FOLDER}/{STAGES_NAME}" not in remote and not overwrite:
        raise ValueError(
            f"{uploader.repo_id}: expected an empty repository or one that a run was pushed to, found another model; "
            "choose another name, or replace it with --overwrite (`overwrite=True`)"
        )


def _seed(run: RunFolder) -> int | str:
    return run.manifest.identity.get("config", {}).get("seed", "unknown")


def _command(folder: Path, repo_id: str, stages: bool, private: bool | None, collection: str | None) -> str:
    parts = ["trl-interfere", "push", str(folder), repo_id]
    parts += ["--stages"] if stages else []
    parts += ["--private"] if private else []
    parts += ["--collection", collection] if collection is not None else []
    return shlex.join(parts)


def push_folder(folder: str | Path, repo_id: str, dry_run: bool = False, **settings) -> PushResult | PushPlan:
    """Publish a run, or a report that is none of a run; with `dry_run` only what would go where."""
    if (Path(folder) / REPORT_NAME).is_file() and not (Path(folder) / STAGES_NAME).is_file():
        if dry_run:
            return PushPlan(repo_id, [plan_report(Path(folder), repo_id)])
        return push_report(folder, repo_id, private=settings.get("private"))
    if dry_run:
        return plan_push(RunFolder.read(folder), repo_id, stages=settings.get("stages", False))
    return push_run(folder, repo_id, **settings)
