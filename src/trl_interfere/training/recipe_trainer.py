"""A trainer from a YAML file."""

from pathlib import Path
from typing import Any

from peft import LoraConfig

from ..recipe import RunFile, build_dataclass, check_names, load_run_file
from .config import SequentialGRPOConfig
from .refresh import RefreshCallback
from .trainer import SequentialGRPOTrainer


def load_run(
    path: str | Path, options: dict[str, Any] | None = None, model: str | None = None
) -> tuple[RunFile, SequentialGRPOConfig]:
    """
    Read a YAML file and put the settings of the command line over those under `training:`.

    Args:
        path (`str` or `pathlib.Path`):
            The file, see [`load_run_file`].
        options (`dict`, *optional*):
            Settings of [`SequentialGRPOConfig`] that go before those of the file.
        model (`str`, *optional*):
            Folder or Hub id of the model. Defaults to the one of the file.

    Returns:
        `tuple`: The [`RunFile`] and the [`SequentialGRPOConfig`].

    Raises:
        `ValueError`: If anything is unknown, missing or does not fit.
    """
    run = load_run_file(path)
    run.model = run.model if model is None else model
    options = options or {}
    where = f"{path}, training" + "".join(f" --{name}" for name in options)
    args = build_dataclass(SequentialGRPOConfig, {**run.training, **options}, where)
    args.model_init_kwargs = {"use_safetensors": True, **(args.model_init_kwargs or {})}
    if run.refresh is not None:
        check_names(run.refresh, RefreshCallback.__init__.__annotations__, f"{path}, refresh")
        RefreshCallback(**run.refresh)  # refuses values that do not fit
    return run, args


def build_trainer(
    path: str | Path,
    options: dict[str, Any] | None = None,
    model: str | None = None,
    loaded: tuple[RunFile, SequentialGRPOConfig] | None = None,
) -> SequentialGRPOTrainer:
    """
    Build the trainer that a YAML file describes.

    Args:
        path (`str` or `pathlib.Path`):
            The file, see [`load_run_file`].
        options (`dict`, *optional*):
            Settings of [`SequentialGRPOConfig`] that go before those of the file.
        model (`str`, *optional*):
            Folder or Hub id of the model. Defaults to the one of the file.
        loaded (`tuple`, *optional*):
            What [`load_run`] returned for all this, if the file is read already.

    Returns:
        [`SequentialGRPOTrainer`]: The trainer.

    Raises:
        `ValueError`: If anything in the file is unknown, missing or does not fit.
    """
    run, args = load_run(path, options, model) if loaded is None else loaded
    peft_config = None if run.peft is None else build_dataclass(LoraConfig, run.peft, f"{path}, peft")
    callbacks = [] if run.refresh is None else [RefreshCallback(**run.refresh)]
    try:
        return SequentialGRPOTrainer(
            model=run.model, args=args, domains=run.domains, callbacks=callbacks, peft_config=peft_config
        )
    except OSError as error:
        raise ValueError(
            f"{path}, model: {run.model!r} is neither a folder with a config and safetensors weights nor readable "
            f"from the Hub ({error})"
        ) from error
