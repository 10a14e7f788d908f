"""Checks that models can be compared, and that references fit them."""

import torch
from torch import nn
from transformers import PreTrainedModel

from .references import References


_STRUCTURE = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


def model_name(model: PreTrainedModel) -> str:
    """Folder or Hub id that a model was loaded from, else its class."""
    return model.config._name_or_path or type(model).__name__


def check_models(before: PreTrainedModel, others: dict[str, PreTrainedModel]) -> None:
    """Check that models have one structure, finite weights of the same shapes, and not all the same ones."""
    check_finite(before, "before")
    for label, model in others.items():
        _check_same_shape(before, model, label)
        check_finite(model, label)
    count_buffers_that_differ([before, *others.values()])
    for label, model in others.items():
        pairs = zip(before.parameters(), model.parameters(), strict=True)
        if all(torch.equal(a, b.to(a.device)) for a, b in pairs):
            raise ValueError(
                f"{label}: expected another checkpoint than before, {model_name(before)}; {model_name(model)} is "
                "identical to it"
            )


def _check_same_shape(before: PreTrainedModel, other: PreTrainedModel, label: str) -> None:
    where, there = f"{label} checkpoint {model_name(other)}", f"as in {model_name(before)}"
    for setting in _STRUCTURE:
        expected, found = (getattr(model.config.get_text_config(), setting, None) for model in (before, other))
        if found != expected:
            raise ValueError(f"{where}: expected {setting} {expected!r} {there}, found {found!r}")
    shapes, found = ({name: tuple(part.shape) for name, part in model.named_parameters()} for model in (before, other))
    for name in sorted(shapes.keys() | found.keys()):
        if shapes.get(name) != found.get(name):
            raise ValueError(
                f"{where}: tensor {name}: expected shape {shapes.get(name)} {there}, found {found.get(name)}"
            )


def check_finite(model: PreTrainedModel, label: str) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{label} checkpoint: tensor {name}: expected finite values, found NaN or infinity")


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
    sequences = [[*prompt, *rest] for prompt, rest in zip(references.prompts, references.completions, strict=True)]
    longest, highest = (
        max(map(len, sequences), default=0),
        max((max(ids, default=-1) for ids in sequences), default=-1),
    )
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
