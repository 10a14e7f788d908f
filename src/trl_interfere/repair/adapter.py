"""Rollback inside a LoRA adapter, without merging it."""

import hashlib
import math
import os
import shutil
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers.utils import ADAPTER_CONFIG_NAME

from ..adapters import AdapterFactors
from ..analysis.routes import RouteMap
from .blocks import Blocks, touched_blocks
from .streaming import SafetensorsWriter


CONCATENATION = "adapter-concatenation"
_FILES = (SAFETENSORS_WEIGHTS_NAME, ADAPTER_CONFIG_NAME)
# Settings under which the update of a weight is more, or something else, than s B A.
_REFUSED = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
# Initialisations that leave the model under the adapter as it is.
_KEEPS_MODEL = (True, False, "gaussian", "eva", "orthogonal")


def check_adapter(folder: str | Path) -> AdapterFactors:
    """
    Open an adapter that can be rolled back exactly: a LoRA, rank-stabilised or not, of linear layers.

    Args:
        folder (`str` or `pathlib.Path`):
            Folder of the adapter.

    Returns:
        [`~trl_interfere.adapters.AdapterFactors`]: The adapter.

    Raises:
        `ValueError`: If the update of a weight is not the product of two matrices times a scale (DoRA, saved modules,
            biases, parameters such as fused experts, initialisations that change the model), or the folder holds none.
    """
    path = Path(folder) / ADAPTER_CONFIG_NAME
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected the configuration of an adapter ({error})") from error
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{path}: expected a LoRA adapter, found {config.peft_type}")
    found = {name: getattr(config, name, None) for name in _REFUSED}
    found = {name: value for name, value in found.items() if value}
    if config.bias != "none":
        found["bias"] = config.bias
    if config.init_lora_weights not in _KEEPS_MODEL:
        found["init_lora_weights"] = config.init_lora_weights
    if found:
        name, value = next(iter(found.items()))
        raise ValueError(
            f"{path}: expected a LoRA whose update of each weight is B A times a scale, found {name}={value!r}: it "
            "cannot be rolled back exactly; merge it into its model and roll the whole weights back"
        )
    return AdapterFactors(folder)


def same_model(first: str | Path | None, second: str | Path | None) -> bool:
    """
    Whether two names mean the same model.

    Args:
        first (`str` or `pathlib.Path`, *optional*):
            Folder or Hub id.
        second (`str` or `pathlib.Path`, *optional*):
            Folder or Hub id.

    Returns:
        `bool`: `True` for the same id or the same folder.
    """
    if first is None or second is None:
        return False
    return str(first) == str(second) or Path(first).resolve() == Path(second).resolve()


def touched_factors(
    adapter: AdapterFactors, route_map: RouteMap, steps: np.ndarray
) -> dict[str, tuple[Blocks, np.ndarray]]:
    """
    Rows of `lora_B` and columns of `lora_A` that hold the updates of routes.

    A route owns rows or columns of a weight W of shape `(out, in)`. Its update ``δ = s B A`` in these is that of the
    same rows of B, or of the same columns of A, so that a step α multiplies them by 1 - α.

    Args:
        adapter ([`~trl_interfere.adapters.AdapterFactors`]):
            The adapter.
        route_map ([`RouteMap`]):
            The routes.
        steps (`numpy.ndarray` of shape `(num_routes,)`):
            Step of each route.

    Returns:
        `dict[str, tuple[Blocks, numpy.ndarray]]`: By the name of a matrix in the file of the adapter, its touched rows
        or columns and the step of each.

    Raises:
        `ValueError`: If routes share a weight in another way than by rows or columns.
    """
    touched = {}
    for name in adapter.names:
        found = _touched(adapter, name, route_map, steps)
        if found is not None:
            of_b, blocks, owned = found
            touched[adapter.keys(name)[of_b]] = blocks, owned
    return touched


def concatenate(
    before: AdapterFactors,
    after: AdapterFactors,
    route_map: RouteMap,
    steps: np.ndarray,
    folder: Path,
    kept: Path,
) -> dict[str, Any]:
    """
    Write an adapter in which routes have gone back to an earlier adapter.

    With ``δ_0 = s_0 B_0 A_0``, ``δ_1 = s_1 B_1 A_1`` and D the diagonal matrix of the steps of the rows,

    ```
    (1 - D) δ_1 + D δ_0 = s_1 [(1 - D) B_1, D s_0/s_1 B_0] [A_1; A_0]
    ```

    and likewise with the columns of A. The rank is the sum of both, or a little more, the same for all modules, which
    are filled with zeros; `lora_alpha` is set so that the scale stays s_1 to the bit.

    Args:
        before ([`~trl_interfere.adapters.AdapterFactors`]):
            The earlier adapter.
        after ([`~trl_interfere.adapters.AdapterFactors`]):
            The later one, of the same model.
        route_map ([`RouteMap`]):
            The routes.
        steps (`numpy.ndarray` of shape `(num_routes,)`):
            Step of each route.
        folder (`pathlib.Path`):
            Folder of the new adapter.
        kept (`pathlib.Path`):
            Folder for a copy of the later one's two files.

    Returns:
        `dict`: `id`, `rank` and `files` with the digests of both states, for the record.

    Raises:
        `ValueError`: If the adapters do not belong to the same model, or the result is not finite.
    """
    names = [str(adapter.config.base_model_name_or_path) for adapter in (before, after)]
    if not same_model(*names):
        raise ValueError(f"{before.path.parent}: expected an adapter of {names[1]}, found one of {names[0]}")
    if before.config.fan_in_fan_out != after.config.fan_in_fan_out:
        raise ValueError(
            f"{before.path.parent}: expected fan_in_fan_out={after.config.fan_in_fan_out}, found the opposite"
        )
    modules = {}
    for name in sorted({*before.names, *after.names}):
        found = _touched(after if name in after.names else before, name, route_map, steps)
        if name in after.names or found is not None:
            modules[name] = found
    owners = {name: after if name in after.names else before for name in modules}
    scales = {name: own.scale(name, _rank(own, name)) for name, own in owners.items()}
    for name, scale in scales.items():
        if not scale or not math.isfinite(scale):
            raise ValueError(f"{owners[name].path.parent}: {name}: expected a scale other than 0, found {scale}")
    rank = max(sum(_rank(adapter, name) for adapter in (before, after)) for name in modules)
    # A power of two, at the latest, gives every scale exactly.
    rank = next(size for size in count(rank) if all(_alpha(scale, size) is not None for scale in scales.values()))
    kept.mkdir(parents=True)
    for file in _FILES:
        shutil.copyfile(after.path.parent / file, kept / file)
    with SafetensorsWriter(folder / SAFETENSORS_WEIGHTS_NAME) as writer:
        for name, found in modules.items():
            first, last = (_matrices(adapter, name) for adapter in (before, after))
            parts = []  # (A, B) of the later adapter, then of the earlier one
            if last is not None:
                parts.append(_scaled(last, found, lambda step: 1 - step, keep=True))
            if first is not None and found is not None:
                ratio = before.scale(name, _rank(before, name)) / scales[name]
                parts.append(_scaled(first, found, lambda step, ratio=ratio: step * ratio, keep=False))
            a = _padded(torch.cat([part[0] for part in parts]), rank, axis=0)
            b = _padded(torch.cat([part[1] for part in parts], dim=1), rank, axis=1)
            for key, matrix in zip(owners[name].keys(name), (a, b), strict=True):
                if not torch.isfinite(matrix).all():
                    raise ValueError(
                        f"{after.path}: tensor {key}: expected finite values after the rollback, found others"
                    )
                bits = matrix.view(torch.int16) if matrix.dtype == torch.bfloat16 else matrix
                writer.add(key, str(matrix.dtype).removeprefix("torch."), bits.numpy())
        writer.close({"format": "pt"})
    _concatenated_config(after, scales, rank).save_pretrained(str(folder))
    files = {file: {"old": _file_digest(kept / file), "new": _file_digest(folder / file)} for file in _FILES}
    return {"id": files[SAFETENSORS_WEIGHTS_NAME]["new"], "rank": rank, "files": files}


def restore_adapter(folder: Path, record: dict[str, Any], target: Path) -> None:
    """
    Put back the two files of an adapter that [`concatenate`] kept.

    Args:
        folder (`pathlib.Path`):
            Folder of the new adapter.
        record (`dict`):
            Record of the rollback.
        target (`pathlib.Path`):
            Folder to write to.

    Raises:
        `ValueError`: If a file has changed since the rollback.
    """
    kept = folder / record["file"]
    for file in _FILES:
        digests = record["files"][file]
        if _file_digest(kept / file) != digests["old"]:
            raise ValueError(f"{kept / file}: expected the file as the rollback kept it, found another")
        if _file_digest(folder / file) not in digests.values():
            raise ValueError(f"{folder / file}: expected the file as the rollback wrote it, found another")
    for file in _FILES:
        temporary = target / f".{file}.tmp"
        shutil.copyfile(kept / file, temporary)
        os.replace(temporary, target / file)


def _touched(
    adapter: AdapterFactors, name: str, route_map: RouteMap, steps: np.ndarray
) -> tuple[bool, Blocks, np.ndarray] | None:
    # Whether the routes of a weight lie in B (or in A), where, and the step of each block.
    with safe_open(adapter.path, framework="pt") as tensors:
        rows, columns = (tensors.get_slice(key).get_shape() for key in reversed(adapter.keys(name)))
    shape = (rows[0], columns[1])  # output and input features
    transposed = adapter.config.fan_in_fan_out
    found = touched_blocks(route_map, name, steps, torch.empty(shape[::-1] if transposed else shape, device="meta"))
    if found is None:
        return None
    blocks, owned = found
    if len(blocks.axes) != 1:
        raise ValueError(
            f"{adapter.path}: tensor {name}: expected the weight of a linear layer, found that of experts"
        )
    of_b = (blocks.axes[0] == 0) != transposed
    return of_b, Blocks((0,) if of_b else (1,), blocks.counts, blocks.index), owned


def _rank(adapter: AdapterFactors, name: str) -> int:
    if name not in adapter.names:
        return 0
    with safe_open(adapter.path, framework="pt") as tensors:
        return tensors.get_slice(adapter.keys(name)[0]).get_shape()[0]


def _matrices(adapter: AdapterFactors, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    if name not in adapter.names:
        return None
    with safe_open(adapter.path, framework="pt") as tensors:
        return tuple(tensors.get_tensor(key) for key in adapter.keys(name))


def _scaled(pair, found, factor, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    # A and B with the touched rows or columns multiplied; the others are kept, or zero.
    if found is None:
        return pair
    of_b, blocks, owned = found
    matrices = list(pair)
    matrix = matrices[of_b]
    wide = torch.promote_types(matrix.dtype, torch.float32)
    values = blocks.take(matrix).to(wide) * torch.as_tensor(factor(owned), dtype=wide)[:, None]
    matrices[of_b] = matrix.clone() if keep else torch.zeros_like(matrix)
    blocks.put(matrices[of_b], values.to(matrix.dtype))
    return tuple(matrices)


def _padded(matrix: torch.Tensor, rank: int, axis: int) -> torch.Tensor:
    shape = list(matrix.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([matrix, matrix.new_zeros(shape)], dim=axis).contiguous()


def _concatenated_config(after: AdapterFactors, scales: dict[str, float], rank: int) -> LoraConfig:
    config = LoraConfig.from_pretrained(str(after.path.parent))
    alphas = {name: _alpha(scale, rank) for name, scale in scales.items()}
    config.r, config.use_rslora, config.rank_pattern = rank, False, {}
    config.lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    # peft matches a key with the ends of names: the caret keeps it from other modules.
    config.alpha_pattern = {
        f"^{name.removesuffix('.weight')}": alpha for name, alpha in alphas.items() if alpha != config.lora_alpha
    }
    if scales.keys() != set(after.names):
        config.target_modules = sorted(name.removesuffix(".weight") for name in scales)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config


def _alpha(scale: float, rank: int) -> float | int | None:
    # The number that gives the scale, to the bit, when it is divided by the rank; there need not be one.
    for alpha in (scale * rank, math.nextafter(scale * rank, math.inf), math.nextafter(scale * rank, -math.inf)):
        if alpha / rank == scale:
            return int(alpha) if alpha.is_integer() else alpha
    return None


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
