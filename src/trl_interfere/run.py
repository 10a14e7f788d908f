"""The folder of a run: its one reader and writer."""

import difflib
import json
import logging
import math
import secrets
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .io import lock_folder, read_json, resolve_inside, write_atomically, write_json
from .stage_record import StageRecord, read_record


SCHEMA_VERSION = 1
STAGES_NAME = "stages.json"
REPORT_NAME = "report.json"

logger = logging.getLogger(__name__)


class Run:
    """
    The folder of a run: stages, scores, reports, repair and recipe.

    `stages.json` says what has finished. It is replaced atomically, and only after all files of a stage are on disk:
    it alone decides what a resumed run does next. The one before its last change is kept as `stages.json.previous`.

    Example:

    ```python
    >>> from trl_interfere import Run

    >>> run = Run("out")
    >>> run.peak("math").name, run.final.name
    ('2-math', '4-writing')
    ```

    Args:
        folder (`str` or `pathlib.Path`):
            Folder of a run that has begun. Nothing in it is changed.

    Raises:
        `FileNotFoundError`: If the folder holds no run.
        `ValueError`: If its `stages.json` is broken or of another schema version.
    """

    def __init__(self, folder: str | Path):
        self._begin(folder, {})
        if not self.exists():
            raise FileNotFoundError(f"{folder}: expected the folder of a run with {STAGES_NAME}, found none")
        self._read()

    @classmethod
    def new(
        cls, folder: str | Path, identity: dict[str, Any], run_name: str | None = None, about: dict | None = None
    ) -> "Run":
        """
        A run that begins, or goes on with [`~Run.resume`]; nothing is written before [`~Run.save`]. `about`, for the
        card, may change when the run is resumed, `identity` may not.
        """
        run = cls.__new__(cls)
        run._begin(folder, json.loads(json.dumps(identity)), run_name, about)
        return run

    def _begin(self, folder, identity, run_name=None, about=None) -> None:
        self.folder, self.identity = Path(folder), identity
        self.run_name, self.about = run_name, dict(about or {})
        self.stages: list[StageRecord] = []
        self.current: StageRecord | None = None  # trained and saved, but not yet scored on every domain
        self._text: str | None = None  # of the last whole stages.json

    @property
    def path(self) -> Path:
        return self.folder / STAGES_NAME

    @property
    def previous_path(self) -> Path:
        return self.folder / f"{STAGES_NAME}.previous"

    def exists(self) -> bool:
        """Whether the folder holds a run, broken or not."""
        return self.path.exists() or self.previous_path.exists()

    @property
    def records(self) -> list[StageRecord]:
        """Finished stages, and the one that is trained and not yet scored."""
        return [*self.stages, *([self.current] if self.current else [])]

    @property
    def order(self) -> list[str]:
        """Domains in the order of training, as the schedule has them."""
        return [stage["domain"] for stage in self.identity.get("schedule", [])]

    @property
    def domains(self) -> list[str]:
        """Names of the domains that are scored, in the order of the first scores."""
        return list(dict.fromkeys(name for record in self.stages for name in record.scores))

    @property
    def base_model(self) -> str:
        """Folder of the base model where this machine has it, else its Hub id, or the name of its folder."""
        kept = self._local().get("base_model")
        return kept if kept and Path(kept).is_dir() else str(self.identity.get("base_model", "unknown"))

    @property
    def recipe(self) -> Path | None:
        """The recipe that the run was trained by; `None` for a run that was made in Python."""
        path = self.folder / "recipe.yaml"
        return path if path.is_file() else None

    @property
    def recipe_folder(self) -> Path:
        """Folder that the paths of the recipe start from."""
        return Path(self._local().get("recipe_folder", self.folder))

    @property
    def final(self) -> StageRecord:
        """The last stage that is not a heal: what a heal starts from."""
        return next(record for record in reversed(self.stages) if record.kind != "heal")

    @property
    def repair(self) -> Path:
        """Folder of the repair; it may be missing."""
        return self.folder / "repair"

    def analysis(self, domain: str) -> Path:
        """Folder of the report on a damaged domain; it may be missing."""
        return self.folder / "analysis" / domain

    @property
    def reports(self) -> dict[str, Path]:
        """Folders of the reports by name, as far as they lie inside the run."""
        found = sorted({path for depth in ("", "*/", "*/*/") for path in self.folder.glob(depth + REPORT_NAME)})
        parts = [path.relative_to(self.folder) for path in found]
        return {part.parent.name or "report": resolve_inside(self.folder, part).parent for part in parts}

    def stage(self, name: str | int) -> StageRecord:
        """A finished stage by its name or position; negative positions count from the end."""
        if isinstance(name, int) and -len(self.stages) <= name < len(self.stages):
            return self.stages[name]
        for record in self.stages:
            if record.name == name:
                return record
        raise ValueError(f"{self.path}: expected one of {[r.name for r in self.stages]} as a stage, found {name!r}")

    def weights(self, stage: StageRecord | str | int) -> Path | str:
        """
        Where the weights of a stage lie.

        Args:
            stage ([`StageRecord`] or `str` or `int`):
                The stage, its name or its position.

        Returns:
            `pathlib.Path` or `str`: Folder of the weights or the adapter; [`~Run.base_model`] for the base.

        Raises:
            `FileNotFoundError`: If the folder is gone.
        """
        record = stage if isinstance(stage, StageRecord) else self.stage(stage)
        if record.folder is None:
            return self.base_model
        folder = resolve_inside(self.folder, record.folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: expected the weights of stage {record.name}, found no such folder")
        return folder

    def rows(self, stage: StageRecord | str | int, domain: str) -> list[dict[str, Any]]:
        """
        What a stage wrote on the test prompts of a domain.

        Args:
            stage ([`StageRecord`] or `str` or `int`):
                The stage, its name or its position.
            domain (`str`):
                Name of the domain.

        Returns:
            `list[dict]`: For each prompt its `score` (0 to 1), the `prompt`, and the `completions`.

        Raises:
            `ValueError`: If the stage was not scored on the domain, or the file is broken.
        """
        record = stage if isinstance(stage, StageRecord) else self.stage(stage)
        if domain not in record.scores:
            scored = list(record.scores)
            raise ValueError(f"domain {domain!r}: expected one that was scored after stage {record.name}, {scored}")
        entry = record.scores[domain]
        path = resolve_inside(self.folder, entry["file"])
        try:
            with open(path, encoding="utf-8") as file:
                rows = json.loads(f"[{','.join(file)}]")  # faster than line by line
            rows = [{"prompt": None, "completions": [], **row} for row in rows]
            if not all(math.isfinite(row["score"]) for row in rows):
                raise ValueError("a score that is not finite")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path}: expected the scores of stage {record.name}, found none") from error
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected one JSON object with a 'score' per line ({error!r})") from error
        if len(rows) != entry["n"]:
            raise ValueError(f"{path}: expected {entry['n']} scores, found {len(rows)}")
        return rows

    def scores(self, stage: StageRecord | str | int, domain: str) -> np.ndarray:
        """The `score` of each of these [`~Run.rows`], an array of shape `(n,)`."""
        return np.array([row["score"] for row in self.rows(stage, domain)], dtype=np.float64)

    def trained(self, domain: str) -> StageRecord | None:
        """The last stage of kind `train` of a domain; `None` where there is none."""
        return next((one for one in reversed(self.stages) if (one.kind, one.domain) == ("train", domain)), None)

    def peak(self, domain: str) -> StageRecord:
        """The stage up to the final one after which a domain scored best; the earliest one among equals."""
        scored = [record for record in self.stages[: self.final.index + 1] if domain in record.scores]
        if not scored:
            raise ValueError(f"domain {domain!r}: expected one that was scored, {self.domains}")
        return max(scored, key=lambda record: self.scores(record, domain).mean())

    def resume(self) -> None:
        """
        Go on with what is in the folder: read its stages and remove what a killed process left half-written. Another
        run is refused; the schedule may be longer than before, and there may be more domains.
        """
        identity, about, run_name = self.identity, self.about, self.run_name
        self._tidy()
        self._read()
        self._check_identity(self.identity, identity, sum(record.kind == "train" for record in self.stages))
        for record in self.records:
            for path in (self.folder / part for part in record.parts):
                if not path.exists():
                    raise ValueError(f"{self.path}: stage {record.name} is listed, but {path} is missing")
        self.identity, self.about, self.run_name = identity, {**self.about, **about}, run_name or self.run_name

    def _tidy(self) -> None:
        for leftover in self.folder.glob(f".{STAGES_NAME}*.tmp"):  # of a process that was killed
            leftover.unlink(missing_ok=True)

    def _read(self) -> None:
        """Read `stages.json`, or the one before it where it was cut off by a failing disk."""
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
        self.stages = [read_record(entry, f"{self.path}, stages[{i}]") for i, entry in enumerate(content["stages"])]
        current = content.get("current")
        self.current = None if current is None else read_record(current, f"{self.path}, current")
        for record in self.records:
            for part in record.parts:
                resolve_inside(self.folder, part)
        indices = [record.index for record in self.stages]
        if indices != list(range(len(indices))):
            raise ValueError(f"{self.path}: expected stages 0, 1, 2, ..., found {indices}")
        self.identity, self.about = content["run"], content.get("about", {})
        self.run_name = content.get("run_name")
        self._text = json.dumps(content, indent=2) + "\n"

    def _check_identity(self, before: dict[str, Any], now: dict[str, Any], trained: int) -> None:
        """Refuse another run. Stages that have not begun may change, and domains may be added."""
        before, now = dict(before), dict(now)
        if isinstance(before.get("schedule"), list):
            # The stage after the trained ones may have checkpoints; only what comes later is free.
            kept = min(len(before["schedule"]), trained + 1)
            before["schedule"], now["schedule"] = before["schedule"][:kept], now.get("schedule", [])[:kept]
        if isinstance(before.get("domains"), dict):
            now["domains"] = {name: now["domains"].get(name) for name in before["domains"]}
        if before == now:
            return
        before, now = (json.dumps(run, indent=1, sort_keys=True).splitlines() for run in (before, now))
        _, _, *diff = difflib.unified_diff(before, now, lineterm="", n=0)
        changes = "\n".join(line for line in diff if not line.startswith("@@"))
        raise ValueError(
            f"{self.path}: this folder belongs to another run. Choose another output_dir or go back to its settings. "
            f"In the folder (-) and now (+):\n{changes}"
        )

    def lock(self):
        """Be the only writer of the folder, see [`lock_folder`]."""
        return lock_folder(self.folder)

    def save(self) -> None:
        """Write `stages.json`."""
        self.run_name = self.run_name or f"{self.folder.absolute().name}-{secrets.token_hex(3)}"
        content = {
            "schema_version": SCHEMA_VERSION,
            "run_name": self.run_name,
            "about": self.about,
            "run": self.identity,
            "stages": [asdict(record) for record in self.stages],
            "current": None if self.current is None else asdict(self.current),
        }
        self._tidy()
        if self._text is not None:
            write_atomically(self.previous_path, self._text)
        self._text = json.dumps(content, indent=2) + "\n"
        write_atomically(self.path, self._text)

    def append(self, record: StageRecord) -> None:
        """Record a finished stage; its files must be on disk."""
        self.stages.append(record)
        self.current = None
        self.save()

    def drop(self) -> str:
        """Take the last stage out of the run, with its weights and scores. Returns its name."""
        record = self.stages.pop()
        self.save()
        for path in (self.folder / "scores" / record.name, record.folder and self.folder / record.folder):
            if path is not None:
                shutil.rmtree(path, ignore_errors=True)
        return record.name

    def write_scores(
        self, stage: str, domain: str, values: np.ndarray, completions: list[str], prompts: list[Any] | None = None
    ) -> str:
        """
        Keep the score of each prompt, of each completion where there are several (`values` of shape `(n,)` or
        `(n, k)`), and the texts. Returns the file, relative to the folder.
        """
        file = Path("scores") / stage / f"{domain}.jsonl"
        values = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
        each = len(completions) // len(values)
        lines = []
        for row, (score, prompt) in enumerate(zip(values.mean(axis=1), prompts or [None] * len(values), strict=True)):
            written = {"score": score, "prompt": prompt, "completions": completions[row * each : (row + 1) * each]}
            samples = {"samples": values[row].tolist()} if values.shape[1] > 1 else {}
            lines.append(json.dumps(written | samples, default=str) + "\n")
        write_atomically(self.folder / file, "".join(lines))
        return file.as_posix()

    def keep_local(self, **values: str) -> None:
        """Remember what holds on this machine only, and is never published: `base_model`, `recipe_folder`."""
        write_json(self.folder / "local.json", {"schema_version": SCHEMA_VERSION, **self._local(), **values})

    def _local(self) -> dict[str, Any]:
        path = self.folder / "local.json"
        return read_json(path, SCHEMA_VERSION) if path.is_file() else {}
