"""Checks that models can be compared, and that references fit them."""

import torch
from torch import nn
from transformers import PreTrainedModel

from .references import References


_STRUCTURE = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


def model_name(model: PreTrainedModel) -> str:
    """Folder or Hub id that a model was loaded from, else its class."""
    return model.config._name_or_path or type(model).__name__


def check_same_shape(before: PreTrainedModel, other: PreTrainedModel, label: str) -> None:
    """Check that two models have the same structure and finite weights of the same shapes."""
    for setting in _STRUCTURE:
        expected, found = (getattr(model.config.get_text_config(), setting, None) for model in (before, other))
        if found != expected:
            raise ValueError(
                f"{label} checkpoint {model_name(other)}: expected {setting} {expected!r} as in {model_name(before)}, "
                f"found {found!r}"
            )
    shapes = {name: tuple(parameter.shape) for name, parameter in before.named_parameters()}
    found = {name: tuple(parameter.shape) for name, parameter in other.named_parameters()}
    for name in sorted(shapes.keys() | found.keys()):
        if shapes.get(name) != found.get(name):
            raise ValueError(
                f"{label} checkpoint {model_name(other)}: tensor {name}: expected shape {shapes.get(name)} as in "
                f"{model_name(before)}, found {found.get(name)}"
            )
    check_finite(other, label)


def check_finite(model: PreTrainedModel, label: str) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{label} checkpoint: tensor {name}: expected finite values, found NaN or infinity")


def identical(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    """Whether all weights of two models are the same."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b.to(a.device)) for a, b in pairs)


def count_buffers_that_differ(models: list[PreTrainedModel]) -> None:
    """
    Turn the buffers in which models differ into parameters.

    Some weights of some models are stored as buffers (the bias of a router's scores, the scalar of a layer): an update
    of them is part of the damage, outside routes.
    """
    buffers = [dict(model.named_buffers()) for model in models]
    stored = models[0].state_dict().keys()
    for name, first in buffers[0].items():
        others = [entry[name].to(first.device) for entry in buffers[1:]]
        if name not in stored or not first.is_floating_point() or all(torch.equal(first, part) for part in others):
            continue
        parent, _, leaf = name.rpartition(".")
        for model, entry in zip(models, buffers, strict=True):
            module = model.get_submodule(parent)
            delattr(module, leaf)
            module.register_parameter(leaf, nn.Parameter(entry[name].clone()))


def check_fits(model: PreTrainedModel, references: References) -> None:
    """Check that the token ids and the lengths of references lie within what a model has embeddings for."""
    tokens = model.get_input_embeddings()
    longest, highest = 0, -1
    for prompt, completion in zip(references.prompts, references.completions, strict=True):
        longest = max(longest, len(prompt) + len(completion))
        highest = max([highest, *prompt, *completion])
    if highest >= tokens.num_embeddings:
        raise ValueError(
            f"domain {references.domain!r}: expected token ids below {tokens.num_embeddings}, the vocabulary of "
            f"{model_name(model)}, found {highest}: is it another model's tokenizer?"
        )
    positions = model.config.get_text_config().max_position_embeddings if _has_positions(model) else longest
    if longest > positions:
        raise ValueError(
            f"domain {references.domain!r}: expected at most {positions} tokens of prompt and completion, the "
            f"positions of {model_name(model)}, found {longest}"
        )


def _has_positions(model: PreTrainedModel) -> bool:
    """Whether positions are embedded, and not only rotated, so that there is a last one."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding))
    inputs = model.get_input_embeddings()
    return limit is not None and any(
        limit <= module.num_embeddings <= limit + 2 for module in embeddings if module is not inputs
    )
