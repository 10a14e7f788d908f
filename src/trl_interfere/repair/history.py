"""The rollbacks of a folder, `rollback.json`: what was done to it, and how to undo the last of it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..run import read_json, write_atomically


SCHEMA_VERSION = 1
HISTORY_NAME = "rollback.json"
# Deltas lie in a folder of their own: programs that read all safetensors files beside config.json must not see them.
DELTA_FOLDER = "rollback"


@dataclass
class RollbackHistory:
    """
    Rollbacks of a checkpoint, the earliest first.

    Args:
        folder (`pathlib.Path`):
            Folder of the checkpoint.
        records (`list[dict]`, *optional*):
            What each rollback did; `file` is what it can be undone with, relative to the folder.
    """

    folder: Path
    records: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path, files: bool = True) -> "RollbackHistory":
        """
        Read `rollback.json`.

        Args:
            folder (`pathlib.Path`):
                Folder of a checkpoint.
            files (`bool`, *optional*, defaults to `True`):
                Whether what the rollbacks can be undone with must be there.

        Returns:
            [`RollbackHistory`]: Its rollbacks, none where there is no such file.

        Raises:
            `ValueError`: If the file is broken or of another schema version, or what it names is missing.
        """
        path = folder / HISTORY_NAME
        if not path.is_file():
            return cls(folder)
        records = read_json(path, SCHEMA_VERSION).get("rollbacks")
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise ValueError(f"{path}: expected a list 'rollbacks' of objects, found {records!r:.100}")
        for record in records:
            for key in ("file", "id", "kind"):
                if not isinstance(record.get(key), str):
                    raise ValueError(f"{path}: expected {key!r} of each rollback, found {record.get(key)!r}")
            if Path(record["file"]).parts[:-1] != (DELTA_FOLDER,) or Path(record["file"]).name == "..":
                raise ValueError(f"{path}: expected a file in {DELTA_FOLDER}/, found {record['file']!r}")
            if files and not (folder / record["file"]).exists():
                raise ValueError(f"{path}: names {record['file']}, which is missing: the rollback cannot be undone")
        return cls(folder, records)

    @property
    def path(self) -> Path:
        return self.folder / HISTORY_NAME

    def next_name(self) -> str:
        """Where the next rollback is to keep what it is undone with, relative to the folder and without suffix."""
        return f"{DELTA_FOLDER}/{len(self.records)}"

    def save(self) -> None:
        """Write `rollback.json`, or remove it where no rollback is left."""
        if not self.records:
            self.path.unlink(missing_ok=True)
            return
        content = {"schema_version": SCHEMA_VERSION, "rollbacks": self.records}
        write_atomically(self.path, json.dumps(content, indent=1) + "\n")
