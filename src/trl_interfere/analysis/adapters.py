"""The update of a LoRA adapter, from its own tensors."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import safe_open


def adapter_updates(folder: str | Path, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, torch.Tensor]]:
    r"""
    Updates of the weight matrices that an adapter stands for, one matrix at a time.

    ``δ = s B A`` with ``s = lora_alpha / r`` (``lora_alpha / sqrt(r)`` for rank-stabilised LoRA), as in
    [LoRA](https://huggingface.co/papers/2106.09685). Merging the adapter into weights of low precision and subtracting
    would round away most of an update of RL.

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
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{folder}: expected an adapter ({SAFETENSORS_WEIGHTS_NAME}), found none")
    config = LoraConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig) or config.use_dora:
        raise ValueError(f"{folder}: expected a LoRA adapter without DoRA, found {config.peft_type}")
    with safe_open(path, framework="pt") as tensors:
        names = sorted(tensors.keys())
        for name in names:
            if not name.endswith((".lora_A.weight", ".lora_B.weight")):
                raise ValueError(f"{path}: expected matrices lora_A and lora_B of linear layers, found {name!r}")
        for name in names:
            if name.endswith(".lora_B.weight"):
                continue
            module = name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
            a = tensors.get_tensor(name).to(dtype)
            b = tensors.get_tensor(name.replace(".lora_A.", ".lora_B.")).to(dtype)
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
            rank = a.shape[0]
            delta = (alpha / (math.sqrt(rank) if config.use_rslora else rank)) * (b @ a)
            yield f"{module}.weight", delta.T if config.fan_in_fan_out else delta
