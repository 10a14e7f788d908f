"""A checkpoint on disk, read a few rows at a time."""

import hashlib
import json
import math
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .adapters import AdapterFactors, ExpertAdapterError
from .models import adapter_base, load_model, local_folder, model_class


# Data types by their names in safetensors, and the integers that hold their bits.
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Bytes that are read at once.
READ_BYTES = 2**20

Index = tuple[slice, ...]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its name in a file, the data type that it is stored in, and its shape."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize

    def parts(self, itemsize: int | None = None) -> Iterator[tuple[Index, torch.Tensor]]:
        """
        The tensor in parts of about `READ_BYTES`, in the order of its elements, each with its place; those of
        checkpoints of several data types are the same with one `itemsize`.
        """
        # The bytes are read, and not mapped: pages of a mapped file count as resident memory of the process.
        with safe_open(self.file, framework="pt", backend="pread") as file:
            stored = file.get_slice(self.name)
            for index in parts(self.shape, itemsize or getattr(torch, self.dtype).itemsize):
                yield index, stored[index] if self.shape else file.get_tensor(self.name)


def parts(shape: tuple[int, ...], itemsize: int) -> Iterator[Index]:
    """Places of parts of about `READ_BYTES`, whole rows of the last axis each, in the order of the elements."""
    if not shape:
        yield ()
        return
    *leading, rows = shape[:-1] if len(shape) > 1 else shape
    width = shape[-1] if len(shape) > 1 else 1
    step = max(1, READ_BYTES // max(1, width * itemsize))
    for place in np.ndindex(*leading):
        for start in range(0, rows, step):
            yield (*(slice(i, i + 1) for i in place), slice(start, min(start + step, rows)))


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
        path = folder / CONFIG_NAME
        try:
            self.config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path}: expected the configuration of a model ({error})") from error
        if getattr(self.config, "quantization_config", None) is not None:
            raise ValueError(f"{path}: expected unquantised weights, found a quantization_config")
        self.tensors = _folder_tensors(folder)
        self._aliases = self._tie()
        for weight in [] if self.adapter is None else self.adapter.names:
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
        """What an adapter adds to a tensor."""
        if self.adapter is None or name not in self.adapter.names:
            return None
        left, right = self.adapter.factors(name)
        return left.numpy(), right.numpy()

    def digest(self) -> str:
        """SHA-256 of its files with weights, and of its adapter."""
        files = sorted({stored.file for stored in self.tensors.values()})
        whole = hashlib.sha256()
        for path in [*files, *([] if self.adapter is None else [self.adapter.path])]:
            with open(path, "rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        return whole.hexdigest()

    def _tie(self) -> dict[str, str]:
        """Names of tensors that are another one, to the name of that one."""
        if not getattr(self.config.get_text_config(), "tie_word_embeddings", False):
            return {}
        aliases = {}
        for target, source in (getattr(model_class(self.config), "_tied_weights_keys", None) or {}).items():
            # Old checkpoints lack the prefix of the model.
            stored = next((name for name in self.tensors if f".{source}".endswith(f".{name}")), None)
            if stored is None and target in self.tensors:
                self.tensors[source] = self.tensors.pop(target)
                stored = source
            elif stored is not None and target in self.tensors and not self._same(target, stored):
                continue  # transformers loads both
            if stored is not None:
                self.tensors.pop(target, None)
                aliases[target] = stored
        return aliases

    def _same(self, first: str, second: str) -> bool:
        first, second = self.tensors[first], self.tensors[second]
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        pairs = zip(first.parts(), second.parts(), strict=True)
        return all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def open_merged(name: str | Path, trust_remote_code: bool = False) -> Checkpoint:
    """
    A checkpoint; an adapter of parameters that hold all experts, which files hold one by one, is merged into whole
    weights in float32, in a folder that lasts as long as the object.
    """
    try:
        return Checkpoint(name, trust_remote_code=trust_remote_code)
    except ExpertAdapterError:
        folder = tempfile.mkdtemp()
        load_model(name, trust_remote_code=trust_remote_code).save_pretrained(folder)
        checkpoint = Checkpoint(folder)
        checkpoint.name = str(name)
        weakref.finalize(checkpoint, shutil.rmtree, folder)
        return checkpoint


def published_name(checkpoint: str | Path) -> str:
    """What a checkpoint is called in files that others get."""
    return "/".join(Path(checkpoint).parts[-2:]) if Path(checkpoint).is_absolute() else str(checkpoint)


def check_comparable(first: Checkpoint, second: Checkpoint) -> list[str]:
    """Check that two checkpoints hold the same tensors."""
    expected, found = first.config.model_type, second.config.model_type
    if expected != found:
        where = f"{second.folder / CONFIG_NAME}: expected model_type {expected!r}"
        raise ValueError(f"{where} as in {first.folder / CONFIG_NAME}, found {found!r}")
    names = first.tensors.keys() | second.tensors.keys()
    for checkpoint, other in ((second, first), (first, second)):
        if missing := sorted(name for name in names if name not in checkpoint):
            where = f"{checkpoint.folder}: tensor {missing[0]}: expected as in {other[missing[0]].file}"
            raise ValueError(f"{where}, found none ({len(missing)} missing)")
    for name in sorted(names):
        expected, found = first[name], second[name]
        if expected.shape != found.shape:
            sizes = [getattr(one.config.get_text_config(), "vocab_size", None) for one in (first, second)]
            hint = "" if sizes[0] == sizes[1] else f" (the vocabularies have {sizes[0]} and {sizes[1]} tokens)"
            where = f"{found.file}: tensor {name}: expected shape {expected.shape} as in {expected.file}"
            raise ValueError(f"{where}, found {found.shape}{hint}")
    return sorted(names, key=lambda name: (first[name].file, name))


def _folder_tensors(folder: Path) -> dict[str, StoredTensor]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return stored_tensors(folder / SAFE_WEIGHTS_NAME)
    if not index.is_file():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f"only {pickles[0]}: pickle can run code and is not read, convert it" if pickles else "neither"
        raise ValueError(f"{folder}: expected {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}, found {found}")
    try:
        files = json.loads(index.read_text())["weight_map"]
        names = sorted(set(files.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: expected a JSON object with a weight_map ({error!r})") from error
    for file in names:
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index}: expected names of files beside it, found {file!r}")
    shards = {file: stored_tensors(folder / file) for file in names}
    for name, file in files.items():
        if name not in shards[file]:
            raise ValueError(f"{folder / file}: tensor {name}: expected by {index.name}, found none")
    return {name: shards[file][name] for name, file in files.items()}


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """Where the tensors of a file lie, by name; the file has to be whole, and of floating point numbers."""
    tensors = {}
    try:
        with safe_open(file, framework="pt", backend="pread") as opened:
            for name in opened.keys():
                entry = opened.get_slice(name)
                stored = entry.get_dtype()
                if stored not in DTYPES:
                    raise ValueError(f"{file}: tensor {name}: expected unquantised weights, found {stored}")
                dtype = str(DTYPES[stored]).removeprefix("torch.")
                tensors[name] = StoredTensor(name, file, dtype, tuple(entry.get_shape()))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: expected a whole safetensors file ({error})") from error
    return tensors
