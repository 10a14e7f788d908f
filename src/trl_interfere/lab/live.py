"""Heal the lab's model while one waits, with any choice of domains, references and rank, beside a control."""

import tempfile
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.references import References
from ..evaluation.flips import flips
from ..evaluation.scorer import Scorer
from ..models import load_tokenizer
from ..repair.heal import account
from ..repair.peak_samples import peak_samples
from ..repair.subspace_rollback import SubspaceRollback
from ..run import Run, StageRecord
from .build import MODEL_FOLDER
from .domains import REWARDS, lab_domain
from .packed import unpack


PROMPTS = 128  # of the test split, for each domain
MAX_COMPLETION_LENGTH = 16
MAX_KEPT = 64  # results
MAX_REFERENCES, MAX_RANK = 128, 128


@dataclass
class LiveResult:
    """
    What a heal did.

    Args:
        figures (`dict`):
            `domains`, `recovered_all` and `worst`, as in `repair.json`.
        layers (`list[dict]`):
            For each layer what changed, as in `repair.json`.
        examples (`list[dict]`):
            Prompts that came back: `domain`, `prompt`, and `peak`, `final`, `healed` with `peak_score` and so on.
        seconds (`float`):
            Time that it took, scoring included.
    """

    figures: dict[str, Any]
    layers: list[dict[str, Any]]
    examples: list[dict[str, Any]]
    seconds: float


def own_stages(run: Run) -> dict[str, StageRecord]:
    """The stage that stands for each earlier domain in a repair, as in `heal`: that of its own training."""
    own = {name: run.trained(name) for name in run.final.scores}
    return {name: record for name, record in own.items() if record is not None and record.index < run.final.index}


def damaged_since(run: Run, peaks: dict[str, StageRecord]) -> list[str]:
    """Domains that score less at the end than after their own stage."""
    return [name for name, own in peaks.items() if run.scores(own, name).mean() > run.scores(run.final, name).mean()]


class LiveHeal:
    """
    A packed run of the lab that can be healed at once.

    Args:
        folder (`pathlib.Path`):
            Folder of the run, see [`~lab.packed.pack`].
        prompts (`int`, *optional*, defaults to `PROMPTS`):
            Test prompts of each domain.
    """

    def __init__(self, folder: Path, prompts: int = PROMPTS):
        self.run = Run(folder)
        self._scratch = tempfile.TemporaryDirectory(prefix="trl-interfere-")
        self._weights: dict[str, str] = {}
        self._kept: OrderedDict[tuple, LiveResult] = OrderedDict()
        self._references: dict[tuple, dict[str, References]] = {}
        self._lock = threading.Lock()
        final = self.run.final
        self.domains = list(final.scores)
        self.peaks = own_stages(self.run)
        self.damaged = damaged_since(self.run, self.peaks)
        self._rows = {name: self.run.rows(final, name)[:prompts] for name in self.domains}
        self._peak_rows = {name: self.run.rows(self.peaks.get(name, final), name)[:prompts] for name in self.domains}
        self._lab = {name: lab_domain(name, prompts) for name in self.domains}
        tokenizer = load_tokenizer(str(MODEL_FOLDER))
        self._scorer = Scorer(
            tokenizer, max_new_tokens=MAX_COMPLETION_LENGTH, batch_size=4 * prompts, temperature=1.0, seed=0
        )

    def heal(
        self,
        domains: list[str] | None = None,
        protect: list[str] | None = None,
        references: int = 64,
        rank: int = 64,
        control: bool = False,
    ) -> LiveResult:
        """
        Heal, measure, and leave the run as it is.

        Args:
            domains (`list[str]`, *optional*):
                Domains to heal. Defaults to those that were damaged.
            protect (`list[str]`, *optional*):
                Other domains that shall keep what they have. Defaults to all.
            references (`int`, *optional*, defaults to `64`):
                Reference completions of each domain.
            rank (`int`, *optional*, defaults to `64`):
                Rank of the change of each layer.
            control (`bool`, *optional*, defaults to `False`):
                Whether each domain gets the references, and so the moments, of another one.

        Returns:
            [`LiveResult`]: What it did on test prompts.
        """
        domains = self.damaged if domains is None else [name for name in self.domains if name in domains]
        protect = self.domains if protect is None else protect
        chosen = [name for name in self.domains if name in domains or name in protect]
        if not domains or not set(domains) <= set(self.peaks):
            raise ValueError(f"domains: expected at least one of {list(self.peaks)}, found {domains}")
        for name, value, most in (("references", references, MAX_REFERENCES), ("rank", rank, MAX_RANK)):
            if not 1 <= value <= most:
                raise ValueError(f"{name}: expected 1 to {most}, found {value}")
        if control and len(chosen) < 2:
            raise ValueError("control: expected a domain to heal and another one, to shuffle their references")
        key = (tuple(domains), tuple(chosen), references, rank, control)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._heal(domains, chosen, references, rank, control)
            self._kept.move_to_end(key)
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]

    def _heal(self, domains: list[str], chosen: list[str], references: int, rank: int, control: bool) -> LiveResult:
        start = time.perf_counter()
        final = self._checkpoint(self.run.final)
        peaks = {name: self._checkpoint(self.peaks[name]) for name in domains}
        method = SubspaceRollback(rank=rank, references=references, max_new_tokens=MAX_COMPLETION_LENGTH)
        of_all = [self._lab[name] for name in chosen]
        sampled = (tuple(domains), tuple(chosen), references)
        if sampled not in self._references:
            self._references[sampled] = peak_samples(
                final, peaks, of_all, references, max_new_tokens=MAX_COMPLETION_LENGTH, batch_size=references
            )
        found = self._references[sampled]
        if control:
            found = {name: found[chosen[place - 1]] for place, name in enumerate(chosen)}
        repair = method.fit(final, peaks, of_all, references=found)
        healed = self._answers(repair.merge())
        scores = [
            {name: np.array([row["score"] for row in rows]) for name, rows in of_model.items()}
            for of_model in (self._peak_rows, self._rows, healed)
        ]
        examples = [self._example(name, place, healed) for name in domains for place in self._regained(name, scores)]
        return LiveResult(
            figures=account(*scores, domains),
            layers=repair.record["layers"],
            examples=examples[:3],
            seconds=time.perf_counter() - start,
        )

    def _regained(self, name: str, scores: list[dict[str, np.ndarray]]) -> list[int]:
        peak, final, healed = (of_model[name] for of_model in scores)
        return flips(final, healed, peak).regained.tolist()

    def _example(self, name: str, place: int, healed: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        models = {"peak": self._peak_rows, "final": self._rows, "healed": healed}
        answers = {key: of_model[name][place]["completions"][0] for key, of_model in models.items()}
        values = {f"{key}_score": of_model[name][place]["score"] for key, of_model in models.items()}
        return {"domain": name, "prompt": self._rows[name][place]["prompt"], **answers, **values}

    def _answers(self, model: Any) -> dict[str, list[dict[str, Any]]]:
        # All domains in one batch: one pass over the tokens instead of four.
        asked = [(name, row) for name, domain in self._lab.items() for row in domain.eval_dataset]
        completions = self._scorer.complete(model, [row["prompt"] for _, row in asked])
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in self._lab}
        for (name, row), text in zip(asked, completions, strict=True):
            columns = {key: [value] for key, value in row.items() if key != "prompt"}
            (value,) = REWARDS[name](prompts=[row["prompt"]], completions=[text], **columns)
            rows[name].append({"score": value, "completions": [text]})
        return rows

    def _checkpoint(self, record: Any) -> str:
        """Folder of the whole weights of a stage."""
        if record.folder is None:
            return str(MODEL_FOLDER)
        if record.name not in self._weights:
            target = Path(self._scratch.name) / record.name
            self._weights[record.name] = str(unpack(self.run.folder, record.name, target))
        return self._weights[record.name]
