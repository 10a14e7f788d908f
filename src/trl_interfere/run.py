"""The manifest of a run, `stages.json`: what has finished, and therefore where a resumed run goes on."""

import difflib
import json
import logging
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .evaluation.bootstrap import score
from .evaluation.score_matrix import ScoreMatrix


SCHEMA_VERSION = 1
MANIFEST_NAME = "stages.json"

logger = logging.getLogger(__name__)


def write_atomically(path: Path, text: str) -> None:
    """
    Write a file so that a reader, or a crash, sees the old content or the new one and nothing between.

    Args:
        path (`pathlib.Path`):
            The file.
        text (`str`):
            Its content.
    """
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


def read_json(path: Path, schema_version: int) -> dict[str, Any]:
    """
    Read one of this project's JSON files.

    Args:
        path (`pathlib.Path`):
            The file.
        schema_version (`int`):
            The version that the caller understands.

    Returns:
        `dict`: Its content.

    Raises:
        `ValueError`: If it is not JSON, or of another schema version.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON, found something else ({error})") from error
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != schema_version:
        raise ValueError(f"{path}: expected schema_version {schema_version}, found {found!r}")
    return content


@dataclass
class StageRecord:
    """
    A finished stage.

    Args:
        index (`int`):
            Position in the run; 0 is the base model.
        kind (`str`):
            `"base"`, `"train"` or `"refresh"`.
        domain (`str`, *optional*):
            Domain that was trained.
        folder (`str`, *optional*):
            Folder of the weights, relative to the folder of the run; `None` for the base model.
        steps (`int`):
            Optimizer steps.
        seconds (`float`):
            Training time; a resumed stage counts only its last part.
        scores (`dict[str, dict]`):
            For each domain `value`, `low`, `high`, `n` and `file`, the per-prompt scores.
        seed (`int`):
            Seed of the stage.
        overrides (`dict`):
            Settings in which the stage differed from the configuration.
        versions (`dict[str, str]`):
            Versions of the packages that ran it.
        reason (`dict`, *optional*):
            Why a callback asked for this stage.
    """

    index: int
    kind: str
    domain: str | None
    folder: str | None
    steps: int
    seconds: float
    scores: dict[str, dict]
    seed: int
    overrides: dict[str, Any]
    versions: dict[str, str]
    reason: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return stage_name(self.index, self.kind, self.domain)


def stage_name(index: int, kind: str, domain: str | None) -> str:
    """
    Name of a stage and of its folder, e.g. `0-base`, `2-math`, `5-refresh-math`.

    Args:
        index (`int`):
            Position in the run.
        kind (`str`):
            `"base"`, `"train"` or `"refresh"`.
        domain (`str`, *optional*):
            Domain of the stage.

    Returns:
        `str`: The name.
    """
    return f"{index}-" + {"base": "base", "train": str(domain)}.get(kind, f"{kind}-{domain}")


class Manifest:
    """
    The finished stages of a run, kept in `stages.json`.

    The file is replaced atomically, and only after all files of a stage are on disk. It alone decides what a resumed
    run does next. The manifest before the last change is kept as `stages.json.previous`.

    Args:
        folder (`str` or `pathlib.Path`):
            Folder of the run.
        run (`dict`):
            What identifies the run: base model, seed, schedule, configuration. JSON values only.
    """

    def __init__(self, folder: str | Path, run: dict[str, Any]):
        self.folder = Path(folder)
        self.run = json.loads(json.dumps(run))
        self.stages: list[StageRecord] = []
        self.current: StageRecord | None = None  # trained and saved, but not yet scored on every domain
        self.run_name: str | None = None  # under which trackers know the run
        self.about: dict[str, Any] = {}  # for the card; may change when the run is resumed
        self._text: str | None = None  # of the last whole manifest

    @property
    def path(self) -> Path:
        return self.folder / MANIFEST_NAME

    @property
    def previous_path(self) -> Path:
        return self.folder / f"{MANIFEST_NAME}.previous"

    def exists(self) -> bool:
        """
        Whether the folder holds a run.

        Returns:
            `bool`: `True` if there is a manifest, broken or not.
        """
        return self.path.exists() or self.previous_path.exists()

    def load(self) -> None:
        """
        Read the finished stages of an earlier process.

        A manifest that is not JSON (cut off by a failing disk) is skipped with a warning where the one before it is
        whole. The schedule may be longer than that of the earlier process, and there may be more domains.

        Raises:
            `ValueError`: If the file is broken, of another schema version, of another run, or names a missing folder.
        """
        for leftover in self.folder.glob(f".{MANIFEST_NAME}*.tmp"):
            logger.warning("%s: half-written by a process that was killed, skipped", leftover)
            leftover.unlink(missing_ok=True)
        try:
            content = read_json(self.path, SCHEMA_VERSION)
        except (OSError, ValueError) as error:
            broken = isinstance(error, OSError) or isinstance(error.__cause__, (json.JSONDecodeError, UnicodeError))
            if not broken or not self.previous_path.exists():
                raise
            logger.warning("%s; going on from %s", error, self.previous_path)
            content = read_json(self.previous_path, SCHEMA_VERSION)
        for key, kind in (("run", dict), ("stages", list)):
            if not isinstance(content.get(key), kind):
                raise ValueError(f"{self.path}: expected {key!r} to be a {kind.__name__}, found {content.get(key)!r}")
        try:
            stages = [StageRecord(**record) for record in content["stages"]]
            current = None if content.get("current") is None else StageRecord(**content["current"])
            parts = [
                [record.folder, *(entry["file"] for entry in record.scores.values())]
                for record in [*stages, *([current] if current else [])]
            ]
            indices = [record.index for record in stages]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: a stage does not have the expected fields ({error})") from error
        if indices != list(range(len(stages))):
            raise ValueError(f"{self.path}: expected stages 0, 1, 2, ..., found {indices}")
        self._check_run(content["run"], sum(record.kind == "train" for record in stages))
        for record, named in zip([*stages, *([current] if current else [])], parts, strict=True):
            for part in named:
                if part is not None and not (self.folder / part).exists():
                    raise ValueError(
                        f"{self.path}: stage {record.name} is listed, but {self.folder / part} is missing"
                    )
        self.stages, self.current = stages, current
        self.run_name = self.run_name or content.get("run_name")
        self.about = {**content.get("about", {}), **self.about}
        self._text = json.dumps(content, indent=2) + "\n"

    def _check_run(self, earlier: dict[str, Any], trained: int) -> None:
        """Refuse another run. Stages that have not begun may change, and domains may be added."""
        before, now = dict(earlier), dict(self.run)
        if isinstance(before.get("schedule"), list):
            # The stage after the trained ones may have checkpoints; only what comes later is free.
            kept = min(len(before["schedule"]), trained + 1)
            before["schedule"], now["schedule"] = before["schedule"][:kept], now.get("schedule", [])[:kept]
        if isinstance(before.get("domains"), dict):
            now["domains"] = {name: now["domains"].get(name) for name in before["domains"]}
        if before == now:
            return
        before, now = (json.dumps(run, indent=1, sort_keys=True).splitlines() for run in (before, now))
        changes = [
            line for line in difflib.unified_diff(before, now, lineterm="", n=0) if line[:2] not in ("--", "++", "@@")
        ]
        raise ValueError(
            f"{self.path}: this folder belongs to another run. Choose another output_dir or go back to its "
            "settings. In the folder (-) and now (+):\n" + "\n".join(changes)
        )

    def append(self, record: StageRecord) -> None:
        """
        Record a finished stage.

        Args:
            record ([`StageRecord`]):
                The stage; its files must be on disk.
        """
        self.stages.append(record)
        self.current = None
        self.save()

    def save(self) -> None:
        """Write `stages.json`."""
        self.run_name = self.run_name or f"{self.folder.absolute().name}-{secrets.token_hex(3)}"
        content = {
            "schema_version": SCHEMA_VERSION,
            "run_name": self.run_name,
            "about": self.about,
            "run": self.run,
            "stages": [vars(record) for record in self.stages],
            "current": None if self.current is None else vars(self.current),
        }
        for leftover in self.folder.glob(f".{MANIFEST_NAME}.*.tmp"):
            logger.warning("%s: half-written by a process that was killed, removed", leftover)
            leftover.unlink(missing_ok=True)
        if self._text is not None:
            write_atomically(self.previous_path, self._text)
        self._text = json.dumps(content, indent=2) + "\n"
        write_atomically(self.path, self._text)

    def write_scores(self, name: str, domain: str, values: np.ndarray, completions: list[str]) -> dict[str, Any]:
        """
        Keep per-prompt scores beside the manifest.

        Args:
            name (`str`):
                Name of the stage.
            domain (`str`):
                Domain that was scored.
            values (`numpy.ndarray` of shape `(n,)`):
                Score of each prompt.
            completions (`list[str]`):
                What the model wrote, the same number for each prompt.

        Returns:
            `dict`: `value`, `low`, `high`, `n` and `file`, as they stand in the manifest.
        """
        file = Path("scores") / name / f"{domain}.jsonl"
        each = len(completions) // len(values)
        lines = (
            json.dumps({"score": float(value), "completions": completions[row * each : (row + 1) * each]})
            for row, value in enumerate(values)
        )
        write_atomically(self.folder / file, "".join(line + "\n" for line in lines))
        return {**score(values).to_dict(), "file": file.as_posix()}

    def read_scores(self, record: StageRecord, domain: str) -> np.ndarray:
        """
        Per-prompt scores of a finished stage.

        Args:
            record ([`StageRecord`]):
                The stage.
            domain (`str`):
                Domain that was scored.

        Returns:
            `numpy.ndarray` of shape `(n,)`: Score of each prompt, 0 to 1.
        """
        path, n = self.folder / record.scores[domain]["file"], record.scores[domain]["n"]
        try:
            with open(path, encoding="utf-8") as file:
                values = np.array([float(json.loads(line)["score"]) for line in file])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected one JSON object with a 'score' per line ({error!r})") from error
        if len(values) != n:
            raise ValueError(f"{path}: expected {n} scores, found {len(values)}")
        return values

    def score_matrix(self, domains: list[str]) -> ScoreMatrix:
        """
        Scores of all finished stages.

        Args:
            domains (`list[str]`):
                Names of the domains.

        Returns:
            [`ScoreMatrix`]: Stages x domains.
        """
        matrix = ScoreMatrix(domains)
        for record in self.stages:
            matrix.append(record.name, {domain: self.read_scores(record, domain) for domain in record.scores})
        return matrix
