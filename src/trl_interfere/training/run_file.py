"""A trainer from a YAML file."""

from pathlib import Path
from typing import Any

from peft import LoraConfig

from ..domains.loading import build_dataclass, check_names, load_run_file
from .config import SequentialGRPOConfig
from .refresh import RefreshCallback
from .trainer import SequentialGRPOTrainer


def build_trainer(path: str | Path, output_dir: str | Path | None = None) -> SequentialGRPOTrainer:
    """
    Build the trainer that a YAML file describes.

    Args:
        path (`str` or `pathlib.Path`):
            The file, see [`load_run_file`].
        output_dir (`str` or `pathlib.Path`, *optional*):
            Folder of the run. Defaults to `training.output_dir` of the file.

    Returns:
        [`SequentialGRPOTrainer`]: The trainer.

    Raises:
        `ValueError`: If anything in the file is unknown, missing or does not fit.
    """
    run = load_run_file(path)
    settings: dict[str, Any] = dict(run.training)
    if output_dir is not None:
        settings["output_dir"] = str(output_dir)
    args = build_dataclass(SequentialGRPOConfig, settings, f"{path}, training")
    args.model_init_kwargs = {"use_safetensors": True, **(args.model_init_kwargs or {})}
    peft_config = None if run.peft is None else build_dataclass(LoraConfig, run.peft, f"{path}, peft")
    callbacks = []
    if run.refresh is not None:
        check_names(run.refresh, RefreshCallback.__init__.__annotations__, f"{path}, refresh")
        callbacks.append(RefreshCallback(**run.refresh))
    try:
        return SequentialGRPOTrainer(
            model=run.model, args=args, domains=run.domains, callbacks=callbacks, peft_config=peft_config
        )
    except OSError as error:
        raise ValueError(
            f"{path}, model: {run.model!r} is neither a folder with a config and safetensors weights nor readable "
            f"from the Hub ({error})"
        ) from error
