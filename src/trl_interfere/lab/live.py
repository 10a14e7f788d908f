"""Repair the lab's model while one waits, with any choice of domains and settings, beside a control."""

import tempfile
import threading
import time
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.report import InterferenceReport
from ..evaluation.flips import flips
from ..evaluation.scorer import Scorer
from ..models import load_tokenizer
from ..repair.heal import account
from ..repair.peak_samples import peak_samples
from ..repair.repair import Repair
from ..repair.route_rollback import RouteRollback
from ..repair.subspace_rollback import SubspaceRollback
from ..run import Run
from . import MODEL_FOLDER
from .domains import REWARDS, lab_domain
from .packed import unpack


PROMPTS = 128  # of the test split, for each domain
MAX_COMPLETION_LENGTH = 16
MAX_KEPT = 64  # results


@dataclass
class LiveResult:
    """What a repair did: its figures, its record, prompts that came back, and how long it took."""

    figures: dict[str, Any]
    record: dict[str, Any]
    examples: list[dict[str, Any]]
    seconds: float


class LiveHeal:
    """A packed run of the lab that can be repaired at once; the run stays as it is."""

    def __init__(self, folder: Path, prompts: int = PROMPTS):
        self.run, self.prompts = Run(folder), prompts
        final = self.run.final
        self.domains = list(final.scores)
        # The stage that stands for each earlier domain, as in `heal`: that of its own training.
        own = {name: self.run.trained(name) for name in self.domains}
        self.peaks = {name: record for name, record in own.items() if record and record.index < final.index}
        scores = {name: [self.run.scores(stage, name).mean() for stage in (own[name], final)] for name in self.peaks}
        self.damaged = [name for name, (peak, end) in scores.items() if peak > end]
        self._scratch = tempfile.TemporaryDirectory(prefix="trl-interfere-")
        self._lock = threading.Lock()
        self._checkpoint, self._sampled, self._heal, self._rollback = (
            lru_cache(MAX_KEPT)(function) for function in (self._checkpoint, self._sampled, self._heal, self._rollback)
        )

    def heal(
        self,
        domains: list[str] | None = None,
        protect: list[str] | None = None,
        references: int = 64,
        rank: int = 64,
        control: bool = False,
    ) -> LiveResult:
        """A subspace rollback; as its control every domain gets the references of another one."""
        domains = self.damaged if domains is None else [name for name in self.domains if name in domains]
        protect = self.domains if protect is None else protect
        chosen = [name for name in self.domains if name in domains or name in protect]
        if not domains or not set(domains) <= set(self.peaks):
            raise ValueError(f"domains: expected at least one of {list(self.peaks)}, found {domains}")
        if control and len(chosen) < 2:
            raise ValueError("control: expected a domain to heal and another one, to shuffle their references")
        with self._lock:
            return self._heal(tuple(domains), tuple(chosen), references, rank, control)

    def rollback(self, domain: str, budget: float, control: bool = False) -> LiveResult:
        """A rollback of the routes that carry the damage of a domain; as its control as many random ones."""
        if domain not in self.reports:
            raise ValueError(f"domains: expected one with a report, {list(self.reports)}, found {domain!r}")
        with self._lock:
            return self._rollback(domain, budget, control)

    @cached_property
    def reports(self) -> dict[str, InterferenceReport]:
        """By domain, the report on what happened to it from its own stage to the end."""
        found = {}
        for name, own in self.peaks.items():
            if (folder := self.run.analysis(name)).is_dir():
                report = InterferenceReport.from_pretrained(folder)
                if [Path(place).name for place in (report.before, report.after)] == [own.name, self.run.final.name]:
                    found[name] = replace(report, digests=None)  # those of weights before they were packed
        return found

    def _heal(
        self, domains: tuple[str, ...], chosen: tuple[str, ...], references: int, rank: int, control: bool
    ) -> LiveResult:
        start = time.perf_counter()
        method = SubspaceRollback(rank=rank, references=references, max_new_tokens=MAX_COMPLETION_LENGTH)
        places = self._places(domains, chosen)
        found = self._sampled(domains, chosen, references)
        if control:
            found = {name: found[chosen[place - 1]] for place, name in enumerate(chosen)}
        return self._result(method.fit(*places, references=found), domains, start)

    def _rollback(self, domain: str, budget: float, control: bool) -> LiveResult:
        start = time.perf_counter()
        ranked = {"criterion": "random"} if control else {"criterion": "damage", "protection": 1.0}
        before, after = (self._checkpoint(record.name) for record in (self.peaks[domain], self.run.final))
        method = RouteRollback(budget=budget, scope="joint", **ranked)
        return self._result(method.fit(self.reports[domain], before=before, after=after), (domain,), start)

    def _result(self, repair: Repair, domains: tuple[str, ...], start: float) -> LiveResult:
        rows = self._rows | {"healed": self._answers(repair.merge())}
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
        return LiveResult(figures, repair.record, examples[:3], seconds)

    def _places(self, domains: tuple[str, ...], chosen: tuple[str, ...]) -> tuple[Any, ...]:
        """The final checkpoint, the peaks, and the domains that count."""
        peaks = {name: self._checkpoint(self.peaks[name].name) for name in domains}
        return self._checkpoint(self.run.final.name), peaks, [self._lab[name] for name in chosen]

    def _sampled(self, domains: tuple[str, ...], chosen: tuple[str, ...], references: int) -> dict[str, Any]:
        settings = {"max_new_tokens": MAX_COMPLETION_LENGTH, "batch_size": references}
        return peak_samples(*self._places(domains, chosen), references, **settings)

    @cached_property
    def _lab(self) -> dict[str, Any]:
        return {name: lab_domain(name, self.prompts) for name in self.domains}

    @cached_property
    def _rows(self) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """What the peak of each domain and the final model wrote."""
        found = {}
        for model, records in (("peak", self.peaks), ("final", {})):
            of_domain = {name: self.run.rows(records.get(name, self.run.final), name) for name in self.domains}
            found[model] = {name: rows[: self.prompts] for name, rows in of_domain.items()}
        return found

    @cached_property
    def _scorer(self) -> Scorer:
        settings = {"max_new_tokens": MAX_COMPLETION_LENGTH, "batch_size": 4 * self.prompts, "temperature": 1.0}
        return Scorer(load_tokenizer(str(MODEL_FOLDER)), **settings)

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
