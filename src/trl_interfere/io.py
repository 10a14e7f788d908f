"""Files that are written whole, read with a check, and locked."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


_locked: set[Path] = set()


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one of this project's JSON files atomically."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path, schema_version: int) -> dict[str, Any]:
    """Read one of this project's JSON files; one that is not JSON, or of another schema version, is refused."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, found something else ({error})") from error
    found = content.get("schema_version") if isinstance(content, dict) else None
    if type(found) is not int or found != schema_version:
        raise ValueError(f"{path}: expected schema_version {schema_version}, found {found!r}")
    return content


def resolve_inside(folder: Path, part: str) -> Path:
    """
    Path of a part of a folder. Links may lead to the Hub's cache that the folder lies in, and nowhere else outside:
    what a file of a stranger names must not be read, and then published, from any place of the disk.
    """
    folder = folder.resolve()
    path = (folder / part).resolve()
    snapshots = next((parent for parent in (folder, *folder.parents) if parent.name == "snapshots"), None)
    if not any(path.is_relative_to(place) for place in (folder, *([snapshots.parent] if snapshots else []))):
        raise ValueError(f"{folder / part}: expected a file inside {folder}, found a path or a link that leaves it")
    return folder / part


@contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Be the only writer of a folder, which is made if it is missing. The lock ends with its process."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = folder.resolve() / ".lock"
        # Opened again in the process that holds it, a lock of POSIX would be lost as the second file is closed.
        if place in _locked:
            raise ValueError(f"{folder}: this process (pid {os.getpid()}) writes to the folder already")
        file = open(place, "a+", encoding="utf-8")  # noqa: SIM115 (held below)
    except OSError as error:
        raise OSError(f"{folder}: cannot be written to ({error.strerror or error})") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            pid = file.read().strip() or "unknown"
            raise ValueError(f"{folder}: another process (pid {pid}) writes to the folder; wait or end it") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        _locked.add(place)
        try:
            yield
        finally:
            file.truncate(0)
            _locked.discard(place)
