"""The update of a LoRA adapter, from its own tensors."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open


class AdapterFactors:
    r"""
    The two thin matrices of each update of an adapter, read when they are asked for.

    ``δ = s B A`` with ``s = lora_alpha / r`` (``lora_alpha / sqrt(r)`` for rank-stabilised LoRA), as in
    [LoRA](https://huggingface.co/papers/2106.09685).

    Args:
        folder (`str` or `pathlib.Path`):
            Folder of the adapter, such as a stage of a run.

    Attributes:
        names (`list[str]`): Names of the weights in the base model that the adapter updates.

    Raises:
        `ValueError`: If the folder holds no LoRA adapter, or one whose update is not a product of two matrices.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
        if not self.path.is_file():
            raise ValueError(f"{folder}: expected an adapter ({SAFETENSORS_WEIGHTS_NAME}), found none")
        self.config = LoraConfig.from_pretrained(str(folder))
        if not isinstance(self.config, LoraConfig) or self.config.use_dora:
            raise ValueError(f"{folder}: expected a LoRA adapter without DoRA, found {self.config.peft_type}")
        try:
            with safe_open(self.path, framework="pt") as tensors:
                keys = sorted(tensors.keys())
        except SafetensorError as error:
            raise ValueError(f"{self.path}: expected a whole safetensors file ({error})") from error
        for key in keys:
            if not key.endswith((".lora_A.weight", ".lora_B.weight")):
                raise ValueError(f"{self.path}: expected matrices lora_A and lora_B of linear layers, found {key!r}")
        self._keys = {
            f"{key.removesuffix('.lora_A.weight').removeprefix('base_model.model.')}.weight": key
            for key in keys
            if key.endswith(".lora_A.weight")
        }
        self.names = list(self._keys)

    def keys(self, name: str) -> tuple[str, str]:
        """
        Names of the two matrices of a weight in the file of the adapter.

        Args:
            name (`str`):
                Name of the weight in the base model.

        Returns:
            `tuple[str, str]`: Those of `lora_A` and of `lora_B`.
        """
        key = self._keys[name]
        return key, key.replace(".lora_A.", ".lora_B.")

    def scale(self, name: str, rank: int) -> float:
        """
        Scale s of the update of a weight.

        Args:
            name (`str`):
                Name of the weight in the base model.
            rank (`int`):
                Number of rows of its `lora_A`.

        Returns:
            `float`: The scale.
        """
        patterns = self.config.alpha_pattern
        alpha = patterns.get(get_pattern_key(patterns, name.removesuffix(".weight")), self.config.lora_alpha)
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)

    def factors(self, name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Two matrices whose product is the update of a weight.

        Args:
            name (`str`):
                Name of the weight in the base model.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
                Data type to compute in.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Of shapes `(rows, r)` and `(r, columns)` for a weight of shape
            `(rows, columns)`; the scale is in the second.

        Raises:
            `ValueError`: If they hold NaN or infinity.
        """
        key, other = self.keys(name)
        with safe_open(self.path, framework="pt") as tensors:
            a = tensors.get_tensor(key).to(dtype)
            b = tensors.get_tensor(other).to(dtype)
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ValueError(f"{self.path}: tensor {key} or its lora_B: expected finite values, found NaN or infinity")
        a *= self.scale(name, a.shape[0])
        return (a.T, b.T) if self.config.fan_in_fan_out else (b, a)


def adapter_updates(folder: str | Path, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Updates of the weight matrices that an adapter stands for, one matrix at a time.

    Merging the adapter into weights of low precision and subtracting would round away most of an update of RL.

    Args:
        folder (`str` or `pathlib.Path`):
            Folder of the adapter, such as a stage of a run.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Data type to compute in.

    Yields:
        `tuple[str, torch.Tensor]`: Name of the weight in the base model and its update, of the shape of the weight.

    Raises:
        `ValueError`: If the folder holds no LoRA adapter, or one whose update is not a product of two matrices.
    """
    adapter = AdapterFactors(folder)
    for name in adapter.names:
        left, right = adapter.factors(name, dtype)
        yield name, left @ right
