"""Which checkpoint of a stage a resumed run goes on from."""

import json
import logging
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open


logger = logging.getLogger(__name__)


def last_whole_checkpoint(folder: Path) -> str | None:
    """
    The newest checkpoint of a stage that was written to its end: `trainer_state.json` is the last file that
    transformers writes. One without it, or with a file that was cut off, is skipped with a warning.
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
    """Whole passes over the prompts before a checkpoint."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state.get("epoch") or 0)
