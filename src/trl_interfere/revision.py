"""Names of checkpoints (a folder, `user/repo`, or `user/repo@revision`) and of benchmarks on the Hub."""

import re
from pathlib import Path


_BENCHMARK = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<task>[\w./-]+))?")
_STAGE_FOLDER = re.compile(r"(?:^|/)stages/([^/]+)/?$")


def split_revision(name: str | Path) -> tuple[str, str | None]:
    """
    Split `user/repo@revision`.

    Args:
        name (`str` or `pathlib.Path`):
            Folder, Hub id, or Hub id with a branch, tag or commit after an `@`. A folder that exists is taken as it
            is, whatever its name.

    Returns:
        `tuple[str, str]`: The folder or Hub id, and the revision or `None`.

    Raises:
        `ValueError`: If there is nothing before or after the `@`.
    """
    name = str(name)
    if "@" not in name or Path(name).exists():
        return name, None
    repo_id, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id) or not revision:
        raise ValueError(f"{name}: expected a folder that exists or user/repo@revision, found neither")
    return repo_id, revision


def parse_benchmark(name: str, where: str = "") -> tuple[str, str | None, str]:
    """Data set, revision and task of the name of a benchmark."""
    match = _BENCHMARK.fullmatch(name)
    if match is None:
        raise ValueError(f"{where}benchmark: expected user/dataset, user/dataset@revision or :task, found {name!r}")
    return match["id"], match["revision"], match["task"] or "default"


def stage_revision(stage: str) -> str:
    """Branch that a stage is published as: `stage-1-math` for `1-math`."""
    return f"stage-{stage}"


def published_checkpoint(checkpoint: str | None, repo_id: str) -> str | None:
    """Where a checkpoint that a report names lies on the Hub: stages of a run are branches of its repository."""
    match = None if checkpoint is None else _STAGE_FOLDER.search(checkpoint)
    return checkpoint if match is None else f"{repo_id}@{stage_revision(match[1])}"
