"""Configuration of [`SequentialGRPOTrainer`]."""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from trl import GRPOConfig

from ..recipe import typed


@dataclass
class SequentialGRPOConfig(GRPOConfig):
    """
    Configuration class for the [`SequentialGRPOTrainer`].

    Holds everything that [`~trl.GRPOConfig`] holds, for every stage alike, plus the schedule and the scoring. Lengths
    (`max_steps`, `num_train_epochs`) are those of one stage.

    Args:
        order (`list[str]`, *optional*):
            Names of the domains in the order of training; a domain may occur more than once. Defaults to the order in
            which the domains are given.
        stage_overrides (`dict[str, dict]` or `str`, *optional*):
            Settings of single stages, by domain name, e.g. `{"qa": {"max_steps": 50, "learning_rate": 1e-6}}`. See
            `STAGE_OPTIONS` for the settings that may differ between stages.
        score_batch_size (`int`, *optional*, defaults to `64`):
            Number of prompts that are generated for at once when a domain is scored.
        score_max_new_tokens (`int`, *optional*):
            Maximum length of a completion when a domain is scored. Defaults to `max_completion_length`.
        score_temperature (`float`, *optional*, defaults to `0.0`):
            Temperature of sampling when a domain is scored; 0 is greedy.
        score_samples (`int`, *optional*, defaults to `1`):
            Completions of each prompt when a domain is scored; their scores are averaged.
        keep_checkpoints (`bool`, *optional*, defaults to `False`):
            Whether to keep the `checkpoint-*` folders of a finished stage, which hold optimizer states.
        kl_reference (`str`, *optional*, defaults to `"base"`):
            Model that the KL penalty of `beta` measures from: `"base"`, the model before the first stage, as in
            [`~trl.GRPOTrainer`], or `"stage"`, the model at the start of each stage.
        adapter_per_stage (`bool`, *optional*, defaults to `False`):
            With LoRA, whether each stage trains an adapter of its own on top of the earlier ones, which stay active
            and frozen.
    """

    order: list[str] | None = None
    stage_overrides: dict | str | None = None
    score_batch_size: int = 64
    score_max_new_tokens: int | None = None
    score_temperature: float = 0.0
    score_samples: int = 1
    keep_checkpoints: bool = False
    kl_reference: str = field(default="base", metadata={"choices": ["base", "stage"]})
    adapter_per_stage: bool = False

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["stage_overrides"]

    def __post_init__(self):
        for name, limits in RANGES.items():
            check_range(name, getattr(self, name), *limits)
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps: expected a number of steps, or -1 to count passes, found {self.max_steps}")
        try:
            super().__post_init__()
        except (ValueError, ImportError):
            raise
        except Exception as error:  # transformers and TRL compute with what they have not looked at
            raise ValueError(f"{type(error).__name__}: {error}") from error
        for name, (neutral, reason) in REFUSED_OPTIONS.items():
            if getattr(self, name) != neutral:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not supported, {reason}")
        if self.push_to_hub and self.hub_strategy not in ("end", "every_save"):
            raise ValueError(
                f"hub_strategy: expected 'end' or 'every_save', without pickles, found {self.hub_strategy.value!r}"
            )
        if self.push_to_hub and self.hub_revision is not None:
            raise ValueError("hub_revision: expected none, since each stage has a revision of its own")
        if self.accelerator_config.dispatch_batches:
            raise ValueError("accelerator_config: dispatch_batches=True is not supported, prompts are no tensors")
        if self.kl_reference not in ("base", "stage"):
            raise ValueError(f"kl_reference: expected 'base' or 'stage', found {self.kl_reference!r}")

    def stage_settings(self, overrides: dict[str, Any], where: str = "stage_overrides") -> dict[str, Any]:
        """
        Values that this configuration takes in a stage, with those that follow from them.

        Args:
            overrides (`dict`):
                Settings of the stage, names of `STAGE_OPTIONS`.
            where (`str`, *optional*, defaults to `"stage_overrides"`):
                Where the settings stand, for the message.

        Returns:
            `dict`: The settings by name; `steps_per_generation` follows `gradient_accumulation_steps` where it does so
            in the whole configuration, and `generation_batch_size` follows from the batch settings.

        Raises:
            `ValueError`: If a value has the wrong type, or the batch settings do not fit together.
        """
        if isinstance(overrides.get("scale_rewards"), bool):  # what GRPOConfig makes of it
            overrides = {**overrides, "scale_rewards": "group" if overrides["scale_rewards"] else "none"}
        settings = typed(type(self), overrides, where)
        for name, value in settings.items():
            if isinstance(getattr(self, name), Enum):
                try:
                    settings[name] = type(getattr(self, name))(value)
                except ValueError as error:
                    raise ValueError(f"{where}, {name}: {error}") from error
            elif name in RANGES:
                check_range(f"{where}, {name}", value, *RANGES[name])

        def get(name: str) -> Any:
            return settings.get(name, getattr(self, name))

        if settings.keys() & _BATCH_OPTIONS:
            follows = self.steps_per_generation == self.gradient_accumulation_steps
            if "steps_per_generation" not in settings and follows:
                settings["steps_per_generation"] = get("gradient_accumulation_steps")
            size = get("per_device_train_batch_size") * self.world_size * get("steps_per_generation")
            if size % get("num_generations") or get("num_generations") < 2:
                raise ValueError(
                    f"{where}: expected a generation batch ({size}) divisible by at least 2 generations, found "
                    f"num_generations={get('num_generations')}"
                )
            settings["generation_batch_size"] = size
        if get("eval_strategy") != "no":
            generations = self.num_generations_eval or get("num_generations")
            size = get("per_device_eval_batch_size") * self.world_size
            if size % generations:
                raise ValueError(f"{where}: expected an eval batch ({size}) divisible by {generations} generations")
        return settings


_BATCH_OPTIONS = {"gradient_accumulation_steps", "num_generations", "per_device_train_batch_size"}
_BATCH_OPTIONS |= {"steps_per_generation"}
# The least and the most that a number may be, and whether it must be whole. transformers and TRL take any.
RANGES = {
    **dict.fromkeys(
        ("gradient_accumulation_steps", "max_completion_length", "num_iterations", "per_device_eval_batch_size")
        + ("per_device_train_batch_size", "score_batch_size", "score_max_new_tokens", "score_samples"),
        (1, 2**31, True),
    ),
    **dict.fromkeys(
        ("beta", "eval_steps", "learning_rate", "logging_steps", "max_grad_norm", "save_steps", "weight_decay"),
        (0.0, math.inf, False),
    ),
    "max_steps": (-1, 2**31, True),
    "num_generations": (2, 2**31, True),
    "num_train_epochs": (0.0, 1e6, False),
    "score_temperature": (0.0, 1e6, False),
    "seed": (0, 2**32 - 1, True),
    "temperature": (1e-6, 1e6, False),
}
_MAY_BE_NONE = ("eval_steps", "max_completion_length", "score_max_new_tokens")


def check_range(name: str, value: Any, least: float, most: float = math.inf, whole: bool = False) -> None:
    """Refuse what is no number, or none from `least` to `most`; infinity is none."""
    if value is None and name.rpartition(" ")[2] in _MAY_BE_NONE:
        return
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not number or not least <= value <= most or value == math.inf:
        kind = "a whole number" if whole else "a number"
        bounds = f"at least {least:g}" if most > 1e5 else f"from {least:g} to {most:g}"
        raise ValueError(f"{name}: expected {kind}, {bounds}, found {value!r}")


# Settings that may differ between stages. Everything else (beta, the reward weights, the vLLM engine, ...) is fixed
# when the trainer is built, and so is the temperature: TRL builds it into the forward pass of the model.
STAGE_OPTIONS = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "epsilon", "epsilon_high", "eval_delay", "eval_steps",
    "eval_strategy", "gradient_accumulation_steps", "learning_rate", "logging_steps", "loss_type",
    "lr_scheduler_kwargs", "lr_scheduler_type", "max_completion_length", "max_grad_norm", "max_steps",
    "num_generations", "num_iterations", "num_train_epochs", "optim", "per_device_eval_batch_size",
    "per_device_train_batch_size", "save_steps", "save_strategy", "save_total_limit", "scale_rewards",
    "steps_per_generation", "warmup_steps", "weight_decay",
)  # fmt: skip

# Options of GRPOConfig that cannot be honoured, with the value that does nothing and the reason.
REFUSED_OPTIONS = {
    "bf16_full_eval": (False, "it would convert the weights that the next stage goes on from"),
    "data_seed": (None, "GRPO draws its prompts by `seed`"),
    "enable_jit_checkpoint": (False, "a stage that it ends would count as finished; set save_steps instead"),
    "fp16_full_eval": (False, "it would convert the weights that the next stage goes on from"),
    "ignore_data_skip": (False, "a resumed run would see other prompts than an uninterrupted one"),
    "include_for_metrics": ([], "GRPO has no compute_metrics to hand them to"),
    "label_smoothing_factor": (0.0, "the loss of GRPO has no labels"),
    "log_completions_hub_repo": (None, "completions are kept in a folder for each stage, which TRL's upload misses"),
    "sync_ref_model": (False, "its reference is not part of a checkpoint; use kl_reference='stage' to move it"),
    "train_sampling_strategy": ("random", "GRPO has a sampler of its own, see shuffle_dataset"),
}
