"""SubspaceRollback: layer by layer, the weights with which the final model computes what the peaks computed."""

import copy
import ctypes
import functools
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm

from ..analysis.references import References
from ..checkpoint import Checkpoint, check_comparable
from ..domain import Domain
from .activation_moments import ActivationMoments, Solution, effective_dimension, gram, random_dimension
from .block_stream import BlockStream, skeleton
from .layers import Group, Pass, Step, finished, narrow
from .peak_samples import peak_samples
from .repair import Repair, recorded


MODULES = ("all", "mlp", "attention")
ROWS = 4096  # of a tensor, at a time
LARGE = 2**22  # bytes of a block
DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass
class SubspaceRollback:
    """
    Heal in closed form: choose the weights of every linear layer, from the first block on, with which the healed model
    gives on the inputs that it really gets what each domain's peak gave on its own. See [`Solution`] for the equation.

    No gradient, no label, no training. The change of each layer is cut to a rank in the metric of its moments before
    the next layer is solved, so that the whole is a LoRA adapter over the final checkpoint.

    Example:

    ```python
    >>> from trl_interfere import SubspaceRollback

    >>> repair = SubspaceRollback(rank=64).fit(
    ...     final="out/stages/4-writing", peaks={"math": "out/stages/2-math"}, domains=[code, math, qa, writing]
    ... )
    >>> repair.save_pretrained("repair")
    ```

    Args:
        rank (`int`, *optional*, defaults to `64`):
            Rank of the change of each layer; `None` keeps all of it.
        weights (`dict[str, float]`, *optional*):
            Weight of each domain in the least squares. Defaults to 1 each.
        ridge (`float`, *optional*, defaults to `0.01`):
            Share of the mean eigenvalue of the moments that holds directions that no reference uses where they are.
        sequential (`bool`, *optional*, defaults to `True`):
            Whether a layer is solved on what it gets in the healed model so far. `False` takes the peaks' inputs for
            all layers at once ("one shot"), for the half of the cost.
        modules (`str` or `list[str]`, *optional*, defaults to `"all"`):
            `"all"`, `"mlp"`, `"attention"`, or ends of names of linear layers.
        references (`int`, *optional*, defaults to `64`):
            Reference completions of each domain.
        batch_size (`int`, *optional*, defaults to `32`):
            References at a time.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Maximum length of a sampled reference.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature at which references are sampled.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Data type of the forward passes. Sums are always in float64.
        data_parallel (`bool`, *optional*, defaults to `False`):
            Whether the processes of `accelerate launch` share the references.

    Raises:
        `ValueError`: If a setting is out of range.
    """

    rank: int | None = 64
    weights: dict[str, float] | None = None
    ridge: float = 0.01
    sequential: bool = True
    modules: str | list[str] = "all"
    references: int = 64
    batch_size: int = 32
    max_new_tokens: int = 256
    temperature: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    data_parallel: bool = False

    def __post_init__(self):
        for name in ("rank", "references", "batch_size", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: expected a whole number, at least 1, found {value!r}")
        if not 0 < self.ridge < float("inf"):
            raise ValueError(f"ridge: expected a share above 0, found {self.ridge!r}")
        for name, known in (("modules", MODULES), ("dtype", DTYPES)):
            if isinstance(value := getattr(self, name), str) and value not in known:
                raise ValueError(f"{name}: expected one of {list(known)}, found {value!r}")
        for name, weight in (self.weights or {}).items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"weights[{name!r}]: expected 0 or more, found {weight!r}")

    def fit(
        self,
        final: str | Path,
        peaks: dict[str, str | Path],
        domains: Sequence[Domain],
        references: dict[str, References] | None = None,
        base: str | Path | None = None,
        progress: bool = False,
    ) -> Repair:
        """
        Make the repair.

        Args:
            final (`str` or `pathlib.Path`):
                Folder or Hub id of the checkpoint to heal, whole weights or a LoRA adapter.
            peaks (`dict[str, str or pathlib.Path]`):
                For each damaged domain the checkpoint after which it scored best. Every other domain counts with the
                final checkpoint, which protects it.
            domains (`Sequence[Domain]`):
                The domains. References are drawn from their training prompts, else from their selection split.
            references (`dict[str, References]`, *optional*):
                References by domain. Defaults to completions that the peak of each domain samples.
            base (`str` or `pathlib.Path`, *optional*):
                Model that adapters stand on. Defaults to the one that they name.
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar over blocks.

        Returns:
            [`Repair`]: The repair.

        Raises:
            `ValueError`: If the checkpoints are of different models, a peak equals the final one, a domain has no
                references, or activations are not finite.
        """
        started = time.perf_counter()
        names = [domain.name for domain in domains]
        for where, given in (("peaks", peaks), ("weights", self.weights or {})):
            if unknown := [name for name in given if name not in names]:
                raise ValueError(f"{where}: expected some of the domains {names}, found {unknown}")
        if not peaks:
            raise ValueError("peaks: expected the peak checkpoint of at least one damaged domain, found none")
        at_end = Checkpoint(final, base=base)
        at_peak = {name: Checkpoint(peak, base=base) for name, peak in peaks.items()}
        for checkpoint in at_peak.values():
            check_comparable(at_end, checkpoint)
        places = recorded(at_end, at_peak)
        for name, place in places["peaks"].items():
            if place["digest"] == places["final"]["digest"]:
                raise ValueError(f"peaks[{name!r}]: {peaks[name]} equals the final checkpoint {final}")
        sampled = references is None
        if sampled:
            sampling = {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size, "seed": self.seed}
            paths = {name: str(peak) for name, peak in peaks.items()}
            references = peak_samples(
                str(final), paths, domains, self.references, base, self.temperature, progress=progress, **sampling
            )
        for name in names:
            if name not in references or not references[name].completions:
                raise ValueError(f"domain {name!r}: expected references, found none")
        fitted = time.perf_counter()
        factors, solved = self._solve({None: at_end, **at_peak}, {name: references[name] for name in names}, progress)
        sequences = sum(len(references[name].completions) for name in names)
        record = {
            "method": "subspace",
            "settings": asdict(self),
            "rank": self.rank,
            "references": max(len(references[name].completions) for name in names),
            "weights": {name: (self.weights or {}).get(name, 1.0) for name in names},
            "checkpoints": places,
            **solved,
            "cost": {
                "sequences_sampled": sequences if sampled else 0,
                "sequences_forward": 2 * sequences,
                "sequences_backward": 0,
                "seconds": round(time.perf_counter() - started, 2),
                "seconds_sampling": round(fitted - started, 2),
            },
        }
        return Repair(factors, at_end, record)

    @torch.no_grad()
    def _solve(self, checkpoints: dict[str | None, Checkpoint], references: dict[str, References], progress: bool):
        """Factors by full name of a module or tensor of experts, and what the record says of them."""
        model, device = skeleton(checkpoints[None]), PartialState().device
        settings = (model, getattr(torch, self.dtype), device)
        streams = {name: BlockStream(checkpoint, *settings) for name, checkpoint in checkpoints.items()}
        passes, names = self._passes(streams, references), streams[None].names
        pairs = [pair for of_domain in passes.values() for pair in of_domain]
        factors, figures, left = {}, [], LeftAsItIs(streams)
        for index in tqdm(range(len(names)), desc="heal", unit="block", disable=not progress):
            final = streams[None].block(index)
            healed = copy.deepcopy(final)
            peaks = {name: streams[name].block(index) if name in streams else final for name in references}
            chosen = functools.partial(self._chosen, final, names[index])
            for name, of_domain in passes.items():
                for pair in of_domain:
                    steps = pair.run_peak(peaks[name], index, chosen)
                    _return_freed_memory(final)
            paths = [group[0].path for group, *_ in steps]
            for number, step in enumerate(steps):
                done = finished(healed, paths, paths[number:])
                for group in step:
                    found = self._moments(step, group, number, healed, peaks, passes, index, done)
                    for layer, left_factor, right_factor, row in self._layers(group, found, final, healed, peaks):
                        name = f"{names[index]}.{layer.name}"
                        factors.setdefault(name, []).append((left_factor.float().cpu(), right_factor.float().cpu()))
                        figures.append({"name": name, "expert": layer.expert, "block": index, **row})
            for pair in pairs if self.sequential else ():
                pair.run_healed(healed, index, finished(healed, paths, []))
                _return_freed_memory(final)
            left.add(final, peaks, {layer.tensor for step in steps for group in step for layer in group})
        routed = torch.tensor([sum(pair.switched for pair in pairs), sum(pair.routed for pair in pairs)]).to(device)
        if self._processes() > 1:
            torch.distributed.all_reduce(routed)
        switched = float(routed[0] / routed[1]) if routed[1] else None
        if not factors:
            raise ValueError(f"modules: expected ends of names of linear layers in blocks, found {self.modules!r}")
        record = {"layers": figures, "left_as_it_is": left.shares(), "switched_tokens": switched}
        factors = {  # those of all experts of a layer in one tensor each
            name: parts[0] if len(parts) == 1 else tuple(map(torch.stack, zip(*parts, strict=True)))
            for name, parts in factors.items()
        }
        return factors, record

    def _passes(self, streams: dict[str | None, BlockStream], references: dict[str, References]):
        """The batches of each domain, before the first block."""
        passes = {}
        for name, found in references.items():
            batches = found.batches(self.batch_size, 0, torch.device("cpu"))
            if self.data_parallel:
                batches = batches[PartialState().process_index :: self._processes()]
            if not batches:
                raise ValueError(f"batch_size: expected a batch of domain {name!r} for each process, lower it")
            peak = list(streams.get(name, streams[None]).entries(batches))
            healed = list(streams[None].entries(batches)) if self.sequential else [None] * len(peak)
            passes[name] = [Pass(*pair) for pair in zip(peak, healed, strict=True)]
        return passes

    def _processes(self) -> int:
        return PartialState().num_processes if self.data_parallel else 1

    def _chosen(self, block: nn.Module, name: str, path: str) -> bool:
        """Whether the layers of a module are to be solved for."""
        if self.modules == "all":
            return True
        if isinstance(self.modules, list):
            return any(f"{name}.{path}".endswith(end) for end in self.modules)
        # A linear layer belongs to attention where a module around it says so.
        around = [type(module).__name__ for place, module in block.named_modules() if path.startswith(f"{place}.")]
        return any("attention" in name.lower() for name in around) == (self.modules == "attention")

    def _moments(self, step: Step, group: Group, number: int, healed, peaks, passes, index: int, done):
        """Moments of the inputs of a group, by domain."""
        weights = [layer.weight(healed) for layer in group]
        width = weights[0].shape[1]
        rows = min(sum(map(len, weights)), width) if self.sequential else None
        found = {}
        for name, of_domain in passes.items():
            found[name] = moments = ActivationMoments(width, rows, weights[0].device)
            for pair in of_domain:
                if self.sequential and group is step[0]:
                    pair.capture(healed, index, number, group[0], done)
                moments.add(*pair.tokens(group, number, peaks[name], healed))
                if group is step[-1]:
                    pair.now, pair.kept[number] = [], []
            moments.finish(reduce=self._processes() > 1)
            if group is step[-1]:
                _return_freed_memory(healed)
            if not torch.isfinite(moments.moments.sum() + moments.cross.sum()):
                where = f"domain {name!r}, {group[0].path} of block {index}"
                raise ValueError(f"{where}: expected finite activations, found NaN or infinity")
        return found

    def _layers(self, group: Group, found: dict[str, ActivationMoments], final, healed, peaks):
        """Solve for the layers of a group, one after the other, and put the weights into the healed block."""
        shares = {name: (self.weights or {}).get(name, 1.0) / max(m.count, 1) for name, m in found.items()}
        angles, total = _angles(found), torch.zeros_like(next(iter(found.values())).moments)
        for name, share in shares.items():
            total.add_(found[name].moments, alpha=share)
            if self.sequential:
                found[name].moments = None
        if not total.diagonal().sum() > 0:  # an expert that no token reaches stays as it is
            for layer in group:
                outputs, width = layer.weight(final).shape
                rank = min(outputs, width, self.rank or outputs)
                yield layer, torch.zeros(outputs, rank), torch.zeros(rank, width), {"tokens": 0}
            return
        mean = sum(share * found[name].sum for name, share in shares.items())
        solution = Solution(total, self.ridge)
        start = 0
        for layer in group:
            weight, bias = layer.weight(final).double(), layer.bias(final)
            rows = slice(start, start := start + len(weight))
            now = weight @ total  # what the layer gives in the healed model so far, without its bias
            residual = -now if bias is None else -now - torch.outer(bias.double(), mean)
            for name, moments in found.items():
                given = moments.cross[rows]  # Y X'ᵀ of the layer, or to be made of X X'ᵀ
                if not (self.sequential and narrow(group, final)):
                    given = layer.weight(peaks[name]).double() @ moments.cross
                    if (shift := layer.bias(peaks[name])) is not None:
                        given.addr_(shift.double(), moments.sum)
                residual.add_(given, alpha=shares[name])
            change = solution.change(residual)
            products = gram(change)
            left, right = solution.factors(change, products, self.rank)
            difference, output = left @ right, float((now * weight).sum())
            layer.weight(healed).copy_(weight + difference)
            row = {
                "tokens": sum(moments.count for moments in found.values()),
                "change": float(difference.norm() / weight.norm()),
                "output_change": float(change.norm() / output**0.5) if output > 0 else 0.0,
                "effective_dimension": effective_dimension(products),
                "effective_dimension_random": random_dimension(total, len(weight)),
                "angles": angles,
            }
            yield layer, left, right, row


class LeftAsItIs:
    """How much of the update since each peak, in squared norm, lies in tensors that no layer of the repair holds."""

    def __init__(self, streams: dict[str | None, BlockStream]):
        self.whole = dict.fromkeys((name for name in streams if name is not None), 0.0)
        self.left = dict(self.whole)
        for parameter in streams[None].outside:
            shape = streams[None].model.get_parameter(parameter).shape
            starts = range(0, shape[0], ROWS) if shape else ()  # embeddings are the largest tensors
            for rows in [slice(start, min(start + ROWS, shape[0])) for start in starts] or [...]:
                final = streams[None].tensor(parameter, rows)
                for name in self.whole:
                    self._note(name, final, streams[name].tensor(parameter, rows), solved=False)

    def add(self, final: nn.Module, peaks: dict[str, nn.Module], solved: set[str]) -> None:
        for name in self.whole:
            for parameter, value in final.named_parameters():
                self._note(name, value, peaks[name].get_parameter(parameter), parameter in solved)

    def _note(self, name: str, final: torch.Tensor, peak: torch.Tensor, solved: bool) -> None:
        size = float(torch.linalg.vector_norm(final - peak, dtype=torch.float64)) ** 2
        self.whole[name] += size
        self.left[name] += 0.0 if solved else size

    def shares(self) -> dict[str, float]:
        return {name: self.left[name] / size if size else 0.0 for name, size in self.whole.items()}


def _angles(found: dict[str, ActivationMoments]) -> dict[str, float]:
    """Cosine of what two domains use of a layer's inputs, `tr(C_a C_b) / (‖C_a‖ ‖C_b‖)`."""
    flat = {name: moments.moments.flatten() for name, moments in found.items() if moments.count}
    norms = {name: values.norm() for name, values in flat.items()}
    return {f"{a} {b}": float(flat[a] @ flat[b] / (norms[a] * norms[b])) for a, b in itertools.combinations(flat, 2)}


def _return_freed_memory(block: nn.Module) -> None:
    """
    glibc keeps what was freed in pieces that the next pass or sum cannot use: without this, half of the peak. Small
    blocks free too little to be worth the call.
    """
    size = sum(parameter.nbytes for parameter in block.parameters())
    if size > LARGE and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
