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
    for path in sorted(folder.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        fault = _fault(path)
        if fault is None:
            return str(path)
        logger.warning("%s: skipped, it was not written to its end (%s)", path, fault)
    return None


def _fault(checkpoint: Path) -> str | None:
    states = (checkpoint / name for name in ("trainer_state.json", "resume_state_0.json"))
    for path in (*states, *checkpoint.rglob("*.safetensors"), *checkpoint.rglob("*.pt*")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.is_file():  # torch.save writes zip archives, whose directory comes last
                zipfile.ZipFile(path).close()
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{path.name}: {error}"
    return None
