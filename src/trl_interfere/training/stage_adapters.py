"""One LoRA adapter for each stage: the earlier ones stay active and frozen, the newest is trained."""

import os
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict


FIRST_ADAPTER = "default"
_COMBINED = "combined"
_REFERENCE = "ref"  # the name under which TRL looks for the adapter of the KL reference


def check_stage_adapters(model: torch.nn.Module) -> None:
    """Refuse a model whose adapter cannot be stacked exactly."""
    adapters = dict(model.peft_config) if isinstance(model, PeftModel) else {}
    adapters.pop(_REFERENCE, None)
    if list(adapters) != [FIRST_ADAPTER] or not isinstance(adapters[FIRST_ADAPTER], LoraConfig):
        raise ValueError(f"adapter_per_stage: expected one LoRA, peft_config=LoraConfig(...), found {list(adapters)}")
    for option in ("use_dora", "use_rslora", "modules_to_save", "trainable_token_indices", "lora_bias", "bias"):
        value = getattr(adapters[FIRST_ADAPTER], option, None)
        if value and value != "none":
            raise ValueError(f"adapter_per_stage: expected a plain LoRA, to be added up, found {option}={value!r}")


def stage_adapters(model: PeftModel) -> list[str]:
    """Names of the adapters of all stages, the earliest first."""
    return sorted(
        (name for name in model.peft_config if name not in (_COMBINED, _REFERENCE)),
        key=lambda name: 0 if name == FIRST_ADAPTER else int(name.split("-", 1)[0]),
    )


def activate_stage_adapters(model: PeftModel) -> None:
    """Make all adapters take part in the forward pass, and the newest one trainable."""
    names = stage_adapters(model)
    model.set_adapter(names[-1])
    model.base_model.set_adapter(names)
    freeze_earlier_adapters(model)


def freeze_earlier_adapters(model: PeftModel) -> None:
    """Leave only the newest adapter trainable; PEFT makes every active one trainable when it enables adapters."""
    frozen = tuple(f".{name}." for name in stage_adapters(model)[:-1])
    for name, parameter in model.named_parameters():
        if any(part in f"{name}." for part in frozen):
            parameter.requires_grad_(False)


def add_stage_adapter(model: PeftModel, name: str) -> None:
    """Begin a stage with an adapter of its own, initialised from the current random state."""
    if name not in model.peft_config:
        model.add_adapter(name, model.peft_config[FIRST_ADAPTER])
    activate_stage_adapters(model)


def save_stage_adapters(model: PeftModel, folder: Path) -> None:
    """
    Write each adapter under `adapters/` and, as the adapter of the folder itself, their exact sum: one LoRA of the sum
    of their ranks, ``B = [B_1 ... B_k]``, ``A = [s_1 A_1; ...; s_k A_k]``.
    """
    names = stage_adapters(model)
    for name in names:
        target = folder / "adapters" / name
        model.save_pretrained(folder / "adapters" if name != FIRST_ADAPTER else target, selected_adapters=[name])
    (folder / "adapters" / "README.md").unlink(missing_ok=True)
    with torch.random.fork_rng():
        model.base_model.add_weighted_adapter(names, [1.0] * len(names), _COMBINED, combination_type="cat")
    try:
        model.save_pretrained(folder, selected_adapters=[_COMBINED])
    finally:
        model.delete_adapter(_COMBINED)
        activate_stage_adapters(model)
    for path in (folder / _COMBINED).iterdir():
        os.replace(path, folder / path.name)
    shutil.rmtree(folder / _COMBINED)


def load_stage_adapters(model: PeftModel, folder: Path) -> None:
    """Read what [`save_stage_adapters`] wrote."""
    for path in (folder / "adapters").iterdir():
        model.load_adapter(str(path), path.name, is_trainable=True)
    activate_stage_adapters(model)


def set_reference_adapter(model: PeftModel) -> None:
    """Make the adapter as it is now the KL reference of TRL."""
    if _REFERENCE not in model.peft_config:
        with torch.random.fork_rng():
            model.add_adapter(_REFERENCE, model.peft_config[FIRST_ADAPTER])
    present = get_peft_model_state_dict(model, adapter_name=FIRST_ADAPTER, save_embedding_layers=False)
    set_peft_model_state_dict(model, present, adapter_name=_REFERENCE)
    model.set_adapter(FIRST_ADAPTER)
