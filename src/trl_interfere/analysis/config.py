"""Configuration of [`InterferenceAnalyzer`]."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path


@dataclass
class InterferenceConfig:
    """
    Configuration class for the [`InterferenceAnalyzer`].

    Args:
        reference (`str`, *optional*, defaults to `"correct"`):
            Completions that losses are taken on. `"correct"`: greedy completions that score at least
            `correct_threshold`, written by `before` for the earlier domain and by `after` for the later ones.
            `"dataset"`: the column `reference_column`.
        reference_column (`str`, *optional*, defaults to `"completion"`):
            Column of the data set with `reference="dataset"`.
        correct_threshold (`float`, *optional*, defaults to `1.0`):
            Least score of a completion that counts as correct.
        max_prompts (`int`, *optional*, defaults to `256`):
            Number of prompts of each domain.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Maximum length of a written reference completion.
        batch_size (`int`, *optional*, defaults to `32`):
            Number of sequences of one forward and backward pass. It changes memory, not results.
        quadrature_nodes (`int`, *optional*, defaults to `4`):
            Gauss-Legendre nodes of the damage attribution: gradient passes over the references.
        difference_step (`float`, *optional*, defaults to `0.05`):
            Step of the central difference behind the Hessian product, as a share of the update.
        active_share (`float`, *optional*, defaults to `0.5`):
            Share of routes, by activity, that count as active on a domain in `route_conflict`.
    """

    reference: str = field(
        default="correct", metadata={"help": "Completions that losses are taken on: 'correct' or 'dataset'."}
    )
    reference_column: str = field(
        default="completion", metadata={"help": "Column of the data set with reference='dataset'."}
    )
    correct_threshold: float = field(
        default=1.0, metadata={"help": "Least score of a completion that counts as correct."}
    )
    max_prompts: int = field(default=256, metadata={"help": "Number of prompts of each domain."})
    max_new_tokens: int = field(default=256, metadata={"help": "Maximum length of a written reference completion."})
    batch_size: int = field(default=32, metadata={"help": "Number of sequences of one forward and backward pass."})
    quadrature_nodes: int = field(default=4, metadata={"help": "Gauss-Legendre nodes of the damage attribution."})
    difference_step: float = field(
        default=0.05, metadata={"help": "Step of the central difference, as a share of the update."}
    )
    active_share: float = field(
        default=0.5, metadata={"help": "Share of routes that count as active on a domain in route_conflict."}
    )

    def __post_init__(self):
        if self.reference not in ("correct", "dataset"):
            raise ValueError(f"reference: expected 'correct' or 'dataset', found {self.reference!r}")
        for name in ("max_prompts", "max_new_tokens", "batch_size", "quadrature_nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        for name in ("difference_step", "active_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share above 0 and up to 1, found {getattr(self, name)}")

    def to_dict(self) -> dict:
        """The settings by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict) -> "InterferenceConfig":
        """
        Configuration from settings by name.

        Args:
            settings (`dict`):
                Settings; those that are missing take their defaults.

        Raises:
            `ValueError`: If a name is unknown.
        """
        names = {field.name for field in fields(cls)}
        unknown = sorted(set(settings) - names)
        if unknown:
            raise ValueError(f"InterferenceConfig: unknown settings {unknown}, expected some of {sorted(names)}")
        return cls(**settings)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `interference_config.json` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "interference_config.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "InterferenceConfig":
        """Read `interference_config.json` of a folder."""
        return cls.from_dict(json.loads((Path(folder) / "interference_config.json").read_text()))
