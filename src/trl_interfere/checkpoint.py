"""A checkpoint on disk, read a few rows at a time."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .adapters import AdapterFactors
from .models import adapter_base, local_folder


# Data types by their names in safetensors, and the integers that hold their bits.
DTYPES = {
    "BF16": ("bfloat16", np.dtype(np.int16)),
    "F16": ("float16", np.dtype(np.int16)),
    "F32": ("float32", np.dtype(np.int32)),
    "F64": ("float64", np.dtype(np.int64)),
}


@dataclass(frozen=True)
class StoredTensor:
    """
    Where a tensor lies.

    Args:
        name (`str`):
            Its name in the file.
        file (`pathlib.Path`):
            The file.
        dtype (`str`):
            Data type that it is stored in, e.g. `"bfloat16"`.
        shape (`tuple[int, ...]`):
            Its shape.
        offset (`int`):
            Position of its first byte in the file.
        bits (`numpy.dtype`):
            Integers of the width of an element.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bits: np.dtype

    @property
    def rows(self) -> int:
        """Number of rows: the product of all sizes but the last."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """Size of the last axis, 1 for a scalar."""
        return self.shape[-1] if self.shape else 1

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.bits.itemsize

    def read(self, start: int, stop: int, buffer: bytearray) -> np.ndarray:
        """
        Bits of some rows.

        The bytes are read into the buffer, and not mapped: pages of a mapped file count as resident memory of the
        process until the system takes them back.

        Args:
            start (`int`):
                First row.
            stop (`int`):
                Row after the last.
            buffer (`bytearray`):
                Memory to read into, which a later call may overwrite.

        Returns:
            `numpy.ndarray` of shape `(stop - start, columns)`: The elements as integers of their width.

        Raises:
            `ValueError`: If the file has become shorter.
        """
        stride = self.columns * self.bits.itemsize
        view = memoryview(buffer)[: (stop - start) * stride]
        filled = 0
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset + start * stride)
            while filled < len(view):
                count = file.readinto(view[filled:])
                if not count:
                    raise ValueError(f"{self.file}: tensor {self.name}: expected {self.nbytes} bytes, found fewer")
                filled += count
        return np.frombuffer(view, self.bits).reshape(stop - start, self.columns)


class Checkpoint:
    """
    A model in safetensors, single or sharded, or a LoRA adapter together with the model that it stands on.

    Opening one reads the names, shapes and data types of its tensors. An output layer that the configuration ties to
    the embeddings is the same tensor as these and is not listed.

    Example:

    ```python
    >>> from trl_interfere.checkpoint import Checkpoint

    >>> checkpoint = Checkpoint("Qwen/Qwen3-0.6B")
    >>> checkpoint.tensors["model.layers.0.mlp.down_proj.weight"].shape
    (1024, 3072)
    ```

    Args:
        name (`str` or `pathlib.Path`):
            Folder, Hub id, or `user/repo@revision`.
        base (`str` or `pathlib.Path`, *optional*):
            Model that an adapter stands on. Defaults to the one that the adapter names.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub id.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the configuration.

    Attributes:
        tensors (`dict[str, StoredTensor]`): Where each tensor lies, by name.
        adapter ([`~trl_interfere.adapters.AdapterFactors`] or `None`): What an adapter adds.

    Raises:
        `ValueError`: If there is no such checkpoint, it holds no whole safetensors, or it is quantised.
    """

    def __init__(
        self,
        name: str | Path,
        base: str | Path | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ):
        self.name = str(name)
        folder = local_folder(name, revision, trust_remote_code)
        self.adapter = None
        if (folder / ADAPTER_CONFIG_NAME).is_file():
            self.adapter = AdapterFactors(folder)
            folder = local_folder(*(adapter_base(folder) if base is None else (base, None)))
        self.folder = folder
        if not (folder / CONFIG_NAME).is_file():
            raise ValueError(f"{folder}: expected {CONFIG_NAME} beside the weights, found none")
        try:
            self.config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder / CONFIG_NAME}: expected the configuration of a model ({error})") from error
        if getattr(self.config, "quantization_config", None) is not None:
            raise ValueError(
                f"{folder / CONFIG_NAME}: expected unquantised weights, found a quantization_config: "
                "compare the checkpoints from before the quantisation"
            )
        self.tensors = _folder_tensors(folder)
        self._aliases = self._tie()
        if self.adapter is not None:
            for weight in self.adapter.names:
                if weight not in self.tensors:
                    raise ValueError(f"{self.adapter.path}: tensor {weight}: expected one of {folder}, found none")

    def __getitem__(self, name: str) -> StoredTensor:
        return self.tensors[self._aliases.get(name, name)]

    def __contains__(self, name: str) -> bool:
        return self._aliases.get(name, name) in self.tensors

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def factors(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """
        What an adapter adds to a tensor.

        Args:
            name (`str`):
                Name of the tensor.

        Returns:
            `tuple[numpy.ndarray, numpy.ndarray]` or `None`: Two matrices, of shapes `(rows, r)` and `(r, columns)`,
            whose product is added; `None` if nothing is.
        """
        if self.adapter is None or name not in self.adapter.names:
            return None
        left, right = self.adapter.factors(name)
        return left.numpy(), right.numpy()

    def _tie(self) -> dict[str, str]:
        # Names of tensors that are another one, to the name of that one.
        if not getattr(self.config.get_text_config(), "tie_word_embeddings", False):
            return {}
        model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(self.config), None)
        aliases = {}
        for target, source in (getattr(model, "_tied_weights_keys", None) or {}).items():
            # Old checkpoints lack the prefix of the model.
            stored = next((name for name in self.tensors if f".{source}".endswith(f".{name}")), None)
            if stored is None and target in self.tensors:
                self.tensors[source] = self.tensors.pop(target)
                stored = source
            if stored is not None:
                self.tensors.pop(target, None)
                aliases[target] = stored
        return aliases


def published_name(checkpoint: str | Path) -> str:
    """
    What a checkpoint is called in files that others get.

    Args:
        checkpoint (`str` or `pathlib.Path`):
            Folder, or Hub id.

    Returns:
        `str`: Of an absolute path the last two parts. They say which stage it is; where it lay on somebody's disk is
        nobody's business.
    """
    return "/".join(Path(checkpoint).parts[-2:]) if Path(checkpoint).is_absolute() else str(checkpoint)


def check_comparable(first: Checkpoint, second: Checkpoint) -> list[str]:
    """
    Check that two checkpoints hold the same tensors.

    Args:
        first ([`Checkpoint`]):
            One of them.
        second ([`Checkpoint`]):
            The other one.

    Returns:
        `list[str]`: Names of the tensors, in the order in which the first one stores them.

    Raises:
        `ValueError`: If their architectures differ, or the names or shapes of their tensors.
    """
    types = first.config.model_type, second.config.model_type
    if types[0] != types[1]:
        raise ValueError(
            f"{second.folder / CONFIG_NAME}: expected model_type {types[0]!r} as in {first.folder / CONFIG_NAME}, "
            f"found {types[1]!r}"
        )
    names = first.tensors.keys() | second.tensors.keys()
    for checkpoint, other in ((second, first), (first, second)):
        missing = sorted(name for name in names if name not in checkpoint)
        if missing:
            raise ValueError(
                f"{checkpoint.folder}: tensor {missing[0]}: expected as in {other[missing[0]].file}, found none"
                + (f" ({len(missing)} tensors are missing)" if len(missing) > 1 else "")
            )
    for name in sorted(names):
        if first[name].shape != second[name].shape:
            sizes = [
                getattr(checkpoint.config.get_text_config(), "vocab_size", None) for checkpoint in (first, second)
            ]
            raise ValueError(
                f"{second[name].file}: tensor {name}: expected shape {first[name].shape} as in {first[name].file}, "
                f"found {second[name].shape}"
                + (f" (the vocabularies have {sizes[0]} and {sizes[1]} tokens)" if sizes[0] != sizes[1] else "")
            )
    return sorted(names, key=lambda name: (first[name].file, first[name].offset))


def to_values(bits: np.ndarray, dtype: str, out: np.ndarray) -> np.ndarray:
    """
    Elements from their bits.

    Args:
        bits (`numpy.ndarray`):
            Elements as integers of their width.
        dtype (`str`):
            Data type that they are stored in.
        out (`numpy.ndarray` of the same shape):
            Memory for the result, float32 or float64.

    Returns:
        `numpy.ndarray`: The elements in the data type of `out`: the input itself, if it has this type, or `out`.
    """
    if dtype == "bfloat16":
        # The upper half of a float32.
        words = out.view(np.uint32) if out.dtype == np.float32 else np.empty(out.shape, np.uint32)
        np.copyto(words, bits.view(np.uint16))
        np.left_shift(words, 16, out=words)
        if out.dtype != np.float32:
            np.copyto(out, words.view(np.float32))
        return out
    values = bits.view(dtype)
    if values.dtype == out.dtype:
        return values
    np.copyto(out, values)
    return out


def _folder_tensors(folder: Path) -> dict[str, StoredTensor]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return stored_tensors(folder / SAFE_WEIGHTS_NAME)
    if not index.is_file():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        raise ValueError(
            f"{folder}: expected {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}, found "
            + (f"only {pickles[0]}: pickle can run code and is not read, convert it first" if pickles else "neither")
        )
    try:
        files = json.loads(index.read_text())["weight_map"]
        shards = {file: stored_tensors(folder / file) for file in sorted(set(files.values()))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
            raise
        raise ValueError(f"{index}: expected a JSON object with a weight_map ({error!r})") from error
    for name, file in files.items():
        if name not in shards[file]:
            raise ValueError(f"{folder / file}: tensor {name}: expected by {index.name}, found none")
    return {name: shards[file][name] for name, file in files.items()}


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """
    Where the tensors of a file lie.

    Args:
        file (`pathlib.Path`):
            File in safetensors.

    Returns:
        `dict[str, StoredTensor]`: By name, in the order of the header.

    Raises:
        `ValueError`: If the file is not whole, or a tensor is not of floating point numbers.
    """
    try:
        with safe_open(file, framework="np", backend="pread"):
            pass  # checks that the header is sound and the file as long as it says
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: expected a whole safetensors file ({error})") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{file}: tensor {name}: expected unquantised weights ({', '.join(sorted(DTYPES))}), "
                f"found {entry['dtype']}"
            )
        dtype, bits = DTYPES[entry["dtype"]]
        offset = 8 + length + entry["data_offsets"][0]
        tensors[name] = StoredTensor(name, file, dtype, tuple(entry["shape"]), offset, bits)
    return tensors
