"""Weights of a finished stage, on disk and back into the model that is trained."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import is_peft_model
from safetensors import SafetensorError

from ..repair.repair import Repair
from ..run import StageRecord
from .stage_adapters import load_stage_adapters, save_stage_adapters


if TYPE_CHECKING:
    from .trainer import SequentialGRPOTrainer

_HEALED = "healed"  # the adapter that holds both the trained one and the repair


def save_stage(trainer: "SequentialGRPOTrainer", folder: Path) -> None:
    """Write the weights under another name, and rename the folder when it is whole."""
    partial, accelerator = folder.with_name(f".{folder.name}.partial"), trainer.accelerator
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    trainer.save_model(str(partial), _internal_call=True)  # it is pushed once it is finished
    if trainer.args.adapter_per_stage and trainer.args.should_save:
        model = accelerator.unwrap_model(trainer.model)
        for path in [path for path in partial.iterdir() if path.name in model.peft_config]:
            shutil.rmtree(path)  # as PEFT lays out several adapters
        save_stage_adapters(model, partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle
        shutil.rmtree(partial / "ref", ignore_errors=True)  # the adapter of the KL reference
        log = json.dumps(trainer.state.log_history, indent=1)
        (partial / "log_history.json").write_text(log + "\n", encoding="utf-8")
        os.replace(partial, folder)
    accelerator.wait_for_everyone()


def load_stage(trainer: "SequentialGRPOTrainer", record: StageRecord) -> None:
    """Give the model the weights of a finished stage."""
    folder, model = trainer.run.weights(record), trainer.accelerator.unwrap_model(trainer.model)
    try:
        if record.kind == "heal":
            if is_peft_model(model):
                if _HEALED in model.peft_config:
                    model.delete_adapter(_HEALED)
                model.load_adapter(str(folder), _HEALED)
                model.set_adapter(_HEALED)
            else:
                model.load_state_dict(Repair.from_pretrained(folder).merge().state_dict())
        elif trainer.args.adapter_per_stage:
            load_stage_adapters(model, folder)
        else:
            trainer._load_plain_weights(folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: the weights of this stage cannot be read ({error})") from error
    trainer.sync_weights()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A failure to write, whatever library met it, as one message that names the place."""
    try:
        yield
    except Exception as error:
        signs = ("No space left", "os error", "PytorchStreamWriter", "inline_container")
        if not isinstance(error, (OSError, SafetensorError)) and not any(sign in str(error) for sign in signs):
            raise
        raise OSError(f"{path}: cannot be written ({error}). Is the disk full? A resumed run goes on") from error
