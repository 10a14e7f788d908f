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
    Inner products of the gradients of several domains, by tensor, module, layer, and for the whole model.

    Each domain comes as the gradients of two disjoint halves of its references, scaled so that they sum to the
    gradient of the domain. One gradient per domain then gives the cosines of all pairs, and the halves say how far
    they are to be trusted. The products are summed in float64, tensor by tensor, and copied to the host once.

    Args:
        halves (`dict[str, Sequence[dict[str, torch.Tensor]]]`):
            For each domain its one or two parts. With one part there is a cosine but no interval.
        route_map ([`RouteMap`]):
            Says which module a tensor belongs to.
        device (`torch.device`, *optional*):
            Where to multiply; tensors are sent there in chunks. Defaults to the devices of the gradients.

    Raises:
        `ValueError`: If the gradients have not the same tensors.
    """

    def __init__(self, halves: dict[str, Sequence[Tensors]], route_map: RouteMap, device: torch.device | None = None):
        self.parts: dict[str, list[int]] = {}
        flat: list[Tensors] = []
        for domain, tensors in halves.items():
            self.parts[domain] = list(range(len(flat), len(flat) + len(tensors)))
            flat += tensors
        names = list(flat[0])
        for tensors in flat:
            if tensors.keys() != flat[0].keys():
                raise ValueError(f"gradients: expected the tensors {names}, found {list(tensors)}")
        self._products: dict[str, dict[str, np.ndarray]] = {level: {} for level in LEVELS}
        for name, module in route_map.modules({name: tensor.shape for name, tensor in flat[0].items()}).items():
            layer = module.rsplit(".", 1)[0] if module.startswith("layers.") else None
            products = _gram([tensors[name] for tensors in flat], device).cpu().numpy()
            for level, key in zip(LEVELS, (name, module, layer, ""), strict=True):
                if key is not None:
                    sums = self._products[level]
                    sums[key] = sums[key] + products if key in sums else products

    def cosines(self, first: str, second: str | Sequence[str]) -> dict:
        """
        Cosines between the gradient of one domain and that of another, or the mean of several.

        ```
        cos = <g_A, g_B> / (|g_A| |g_B|)
        ```
        """
        a, b = self._weights([first]), self._weights([second] if isinstance(second, str) else second)
        levels = {
            level: {key: value for key, gram in grams.items() if (value := _cosine(gram, a, b)) is not None}
            for level, grams in self._products.items()
        }
        return {**levels, "global": levels["global"].get("")}

    def pairs(self) -> dict[str, dict[str, float | None]]:
        """Cosines of the whole gradients of all pairs of domains, each pair once."""
        found: dict[str, dict[str, float | None]] = {first: {} for first in list(self.parts)[:-1]}
        for first, second in itertools.combinations(self.parts, 2):
            found[first][second] = self._cosine([first], [second])
        return found

    def reliability(self, domain: str) -> float | None:
        """
        How well the gradient of a domain would be found again on as many other references.

        ```
        R = 2 ρ / (1 + ρ)        ρ = cos(g_1, g_2) of the two halves
        ```

        the Spearman-Brown formula for a sample twice as large as each half. A measured cosine of two domains is that
        of their true gradients times about sqrt(R_A R_B), which is the highest that noise allows.
        """
        if len(self.parts[domain]) != 2:
            return None
        gram = self._products["global"][""]
        rho = _cosine(gram, *(np.eye(len(gram))[index] for index in self.parts[domain]))
        return None if rho is None else max(0.0, 2 * rho / (1 + rho)) if rho > -1 else 0.0

    def ceiling(self, first: str, second: str) -> float | None:
        """
        Highest cosine that the noise of two gradients allows: `sqrt(R_A R_B)` of [`~GradientProducts.reliability`].
        """
        found = [self.reliability(domain) for domain in (first, second)]
        return None if None in found else float(np.sqrt(found[0] * found[1]))

    def interval(self, first: str, second: str, module: str | None = None) -> list[float] | None:
        """
        95% interval of a cosine over the draw of references.

        Balanced repeated replication (McCarthy, 1969), the domains being two strata of two halves each: the variance
        is the mean squared deviation of the four cosines between halves from the whole one,

        ```
        s² = ¼ Σ_ij (cos(g_Ai, g_Bj) - cos(g_A, g_B))²
        ```

        with two degrees of freedom, so that the interval is `cos ± 4.30 s`. It is wide, and wider than it need be:
        halves are noisier than wholes, so that their cosines lie nearer to zero, and this counts as deviation.
        """
        gram = self._products["global"][""] if module is None else self._products["modules"][module]
        if any(len(self.parts[domain]) != 2 for domain in (first, second)):
            return None
        unit = np.eye(len(gram))
        whole = _cosine(gram, self._weights([first]), self._weights([second]))
        halves = [_cosine(gram, unit[i], unit[j]) for i in self.parts[first] for j in self.parts[second]]
        if whole is None or None in halves:
            return None
        spread = _T2 * float(np.sqrt(np.mean((np.array(halves) - whole) ** 2)))
        return [max(-1.0, whole - spread), min(1.0, whole + spread)]

    def figures(self, earlier: str, later: list[str]) -> dict:
        """What a report holds of the cosines between the earlier domain and the later ones."""
        return {
            **self.cosines(earlier, later),
            "by_domain": {
                name: {
                    **self.cosines(earlier, name),
                    "interval": self.interval(earlier, name),
                    "ceiling": self.ceiling(earlier, name),
                    **self._extremes(earlier, name),
                }
                for name in later
            },
            "pairs": self.pairs(),
            "reliability": {name: self.reliability(name) for name in self.parts},
        }

    def _extremes(self, first: str, second: str) -> dict:
        modules = self.cosines(first, second)["modules"]
        if not modules:
            return {}
        found = {"most_conflicting": min(modules, key=modules.get), "most_synergistic": max(modules, key=modules.get)}
        return {
            key: {
                "module": name,
                "cosine": modules[name],
                "interval": self.interval(first, second, module=name),
                "of": len(modules),
            }
            for key, name in found.items()
        }

    def _cosine(self, first: list[str], second: list[str]) -> float | None:
        return _cosine(self._products["global"][""], self._weights(first), self._weights(second))

    def _weights(self, domains: Sequence[str]) -> np.ndarray:
        weights = np.zeros(len(self._products["global"][""]))
        for domain in domains:
            weights[self.parts[domain]] += 1 / len(domains)
        return weights


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
