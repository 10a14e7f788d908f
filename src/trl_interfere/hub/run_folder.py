"""What the folder of a run holds, for its card and its publication."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.score_matrix import ScoreMatrix
from ..run import Run, StageRecord, read_json


RESULTS_NAME = "results.json"


@dataclass
class RunFolder:
    """
    A run on disk, to be read.

    Args:
        folder (`pathlib.Path`):
            Folder of the run.
        manifest ([`Run`]):
            Its finished stages.
        reports (`dict[str, pathlib.Path]`):
            Folders of its reports, by their names.
        results (`dict`, *optional*):
            Content of the lab's `results.json`.
    """

    folder: Path
    manifest: Run
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
        run = Run(folder)
        results = run.folder / RESULTS_NAME
        return cls(run.folder, run, run.reports, read_json(results, 1) if results.is_file() else None)

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
        return self.manifest.identity.get("base_model", "unknown")

    @property
    def score_matrix(self) -> ScoreMatrix:
        """Scores of every domain after every finished stage."""
        return ScoreMatrix.from_run(self.manifest)

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
