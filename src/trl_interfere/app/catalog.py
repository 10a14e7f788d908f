"""What the page may show: runs and evaluations in chosen folders, and repositories on the Hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..models import local_folder
from ..run import STAGES_NAME
from .scored import SCORES_NAME, Scored


TAG = "trl-interfere"
HUB_FOLDER = "interference"  # of a repository that `trl-interfere push` filled
MAX_FOUND = 50
_REPO_ID = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}", re.ASCII)


class Catalog:
    """Nothing outside the chosen folders, and the Hub where it is allowed, is read."""

    def __init__(self, folders: Sequence[Path] = (), hub: bool = True):
        self.hub = hub
        self.folders: dict[str, Path] = {}
        self._open: dict[str, tuple[float, Scored]] = {}
        for folder in map(Path, folders):
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder}: expected a folder, found none")
            found = [place for place in (folder, *sorted(folder.iterdir())) if _mark(place)]
            if not found:
                raise ValueError(f"{folder}: expected the folder of a run or of an evaluation, found none")
            for path in found[:1] if _mark(folder) else found:
                self.folders[_free_name(path.resolve().name, self.folders)] = path
        self.names = list(self.folders)  # of the local runs and evaluations

    def search(self, words: str = "") -> list[str]:
        """Ids of repositories on the Hub with the tag `trl-interfere`."""
        if not self.hub:
            raise ValueError("the Hub is switched off here")
        try:
            return [model.id for model in HfApi().list_models(filter=TAG, search=words[:96] or None, limit=MAX_FOUND)]
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise ValueError(f"the Hub cannot be reached ({str(error).strip()[:200]})") from error

    def open(self, name: str) -> Scored:
        """A run or an evaluation by its local name, or a run by `user/repo`; read again where it has changed."""
        if name in self.folders:
            folder = self.folders[name]
        elif not _REPO_ID.fullmatch(name) or ".." in name:
            raise ValueError(f"{name[:80]!r}: expected one of {self.names} or user/repo on the Hub")
        elif not self.hub:
            raise ValueError(f"{name}: the Hub is switched off here")
        else:
            # By an address of the Hub, so that no folder of this name is taken.
            folder = local_folder(f"{name}@main", files=(f"{HUB_FOLDER}/*",)) / HUB_FOLDER
        mark = _mark(folder)
        if mark is None:
            raise ValueError(f"{name}: expected a run with {STAGES_NAME}, found none")
        changed = mark.stat().st_mtime
        if name not in self._open or self._open[name][0] != changed:
            self._open[name] = (changed, Scored(name, folder))
        return self._open[name][1]


def _mark(folder: Path) -> Path | None:
    return next((folder / name for name in (STAGES_NAME, SCORES_NAME) if (folder / name).is_file()), None)


def _free_name(name: str, taken: dict[str, Path]) -> str:
    number, free = 2, name
    while free in taken:
        free, number = f"{name} ({number})", number + 1
    return free
