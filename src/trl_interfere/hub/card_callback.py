"""The analysis card fills itself while a run goes on."""

import logging
from pathlib import Path

from accelerate import PartialState

from ..evaluation.score_matrix import ScoreMatrix
from ..reporting.card import analysis_card
from ..run import StageRecord, write_atomically
from ..training.callbacks import StageCallback
from .run_folder import RunFolder


logger = logging.getLogger(__name__)


class AnalysisCardCallback(StageCallback):
    """
    Writes the card of the run, `README.md`, after every stage. [`SequentialGRPOTrainer`] has one by itself.

    Args:
        folder (`str` or `pathlib.Path`):
            Folder of the run.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def on_stage_end(self, record: StageRecord, score_matrix: ScoreMatrix) -> None:
        if PartialState().is_main_process:
            update_card(self.folder)


def update_card(folder: str | Path) -> None:
    """
    Write the card of a run that is going on. It is not worth a training: a full disk, or a report of another version
    in the folder, is a warning.

    Args:
        folder (`str` or `pathlib.Path`):
            Folder of the run.
    """
    try:
        write_card(folder)
    except (OSError, ValueError) as error:
        logger.warning("the card of the run is not up to date (%s); the training goes on", error)


def write_card(folder: str | Path, license: str | None = None) -> Path:
    """
    Write the card of a run into its folder, from what the folder holds by now.

    Args:
        folder (`str` or `pathlib.Path`):
            Folder of the run.
        license (`str`, *optional*):
            Licence, which is that of the base model.

    Returns:
        `pathlib.Path`: The card.
    """
    run = RunFolder.read(folder)
    figures = {path.stem: f"figures/{path.name}" for path in sorted((run.folder / "figures").glob("*.png"))}
    for name, report in run.reports.items():
        for path in sorted((report / "figures").glob("*.png")):
            figures[f"{name}/{path.stem}"] = path.relative_to(run.folder).as_posix()
    path = run.folder / "README.md"
    write_atomically(path, str(analysis_card(run.manifest, license=license, figures=figures)))
    return path
