"""Models and tokenizers from a folder or the Hub: the one loader."""

import warnings
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RevisionNotFoundError
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ADAPTER_CONFIG_NAME

from .revision import split_revision


# Files of a checkpoint. No pickle is among them.
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "adapters/*")
_OTHER_FILES = ("interference/*", "onnx/*", "original/*", "stages/*", "consolidated*")


def local_folder(
    name: str | Path,
    revision: str | None = None,
    trust_remote_code: bool = False,
    files: tuple[str, ...] = MODEL_FILES,
) -> Path:
    """
    Folder of a checkpoint. What is not on disk is fetched into the cache of the Hub.

    Args:
        name (`str` or `pathlib.Path`):
            Folder, Hub id, or `user/repo@revision`.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub id.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to fetch code that comes with the checkpoint too.
        files (`tuple[str, ...]`, *optional*):
            Patterns of the files to fetch. Defaults to those of a checkpoint in safetensors.

    Returns:
        `pathlib.Path`: The folder.

    Raises:
        `ValueError`: If there is no such folder, repository or revision, or it cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    repo_id, named = split_revision(name)
    revision = revision or named
    allowed = [*files, "*.py"] if trust_remote_code else list(files)
    ignored = list(_OTHER_FILES) if files is MODEL_FILES else None
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=allowed, ignore_patterns=ignored))
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo_id}: expected the branch, tag or commit {revision!r}, found none") from error
    except (HFValidationError, OSError) as error:
        raise ValueError(f"{name}: expected a folder or the id of a Hub repository ({error})") from error


def is_adapter(name: str | Path, revision: str | None = None) -> bool:
    """Whether a checkpoint is an adapter and no whole model."""
    return (local_folder(name, revision) / ADAPTER_CONFIG_NAME).is_file()


def load_model(
    name: str | Path,
    revision: str | None = None,
    dtype: str | torch.dtype = "float32",
    device_map: str | dict | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    max_memory: dict | None = None,
    merge: bool = True,
) -> PreTrainedModel | PeftModel:
    """
    Load a language model from safetensors, in evaluation mode.

    A model with a nested language model is loaded whole, as the class that its configuration names. An adapter is
    loaded over the model that it names.

    Args:
        name (`str` or `pathlib.Path`):
            Folder or Hub id of a model or an adapter, or `user/repo@revision`.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub id.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`):
            Data type of the parameters.
        device_map (`str` or `dict`, *optional*):
            Placement, as in transformers.
        base (`str` or `pathlib.Path`, *optional*):
            Where the model of an adapter lies, if not where the adapter says.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the checkpoint.
        max_memory (`dict`, *optional*):
            Memory of each device that `device_map` may use, as in transformers.
        merge (`bool`, *optional*, defaults to `True`):
            Whether to merge an adapter into the weights, which needs float32 or float64: in less, most of an update of
            RL would be rounded away.

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]: The model. `config.dtype` keeps the stored data type.

    Raises:
        `ValueError`: If there is no such checkpoint or data type, or its weights are not whole, finite and in
            safetensors.
    """
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise ValueError(f"dtype: expected a floating point type such as 'float32' or 'bfloat16', found {dtype!r}")
    folder = local_folder(name, revision, trust_remote_code)
    known_as = str(name) if revision is None else f"{name}@{revision}"
    options = {"device_map": device_map, "max_memory": max_memory, "trust_remote_code": trust_remote_code}
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        return _load_weights(folder, known_as, dtype=dtype, **options)
    if merge and named not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: expected 'float32' to merge the adapter {name} in, found {dtype!r}")
    place = adapter_base(folder) if base is None else (base, None)
    model = _load_adapter(load_model(place[0], place[1], dtype, **options), folder)
    if merge:
        model = model.merge_and_unload().requires_grad_(True)  # PEFT froze the base
        model.config._name_or_path = model.name_or_path = known_as
    return model.eval()


def load_tokenizer(
    name: str | Path,
    revision: str | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer of a checkpoint.

    Args:
        name (`str` or `pathlib.Path`):
            Folder or Hub id of a model or an adapter, or `user/repo@revision`.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub id.
        base (`str` or `pathlib.Path`, *optional*):
            Checkpoint with the same tokenizer, which a warning names if it is taken because `name` has none. Defaults
            to the model that an adapter names.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the checkpoint.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`]: The tokenizer.

    Raises:
        `ValueError`: If there is no such checkpoint, or no tokenizer in it.
    """
    folder = local_folder(name, revision, trust_remote_code)
    tokenizer, reason = _tokenizer(folder, trust_remote_code)
    if tokenizer is not None:
        return tokenizer
    place = (base, None)
    if base is None and (folder / ADAPTER_CONFIG_NAME).is_file():
        place = adapter_base(folder)
    if place[0] is not None:
        tokenizer, _ = _tokenizer(local_folder(*place, trust_remote_code), trust_remote_code)
    if tokenizer is None:
        raise ValueError(f"{name}: expected the files of a tokenizer, found {reason}: save it beside the weights")
    warnings.warn(f"{name} has no tokenizer, that of {place[0]} is taken", stacklevel=2)
    return tokenizer


def adapter_base(folder: Path) -> tuple[str, str | None]:
    """Name and revision of the model that an adapter stands on."""
    path = folder / ADAPTER_CONFIG_NAME
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected the configuration of an adapter ({error})") from error
    if not config.base_model_name_or_path:
        raise ValueError(f"{path}: expected base_model_name_or_path, found none: pass `base`")
    return config.base_model_name_or_path, config.revision


def model_class(config: PretrainedConfig) -> type:
    """The class of language models that a configuration names, as TRL chooses it, or the one of its type."""
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        found = auto._model_mapping.get(type(config), None)
        if found is not None and found.__name__ in (config.architectures or [found.__name__]):
            return found
    return AutoModelForCausalLM


def exact_experts(model: PreTrainedModel) -> None:
    """Let the experts of a float64 model compute in plain PyTorch: the other implementations know no float64."""
    if model.dtype == torch.float64 and getattr(model.config, "_experts_implementation", None) is not None:
        model.set_experts_implementation("eager")


def _load_weights(folder: Path, name: str, **options) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=options["trust_remote_code"])
        model, loading = model_class(config).from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ImportError, SafetensorError) as error:
        raise ValueError(f"{name}: expected config.json and whole, unquantised safetensors ({error})") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if loading[problem]:
            raise ValueError(f"{name}: {problem.replace('_keys', ' tensors')}: {sorted(map(str, loading[problem]))}")
    for tensor, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name}: tensor {tensor}: expected finite values, found NaN or infinity")
    if config.dtype is not None:
        model.config.dtype = config.dtype
    model.config._name_or_path = model.name_or_path = name  # with its revision, and not the cache's folder
    exact_experts(model)
    return model.eval()


def _load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{folder}: expected an adapter ({SAFETENSORS_WEIGHTS_NAME}), found none")
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
        with safe_open(path, framework="pt") as tensors:
            stored = set(tensors.keys())
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path}: expected an adapter of {model.name_or_path} ({error})") from error
    loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    for tensor in sorted(stored - loaded.keys()):
        if "lora_" in tensor:
            raise ValueError(f"{path}: tensor {tensor}: expected one of {model.name_or_path}, found none")
    for tensor, value in loaded.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{path}: tensor {tensor}: expected finite values, found NaN or infinity")
    return adapted


def _tokenizer(folder: Path, trust_remote_code: bool) -> tuple[PreTrainedTokenizerBase | None, str]:
    """The tokenizer of a folder; transformers makes an empty one where there are no files."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        return None, f"none that loads ({error})"
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        return None, "none"
    return tokenizer, ""
