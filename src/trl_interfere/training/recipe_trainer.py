"""A trainer from a YAML file."""

import inspect
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from peft import LoraConfig

from ..analysis.config import InterferenceConfig
from ..recipe import RunFile, build_dataclass, check_names, load_run_file, read_yaml
from ..run import Run, write_atomically
from .callbacks import HealCallback, StageCallback
from .config import SequentialGRPOConfig
from .refresh import RefreshCallback
from .trainer import SequentialGRPOTrainer


def load_run(
    path: str | Path,
    options: dict[str, Any] | None = None,
    model: str | None = None,
    recipe: RunFile | None = None,
    dry: bool = False,
) -> tuple[RunFile, SequentialGRPOConfig]:
    """
    Read a recipe and put the settings of the command line over those under `training:`.

    Args:
        path (`str` or `pathlib.Path`):
            The file.
        options (`dict`, *optional*):
            Settings of [`SequentialGRPOConfig`] that go before those of the file.
        model (`str`, *optional*):
            Folder or Hub id of the model. Defaults to the one of the file.
        recipe ([`RunFile`], *optional*):
            Content of the file, if it is read already.
        dry (`bool`, *optional*, defaults to `False`):
            Whether to import no functions from outside the file's folder.

    Returns:
        `tuple`: The [`RunFile`] and the [`SequentialGRPOConfig`].

    Raises:
        `ValueError`: If anything is unknown, missing or does not fit.
    """
    run = load_run_file(path, dry=dry) if recipe is None else recipe
    run.model, options = model or run.model, options or {}
    where = f"{path}, training" + "".join(f" --{name}" for name in options)
    args = build_dataclass(SequentialGRPOConfig, {**run.training, **options}, where)
    args.model_init_kwargs = {"use_safetensors": True, **(args.model_init_kwargs or {})}
    _callbacks(run, path)  # refuses settings that do not fit, as the two below
    build_dataclass(InterferenceConfig, run.analysis, f"{path}, analysis")
    if run.peft is not None:
        build_dataclass(LoraConfig, run.peft, f"{path}, peft")
    return run, args


def _callbacks(run: RunFile, path: str | Path) -> list[StageCallback]:
    callbacks = []
    for cls, settings, part in ((RefreshCallback, run.refresh, "refresh"), (HealCallback, run.heal, "heal")):
        if settings is not None:
            check_names(settings, list(inspect.signature(cls).parameters), f"{path}, {part}")
            try:
                callbacks.append(cls(**settings))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, {part}, {error}") from error
    return callbacks


def build_trainer(
    path: str | Path,
    options: dict[str, Any] | None = None,
    model: str | None = None,
    loaded: tuple[RunFile, SequentialGRPOConfig] | None = None,
) -> SequentialGRPOTrainer:
    """
    Build the trainer that a recipe describes.

    Args:
        path (`str` or `pathlib.Path`):
            The file.
        options (`dict`, *optional*):
            Settings that go before those of the file.
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
    callbacks = _callbacks(run, path)
    try:
        return SequentialGRPOTrainer(
            model=run.model, args=args, domains=run.domains, callbacks=callbacks, peft_config=peft_config
        )
    except OSError as error:
        raise ValueError(f"{path}, model: {run.model!r} is neither a folder nor on the Hub ({error})") from error


class RecipeKeeper(StageCallback):
    """Keeps the recipe in the run, with the settings of the command line, so that later commands need not name it."""

    def __init__(self, path: str | Path, options: dict[str, Any], model: str | None = None):
        self.path, content = Path(path), read_yaml(Path(path))
        content["training"] = {**(content.get("training") or {}), **options}
        if model is not None:
            content["model"] = str(Path(model).resolve()) if Path(model).is_dir() else model
        self.local = {"recipe_folder": str(self.path.parent.resolve())}
        if (self.path.parent / str(content["model"])).is_dir():
            self.local["base_model"] = str((self.path.parent / content["model"]).resolve())
        self.text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)

    def on_run_begin(self, args: SequentialGRPOConfig, run: Run) -> None:
        if PartialState().is_main_process:
            write_atomically(run.folder / "recipe.yaml", self.text)
            run.keep_local(**self.local)
