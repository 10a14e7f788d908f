"""What a checkpoint of TRL lacks for a resume in the middle of a generation block to be exact."""

import json
import logging
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..run import write_atomically


if TYPE_CHECKING:
    from .trainer import SequentialGRPOTrainer


logger = logging.getLogger(__name__)


def save_resume_state(trainer: "SequentialGRPOTrainer", folder: str | Path) -> None:
    """
    Write what [`~trl.GRPOTrainer`] keeps in memory between two optimizer steps, one set of files per process.

    That is the position in the generation block, the completions that are still to be trained on (with
    `steps_per_generation` or `num_iterations` above 1), the entropy controller, and the metrics and the loss that the
    next log line averages.

    Args:
        trainer ([`SequentialGRPOTrainer`]):
            The trainer, between two optimizer steps.
        folder (`str` or `pathlib.Path`):
            Folder of the checkpoint.
    """
    folder, rank = Path(folder), trainer.args.process_index
    folder.mkdir(parents=True, exist_ok=True)
    block = trainer.args.steps_per_generation * trainer.num_iterations
    buffered = trainer._buffered_inputs if trainer._step % block else None
    tensors, values = {}, []
    for position, inputs in enumerate(buffered or []):
        values.append({key: value for key, value in inputs.items() if not isinstance(value, torch.Tensor)})
        for key, value in inputs.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{position}/{key}"] = value.detach().cpu().clone().contiguous()
    if tensors:
        save_file(tensors, folder / f"generation_buffer_{rank}.safetensors")
    state = {
        "step": trainer._step,
        "buffer": values if tensors else None,
        "metrics": {
            mode: {name: [None if v is None else float(v) for v in series] for name, series in metrics.items()}
            for mode, metrics in trainer._metrics.items()
        },
        "loss": [trainer._tr_loss.item(), trainer._total_loss_scalar, trainer._globalstep_last_logged],
        "entropy": [trainer.entropy_coef, trainer._last_world_entropy],
        "overrides": _overrides(trainer),
    }
    write_atomically(folder / f"resume_state_{rank}.json", json.dumps(state) + "\n")


def load_resume_state(trainer: "SequentialGRPOTrainer", folder: str | Path) -> None:
    """
    Restore what [`save_resume_state`] wrote.

    Args:
        trainer ([`SequentialGRPOTrainer`]):
            The trainer, before its first step.
        folder (`str` or `pathlib.Path`):
            Folder of the checkpoint.

    Raises:
        `ValueError`: If the checkpoint is of another number of processes, or of a stage with other settings.
    """
    folder, rank = Path(folder), trainer.args.process_index
    path = folder / f"resume_state_{rank}.json"
    surplus = folder / f"resume_state_{trainer.args.world_size}.json"
    if surplus.exists():
        raise ValueError(
            f"{surplus}: found. The checkpoint was written by more than {trainer.args.world_size} processes; a run "
            "goes on with as many processes as it began with"
        )
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: missing. The checkpoint was written by another number of processes; a run goes on with as many "
            "processes as it began with"
        ) from None
    # The schedule is compared with the run's; what a callback asks for is in no other file before the stage has ended.
    wanted, found = _overrides(trainer), state.get("overrides")
    if found is not None and wanted != found:
        names = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
        raise ValueError(
            f"{folder}: expected to go on with the settings that the stage was stopped with, "
            + ", ".join(f"{name} {found.get(name, 'unset')}, found {wanted.get(name, 'unset')}" for name in names)
        )
    device = trainer.accelerator.device
    if state["buffer"] is not None:
        inputs: list[dict[str, Any]] = [dict(values) for values in state["buffer"]]
        for name, tensor in load_file(folder / f"generation_buffer_{rank}.safetensors").items():
            position, key = name.split("/", 1)
            inputs[int(position)][key] = tensor.to(device)
        trainer._buffered_inputs = inputs
    trainer._step = state["step"]
    trainer._metrics = {mode: defaultdict(list, metrics) for mode, metrics in state["metrics"].items()}
    loss, trainer._total_loss_scalar, trainer._globalstep_last_logged = state["loss"]
    trainer._tr_loss = torch.tensor(loss, device=device)
    trainer.entropy_coef, trainer._last_world_entropy = state["entropy"]


def _overrides(trainer: "SequentialGRPOTrainer") -> dict[str, Any]:
    return json.loads(json.dumps(trainer._stage[1].overrides)) if trainer._stage is not None else {}


def last_whole_checkpoint(folder: Path) -> str | None:
    """
    The newest checkpoint of a stage that was written to its end.

    `trainer_state.json` is the last file that transformers writes. A checkpoint without a readable one, or with a file
    that was cut off, is skipped with a warning.

    Args:
        folder (`pathlib.Path`):
            Folder with `checkpoint-*` folders; it may be missing.

    Returns:
        `str` or `None`: Folder of the checkpoint.
    """
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        fault = _fault(path)
        if fault is None:
            return str(path)
        logger.warning("%s: skipped, it was not written to its end (%s)", path, fault)
    return None


def _fault(checkpoint: Path) -> str | None:
    for name in ("trainer_state.json", "resume_state_0.json"):
        try:
            json.loads((checkpoint / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return f"{name} is missing" + (", as with save_only_model" if name.startswith("resume") else "")
        except (OSError, ValueError) as error:
            return f"{name}: {error}"
    for path in checkpoint.rglob("*"):
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (OSError, SafetensorError) as error:
                return f"{path.name}: {error}"
        # torch.save writes zip archives, whose directory comes last
        elif path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            return f"{path.name} is cut off"
    return None


def epochs_done(checkpoint: str | Path) -> int:
    """
    Whole passes over the prompts before a checkpoint.

    Args:
        checkpoint (`str` or `pathlib.Path`):
            Folder of the checkpoint.

    Returns:
        `int`: Their number.
    """
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state.get("epoch") or 0)
