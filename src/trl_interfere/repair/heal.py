"""Heal: find what was lost, choose a repair on the selection split, report it on the test split, write it."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from .. import __version__
from ..domain import Domain
from ..evaluation.bootstrap import Interval, difference, score
from ..evaluation.checkpoints import SPLITS, scorer_of
from ..evaluation.flips import flips
from ..evaluation.metrics import recovered, recovered_all
from ..evaluation.scorer import DomainScores, Scorer
from ..models import load_model, load_tokenizer
from ..run import Run, StageRecord
from ..stage_record import stage_name
from .repair import Repair
from .subspace_rollback import SubspaceRollback


# Weights of the domains that are not restored, in place of 1, that a search tries.
PROTECTIONS = (1.0, 3.0, 10.0)
Scores = dict[str, np.ndarray]


def lost_beyond_interval(peaks: Scores, final: Scores) -> list[str]:
    """Domains that lost more than the interval of the loss, the largest loss first."""
    lost = {name: difference(peaks[name], final[name]) for name in final if name in peaks}
    return sorted((name for name in lost if lost[name].low > 0), key=lambda name: -lost[name].value)


def scores_of(scorer: Scorer, model: PreTrainedModel, domains: Sequence[Domain], split: str) -> Scores:
    """Scores of each prompt of a split, by domain."""
    return {domain.name: scorer.score(model, domain, getattr(domain, SPLITS[split])).values for domain in domains}


def run_peaks(run: Run, domains: Sequence[Domain], scorer: Scorer) -> dict[str, StageRecord]:
    """
    The stage that stands for each earlier domain in the repair: that of its own training, which is known without any
    score. A domain that the later stages have made better, beyond the interval on its selection split, counts with the
    final checkpoint instead.
    """
    final, found = run.final, {}
    model = load_model(run.weights(final), base=run.base_model)
    for domain in domains:
        own = run.trained(domain.name)
        if own is None or own.index >= final.index:
            continue
        if domain.selection_dataset is None:
            before, after = run.scores(own, domain.name), run.scores(final, domain.name)
        else:
            peak = load_model(run.weights(own), base=run.base_model)
            before, after = (scorer.score(m, domain, domain.selection_dataset).values for m in (peak, model))
        if not difference(after, before).low > 0:
            found[domain.name] = own
    return found


def heal(
    final: str | Path,
    peaks: dict[str, str | Path],
    domains: Sequence[Domain],
    scorer: Scorer,
    method: SubspaceRollback | None = None,
    max_drop: float = 1.0,
    search: bool = False,
    scores: tuple[Scores, Scores] | None = None,
    base: str | Path | None = None,
    progress: bool = False,
) -> tuple[Repair, dict[str, DomainScores]]:
    """
    Repair a checkpoint, and say in the record what it did on the test split; also the scores of the healed model.

    A domain may lose `max_drop` points on the selection split, where it has one; `search` tries heavier weights for
    the domains that are not restored. `scores` are those of each test prompt at the peaks and at the end, if known.
    """
    method = method or SubspaceRollback()
    tested = [domain for domain in domains if domain.eval_dataset is not None]
    chosen = [domain for domain in domains if domain.selection_dataset is not None]
    model = load_model(final, base=base)
    before = scores_of(scorer, model, chosen, "selection")
    if scores is None:
        at_peak = {}
        for domain in tested:
            peak = load_model(peaks[domain.name], base=base) if domain.name in peaks else model
            at_peak |= scores_of(scorer, peak, [domain], "test")
        scores = (at_peak, scores_of(scorer, model, tested, "test"))
    del model

    def trials() -> Iterator[tuple[tuple, Repair, PreTrainedModel, float | None]]:
        for protection in PROTECTIONS if search else (None,):
            trial = method
            if protection is not None:
                trial = replace(method, weights={d.name: 1.0 if d.name in peaks else protection for d in domains})
            repair = trial.fit(final, peaks, domains, base=base, progress=progress)
            healed = repair.merge()
            after = scores_of(scorer, healed, chosen, "selection")
            changes = [difference(after[name], before[name]).value for name in after]
            worst = min(changes, default=None)
            # First what keeps to the limit, then the best mean.
            yield (worst is None or worst >= -max_drop, np.mean(changes) if changes else 0.0), repair, healed, worst

    (within, _), repair, healed, worst = max(trials(), key=lambda trial: trial[0])
    tests = {domain.name: scorer.score(healed, domain, domain.eval_dataset) for domain in tested}
    repair.record.update(
        split="test",
        max_drop=max_drop,
        within_max_drop=within,
        worst_on_selection=worst,
        **account(*scores, {name: found.values for name, found in tests.items()}, list(peaks)),
    )
    return repair, tests


def account(peaks: Scores, final: Scores, healed: Scores, restored: Sequence[str]) -> dict[str, Any]:
    """
    Figures of a repair from the score of each test prompt, 0 to 1, at the peaks, before and after.

    `recovered_all` is of what the `restored` domains have lost in sum, and `worst` the lowest change of a domain in
    points of 100.
    """
    rows, damaged = {}, lost_beyond_interval(peaks, final)
    for name in final:
        found = {key: score(v[name]) for key, v in (("peak", peaks), ("final", final), ("healed", healed))}
        change, turned = difference(healed[name], final[name]), flips(final[name], healed[name], peaks[name])
        share = Interval(*[np.nan] * 3, 0)
        if name in restored:
            share = recovered(healed[name], final[name], peaks[name])
        rows[name] = {
            **{key: interval.value for key, interval in found.items()},
            "intervals": {key: [interval.low, interval.high] for key, interval in found.items()},
            "damaged": name in damaged,
            **_known("recovered", share),
            "change": change.to_dict(),
            "n": len(final[name]),
            **{key: len(getattr(turned, key)) for key in ("lost", "regained", "newly_lost")},
        }
    share = recovered_all(*({name: values[name] for name in restored} for values in (healed, final, peaks)))
    worst = min(row["change"]["value"] for row in rows.values())
    return {"domains": rows, "recovered_all": _known("value", share), "worst": worst}


def _known(name: str, share: Interval) -> dict[str, float | None]:
    """A share as JSON has it: `None` where nothing was lost, of which nothing can be recovered."""
    figures = {name: share.value, "low": share.low, "high": share.high}
    return {name: figure if np.isfinite(figure) else None for name, figure in figures.items()}


def heal_run(
    run: Run,
    domains: Sequence[Domain],
    *,
    rank: int | None = 64,
    max_drop: float = 1.0,
    merge: bool = False,
    names: Sequence[str] | None = None,
    search: bool = False,
    scorer: Scorer | None = None,
    progress: bool = False,
) -> Repair | None:
    """
    Heal the last stage of a run, into its folder `repair/`. What a process that was killed left is made anew.

    `names` are the domains to heal, by default those of [`run_peaks`]. `None` where no domain lost more than the
    interval of its loss, or every earlier one is better than after its own stage on its selection split.
    """
    final = run.final
    scored = [domain for domain in domains if domain.name in final.scores]
    if scorer is None:
        tokenizer = load_tokenizer(run.weights(final), base=run.base_model)
        scorer = scorer_of(tokenizer, run.identity["config"], progress)
    own = {domain.name: run.trained(domain.name) or final for domain in scored}
    earlier = [name for name, record in own.items() if record.index < final.index]
    if unknown := [name for name in names or () if name not in earlier]:
        raise ValueError(f"domain: expected some that were trained before {final.name}, {earlier}, found {unknown}")
    at_end = {domain.name: run.scores(final, domain.name) for domain in scored}
    at_peak = {name: run.scores(record, name) for name, record in own.items()}
    damaged = lost_beyond_interval(at_peak, at_end)
    peaks = {name: own[name] for name in names} if names else damaged and run_peaks(run, scored, scorer)
    if not peaks:
        return None
    method = SubspaceRollback(rank=rank, max_new_tokens=scorer.max_new_tokens, batch_size=min(scorer.batch_size, 64))
    at_peak = {name: at_peak[name] if name in peaks else at_end[name] for name in at_end}
    settings = (scorer, method, max_drop, search, (at_peak, at_end), run.base_model, progress)
    places = {name: run.weights(record) for name, record in peaks.items()}
    repair, tests = heal(run.weights(final), places, scored, *settings)
    repair.record["checkpoints"]["final"]["path"] = final.folder
    for name, record in peaks.items():
        repair.record["checkpoints"]["peaks"][name]["path"] = record.folder
    _keep(run, repair, tests, merge, damaged)
    return repair


def _keep(run: Run, repair: Repair, tests: dict[str, DomainScores], merge: bool, damaged: list[str]) -> None:
    """
    Write the repair beside its place and move it there, so that there is a whole one or none; then record the stage.
    A heal of the same stage is replaced.
    """
    run.stages = run.stages[: run.final.index + 1]
    index = len(run.stages)
    taken = any(record.folder == run.repair.name for record in run.stages)
    folder = run.folder / f"repair-{index}" if taken else run.repair
    part = run.folder / f".{folder.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    repair.save_pretrained(part)
    if merge:
        repair.merge().save_pretrained(part / "merged")
        load_tokenizer(repair.base).save_pretrained(part / "merged")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    name, scores = stage_name(index, "heal", None), {}
    for domain, found in tests.items():
        file = run.write_scores(name, domain, found.samples, found.completions, found.prompts)
        scores[domain] = {**score(found.values).to_dict(), "file": file}
    overrides = {"rank": repair.record["rank"], "weights": repair.record["weights"]}
    seconds, versions = repair.record["cost"]["seconds"], {"trl-interfere": __version__}
    reason = {"damaged": damaged}
    run.append(StageRecord(index, "heal", None, folder.name, 0, seconds, scores, 0, overrides, versions, reason))
