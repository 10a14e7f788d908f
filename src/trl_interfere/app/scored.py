"""Models that were scored on the same prompts: the stages of a run, or the checkpoints of an evaluation."""

from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.report import InterferenceReport
from ..evaluation.bootstrap import difference
from ..evaluation.flips import Flips, flips, most_by_chance
from ..evaluation.metrics import recovered_all
from ..evaluation.score_matrix import ScoreMatrix
from ..reporting.verdict import answer_text, arm_of, prompt_text, read_repair, verdict
from ..run import Run, StageRecord, read_json


SCORES_NAME = "scores.json"
RIVALS_NAME = "rivals.json"
KINDS = ("kept", "lost", "regained", "newly_lost")


class Scored:
    """What the page asks of a run or of an evaluation."""

    def __init__(self, name: str, folder: Path):
        self.name, self.is_run = name, not (folder / SCORES_NAME).is_file()
        self.run = Run(folder) if self.is_run else _evaluation(folder)
        self.models = [record.name for record in self.run.stages]
        self.matrix = ScoreMatrix.from_run(self.run)
        self.repair = read_repair(self.run) if self.is_run else None
        self.rows = cache(self.run.rows)  # of a model and a domain: `score`, `prompt` and `completions` by prompt

    @cached_property
    def verdict(self) -> str:
        """The sentence that comes first."""
        if self.is_run:
            return verdict(self.run, self.matrix, self.repair)
        parts = []
        for domain in self.matrix.domains:
            counts = self.flips(domain, *self.pair()).counts()
            parts.append(f"{domain}: {counts['newly_lost']} prompts lost and {counts['regained']} gained")
        return f"From {self.models[0]} to {self.models[-1]}: {'; '.join(parts)}."

    def pair(self) -> tuple[str, str]:
        """The two models that are compared first: the end of the training, and what healed it."""
        if not self.is_run:
            return self.models[0], self.models[-1]
        heal = next((record.name for record in reversed(self.run.stages) if record.kind == "heal"), None)
        return (self.run.final.name, heal) if heal else (self.models[0], self.run.final.name)

    def scores(self, model: str, domain: str) -> np.ndarray:
        """Score of each prompt."""
        values = self.matrix.values[self.run.stage(model).index]
        if domain not in values:
            raise ValueError(f"{model}: expected a model that was scored on {domain}, which {[*values]} it was")
        return values[domain]

    def peak(self, domain: str) -> str | None:
        """The model at the peak of a domain; of an evaluation the one that was named as such."""
        if not self.is_run:
            return self.run.about["peak"]
        return self.models[self.matrix.peak(domain, self.run.final.index)]

    def flips(self, domain: str, before: str, after: str) -> Flips:
        """Prompts kept, lost, regained and newly lost between two models; of a run beside the peak of the domain."""
        models = [model for model in (before, after, self.peak(domain)) if model is not None]
        return flips(*(self.samples(model, domain) for model in models))

    def by_chance(self, domain: str, before: str, after: str) -> dict[str, str]:
        """By kind, how many prompts a second sample from the unchanged model would flip, or a bound on it."""
        right, most = int((self.scores(before, domain) >= 0.5).sum()), most_by_chance(self.scores(before, domain))
        if self.run.identity.get("config", {}).get("score_temperature") == 0:
            return {**dict.fromkeys(KINDS, "0"), "kept": str(right)}
        at_peak = most_by_chance(self.scores(self.peak(domain) or before, domain))
        bounds = {"kept": f"≥ {right - most:.0f}", "lost": f"≤ {at_peak:.0f}"}
        bounds |= dict.fromkeys(("regained", "newly_lost"), f"≤ {most:.0f}")
        return bounds | {k: f"{count:.0f}" for k, count in self.flips(domain, before, after).expected.items()}

    def samples(self, model: str, domain: str) -> np.ndarray:
        """Scores of the samples of each prompt where they were kept, else their mean."""
        kept = [row.get("samples") for row in self.rows(model, domain)]
        return np.array(kept, dtype=np.float64) if all(kept) else self.scores(model, domain)

    def prompts(self, domain: str, before: str, after: str) -> list[list[Any]]:
        """A row for each prompt: number, what became of it, both scores, and its text."""
        kinds, first, second = self.flips(domain, before, after), self.rows(before, domain), self.rows(after, domain)
        became = ["gained" if row["score"] >= 0.5 else "wrong in both" for row in second]
        for kind in ("kept", "lost", "newly_lost", "regained"):  # the last one says most
            for number in getattr(kinds, kind):
                became[number] = kind.replace("_", " ")
        return [
            [number, became[number], one["score"], two["score"], prompt_text(one["prompt"] or two["prompt"])]
            for number, (one, two) in enumerate(zip(first, second, strict=True))
        ]

    def answers(self, domain: str, number: int) -> tuple[str, list[dict[str, Any]]]:
        """A prompt, and what every model wrote, with its score and the verifier's reason where there is one."""
        found, prompt = [], ""
        for record in self.run.stages:
            if domain in record.scores:
                rows = self.rows(record.name, domain)
                if not 0 <= number < len(rows):
                    raise ValueError(f"prompt: expected 0 to {len(rows) - 1}, found {number}")
                row = rows[number]
                prompt = prompt or prompt_text(row["prompt"])
                answer = {"model": record.name, "text": answer_text(row), "score": row["score"]}
                found.append(answer | {"reason": str(row.get("reason") or "")})
        return prompt, found

    def arms(self) -> list[dict[str, Any]]:
        """Every repair that the run has: its heal, its refreshes, and what the lab compared them with."""
        arms = [] if self.repair is None else [arm_of({"arm": "heal", **self.repair})]
        arms += [self._refresh(row) for row, record in enumerate(self.run.stages) if record.kind == "refresh"]
        path = self.run.folder / RIVALS_NAME
        return arms + [arm_of(row) for row in (read_json(path, 2)["rows"] if path.is_file() else [])]

    def _refresh(self, row: int) -> dict[str, Any]:
        record, before, after = self.run.stages[row], self.matrix.values[row - 1], self.matrix.values[row]
        peaks = {name: self.matrix.values[self.matrix.peak(name, row - 1)][name] for name in before}
        lost = [name for name in before if name in after and difference(peaks[name], before[name]).low > 0]
        share = recovered_all(*({name: values[name] for name in lost} for values in (after, before, peaks)))
        changes = [100 * float((after[name] - before[name]).mean()) for name in before if name in after]
        config = self.run.identity.get("config", {})
        batch = config.get("per_device_train_batch_size", 0) * config.get("gradient_accumulation_steps", 1)
        return arm_of(
            {
                "arm": f"refresh of {', '.join(record.domains)}, {record.steps} steps",
                "recovered_all": share.to_dict(),
                "worst": min(changes, default=None),
                "cost": {f"sequences_{k}": batch * record.steps for k in ("sampled", "forward", "backward")},
            }
        )

    @property
    def reports(self) -> dict[str, Path]:
        return self.run.reports

    def report(self, name: str) -> InterferenceReport:
        if name not in self.reports:
            raise ValueError(f"{self.name}: expected one of the reports {list(self.reports)}, found {name[:80]!r}")
        return InterferenceReport.from_pretrained(self.reports[name])


def _evaluation(folder: Path) -> Run:
    """The checkpoints of an evaluation as the stages of a run."""
    content = read_json(folder / SCORES_NAME, 2)
    run = Run.new(folder, {"config": content.get("sampling", {})}, about={"peak": None})
    for index, entry in enumerate(content["models"]):
        record = StageRecord(index, "train", Path(entry["model"]).name, None, 0, 0.0, entry["scores"], 0, {}, {})
        run.stages.append(record)
        if entry["model"] == content["peak"]:
            run.about["peak"] = record.name
    return run
