"""What is fetched from the Hub: checkpoints of a revision, and reports."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RevisionNotFoundError

from ..revision import split_revision


REPORT_FOLDER = "interference"
# Files of a checkpoint. No pickle is among them.
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "adapters/*")


def checkpoint_folder(name: str | Path, trust_remote_code: bool = False) -> str:
    """
    A checkpoint in a form that every `from_pretrained` takes.

    Args:
        name (`str` or `pathlib.Path`):
            Folder, `user/repo` or `user/repo@revision`.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to fetch code that comes with the checkpoint too.

    Returns:
        `str`: The name as it is, without a revision; otherwise the folder of the cache with the files of the revision.

    Raises:
        `ValueError`: If there is no such repository or revision, or it cannot be reached.
    """
    repo_id, revision = split_revision(name)
    if revision is None:
        return repo_id
    patterns = [*MODEL_FILES, "*.py"] if trust_remote_code else list(MODEL_FILES)
    return _snapshot(repo_id, revision, allow_patterns=patterns, ignore_patterns=[f"{REPORT_FOLDER}/*"])


def report_folder(name: str | Path, subfolder: str = REPORT_FOLDER) -> tuple[Path, str | None]:
    """
    Folder of a report.

    Args:
        name (`str` or `pathlib.Path`):
            Folder, `user/repo` or `user/repo@revision`.
        subfolder (`str`, *optional*, defaults to `"interference"`):
            Folder of the report in the repository. A run with several reports has the others in folders below it.

    Returns:
        `tuple[pathlib.Path, str]`: The folder, and the Hub id if it was fetched from the Hub.

    Raises:
        `ValueError`: If there is no such repository or revision, or it cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name), None
    repo_id, revision = split_revision(name)
    try:
        folder = Path(_snapshot(repo_id, revision, allow_patterns=[f"{subfolder}/*"])) / subfolder
    except ValueError as error:
        raise ValueError(f"{name}: expected a report with report.json, found none ({error})") from error
    if not (folder / "report.json").is_file():
        raise ValueError(f"{name}: expected a report with {subfolder}/report.json, found none")
    return folder, repo_id


def _snapshot(repo_id: str, revision: str | None, **patterns) -> str:
    name = repo_id if revision is None else f"{repo_id}@{revision}"
    try:
        return snapshot_download(repo_id, revision=revision, **patterns)
    except HFValidationError as error:
        raise ValueError(f"{name}: expected a folder that exists or a Hub id ({error})") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo_id}: expected the branch, tag or commit {revision!r}, found none") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"{name}: neither a folder nor readable from the Hub ({error})") from error
