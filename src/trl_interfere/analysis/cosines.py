"""Cosines between the gradients of domains, from the inner products of their halves."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from .gradients import Tensors
from .routes import RouteMap


LEVELS = ("tensors", "modules", "layers", "global")
# Elements of a tensor that are turned into float64 at a time: few enough to stay in the cache of a processor, and on
# an accelerator enough to be worth the launch of a kernel.
_CHUNK, _ACCELERATOR_CHUNK = 1 << 17, 1 << 22
# 97.5% quantile of Student's t with 2 degrees of freedom: one for each of two domains with two halves.
_T2 = 4.302652729911275


class GradientProducts:
    """
    Inner products of the gradients of several domains, by tensor, module, layer, and for the whole model, in float64.

    Each domain comes as the gradients of two disjoint halves of its references (or of one part, which leaves no
    interval), which sum to the gradient of the domain: the halves say how far its cosines are to be trusted.
    """

    def __init__(self, halves: dict[str, Sequence[Tensors]], route_map: RouteMap, device: torch.device | None = None):
        flat = [tensors for parts in halves.values() for tensors in parts]
        rows = iter(np.eye(len(flat)))
        # The place of each half among all of them.
        self._halves = {domain: [next(rows) for _ in parts] for domain, parts in halves.items()}
        self._products: dict[str, dict[str, np.ndarray]] = {level: {} for level in LEVELS}
        for name, module in route_map.modules({name: tensor.shape for name, tensor in flat[0].items()}).items():
            layer = module.rsplit(".", 1)[0] if module.startswith("layers.") else None
            products = _gram([tensors[name] for tensors in flat], device).cpu().numpy()
            for level, key in zip(LEVELS, (name, module, layer, ""), strict=True):
                if key is not None:
                    sums = self._products[level]
                    sums[key] = sums[key] + products if key in sums else products
        self._whole = self._products["global"][""]

    def cosines(self, first: str, second: str | Sequence[str]) -> dict:
        """Cosines <g_A, g_B> / (|g_A| |g_B|) of the gradient of a domain and another, or the mean of several."""
        a, b = self._weights(first), np.mean([self._weights(name) for name in np.atleast_1d(second)], axis=0)
        levels = {
            level: {key: value for key, gram in grams.items() if (value := _cosine(gram, a, b)) is not None}
            for level, grams in self._products.items()
        }
        return {**levels, "global": levels["global"].get("")}

    def pairs(self) -> dict[str, dict[str, float | None]]:
        """Cosines of the whole gradients of all pairs of domains, each pair once."""
        found: dict[str, dict[str, float | None]] = {first: {} for first in list(self._halves)[:-1]}
        for first, second in itertools.combinations(self._halves, 2):
            found[first][second] = _cosine(self._whole, self._weights(first), self._weights(second))
        return found

    def reliability(self, domain: str) -> float | None:
        """
        How well the gradient of a domain would be found again on as many other references.

        ```
        R = 2 ρ / (1 + ρ)        ρ = cos(g_1, g_2) of the two halves
        ```

        the Spearman-Brown formula for a sample twice as large as each half.
        """
        if len(self._halves[domain]) != 2:
            return None
        rho = _cosine(self._whole, *self._halves[domain])
        return None if rho is None else max(0.0, 2 * rho / (1 + rho)) if rho > -1 else 0.0

    def ceiling(self, first: str, second: str) -> float | None:
        """Highest cosine that the noise of two gradients allows, sqrt(R_A R_B)."""
        found = [self.reliability(domain) for domain in (first, second)]
        return None if None in found else float(np.sqrt(found[0] * found[1]))

    def interval(self, first: str, second: str, module: str | None = None) -> list[float] | None:
        """
        95% interval of a cosine over the draw of references, cos ± 4.30 s, by balanced repeated replication (McCarthy,
        1969) with two strata of two halves each, which leaves two degrees of freedom.

        ```
        s² = ¼ Σ_ij (cos(g_Ai, g_Bj) - cos(g_A, g_B))²
        ```
        """
        gram = self._whole if module is None else self._products["modules"][module]
        if any(len(self._halves[domain]) != 2 for domain in (first, second)):
            return None
        whole = _cosine(gram, self._weights(first), self._weights(second))
        halves = [_cosine(gram, a, b) for a in self._halves[first] for b in self._halves[second]]
        if whole is None or None in halves:
            return None
        spread = _T2 * float(np.sqrt(np.mean((np.array(halves) - whole) ** 2)))
        return [max(-1.0, whole - spread), min(1.0, whole + spread)]

    def figures(self, earlier: str, later: list[str]) -> dict:
        """What a report holds."""
        by_domain = {}
        for name in later:
            found = self.cosines(earlier, name)
            by_domain[name] = found | {
                "interval": self.interval(earlier, name),
                "ceiling": self.ceiling(earlier, name),
            }
            modules = found["modules"]
            for key, extreme in (("most_conflicting", min), ("most_synergistic", max)) if modules else ():
                module = extreme(modules, key=modules.get)
                interval = self.interval(earlier, name, module)
                figures = {"module": module, "cosine": modules[module], "interval": interval, "of": len(modules)}
                by_domain[name][key] = figures
        return {
            **self.cosines(earlier, later),
            "by_domain": by_domain,
            "pairs": self.pairs(),
            "reliability": {name: self.reliability(name) for name in self._halves},
        }

    def _weights(self, domain: str) -> np.ndarray:
        return np.sum(self._halves[domain], axis=0)


def _gram(tensors: list[torch.Tensor], device: torch.device | None = None) -> torch.Tensor:
    device, size = tensors[0].device if device is None else device, tensors[0].numel()
    flat = [tensor.reshape(-1) for tensor in tensors]
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=device)
    chunk = _CHUNK if device.type == "cpu" else _ACCELERATOR_CHUNK
    for start in range(0, size, chunk):
        # Sent first and widened there: the other way round four times as many bytes go over the bus.
        rows = torch.stack([tensor[start : start + chunk].to(device).double() for tensor in flat])
        total += rows @ rows.T
    return total


def _cosine(gram: np.ndarray, first: np.ndarray, second: np.ndarray) -> float | None:
    squares = (first @ gram @ first) * (second @ gram @ second)
    return None if squares <= 0 else float(np.clip(first @ gram @ second / np.sqrt(squares), -1, 1))
