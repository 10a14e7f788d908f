"""Heal the lab's model while one waits, with any choice of domains, references and rank, beside a control."""

import tempfile
import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

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
    """What a heal did."""

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
    """A packed run of the lab that can be healed at once."""

    def __init__(self, folder: Path, prompts: int = PROMPTS):
        self.run = Run(folder)
        self._scratch = tempfile.TemporaryDirectory(prefix="trl-interfere-")
        self._lock = threading.Lock()
        self._checkpoint, self._sampled, self._heal = (
            lru_cache(MAX_KEPT)(function) for function in (self._checkpoint, self._sampled, self._heal)
        )
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
        """Heal, measure, and leave the run as it is."""
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
        with self._lock:
            return self._heal(tuple(domains), tuple(chosen), references, rank, control)

    def _heal(
        self, domains: tuple[str, ...], chosen: tuple[str, ...], references: int, rank: int, control: bool
    ) -> LiveResult:
        start = time.perf_counter()
        final, peaks = self._checkpoint(self.run.final.name), self._peaks(domains)
        found = self._sampled(domains, chosen, references)
        if control:
            found = {name: found[chosen[place - 1]] for place, name in enumerate(chosen)}
        method = SubspaceRollback(rank=rank, references=references, max_new_tokens=MAX_COMPLETION_LENGTH)
        repair = method.fit(final, peaks, [self._lab[name] for name in chosen], references=found)
        rows = {"peak": self._peak_rows, "final": self._rows, "healed": self._answers(repair.merge())}
        scores = {
            model: {name: np.array([row["score"] for row in part]) for name, part in of_model.items()}
            for model, of_model in rows.items()
        }
        examples = []
        for name in domains:
            for place in flips(*(scores[model][name] for model in ("final", "healed", "peak"))).regained.tolist():
                at = {model: of_model[name][place] for model, of_model in rows.items()}
                answers = {model: row["completions"][0] for model, row in at.items()}
                values = {f"{model}_score": row["score"] for model, row in at.items()}
                examples.append({"domain": name, "prompt": at["final"]["prompt"], **answers, **values})
        figures, seconds = account(*scores.values(), list(domains)), time.perf_counter() - start
        return LiveResult(figures, repair.record["layers"], examples[:3], seconds)

    def _peaks(self, domains: tuple[str, ...]) -> dict[str, str]:
        return {name: self._checkpoint(self.peaks[name].name) for name in domains}

    def _sampled(self, domains: tuple[str, ...], chosen: tuple[str, ...], references: int) -> dict[str, Any]:
        lab, longest = [self._lab[name] for name in chosen], MAX_COMPLETION_LENGTH
        places = (self._checkpoint(self.run.final.name), self._peaks(domains), lab, references)
        return peak_samples(*places, max_new_tokens=longest, batch_size=references)

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

    def _checkpoint(self, stage: str) -> str:
        """Folder of the whole weights of a stage."""
        return str(unpack(self.run.folder, stage, Path(self._scratch.name) / stage))
