"""Rollback of a checkpoint on disk: folder in, folder out."""

import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from tqdm.auto import tqdm
from transformers.utils import ADAPTER_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .. import __version__
from ..analysis.architectures import Architecture
from ..analysis.routes import KINDS, RouteMap
from ..checkpoint import Checkpoint, StoredTensor, check_comparable, published_name, stored_tensors
from ..models import local_folder
from .adapter import CONCATENATION, check_adapter, concatenate, restore_adapter, same_model, touched_factors
from .blocks import Blocks, touched_blocks
from .delta import DeltaWriter, RollbackDelta, to_bits
from .history import DELTA_FOLDER, HISTORY_NAME, RollbackHistory
from .step import move_back, route_steps
from .streaming import read_bits, rewrite_file


# Weights in other formats, which a rollback would leave as they were, and the state of an optimizer.
_PICKLES_AND_OTHERS = (".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".onnx")
_WEIGHTS = (*_PICKLES_AND_OTHERS, ".safetensors", ".safetensors.index.json", "trainer_state.json")


def roll_back_folder(
    before: str | Path | Sequence[str | Path] | None,
    after: str | Path,
    output_dir: str | Path,
    routes: np.ndarray,
    step: float | np.ndarray = 1.0,
    base: str | Path | None = None,
    description: Architecture | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = False,
    target: np.ndarray | None = None,
) -> dict[str, Any]:
    """
    Write a checkpoint in which routes are rolled back.

    Two tensors are in memory at a time. Data types, shards, their index and headers, and every tensor that no chosen
    route has a part in stay to the byte; configuration, tokenizer, chat template and other files are carried over. The
    new folder also holds `rollback.json`, and under `rollback/` what [`undo_rollback`] needs.

    An adapter is rolled back within itself. Without `before`, or with the model that it stands on, a share α of the
    rows of `lora_B` (gate, up, query, key, value) or columns of `lora_A` (down, output) of the routes is taken away.
    With an earlier adapter of the same model, the new adapter is a concatenation of both, of the sum of their ranks.

    Example:

    ```python
    >>> from trl_interfere import InterferenceReport, RouteRollback
    >>> from trl_interfere.checkpoint import Checkpoint
    >>> from trl_interfere.analysis.routes import RouteMap
    >>> from trl_interfere.repair.folder import roll_back_folder, undo_rollback

    >>> report = InterferenceReport.from_pretrained("report")
    >>> route_map = RouteMap(Checkpoint(report.after).config)
    >>> routes = RouteRollback(criterion="damage", budget=0.02).select(report, route_map)
    >>> record = roll_back_folder(report.before, report.after, "repaired", routes, step=1.5)
    >>> undo_rollback("repaired", output_dir="as-before")
    ```

    Args:
        before (`str` or `pathlib.Path`, *optional*):
            Folder or Hub id of the checkpoint before the update; may be left out for an adapter. With `target` a list
            of them, all whole weights.
        after (`str` or `pathlib.Path`):
            Folder or Hub id of the checkpoint after it, whole weights or an adapter.
        output_dir (`str` or `pathlib.Path`):
            The new folder, which does not exist or is empty.
        routes (`numpy.ndarray` of shape `(chosen,)`):
            Indices of the routes.
        step (`float` or `numpy.ndarray` of shape `(chosen,)`, *optional*, defaults to `1.0`):
            Share of the update that is taken back, of all routes or of each.
        base (`str` or `pathlib.Path`, *optional*):
            Where the model of an adapter lies, if not where the adapter says.
        description ([`Architecture`], *optional*):
            Description of the architecture, if it is none of those that are known.
        settings (`Mapping[str, Any]`, *optional*):
            How the routes were chosen: criterion, budget, scope and what else is to stand in the record. JSON values.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar over bytes.
        target (`numpy.ndarray` of shape `(num_routes,)`, *optional*):
            Position in `before` of the checkpoint that each route goes back to, see [`joint_report`].

    Returns:
        `dict`: The record of the rollback, as it stands in `rollback.json`.

    Raises:
        `ValueError`: If a checkpoint is not whole or not of unquantised safetensors, both do not fit each other, a
            kind of adapter cannot be rolled back exactly, the output folder is not empty, or the result overflows.
    """
    source = local_folder(after)
    several = not (before is None or isinstance(before, (str, Path)))
    befores = list(before) if several else [before]
    with _new_folder(output_dir) as folder:
        history = _carry_over(source, folder)
        is_adapter = (source / ADAPTER_CONFIG_NAME).is_file()
        if None in befores and not is_adapter:
            raise ValueError(f"before: expected a checkpoint, since {after} is no adapter")
        if several and is_adapter:
            raise ValueError(f"{after}: expected whole weights to roll back to several checkpoints, found an adapter")
        places = [None if entry is None else local_folder(entry) for entry in befores]
        for entry, place in zip(befores, places, strict=True):
            if place is not None and (place / ADAPTER_CONFIG_NAME).is_file() and not is_adapter:
                raise ValueError(f"{entry}: expected whole weights as in {after}, found an adapter: merge it first")
        first = places[0]
        record = {
            "kind": "adapter" if is_adapter else "weights",
            "before": [published_name(entry) for entry in befores] if several else published_name(str(before)),
            "after": published_name(after),
            "file": f"{history.next_name()}.safetensors",
        }
        if is_adapter:
            adapter = check_adapter(source)
            model = Checkpoint(source, base=base)
            own = str(adapter.config.base_model_name_or_path)
            record["base"] = published_name(own)
            record["before"] = record["base"] if before is None else record["before"]
        else:
            model = Checkpoint(source)
        route_map = RouteMap(model.config, description)
        steps = route_steps(route_map, routes, step)
        if not steps.any():
            raise ValueError("routes: expected at least one with a step other than 0, found none")
        if several:
            target = np.zeros(route_map.num_routes, dtype=int) if target is None and len(befores) == 1 else target
            if (
                target is None
                or np.shape(target) != (route_map.num_routes,)
                or not set(np.unique(target)) <= set(range(len(befores)))
            ):
                raise ValueError(
                    f"target: expected for each of {route_map.num_routes} routes a position in `before`, from 0 to "
                    f"{len(befores) - 1}, found {'none' if target is None else f'shape {np.shape(target)}'}"
                )
            record["targets"] = np.asarray(target)[np.asarray(routes)].astype(int).tolist()
        record |= {
            "model_type": model.config.model_type,
            **{name: value for name, value in (settings or {}).items() if name not in record},
            "step": np.asarray(step, dtype=float).tolist(),
            "routes": np.asarray(routes).astype(int).tolist(),
            "routes_by_layer": _by_layer(route_map, steps),
            "versions": {
                "trl_interfere": __version__,
                "torch": version("torch"),
                "safetensors": version("safetensors"),
            },
        }
        if is_adapter and first is not None and (first / ADAPTER_CONFIG_NAME).is_file():
            record["file"] = history.next_name()
            record |= concatenate(check_adapter(first), adapter, route_map, steps, folder, folder / record["file"])
            record["kind"] = CONCATENATION
        else:
            if is_adapter:
                if before is not None and not same_model(before, own) and not same_model(before, base):
                    raise ValueError(
                        f"{before}: expected the model {own} of the adapter {after}, or another adapter of "
                        "it: no other weights can be reached inside an adapter, merge it first"
                    )
                earlier = []
                touched = touched_factors(adapter, route_map, steps)
                tensors = stored_tensors(source / SAFETENSORS_WEIGHTS_NAME)
            else:
                earlier = [Checkpoint(place) for place in places]
                for checkpoint in earlier:
                    check_comparable(checkpoint, model)
                touched = _touched(model, route_map, steps)
                tensors = {name: model[name] for name in touched}
            with DeltaWriter(folder / record["file"]) as delta:
                roll_back = _Rollback(earlier, touched, delta, after, route_map, target if several else None)
                chosen = [tensors[name] for name in touched]
                _rewrite(source, folder, chosen, roll_back, progress, "roll back")
                record = delta.close(record)
        history.records.append(record)
        history.save()
    return record


def undo_rollback(folder: str | Path, output_dir: str | Path | None = None, progress: bool = False) -> dict[str, Any]:
    """
    Undo the last rollback of a folder: every tensor is as before, to the bit.

    Args:
        folder (`str` or `pathlib.Path`):
            Folder with `rollback.json`.
        output_dir (`str` or `pathlib.Path`, *optional*):
            A new folder for the result. Defaults to changing the folder itself, one file after the other; if this is
            interrupted, it is to be repeated.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar over bytes.

    Returns:
        `dict`: The record of the rollback that was undone.

    Raises:
        `ValueError`: If there is no rollback to undo, or the weights have changed since.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected the folder of a rollback, found none")
    history = RollbackHistory.read(folder)
    if not history.records:
        raise ValueError(
            f"{folder}: expected {HISTORY_NAME}, found none: there is no rollback, or it is undone already"
        )
    record = history.records[-1]
    if record["kind"] == CONCATENATION:
        with _target(folder, output_dir) as target:
            restore_adapter(folder, record, target)
            _forget(target)
        return record
    _change_folder(RollbackDelta(folder / record["file"]), folder, "old", output_dir, progress)
    return record


def apply_delta(
    delta: str | Path, model: str | Path, output_dir: str | Path | None = None, progress: bool = False
) -> dict[str, Any]:
    """
    Apply a delta file to the checkpoint that it was made for.

    Args:
        delta (`str` or `pathlib.Path`):
            The delta file.
        model (`str` or `pathlib.Path`):
            Folder of the checkpoint; a Hub id with `output_dir`.
        output_dir (`str` or `pathlib.Path`, *optional*):
            A new folder for the result. Defaults to changing the folder itself, one file after the other; if this is
            interrupted, it is to be repeated.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar over bytes.

    Returns:
        `dict`: The record of the rollback.

    Raises:
        `ValueError`: If a touched slice is not as it was before the rollback, or all of them are as after it.
    """
    return _change_folder(RollbackDelta(delta), model, "new", output_dir, progress)


def revert_delta(
    delta: str | Path, model: str | Path, output_dir: str | Path | None = None, progress: bool = False
) -> dict[str, Any]:
    """
    Undo, by a delta file, the rollback of a checkpoint that may hold no `rollback.json`.

    Args:
        delta (`str` or `pathlib.Path`):
            The delta file.
        model (`str` or `pathlib.Path`):
            Folder of the checkpoint; a Hub id with `output_dir`.
        output_dir (`str` or `pathlib.Path`, *optional*):
            A new folder for the result. Defaults to changing the folder itself, one file after the other; if this is
            interrupted, it is to be repeated.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar over bytes.

    Returns:
        `dict`: The record of the rollback.

    Raises:
        `ValueError`: If a touched slice is not as it was after the rollback, or all of them are as before it.
    """
    return _change_folder(RollbackDelta(delta), model, "old", output_dir, progress)


class _Rollback:
    """Changes one stored tensor after the other, and keeps what it changes in a delta file."""

    def __init__(
        self,
        befores: list[Checkpoint],
        touched: dict[str, tuple[Blocks, np.ndarray]],
        delta: DeltaWriter,
        after: str | Path,
        route_map: RouteMap,
        target: np.ndarray | None,
    ):
        self.befores, self.touched, self.delta, self.after = befores, touched, delta, after
        self.route_map, self.target = route_map, target

    def __call__(self, stored: StoredTensor, bits: torch.Tensor) -> None:
        blocks, steps = self.touched[stored.name]
        old = blocks.take(bits)
        values = old.view(getattr(torch, stored.dtype))
        # The model of an adapter has no update.
        start = self._start(stored, blocks) if self.befores else torch.zeros_like(values)
        moved = move_back(values, start, steps)
        if not torch.isfinite(moved).all():
            raise ValueError(
                f"{self.after}: tensor {stored.name}: expected finite values after the rollback, found NaN or "
                f"infinity: is the step too large for {stored.dtype}?"
            )
        new = to_bits(moved)
        blocks.put(bits, new)
        self.delta.add(stored, blocks, old, new)

    def _start(self, stored: StoredTensor, blocks: Blocks) -> torch.Tensor:
        start = None
        for position, checkpoint in enumerate(self.befores):
            first = checkpoint[stored.name]
            values = blocks.take(read_bits(first)).view(getattr(torch, first.dtype))
            if start is None:
                start = values
                continue
            shape = torch.empty(1, dtype=torch.bool).expand(stored.shape)
            mine = self.route_map.spread(stored.name, self.target == position, shape)
            start = torch.where(blocks.take(mine.expand(stored.shape)), values, start)
        return start


def _touched(model: Checkpoint, route_map: RouteMap, steps: np.ndarray) -> dict[str, tuple[Blocks, np.ndarray]]:
    found = {
        name: touched_blocks(route_map, name, steps, torch.empty(stored.shape, device="meta"))
        for name, stored in model.tensors.items()
    }
    return {name: blocks for name, blocks in found.items() if blocks is not None}


def _by_layer(route_map: RouteMap, steps: np.ndarray) -> dict[str, dict[str, int]]:
    # Number of rolled-back routes by kind and layer.
    counts: dict[str, dict[str, int]] = {}
    for kind in KINDS:
        for layer in range(route_map.num_layers):
            count = int(np.count_nonzero(steps[route_map.of_layer(kind, layer)]))
            if count:
                counts.setdefault(kind, {})[str(layer)] = count
    return counts


def _change_folder(
    delta: RollbackDelta, model: str | Path, wanted: str, output_dir: str | Path | None, progress: bool
) -> dict[str, Any]:
    if output_dir is None and not Path(model).is_dir():
        raise ValueError(f"{model}: expected a folder to change in place, or else an output folder for the result")
    source = local_folder(model)
    history = RollbackHistory.read(source)
    known = [record["id"] for record in history.records]
    if wanted == "old" and delta.record["id"] in known[:-1]:
        raise ValueError(
            f"{model}: {delta.path} is not the last rollback in {HISTORY_NAME}: undo the later ones first"
        )
    if delta.record["kind"] == "adapter":
        if not (source / ADAPTER_CONFIG_NAME).is_file():
            raise ValueError(f"{model}: expected an adapter, for which {delta.path} was made, found none")
        tensors = stored_tensors(source / SAFETENSORS_WEIGHTS_NAME)
    elif (source / ADAPTER_CONFIG_NAME).is_file():
        raise ValueError(f"{model}: expected whole weights, for which {delta.path} was made, found an adapter")
    else:
        tensors = Checkpoint(source).tensors
    states = {}
    for name, entry in delta.tensors.items():
        stored = tensors.get(name)
        if stored is None:
            raise ValueError(f"{model}: tensor {name}: expected as in {delta.path}, found none: is it another model?")
        for part, found in (("shape", list(stored.shape)), ("dtype", stored.dtype)):
            if found != entry[part]:
                raise ValueError(
                    f"{stored.file}: tensor {name}: expected {part} {entry[part]} as in {delta.path}, found {found}"
                )
        current = delta.blocks(name).take(read_bits(stored))
        states[name] = delta.state(name, current)
        if states[name] not in (None, wanted):
            delta.changed_slices(name, current, wanted)  # a damaged file is found before anything is written
    listed = bool(known) and known[-1] == delta.record["id"]
    interrupted = listed and wanted == "old"  # the weights are reverted, the record is not yet removed
    if not (interrupted and set(states.values()) == {"old"}):
        delta.check_state(states, wanted, str(model))

    def change(stored: StoredTensor, bits: torch.Tensor) -> None:
        blocks = delta.blocks(stored.name)
        blocks.put(bits, delta.changed_slices(stored.name, blocks.take(bits), wanted))

    pending = [tensors[name] for name, state in states.items() if state != wanted]
    with _target(source, output_dir) as target:
        if wanted == "new" and not listed:
            # Listed before the first tensor is written, so that what an interruption leaves can be undone.
            _remember(delta, target)
        _rewrite(source, target, pending, change, progress, "apply" if wanted == "new" else "revert")
        if wanted == "old" and listed:
            _forget(target)
    return delta.record


def _remember(delta: RollbackDelta, folder: Path) -> None:
    history = RollbackHistory.read(folder)
    record = {**delta.record, "file": f"{history.next_name()}.safetensors"}
    path = folder / record["file"]
    path.parent.mkdir(exist_ok=True)
    shutil.copyfile(delta.path, path)
    history.records.append(record)
    history.save()


def _forget(folder: Path) -> None:
    history = RollbackHistory.read(folder)
    path = folder / history.records.pop()["file"]
    history.save()
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    if not history.records:
        path.parent.rmdir()


def _rewrite(source: Path, target: Path, tensors: list[StoredTensor], change, progress: bool, label: str) -> None:
    # In place only files with a changed tensor are written; what is unchanged in a new folder is copied.
    by_file: dict[Path, list[StoredTensor]] = {}
    for stored in tensors:
        by_file.setdefault(stored.file, []).append(stored)
    files = [source / name for name in weight_files(source)]
    if source == target:
        files = [file for file in files if file in by_file]
        for file in files:
            if file.is_symlink():
                raise ValueError(f"{file}: expected a file, found a link, as in a cache: choose an output folder")
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, leave=False, disable=not progress) as bar:
        for file in files:
            rewrite_file(file, target / file.name, by_file.get(file, []), change, bar.update)


def weight_files(folder: Path) -> list[str]:
    """
    Files that hold the weights of a checkpoint.

    Args:
        folder (`pathlib.Path`):
            Folder of a model or an adapter.

    Returns:
        `list[str]`: Names of its safetensors files.
    """
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return [SAFETENSORS_WEIGHTS_NAME]
    if (folder / SAFE_WEIGHTS_NAME).is_file() or not (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return [SAFE_WEIGHTS_NAME]
    files = sorted(set(json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())["weight_map"].values()))
    for file in files:
        if Path(file).name != file:
            raise ValueError(f"{folder / SAFE_WEIGHTS_INDEX_NAME}: expected files of the same folder, found {file!r}")
    return files


def _carry_over(source: Path, target: Path) -> RollbackHistory:
    # Everything but weights, which are written, weights in other formats, checkpoints of a training and hidden files.
    history = RollbackHistory.read(source)
    for path in sorted(source.iterdir()):
        if path.name.startswith((".", "checkpoint-")) or path.name in (HISTORY_NAME, DELTA_FOLDER):
            continue
        if path.is_dir():
            if not any(_is_weights(inner.name) for inner in path.rglob("*")):
                shutil.copytree(path, target / path.name)
        elif not _is_weights(path.name) or _is_index(source, path):
            shutil.copyfile(path, target / path.name)
    if history.records:
        shutil.copytree(source / DELTA_FOLDER, target / DELTA_FOLDER)
        shutil.copyfile(source / HISTORY_NAME, target / HISTORY_NAME)
    return RollbackHistory(target, history.records)


def _is_weights(name: str) -> bool:
    return name.endswith(_WEIGHTS)


def _is_index(source: Path, path: Path) -> bool:
    return path.name == SAFE_WEIGHTS_INDEX_NAME and not (source / SAFE_WEIGHTS_NAME).is_file()


@contextmanager
def _target(source: Path, output_dir: str | Path | None) -> Iterator[Path]:
    # The folder to write to: the source, or a new one with everything but the weights.
    if output_dir is None:
        yield source
        return
    with _new_folder(output_dir) as folder:
        _carry_over(source, folder)
        yield folder


@contextmanager
def _new_folder(path: str | Path) -> Iterator[Path]:
    # A folder under another name until it is whole.
    path = Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: expected an empty or a new folder")
    parent = path.parent
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(f".{glob.escape(path.name)}.*.rollback"):
        shutil.rmtree(leftover)  # of a process that was killed
    temporary = parent / f".{path.name}.{os.getpid()}.rollback"
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
