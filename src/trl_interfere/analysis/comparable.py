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
    for label, model in {"before": before, **others}.items():
        where, there = f"{label} checkpoint {model_name(model)}", f"as in {model_name(before)}"
        for setting in _STRUCTURE:
            expected, found = (getattr(one.config.get_text_config(), setting, None) for one in (before, model))
            if found != expected:
                raise ValueError(f"{where}: expected {setting} {expected!r} {there}, found {found!r}")
        shapes, found = ({name: tuple(part.shape) for name, part in one.named_parameters()} for one in (before, model))
        for name in sorted(shapes.keys() | found.keys()):
            if shapes.get(name) != found.get(name):
                raise ValueError(
                    f"{where}: tensor {name}: expected shape {shapes.get(name)} {there}, found {found.get(name)}"
                )
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise ValueError(f"{label} checkpoint: tensor {name}: expected finite values, found NaN or infinity")
    count_buffers_that_differ([before, *others.values()])
    for label, model in others.items():
        pairs = zip(before.parameters(), model.parameters(), strict=True)
        if all(torch.equal(a, b.to(a.device)) for a, b in pairs):
            raise ValueError(
                f"{label}: expected another checkpoint than before, {model_name(before)}; {model_name(model)} is "
                "identical to it"
            )


def count_buffers_that_differ(models: list[PreTrainedModel]) -> None:
    """
    Turn the buffers in which models differ into parameters: weights that are stored as buffers (the bias of a router's
    scores, the scalar of a layer) are part of the damage, outside routes.
    """
    stored = models[0].state_dict().keys()
    for name, first in list(models[0].named_buffers()):
        found = [model.get_buffer(name) for model in models]
        same = all(torch.equal(first, entry.to(first.device)) for entry in found)
        if name not in stored or not first.is_floating_point() or same:
            continue
        parent, _, leaf = name.rpartition(".")
        for model, entry in zip(models, found, strict=True):
            module = model.get_submodule(parent)
            delattr(module, leaf)
            module.register_parameter(leaf, nn.Parameter(entry.clone()))


def check_fits(model: PreTrainedModel, references: References) -> None:
    """Check that the token ids and the lengths of references lie within what a model has embeddings for."""
    tokens, name = model.get_input_embeddings(), model_name(model)
    sequences = [[*prompt, *rest] for prompt, rest in zip(references.prompts, references.completions, strict=True)]
    highest, longest = max(map(max, filter(None, sequences))), max(map(len, sequences))
    if highest >= tokens.num_embeddings:
        raise ValueError(
            f"domain {references.domain!r}: expected token ids below {tokens.num_embeddings}, the vocabulary of "
            f"{name}, found {highest}: is it another model's tokenizer?"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    embeddings = {module for module in model.modules() if isinstance(module, nn.Embedding)} - {tokens}
    # Positions that are rotated have no embeddings, and no limit.
    embedded = limit is not None and any(limit <= module.num_embeddings <= limit + 2 for module in embeddings)
    if embedded and longest > limit:
        raise ValueError(
            f"domain {references.domain!r}: expected at most {limit} tokens of prompt and completion, the positions "
            f"of {name}, found {longest}"
        )
