"""The card of a run that goes on, and what is published of it on the way and at its end."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState

from ..evaluation.score_matrix import ScoreMatrix
from ..reporting.card import analysis_card
from ..run import Run, StageRecord, write_atomically
from ..training.callbacks import StageCallback
from ..training.config import SequentialGRPOConfig
from .plan import PushPlan
from .push import PushError, PushResult, push_checkpoint, push_folder


logger = logging.getLogger(__name__)


class HubCallback(StageCallback):
    """
    Writes the card of the run, `README.md`, after every stage, and publishes the run as `args.push_to_hub` says.

    With `push_to_hub=True`, the run is published when it has ended; with `hub_strategy="every_save"` also each stage
    when it has finished, and the weights of each checkpoint on the branch of its stage. A failure on the way is a
    warning, one at the end an error.

    Example:

    ```python
    >>> from trl_interfere import HubCallback, SequentialGRPOConfig, SequentialGRPOTrainer

    >>> args = SequentialGRPOConfig(output_dir="out", push_to_hub=True, hub_model_id="user/model")
    >>> trainer = SequentialGRPOTrainer(model, args, domains, callbacks=[HubCallback()])
    ```
    """

    run: Run | None = None

    def on_run_begin(self, args: SequentialGRPOConfig, run: Run) -> None:
        self.args, self.run = args, run

    def on_stage_end(self, record: StageRecord, score_matrix: ScoreMatrix) -> None:
        if not PartialState().is_main_process:
            return
        update_card(self.run.folder)
        if self._every_save and record.folder is not None:
            with _warned():
                self.push(only=[record.name])

    def on_save(self, args, state, control, **kwargs):
        if PartialState().is_main_process and self._every_save:
            checkpoint, stage = Path(args.output_dir) / f"checkpoint-{state.global_step}", Path(args.output_dir).name
            with _warned():
                push_checkpoint(checkpoint, self._name, stage, f"Stage {stage}, step {state.global_step}", args)

    def on_run_end(self, args: SequentialGRPOConfig, run: Run) -> None:
        if args.push_to_hub and PartialState().is_main_process:
            self.push()

    @property
    def _every_save(self) -> bool:
        return self.run is not None and self.args.push_to_hub and self.args.hub_strategy == "every_save"

    @property
    def _name(self) -> str:
        return self.args.hub_model_id or self.run.folder.absolute().name

    def push(self, token: str | None = None, private: bool | None = None, **kwargs) -> PushResult | PushPlan:
        """
        Publish the finished stages: each as a branch, the last one on `main`, and the analysis.

        Args:
            token (`str`, *optional*):
                Token. Defaults to `args.hub_token`.
            private (`bool`, *optional*):
                Whether a new repository is private. Defaults to `args.hub_private_repo`.
            **kwargs:
                Further arguments of [`~trl_interfere.hub.push.push_folder`], which this calls.
        """
        private = self.args.hub_private_repo if private is None else private
        return push_folder(self.run.folder, self._name, token=token or self.args.hub_token, private=private, **kwargs)


@contextmanager
def _warned() -> Iterator[None]:
    """A push that fails on the way is not worth a training."""
    try:
        yield
    except PushError as error:
        logger.warning("%s. The training goes on; the end of the run is pushed in any case", error)


def update_card(folder: str | Path) -> None:
    """Write the card of a run that is going on; a full disk, or a report of another version, is a warning."""
    try:
        write_card(folder)
    except (OSError, ValueError) as error:
        logger.warning("the card of the run is not up to date (%s); the training goes on", error)


def write_card(folder: str | Path) -> Path:
    """Write the card of a run, `README.md`, into its folder, from what the folder holds by now."""
    run, figures = Run(folder), {}
    for prefix, place in [("", run.folder), *((f"{name}/", report) for name, report in run.reports.items())]:
        for path in sorted((place / "figures").glob("*.png")):
            figures[prefix + path.stem] = path.relative_to(run.folder).as_posix()
    path = run.folder / "README.md"
    write_atomically(path, str(analysis_card(run, figures=figures)))
    return path
