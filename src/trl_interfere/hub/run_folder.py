"""What the folder of a run holds, for its card and its publication."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..analysis.report import REPORT_NAME
from ..evaluation.score_matrix import ScoreMatrix
from ..run import MANIFEST_NAME, SCHEMA_VERSION, Manifest, StageRecord, read_json


RESULTS_NAME = "results.json"


@dataclass
class RunFolder:
    """
    A run on disk, to be read.

    Args:
        folder (`pathlib.Path`):
            Folder of the run.
        manifest ([`Manifest`]):
            Its finished stages.
        reports (`dict[str, pathlib.Path]`):
            Folders of its reports, by their names.
        results (`dict`, *optional*):
            Content of the lab's `results.json`.
    """

    folder: Path
    manifest: Manifest
    reports: dict[str, Path] = field(default_factory=dict)
    results: dict[str, Any] | None = None

    @classmethod
    def read(cls, folder: str | Path) -> "RunFolder":
        """
        Read the folder of a run.

        Args:
            folder (`str` or `pathlib.Path`):
                The folder.

        Returns:
            [`RunFolder`]: What it holds.

        Raises:
            `ValueError`: If it holds no run.
        """
        folder = Path(folder)
        if not (folder / MANIFEST_NAME).is_file():
            raise ValueError(f"{folder}: expected the folder of a run with {MANIFEST_NAME}, found none")
        content = read_json(folder / MANIFEST_NAME, SCHEMA_VERSION)
        if not isinstance(content.get("run"), dict):
            raise ValueError(f"{folder / MANIFEST_NAME}: expected 'run' to be a dict, found {content.get('run')!r}")
        # Not `Manifest.load`, which tidies up: the run may be going on in another process.
        manifest = Manifest(folder, content["run"])
        manifest.run_name, manifest.about = content.get("run_name"), content.get("about", {})
        try:
            manifest.stages = [StageRecord(**record) for record in content["stages"]]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / MANIFEST_NAME}: a stage does not have the expected fields ({error})"
            ) from error
        found = sorted({path for depth in ("", "*/", "*/*/") for path in folder.glob(depth + REPORT_NAME)})
        reports = {path.parent.relative_to(folder).name or "report": path.parent for path in found}
        results = folder / RESULTS_NAME
        return cls(folder, manifest, reports, read_json(results, 1) if results.is_file() else None)

    @property
    def stages(self) -> list[StageRecord]:
        """The finished stages, the base model first."""
        return self.manifest.stages

    @property
    def trained(self) -> list[StageRecord]:
        """The stages that have weights."""
        return [record for record in self.stages if record.folder is not None]

    @property
    def base_model(self) -> str:
        """Hub id of the base model, or the name of its folder."""
        return self.manifest.run.get("base_model", "unknown")

    @property
    def score_matrix(self) -> ScoreMatrix:
        """Scores of every domain after every finished stage."""
        scored = dict.fromkeys(domain for record in self.stages for domain in record.scores)
        return self.manifest.score_matrix(list(scored))

    def weights(self, record: StageRecord) -> Path:
        """
        Folder of the weights of a stage.

        Args:
            record ([`StageRecord`]):
                The stage.

        Returns:
            `pathlib.Path`: The folder.
        """
        return self.folder / record.folder
