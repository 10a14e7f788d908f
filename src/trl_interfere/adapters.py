"""The update of a LoRA adapter, from its own tensors."""

import math
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open


class ExpertAdapterError(ValueError):
    """An adapter of parameters that hold all experts, which the files of its model hold one by one."""


class AdapterFactors:
    """
    The two thin matrices of each update of a LoRA adapter, by `names` of weights of the base model: ``δ = s B A`` with
    ``s = lora_alpha / r`` (``lora_alpha / sqrt(r)`` for rank-stabilised LoRA), https://huggingface.co/papers/2106.09685.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
        if not self.path.is_file():
            raise ValueError(f"{folder}: expected an adapter ({SAFETENSORS_WEIGHTS_NAME}), found none")
        self.config = LoraConfig.from_pretrained(str(folder))
        if not isinstance(self.config, LoraConfig) or self.config.use_dora:
            raise ValueError(f"{folder}: expected a LoRA adapter without DoRA, found {self.config.peft_type}")
        if self.config.target_parameters:
            found = self.config.target_parameters
            raise ExpertAdapterError(f"{folder}: expected an adapter of linear layers, found {found}: merge it first")
        try:
            with safe_open(self.path, framework="pt") as tensors:
                keys = sorted(tensors.keys())
        except SafetensorError as error:
            raise ValueError(f"{self.path}: expected a whole safetensors file ({error})") from error
        self._keys = {}
        for key in keys:
            if not key.endswith((".lora_A.weight", ".lora_B.weight")):
                raise ValueError(f"{self.path}: expected matrices lora_A and lora_B of linear layers, found {key!r}")
            if key.endswith(".lora_A.weight"):
                self._keys[key.replace(".lora_A.", ".").removeprefix("base_model.model.")] = key
        self.names = list(self._keys)

    def factors(self, name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """Two matrices whose product is the update of a weight."""
        key = self._keys[name]
        with safe_open(self.path, framework="pt") as tensors:
            a = tensors.get_tensor(key).to(dtype)
            b = tensors.get_tensor(key.replace(".lora_A.", ".lora_B.")).to(dtype)
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ValueError(f"{self.path}: tensor {key} or its lora_B: expected finite values, found NaN or infinity")
        patterns, rank = self.config.alpha_pattern, a.shape[0]
        alpha = patterns.get(get_pattern_key(patterns, name.removesuffix(".weight")), self.config.lora_alpha)
        a *= alpha / (math.sqrt(rank) if self.config.use_rslora else rank)
        return (a.T, b.T) if self.config.fan_in_fan_out else (b, a)
