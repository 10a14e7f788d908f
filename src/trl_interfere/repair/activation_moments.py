"""Second moments of what linear layers get, and the least squares that they decide."""

import torch
import torch.distributed


COLUMNS = 256  # of a symmetric sum, at a time


class ActivationMoments:
    r"""
    Sums over the references of one domain, for linear layers that get the same input.

    With X' the inputs in the healed model so far, X those in the peak model and Y what the layers give there (tokens
    in columns)

    ```
    C = X' X'ᵀ        K = X X'ᵀ or Y X'ᵀ        m = X' 1        n tokens
    ```

    All sums are in float64: spectra of activations reach 1e-8 of their mean, and float32 sums make a healed model that
    is wrong in these directions. Without a number of rows of K, X' is X and K is C.
    """

    def __init__(self, width: int, rows: int | None = None, device: torch.device | None = None):
        self.moments = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.cross = self.moments if rows is None else self.moments.new_zeros(rows, width)
        self.sum = self.moments.new_zeros(width)
        self.count = 0

    def add(self, healed: torch.Tensor, peak: torch.Tensor) -> None:
        """Add some tokens: X' of shape `(tokens, width)`, and X or Y."""
        healed = healed.double()
        for start in range(0, healed.shape[1], COLUMNS):  # C is symmetric: its upper triangle is enough
            part = slice(start, start + COLUMNS)
            self.moments[part, start:].addmm_(healed[:, part].T, healed[:, start:])
        if self.cross is not self.moments:
            self.cross.addmm_(peak.to(healed).T, healed)
        self.sum += healed.sum(0)
        self.count += len(healed)

    def finish(self, reduce: bool) -> None:
        """Add up the sums of all processes, and fill in the lower triangle of C."""
        if reduce:
            count = self.sum.new_tensor([self.count])
            for values in (self.moments, self.sum, count) + (() if self.cross is self.moments else (self.cross,)):
                torch.distributed.all_reduce(values)
            self.count = int(count)
        self.moments.triu_().add_(self.moments.triu(1).T)


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
    """

    def __init__(self, moments: torch.Tensor, ridge: float):
        metric = moments.clone()
        metric.diagonal().add_(ridge * float(moments.diagonal().mean()))
        self.root = torch.linalg.cholesky(metric)

    def change(self, residual: torch.Tensor) -> torch.Tensor:
        """The change in the metric of the moments, `ΔW (S + ρI)^½`, of shape `(outputs, width)`."""
        return torch.linalg.solve_triangular(self.root, residual.T, upper=False).T

    def weights(self, change: torch.Tensor) -> torch.Tensor:
        """ΔW from the change in the metric of the moments."""
        return torch.linalg.solve_triangular(self.root.T, change.T, upper=True).T

    def factors(self, change: torch.Tensor, gram: torch.Tensor, rank: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        `B` and `A` with `B A` the change of the weights, cut to a rank in the metric of the moments by the leading
        eigenvectors of the [`gram`] matrix. At full rank one factor is the identity.
        """
        outputs, width = change.shape
        if rank is None or rank >= len(gram):
            identity = torch.eye(len(gram), dtype=change.dtype, device=change.device)
            return (self.weights(change), identity) if width <= outputs else (identity, self.weights(change))
        leading = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
        if outputs <= width:
            return leading, self.weights(leading.T @ change)
        return change @ leading, self.weights(leading.T)


def gram(change: torch.Tensor) -> torch.Tensor:
    """The smaller of `M Mᵀ` and `Mᵀ M`."""
    return change @ change.T if len(change) <= change.shape[1] else change.T @ change


def effective_dimension(gram: torch.Tensor) -> float:
    """Participation ratio of the squared singular values, `(Σ s²)² / Σ s⁴`, from the [`gram`] matrix."""
    total = float(gram.diagonal().sum())
    return total**2 / float(gram.square().sum()) if total > 0 else 0.0


def random_dimension(moments: torch.Tensor, outputs: int) -> float:
    """
    [`effective_dimension`] of the change where the update to be undone is random, in expectation and without a ridge:
    its rows are then normal with covariance S, and their Gram matrix has a Wishart distribution.
    """
    trace, square = float(moments.diagonal().sum()), float(moments.norm()) ** 2
    return (outputs * trace**2 + 2 * square) / ((outputs + 1) * square + trace**2)
