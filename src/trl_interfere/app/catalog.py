"""What can be compared: runs in chosen folders, repositories on the Hub, uploaded reports."""

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from ..analysis.report import REPORT_NAME, ROUTES_NAME
from ..run import STAGES_NAME
from .stored_run import HUB_FOLDER, MAX_JSON_BYTES, RESULTS_NAME, StoredRun


TAG = "trl-interfere"
MAX_DOWNLOAD_BYTES = 256 * 2**20  # of what a repository holds beside its weights
MAX_FOUND = 50
_REPO_ID = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}", re.ASCII)
_MARKS = (RESULTS_NAME, STAGES_NAME, REPORT_NAME)


class Catalog:
    """
    The runs that may be shown. Nothing outside the chosen folders is read.

    Args:
        folders (`Sequence[pathlib.Path]`, *optional*):
            Folders of runs or reports, or folders of such folders.
        hub (`bool`, *optional*, defaults to `True`):
            Whether repositories on the Hub may be read.

    Raises:
        `ValueError`: If a folder does not exist or holds no run.
    """

    def __init__(self, folders: Sequence[Path] = (), hub: bool = True):
        self.hub = hub
        self.folders: dict[str, Path] = {}
        self._fetched: dict[str, Path] = {}
        for folder in folders:
            found = _runs_in(Path(folder))
            if not found:
                raise ValueError(f"{folder}: expected the folder of a run or of a report, found none")
            for path in found:
                self.folders[_free_name(path.resolve().name, self.folders)] = path

    @property
    def names(self) -> list[str]:
        """Names of the local runs."""
        return list(self.folders)

    def search(self, words: str = "") -> list[str]:
        """
        Repositories on the Hub with the tag `trl-interfere`.

        Args:
            words (`str`, *optional*, defaults to `""`):
                Part of the name.

        Returns:
            `list[str]`: Their ids, at most 50.

        Raises:
            `ValueError`: If the Hub is switched off or cannot be reached.
        """
        if not self.hub:
            raise ValueError("the Hub is switched off here")
        try:
            models = HfApi().list_models(filter=TAG, search=words[:96] or None, limit=MAX_FOUND)
            return [model.id for model in models]
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise ValueError(f"the Hub cannot be reached ({_first_line(error)})") from error

    def open(self, name: str, uploads: dict[str, str] | None = None) -> StoredRun:
        """
        A run by its name.

        Args:
            name (`str`):
                A local name, the name of an upload, or `user/repo` on the Hub.
            uploads (`dict[str, str]`, *optional*):
                Folders of this visitor's uploads, by name.

        Returns:
            [`StoredRun`]: The run.

        Raises:
            `ValueError`: If there is none, or it is broken.
        """
        if name in self.folders:
            return StoredRun.read(self.folders[name], name)
        if uploads and name in uploads:
            return StoredRun.read(Path(uploads[name]), name)
        if _REPO_ID.fullmatch(name) and ".." not in name:
            folder = self._fetch(name)
            return StoredRun.read(folder, name, boundary=folder.parent.parent)
        raise ValueError(f"{name[:80]!r}: expected one of {self.names} or user/repo on the Hub")

    def _fetch(self, repo_id: str) -> Path:
        if not self.hub:
            raise ValueError(f"{repo_id}: the Hub is switched off here")
        if repo_id in self._fetched:
            return self._fetched[repo_id]
        try:
            files = HfApi().model_info(repo_id, files_metadata=True).siblings or []
            wanted = {
                file.rfilename: file.size or 0
                for file in files
                if file.rfilename == "README.md"
                or Path(file.rfilename).name in (*_MARKS, ROUTES_NAME, "rollback.json")
                and file.rfilename.startswith(f"{HUB_FOLDER}/")
            }
            if not any(name.startswith(f"{HUB_FOLDER}/") for name in wanted):
                raise ValueError(f"{repo_id}: expected a repository with {HUB_FOLDER}/{REPORT_NAME}, found none")
            if sum(wanted.values()) > MAX_DOWNLOAD_BYTES:
                limit = MAX_DOWNLOAD_BYTES >> 20
                raise ValueError(f"{repo_id}: expected at most {limit} MB, found {sum(wanted.values()) >> 20} MB")
            self._fetched[repo_id] = Path(snapshot_download(repo_id, allow_patterns=list(wanted)))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ValueError(f"{repo_id}: not readable from the Hub ({_first_line(error)})") from error
        return self._fetched[repo_id]


def store_upload(files: Sequence[Path], folder: Path | None = None) -> tuple[str, Path]:
    """
    Keep an uploaded report in a folder of its own, after a look at it.

    Args:
        files (`Sequence[pathlib.Path]`):
            A `report.json` and, if figures over routes are wanted, its `routes.safetensors`.
        folder (`pathlib.Path`, *optional*):
            Where to put it. Defaults to a new temporary folder.

    Returns:
        `tuple[str, pathlib.Path]`: Name and folder.

    Raises:
        `ValueError`: If the files are too large, or hold something else.
    """
    reports = [path for path in files if path.suffix == ".json"]
    routes = [path for path in files if path.suffix == ".safetensors"]
    if len(reports) != 1 or len(routes) > 1 or len(reports) + len(routes) != len(files):
        raise ValueError(
            f"upload: expected one {REPORT_NAME}, and {ROUTES_NAME} if you like, found {len(files)} files"
        )
    for path, limit in ((reports[0], MAX_JSON_BYTES), *((path, MAX_DOWNLOAD_BYTES) for path in routes)):
        if path.stat().st_size > limit:
            raise ValueError(f"upload, {path.name[:80]}: expected at most {limit >> 20} MB")
    for path in routes:
        try:
            safe_open(path, framework="np")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"upload, {path.name[:80]}: expected safetensors ({error})") from error
    folder = Path(tempfile.mkdtemp(prefix="trl-interfere-")) if folder is None else folder
    shutil.copyfile(reports[0], folder / REPORT_NAME)
    for path in routes:
        shutil.copyfile(path, folder / ROUTES_NAME)
    try:
        report = StoredRun.read(folder, "upload").report("report")
    except ValueError as error:
        shutil.rmtree(folder)
        raise ValueError(str(error).replace("upload, report: ", "upload: ")) from error
    return f"upload: {report.earlier[:40]} after {', '.join(report.later)[:60]}", folder


def is_packed_lab(folder: Path) -> bool:
    """
    Whether a folder holds a run of the lab with packed weights, see [`~lab.packed.pack`].

    Args:
        folder (`pathlib.Path`):
            The folder.

    Returns:
        `bool`: `True` if it does.
    """
    return any(folder.glob("stages/*/delta.safetensors")) and any(folder.glob(f"analysis/*/{REPORT_NAME}"))


def _runs_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, found none")
    if _is_run(folder):
        return [folder]
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and _is_run(path)]


def _is_run(folder: Path) -> bool:
    return any((place / name).is_file() for place in (folder, folder / HUB_FOLDER) for name in _MARKS)


def _free_name(name: str, taken: dict[str, Path]) -> str:
    number, free = 2, name
    while free in taken:
        free, number = f"{name} ({number})", number + 1
    return free


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
