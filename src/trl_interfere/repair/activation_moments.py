"""Second moments of what linear layers get, and the least squares that they decide."""

import torch
import torch.distributed


class ActivationMoments:
    r"""
    Sums over the references of one domain, for linear layers that get the same input.

    With X' the inputs in the healed model so far and X those in the peak model (tokens in columns)

    ```
    C = X' X'ᵀ        K = X X'ᵀ        m = X' 1        n tokens
    ```

    and for layers with fewer outputs than inputs `W_d X X'ᵀ` at once instead of K. All sums are in float64: spectra of
    activations reach 1e-8 of their mean, and float32 sums make a healed model that is wrong in these directions.

    Args:
        width (`int`):
            Number of inputs of the layers.
        peak_weight (`torch.Tensor` of shape `(outputs, width)`, *optional*):
            Weights W_d of the layers in the peak model, one above the other, where they are to be applied at once.
    """

    def __init__(self, width: int, device: torch.device, peak_weight: torch.Tensor | None = None):
        rows = width if peak_weight is None else len(peak_weight)
        self.peak_weight = peak_weight
        self.moments = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.cross = torch.zeros(rows, width, dtype=torch.float64, device=device)
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, peak: torch.Tensor, healed: torch.Tensor) -> None:
        """Add the inputs of some tokens in both models, each of shape `(tokens, width)`."""
        left = peak if self.peak_weight is None else peak @ self.peak_weight.T
        left, healed = left.double(), healed.double()
        self.moments.addmm_(healed.T, healed)
        self.cross.addmm_(left.T, healed)
        self.sum += healed.sum(0)
        self.count += len(healed)

    def reduce(self) -> None:
        """Add up the sums of all processes."""
        if torch.distributed.is_initialized():
            count = torch.tensor([self.count], dtype=torch.float64, device=self.sum.device)
            for values in (self.moments, self.cross, self.sum, count):
                torch.distributed.all_reduce(values)
            self.count = int(count)

    def targets(self, weight: torch.Tensor, shift: torch.Tensor | None, rows: slice) -> torch.Tensor:
        """`Y X'ᵀ` of one layer, Y what it gives in the peak model; `shift` is the difference of the biases."""
        found = weight.double() @ self.cross if self.peak_weight is None else self.cross[rows]
        return found if shift is None else found + shift.double()[:, None] * self.sum


class Solution:
    r"""
    Weights with which a layer gives on the healed model's inputs what it gave in the peaks:

    ```
    W* = argmin Σ_d w_d/n_d ‖W* X'_d - Y_d‖² + ρ ‖W* - W‖²
       = W + (Σ_d w_d/n_d (Y_d - W X'_d) X'_dᵀ) (S + ρ I)⁻¹        S = Σ_d w_d/n_d X'_d X'_dᵀ,  ρ = ridge tr(S)/width
    ```

    With X' = X this is [RegMean](https://huggingface.co/papers/2212.09849) between the stages of one run. GPTQ goes
    through the layers in order and regresses on outputs for quantisation, and
    [RegMean++](https://huggingface.co/papers/2508.03121) for merging.

    Args:
        moments (`torch.Tensor` of shape `(width, width)`):
            S.
        ridge (`float`):
            ρ as a share of the mean eigenvalue of S.
    """

    def __init__(self, moments: torch.Tensor, ridge: float):
        self.moments = moments
        diagonal = ridge * moments.diagonal().mean()
        self.root = torch.linalg.cholesky(moments + diagonal * torch.eye(len(moments)).to(moments))

    def change(self, residual: torch.Tensor) -> torch.Tensor:
        """The change in the metric of the moments, `ΔW (S + ρI)^½`, of shape `(outputs, width)`."""
        return torch.linalg.solve_triangular(self.root, residual.T, upper=False).T

    def random_change(self, update: torch.Tensor) -> torch.Tensor:
        """The change in the metric of the moments where a given update of the weights is to be made up for."""
        return self.change(update @ self.moments)

    def factors(self, change: torch.Tensor, rank: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        `B` and `A` with `B A` the change of the weights, cut to a rank in the metric of the moments.

        The leading singular directions come from the smaller Gram matrix. At full rank one factor is the identity.
        """
        outputs, width = change.shape
        if rank is None or rank >= min(outputs, width):
            whole = torch.linalg.solve_triangular(self.root.T, change.T, upper=True).T
            identity = torch.eye(min(outputs, width), dtype=whole.dtype, device=whole.device)
            return (whole, identity) if width <= outputs else (identity, whole)
        if outputs <= width:
            left = torch.linalg.eigh(change @ change.T).eigenvectors[:, -rank:]
            right = left.T @ change
        else:
            right = torch.linalg.eigh(change.T @ change).eigenvectors[:, -rank:].T
            left = change @ right.T
        return left, torch.linalg.solve_triangular(self.root.T, right.T, upper=True).T


def effective_dimension(change: torch.Tensor) -> float:
    """Participation ratio of the squared singular values, `(Σ s²)² / Σ s⁴`."""
    gram = change @ change.T if len(change) <= change.shape[1] else change.T @ change
    total = gram.diagonal().sum()
    return float(total**2 / (gram * gram).sum()) if total > 0 else 0.0
