"""Configuration of [`SequentialGRPOTrainer`]."""

from dataclasses import dataclass, field

from trl import GRPOConfig


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
            Whether to keep the `checkpoint-*` folders of a stage after it has finished. They hold optimizer states;
            the finished stage itself is always kept under `stages/`.
    """

    order: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the domains in the order of training. Defaults to the order of the domains."},
    )
    stage_overrides: dict | str | None = field(
        default=None,
        metadata={"help": 'Settings of single stages by domain name, e.g. {"qa": {"max_steps": 50}}.'},
    )
    score_batch_size: int = field(
        default=64, metadata={"help": "Number of prompts generated for at once when a domain is scored."}
    )
    score_max_new_tokens: int | None = field(
        default=None,
        metadata={"help": "Maximum completion length in scoring. Defaults to `max_completion_length`."},
    )
    score_temperature: float = field(
        default=0.0, metadata={"help": "Temperature of sampling when a domain is scored; 0 is greedy."}
    )
    score_samples: int = field(
        default=1, metadata={"help": "Completions of each prompt in scoring; their scores are averaged."}
    )
    keep_checkpoints: bool = field(
        default=False,
        metadata={"help": "Whether to keep the `checkpoint-*` folders of a stage after it has finished."},
    )

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["stage_overrides"]


# Settings that TRL reads anew for every `train()` and that may therefore differ between stages. Everything else
# (temperature, completion length, beta, the vLLM engine, ...) is fixed when the trainer is built.
STAGE_OPTIONS = (
    "learning_rate",
    "max_steps",
    "num_train_epochs",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "logging_steps",
    "save_steps",
    "save_strategy",
    "save_total_limit",
)
