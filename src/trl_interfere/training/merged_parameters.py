"""Weights of a model with adapters as one set of plain weights, for an engine that knows no adapters."""

from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer


def merged_parameters(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Parameters of a model with its active adapters merged in, one layer at a time. Each layer then gets back a copy of
    what it was: adding an adapter and subtracting it again would round the weights.
    """
    prefix = "base_model.model."
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            parameters = dict(module.get_base_layer().named_parameters())
            kept = {part: parameter.data.clone() for part, parameter in parameters.items()}
            module.merge()
            try:
                for part, parameter in parameters.items():
                    yield f"{name.removeprefix(prefix)}.{part}", parameter.data
            finally:
                module.unmerge()
                for part, parameter in parameters.items():
                    parameter.data.copy_(kept[part])
    for name, parameter in model.named_parameters():
        if ".base_layer." in name or model.prefix in name or "original_module" in name:
            continue
        yield name.removeprefix(prefix).replace("modules_to_save.default.", ""), parameter.data
