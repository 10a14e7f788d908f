"""The delta file of a rollback: what it wrote and what was there, of the touched slices alone."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from ..analysis.architectures import Architecture
from ..analysis.routes import RouteMap
from ..checkpoint import StoredTensor
from .blocks import Blocks
from .streaming import SafetensorsWriter


SCHEMA_VERSION = 1
_KEY = "trl_interfere_rollback"
_ENTRY = {"dtype", "shape", "axes", "counts", "elements", "changed", "old", "new"}
# Tensors of single experts in files, and the tensor of all experts in memory with the half of it that holds them.
_FUSED = {
    "gate_proj": ("mlp.experts.gate_up_proj", 0, 2),
    "up_proj": ("mlp.experts.gate_up_proj", 1, 2),
    "down_proj": ("mlp.experts.down_proj", 0, 1),
}
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(\w+)\.weight")


def digest(bits: torch.Tensor) -> str:
    """
    SHA-256 of elements.

    Args:
        bits (`torch.Tensor`):
            Elements as integers of their width.

    Returns:
        `str`: In hexadecimal.
    """
    return hashlib.sha256(np.ascontiguousarray(bits.numpy()).data).hexdigest()


def to_bits(values: torch.Tensor) -> torch.Tensor:
    """
    Elements as integers of their width.

    Args:
        values (`torch.Tensor`):
            Elements of a floating point type.

    Returns:
        `torch.Tensor`: Their bits, in the same memory.
    """
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


@dataclass(frozen=True, eq=False)
class Slices:
    """
    What a rollback changed in one tensor.

    Args:
        blocks ([`Blocks`]):
            The touched slices.
        changed (`torch.Tensor` of shape `(blocks, elements per block)`):
            Which of their elements differ before and after the rollback.
        old (`torch.Tensor` of shape `(changed,)`):
            Bits of these elements before the rollback.
        new (`torch.Tensor` of shape `(changed,)`):
            Bits of these elements after it.
    """

    blocks: Blocks
    changed: torch.Tensor
    old: torch.Tensor
    new: torch.Tensor


class DeltaWriter:
    """
    Writes a delta file, one tensor after the other.

    Of each tensor it holds the touched blocks (`<name>:blocks`), which of their elements the rollback changed
    (`<name>:mask`, packed bits), and these elements before and after it (`<name>:old`, `<name>:new`), in the data type
    of the checkpoint. In a bfloat16 checkpoint RL changes few elements, and the file has the size of these.

    Args:
        path (`pathlib.Path`):
            The file.

    Attributes:
        tensors (`dict[str, dict]`): By name, what the record of the rollback says about a tensor.
    """

    def __init__(self, path: Path):
        self._writer = SafetensorsWriter(path)
        self.tensors: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> "DeltaWriter":
        return self

    def __exit__(self, *error) -> None:
        self._writer.__exit__(*error)

    def add(self, stored: StoredTensor, blocks: Blocks, old: torch.Tensor, new: torch.Tensor) -> None:
        """
        Add a tensor; one of which nothing has changed is left out.

        Args:
            stored ([`StoredTensor`]):
                The tensor.
            blocks ([`Blocks`]):
                The touched slices.
            old (`torch.Tensor` of shape `(blocks, elements per block)`):
                Their bits before the rollback.
            new (`torch.Tensor` of the same shape):
                Their bits after it.
        """
        changed = old != new
        if not changed.any():
            return
        self._writer.add(f"{stored.name}:blocks", "int64", blocks.index.astype(np.int64))
        self._writer.add(f"{stored.name}:mask", "uint8", np.packbits(changed.numpy()))
        for state, bits in (("old", old), ("new", new)):
            self._writer.add(f"{stored.name}:{state}", stored.dtype, bits[changed].numpy())
        self.tensors[stored.name] = {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "axes": list(blocks.axes),
            "counts": [int(count) for count in blocks.counts],
            "elements": old.numel(),
            "changed": int(changed.sum()),
            "old": digest(old),
            "new": digest(new),
        }

    def close(self, record: dict[str, Any]) -> dict[str, Any]:
        """
        Write the file.

        Args:
            record (`dict`):
                What was done.

        Returns:
            `dict`: The record with the tensors, and an `id` that is made of their contents.

        Raises:
            `ValueError`: If nothing has changed.
        """
        if not self.tensors:
            raise ValueError(
                f"{record['after']}: expected an update from {record['before']} on the chosen routes, found none: "
                "there is nothing to roll back"
            )
        states = json.dumps([[name, entry["old"], entry["new"]] for name, entry in sorted(self.tensors.items())])
        record = {**record, "id": hashlib.sha256(states.encode()).hexdigest(), "tensors": self.tensors}
        text = json.dumps({"schema_version": SCHEMA_VERSION, **record})
        self._writer.close({"format": "pt", _KEY: text})
        return record


class RollbackDelta:
    """
    A delta file, which can be applied to a model and reverted without the checkpoints it was made from.

    It fits a checkpoint in which the touched slices are, to the bit, those before the rollback (to apply it) or those
    after it (to revert it). Anything else is refused.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM
    >>> from trl_interfere.repair.delta import RollbackDelta

    >>> model = AutoModelForCausalLM.from_pretrained("out/stages/2-qa")
    >>> delta = RollbackDelta("math.safetensors")
    >>> delta.apply(model)
    >>> delta.revert(model)
    ```

    Args:
        path (`str` or `pathlib.Path`):
            The file.

    Attributes:
        record (`dict`): What was done: criterion, scope, budget, routes, steps, checkpoints, versions, tensors.

    Raises:
        `ValueError`: If it is no delta file, not whole, or of another schema version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path}: expected a delta file of a rollback, found none")
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata, names = file.metadata() or {}, set(file.keys())
        except SafetensorError as error:
            raise ValueError(f"{self.path}: expected a whole safetensors file ({error})") from error
        if _KEY not in metadata:
            raise ValueError(f"{self.path}: expected a delta file of a rollback, found other safetensors")
        self.record = json.loads(metadata[_KEY])
        version = self.record.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ValueError(f"{self.path}: expected schema_version {SCHEMA_VERSION}, found {version!r}")
        if not isinstance(self.record.get("tensors"), dict):
            raise ValueError(
                f"{self.path}: expected the tensors of a rollback in the header, found {self.record.get('tensors')!r}"
            )
        for name, entry in self.tensors.items():
            if not isinstance(entry, dict) or not _ENTRY <= entry.keys():
                raise ValueError(f"{self.path}: tensor {name}: expected {sorted(_ENTRY)} in the header, found {entry}")
            missing = [part for part in ("blocks", "mask", "old", "new") if f"{name}:{part}" not in names]
            if missing:
                raise ValueError(f"{self.path}: tensor {name}:{missing[0]}: expected by the header, found none")

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """By name, data type, shape, number of touched and changed elements, and digests of both states."""
        return self.record["tensors"]

    def blocks(self, name: str) -> Blocks:
        """
        Touched slices of a tensor.

        Args:
            name (`str`):
                Its name.

        Returns:
            [`Blocks`]: Where they lie.
        """
        entry = self.tensors[name]
        with safe_open(self.path, framework="pt") as file:
            index = file.get_tensor(f"{name}:blocks").numpy()
        sizes = [entry["shape"][axis] for axis in entry["axes"]]
        fits = all(size % count == 0 for size, count in zip(sizes, entry["counts"], strict=True))
        if not fits or index.min() < 0 or index.max() >= np.prod(entry["counts"]):
            raise ValueError(f"{self.path}: tensor {name}: expected blocks of shape {entry['shape']}, found others")
        return Blocks(tuple(entry["axes"]), tuple(entry["counts"]), index)

    def slices(self, name: str) -> Slices:
        """
        What the rollback changed in a tensor.

        Args:
            name (`str`):
                Its name.

        Returns:
            [`Slices`]: The slices.
        """
        with safe_open(self.path, framework="pt") as file:
            mask, old, new = (file.get_tensor(f"{name}:{part}") for part in ("mask", "old", "new"))
        blocks = self.blocks(name)
        changed = np.unpackbits(mask.numpy(), count=self.tensors[name]["elements"]).astype(bool)
        changed = torch.from_numpy(changed.reshape(len(blocks.index), -1))
        return Slices(blocks, changed, to_bits(old), to_bits(new))

    def state(self, name: str, current: torch.Tensor) -> str | None:
        """
        State that the touched slices of a tensor are in.

        Args:
            name (`str`):
                Name of the tensor.
            current (`torch.Tensor` of shape `(blocks, elements per block)`):
                Bits of its touched slices.

        Returns:
            `str` or `None`: `"old"` (before the rollback), `"new"` (after it) or `None` (neither).
        """
        found, entry = digest(current), self.tensors[name]
        return next((state for state in ("old", "new") if entry[state] == found), None)

    def changed_slices(self, name: str, current: torch.Tensor, wanted: str) -> torch.Tensor:
        """
        The touched slices of a tensor in the other state.

        Args:
            name (`str`):
                Name of the tensor.
            current (`torch.Tensor` of shape `(blocks, elements per block)`):
                Bits of its touched slices, in one of both states.
            wanted (`str`):
                State to bring them to: `"new"` or `"old"`.

        Returns:
            `torch.Tensor` of shape `(blocks, elements per block)`: Their bits in this state.

        Raises:
            `ValueError`: If the file does not give the slices whose digest it has.
        """
        slices, values = self.slices(name), current.clone()
        found = getattr(slices, wanted)
        if found.numel() == int(slices.changed.sum()):
            values[slices.changed] = found
        if digest(values) != self.tensors[name][wanted]:
            raise ValueError(
                f"{self.path}: tensor {name}: expected the slices whose digest is in the file, found others: the file "
                "is damaged, and nothing is written"
            )
        return values

    def check_state(self, states: dict[str, str | None], wanted: str, target: str) -> None:
        """
        Check that a delta can be applied or reverted.

        Args:
            states (`dict[str, str | None]`):
                State of each tensor.
            wanted (`str`):
                State to bring them to: `"new"` to apply, `"old"` to revert. Tensors may be in it already, as an
                interrupted run leaves them, but not all of them.
            target (`str`):
                The model, for the error.

        Raises:
            `ValueError`: If a tensor is in neither state, or all are in the wanted one.
        """
        neither = [name for name, state in states.items() if state is None]
        if neither:
            raise ValueError(
                f"{target}: tensor {neither[0]}: expected the touched slices as they were before the rollback of "
                f"{self.path} or after it, found others"
                + (f" ({len(neither)} of {len(states)} tensors differ)" if len(neither) > 1 else "")
            )
        if set(states.values()) == {wanted}:
            done = "applied" if wanted == "new" else "reverted, or never applied"
            raise ValueError(f"{target}: {self.path} is already {done}")

    def apply(self, model: PreTrainedModel, description: Architecture | None = None) -> None:
        """
        Roll a model in memory back.

        Args:
            model ([`~transformers.PreTrainedModel`]):
                The model, in the data type of the checkpoint or a wider one; it is changed in place, or not at all.
            description ([`Architecture`], *optional*):
                Description of the architecture, if it is none of those that are known.

        Raises:
            `ValueError`: If the model does not hold the weights from before the rollback.
        """
        self._change(model, "new", description)

    def revert(self, model: PreTrainedModel, description: Architecture | None = None) -> None:
        """
        Undo the rollback of a model in memory.

        Args:
            model ([`~transformers.PreTrainedModel`]):
                The model, in the data type of the checkpoint or a wider one; it is changed in place, or not at all.
            description ([`Architecture`], *optional*):
                Description of the architecture, if it is none of those that are known.

        Raises:
            `ValueError`: If the model does not hold the weights from after the rollback.
        """
        self._change(model, "old", description)

    def _change(self, model: PreTrainedModel, wanted: str, description: Architecture | None) -> None:
        if self.record["kind"] != "weights":
            raise ValueError(f"{self.path}: is a delta of an adapter: apply it to the folder of the adapter")
        target = model.config._name_or_path or type(model).__name__
        route_map = RouteMap(model.config, description)
        places = {route_map.place(name): parameter.detach() for name, parameter in model.named_parameters()}
        found, states = {}, {}
        for name, entry in self.tensors.items():
            parameter, blocks = self._locate(name, route_map, places, target)
            narrow = parameter.dtype != torch.promote_types(parameter.dtype, getattr(torch, entry["dtype"]))
            if narrow:
                raise ValueError(
                    f"{target}: tensor {name}: expected {entry['dtype']} as in {self.path} or a wider data type, "
                    f"found {parameter.dtype}: load the model with dtype={entry['dtype']!r}"
                )
            current = blocks.take(parameter).cpu()
            stored = current.to(getattr(torch, entry["dtype"]))
            same = torch.equal(stored.to(current.dtype), current)
            states[name] = self.state(name, to_bits(stored)) if same else None
            found[name] = parameter, blocks
        self.check_state(states, wanted, target)
        for name, (parameter, blocks) in found.items():
            if states[name] != wanted:
                stored = blocks.take(parameter).cpu().to(getattr(torch, self.tensors[name]["dtype"]))
                self.changed_slices(name, to_bits(stored), wanted)
        for name, (parameter, blocks) in found.items():
            if states[name] != wanted:
                slices, dtype = self.slices(name), getattr(torch, self.tensors[name]["dtype"])
                values = blocks.take(parameter)
                changed = slices.changed.to(parameter.device)
                values[changed] = getattr(slices, wanted).view(dtype).to(parameter)
                blocks.put(parameter, values)

    def _locate(
        self, name: str, route_map: RouteMap, places: dict[tuple[int, str] | None, torch.Tensor], target: str
    ) -> tuple[torch.Tensor, Blocks]:
        # The parameter that holds a tensor of the files, and where in it the touched slices lie.
        entry, place, blocks = self.tensors[name], route_map.place(name), self.blocks(name)
        shape = tuple(entry["shape"])
        parameter = None if place is None else places.get(place)
        expert = _EXPERT.fullmatch(place[1]) if place is not None and parameter is None else None
        if expert is not None and expert[2] in _FUSED:
            fused, half, halves = _FUSED[expert[2]]
            parameter = places.get((place[0], fused))
            if parameter is not None:
                (axis,), (count,) = blocks.axes, blocks.counts
                experts, number = parameter.shape[0], int(expert[1])
                shape = (experts, *(size * (halves if i == axis else 1) for i, size in enumerate(shape)))
                index = (number * halves + half) * count + blocks.index
                blocks = Blocks((0, axis + 1), (experts, halves * count), index)
                parameter = parameter if number < experts else None
        if parameter is None:
            raise ValueError(f"{target}: tensor {name}: expected as in {self.path}, found none: is it another model?")
        if tuple(parameter.shape) != shape:
            raise ValueError(
                f"{target}: tensor {name}: expected shape {shape} as in {self.path}, found {tuple(parameter.shape)}"
            )
        return parameter, blocks
