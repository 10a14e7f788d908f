"""What [`SequentialGRPOTrainer`] pushes, at the end of a run and on its way."""

import logging
from pathlib import Path

from accelerate import PartialState

from ..evaluation.score_matrix import ScoreMatrix
from ..run import StageRecord
from ..training.callbacks import StageCallback
from ..training.config import SequentialGRPOConfig
from .push import PushResult, push_checkpoint, push_run
from .upload import PushError, Uploader


logger = logging.getLogger(__name__)


def hub_model_id(args: SequentialGRPOConfig) -> str:
    """
    Repository that a run is pushed to.

    Args:
        args ([`SequentialGRPOConfig`]):
            Settings of the run.

    Returns:
        `str`: `args.hub_model_id`, by default the name of the output folder.
    """
    return args.hub_model_id or Path(args.output_dir).absolute().name


def push_trainer(
    folder: Path, args: SequentialGRPOConfig, token: str | None = None, private: bool | None = None, **kwargs
) -> PushResult:
    """
    Publish the finished stages of a run.

    Args:
        folder (`pathlib.Path`):
            Folder of the run.
        args ([`SequentialGRPOConfig`]):
            Its settings: `hub_model_id`, `hub_token`, `hub_private_repo`.
        token (`str`, *optional*):
            Over the one of the settings.
        private (`bool`, *optional*):
            Over the one of the settings.
        **kwargs:
            Further arguments of [`push_run`].

    Returns:
        [`PushResult`]: Where it has gone.
    """
    token = token or args.hub_token
    private = args.hub_private_repo if private is None else private
    return push_run(folder, _full_name(args, token), token=token, private=private, **{"stages": True, **kwargs})


def push_during_training(folder: Path, args: SequentialGRPOConfig, checkpoint: Path, stage: str, step: int) -> None:
    """
    Bring the weights of a checkpoint to the branch of its stage. A failure is logged and does not stop the training.

    Args:
        folder (`pathlib.Path`):
            Folder of the run.
        args ([`SequentialGRPOConfig`]):
            Its settings.
        checkpoint (`pathlib.Path`):
            Folder of the checkpoint.
        stage (`str`):
            Name of the stage.
        step (`int`):
            Step of the checkpoint.
    """
    try:
        name = _full_name(args, args.hub_token)
        Uploader(name, token=args.hub_token).create(args.hub_private_repo)
        push_checkpoint(checkpoint, name, stage, f"Stage {stage}, step {step}", token=args.hub_token)
    except PushError as error:
        logger.warning("%s. The training goes on; the end of the run is pushed in any case", error)


class StagePusher(StageCallback):
    """
    Publishes each stage as a revision when it has finished, if `args.hub_strategy` is `"every_save"`.

    Args:
        args ([`SequentialGRPOConfig`]):
            Settings of the run.
    """

    def __init__(self, args: SequentialGRPOConfig):
        self.args, self.folder = args, Path(args.output_dir)

    def on_stage_end(self, record: StageRecord, score_matrix: ScoreMatrix) -> None:
        if record.folder is None or self.args.hub_strategy != "every_save" or not PartialState().is_main_process:
            return
        try:
            push_trainer(self.folder, self.args, only=[record.name])
        except PushError as error:
            logger.warning("%s. The training goes on; the end of the run is pushed in any case", error)


def _full_name(args: SequentialGRPOConfig, token: str | None) -> str:
    name = hub_model_id(args)
    if "/" in name:
        return name
    uploader = Uploader(name, token=token)
    return f"{uploader.step('asking for the name of the account', uploader.api.whoami)['name']}/{name}"
