"""Configuration of [`InterferenceAnalyzer`]."""

from dataclasses import dataclass, fields

from .objectives import OBJECTIVES


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
        later_quadrature_nodes (`int`, *optional*, defaults to `2`):
            The same for the later domains, whose terms only serve to protect them.
        difference_step (`float`, *optional*):
            Step of the central difference behind Hessian products, as a share of the update. Defaults to the one that
            balances truncation and rounding, see [`difference_step`].
        check_prompts (`int`, *optional*, defaults to `8`):
            References that the error of the central difference is estimated on; 0 leaves it out.
        objective (`str`, *optional*, defaults to `"nll"`):
            What the gradients behind the cosines are taken of. `"nll"`: the mean token loss on the references.
            `"grpo"`: the surrogate of GRPO on completions sampled from `before`, with the rewards of the domains.
            `"kl"`: the divergence of `before` from `base` on the references. Damage is always one of the token loss.
        num_generations (`int`, *optional*, defaults to `8`):
            Completions of each prompt with `objective="grpo"`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of these completions.
        seed (`int`, *optional*, defaults to `0`):
            Seed of these completions, of the Lanczos vectors and of the random update.
        subspace_size (`int`, *optional*, defaults to `0`):
            Eigenpairs of the conflict subspace, for the update and for a random one; 0 leaves it out. Each takes at
            least `2 * subspace_size + 2` Hessian products on `subspace_prompts` references.
        subspace_prompts (`int`, *optional*, defaults to `32`):
            References of the earlier domain that the conflict subspace is taken on.
        active_share (`float`, *optional*, defaults to `0.5`):
            Share of routes, by activity, that count as active on a domain in `route_conflict`.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Whether backward passes recompute the activations of each layer: less memory, a third more time.
        offload (`bool`, *optional*, defaults to `False`):
            Whether weights are kept in host memory, so that the device holds one set of them and one gradient.
        data_parallel (`bool`, *optional*, defaults to `False`):
            Whether the processes of accelerate, which all run the analysis, share out references.

    Raises:
        `ValueError`: If a setting is out of range.
    """

    reference: str = "correct"
    reference_column: str = "completion"
    correct_threshold: float = 1.0
    max_prompts: int = 256
    max_new_tokens: int = 256
    batch_size: int = 32
    quadrature_nodes: int = 4
    later_quadrature_nodes: int = 2
    difference_step: float | None = None
    check_prompts: int = 8
    objective: str = "nll"
    num_generations: int = 8
    temperature: float = 1.0
    seed: int = 0
    subspace_size: int = 0
    subspace_prompts: int = 32
    active_share: float = 0.5
    gradient_checkpointing: bool = False
    offload: bool = False
    data_parallel: bool = False

    def __post_init__(self):
        if self.reference not in ("correct", "dataset"):
            raise ValueError(f"reference: expected 'correct' or 'dataset', found {self.reference!r}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective: expected one of {sorted(OBJECTIVES)}, found {self.objective!r}")
        least = {"check_prompts": 0, "subspace_size": 0, "seed": 0, "num_generations": 2}
        for name in (entry.name for entry in fields(self) if entry.type is int):
            if getattr(self, name) < least.get(name, 1):
                raise ValueError(f"{name}: expected at least {least.get(name, 1)}, found {getattr(self, name)}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature: expected a number above 0, found {self.temperature}")
        for name in ("difference_step", "active_share"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}: expected a share above 0 and up to 1, found {value}")
