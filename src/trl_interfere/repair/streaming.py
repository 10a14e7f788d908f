"""Safetensors files written and rewritten one tensor at a time."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from ..checkpoint import DTYPES, StoredTensor


CHUNK = 1 << 23
_NAMES = {name: code for code, (name, _) in DTYPES.items()} | {"uint8": "U8", "int64": "I64"}


class SafetensorsWriter:
    """
    A safetensors file whose tensors come one after the other.

    The header of the format stands first and needs the sizes of all tensors, hence their bytes go to a second file
    until the last of them is known. The file appears under its name when it is whole.

    Args:
        path (`pathlib.Path`):
            The file.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._spool_path = path.with_name(f".{path.name}.{os.getpid()}.spool")
        self._spool = open(self._spool_path, "w+b")
        self._entries: list[tuple[str, str, int, tuple[int, ...], int, int]] = []

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, *_) -> None:
        self._spool.close()
        self._spool_path.unlink(missing_ok=True)

    def add(self, name: str, dtype: str, values: np.ndarray) -> None:
        """
        Add a tensor.

        Args:
            name (`str`):
                Its name.
            dtype (`str`):
                Its data type, e.g. `"bfloat16"`.
            values (`numpy.ndarray`):
                Its elements, or their bits as integers of the same width.
        """
        values = np.ascontiguousarray(values)
        start = self._spool.tell()
        self._spool.write(values.reshape(-1).view(np.uint8).data)
        self._entries.append((name, dtype, values.itemsize, values.shape, start, values.nbytes))

    def close(self, metadata: dict[str, str]) -> None:
        """
        Write the file.

        Args:
            metadata (`dict[str, str]`):
                What stands in its header.
        """
        # Widest elements first, so that each tensor begins at a multiple of its element's width.
        entries = sorted(self._entries, key=lambda entry: -entry[2])
        header, offset = {"__metadata__": metadata}, 0
        for name, dtype, _, shape, _, size in entries:
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for *_, start, size in entries:
                    self._spool.seek(start)
                    _copy(self._spool, file, size, self._spool_path)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)


def read_bits(stored: StoredTensor) -> torch.Tensor:
    """
    Read a tensor.

    Args:
        stored ([`StoredTensor`]):
            Where it lies.

    Returns:
        `torch.Tensor`: Its elements as integers of their width, in its shape.

    Raises:
        `ValueError`: If the file has become shorter.
    """
    bits = stored.read(0, stored.rows, bytearray(stored.nbytes))
    return torch.from_numpy(bits).reshape(stored.shape)


def rewrite_file(
    source: Path,
    target: Path,
    tensors: Iterable[StoredTensor],
    change: Callable[[StoredTensor, torch.Tensor], None],
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """
    Copy a safetensors file and change some tensors on the way, one in memory at a time.

    Everything else stays to the byte: header, metadata, order and the other tensors. The target is replaced at once,
    and may be the source.

    Args:
        source (`pathlib.Path`):
            The file.
        target (`pathlib.Path`):
            Its copy.
        tensors (`Iterable[StoredTensor]`):
            Tensors of the file that are changed.
        change (`Callable[[StoredTensor, torch.Tensor], None]`):
            Gets each of them with its bits, which it changes in place.
        progress (`Callable[[int], None]`, *optional*):
            Called with the number of bytes that were written since the last call.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(source, "rb") as reader, open(temporary, "wb") as writer:
            size = os.fstat(reader.fileno()).st_size
            for stored in sorted(tensors, key=lambda stored: stored.offset):
                _copy(reader, writer, stored.offset - reader.tell(), source, progress)
                bits = read_bits(stored)
                change(stored, bits)
                writer.write(bits.numpy().reshape(-1).view(np.uint8).data)
                reader.seek(stored.nbytes, os.SEEK_CUR)
                progress(stored.nbytes)
            _copy(reader, writer, size - reader.tell(), source, progress)
            writer.flush()
            os.fsync(writer.fileno())
        shutil.copymode(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _copy(reader, writer, size: int, source: Path, progress: Callable[[int], None] = lambda _: None) -> None:
    while size > 0:
        chunk = reader.read(min(size, CHUNK))
        if not chunk:
            raise ValueError(f"{source}: expected {size} bytes more, found the end of the file")
        writer.write(chunk)
        size -= len(chunk)
        progress(len(chunk))
