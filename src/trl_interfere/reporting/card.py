"""The analysis card: what a sequence did to a model, as the README of its repository."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .. import __version__
from ..analysis.report import InterferenceReport
from ..benchmark import parse_benchmark
from ..checkpoint import published_name
from ..evaluation.bootstrap import Interval
from ..evaluation.metrics import ScoreSummary
from ..evaluation.score_matrix import ScoreMatrix
from ..hub.eval_results import model_index
from ..hub.run_folder import RunFolder
from ..revision import published_checkpoint, split_revision, stage_revision
from ..run import StageRecord


TEMPLATES = Path(__file__).parent / "templates"
TAGS = ["trl-interfere", "trl", "grpo"]
_CONTROLS = ("random", "random_matched")
_CAPTIONS = {
    "module_cosines": "Gradient cosines by layer and module",
    "sparsity": "Share of the parameters that hardly change",
    "overlaps": "Overlap of the routes that are active",
    "damage_concentration": "Share of the damage in the most damaged routes",
    "damage_by_layer": "Damage by layer and kind of route",
    "eigenvalues": "Second-order damage along the leading directions",
}


def analysis_card(
    run: RunFolder,
    repo_id: str | None = None,
    license: str | None = None,
    figures: dict[str, str] | None = None,
    revisions: bool = False,
    final: StageRecord | None = None,
    repaired: str | None = None,
    with_model_index: bool = False,
) -> ModelCard:
    """
    The card of a run. Every figure in it stands in `stages.json`, the files of scores, `report.json` or the lab's
    `results.json`, or follows from them.

    Args:
        run ([`RunFolder`]):
            The run.
        repo_id (`str`, *optional*):
            Repository that the card is for. Defaults to none: a card for the folder.
        license (`str`, *optional*):
            Licence, which is that of the base model.
        figures (`dict[str, str]`, *optional*):
            Paths of figures, relative to the card: `"score_matrix"`, `"rollback_curve"`, and `"<report>/<figure>"`.
        revisions (`bool`, *optional*, defaults to `False`):
            Whether the stages are revisions of the repository.
        final ([`StageRecord`], *optional*):
            The stage whose weights are on `main`. Defaults to the last one.
        repaired (`str`, *optional*):
            What was done to these weights afterwards, in words.
        with_model_index (`bool`, *optional*, defaults to `False`):
            Whether to write the scores into the legacy `model-index` too.

    Returns:
        [`~huggingface_hub.ModelCard`]: The card.
    """
    figures = figures or {}
    trained = run.trained
    final = final or (trained[-1] if trained else None)
    matrix = run.score_matrix
    reports = {name: InterferenceReport.from_pretrained(folder) for name, folder in run.reports.items()}
    summary = ScoreSummary.from_matrix(matrix) if matrix.domains and matrix.stages else None
    refreshed = summary is not None and any(record.kind == "refresh" for record in trained)
    title = _title(run, repo_id)
    data = _card_data(run, license, final)
    if with_model_index and (index := model_index(run)):
        data.model_name, data.eval_results = title, index
    config = run.manifest.identity.get("config", {})
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "analysis_card.md"),
        title=title,
        base=_base(run),
        order=_order(run),
        stages=[
            {
                "name": record.name,
                "kind": record.kind,
                "steps": record.steps,
                "revision": stage_revision(record.name) if revisions else None,
            }
            for record in trained
        ],
        revision=stage_revision(trained[0].name) if revisions and trained else None,
        final=final.name if final else "no stage",
        sampling=_sampling(config),
        scores=score_table(matrix) if summary is not None else "",
        summary_stage=summary.stage if summary is not None else "",
        summary=_summary_table(summary) if summary is not None else "",
        reports=[_report_section(name, report, repo_id, revisions, figures) for name, report in reports.items()],
        figures=figures,
        **_rollback_section(run.results),
        refresh=_refresh_table(summary) if refreshed else "",
        repaired=repaired,
        lab=_of_lab(run),
        settings=_settings(run, repo_id),
        command=_command(run),
        repo_id=repo_id,
        versions=final.versions if final else {"trl-interfere": __version__},
        hardware=run.manifest.about.get("hardware", {}),
    )


def stage_card(run: RunFolder, record: StageRecord, repo_id: str, license: str | None = None) -> ModelCard:
    """
    The short card of the revision of a stage.

    Args:
        run ([`RunFolder`]):
            The run.
        record ([`StageRecord`]):
            The stage.
        repo_id (`str`):
            The repository.
        license (`str`, *optional*):
            Licence, which is that of the base model.

    Returns:
        [`~huggingface_hub.ModelCard`]: The card.
    """
    matrix = run.score_matrix
    rows = [row for row, name in enumerate(matrix.stages) if name in ("0-base", record.name)]
    part = ScoreMatrix(matrix.domains, [matrix.stages[row] for row in rows], [matrix.values[row] for row in rows])
    return ModelCard.from_template(
        _card_data(run, license, record),
        template_path=str(TEMPLATES / "stage_card.md"),
        title=_title(run, repo_id),
        base=_base(run),
        order=_order(run),
        stage=record,
        scores=score_table(part) if matrix.domains else "",
        repo_id=repo_id,
        revision=stage_revision(record.name),
    )


def report_card(report: InterferenceReport, repo_id: str, figures: dict[str, str] | None = None) -> ModelCard:
    """
    The card of a repository that holds a report and no model.

    Args:
        report ([`InterferenceReport`]):
            The report.
        repo_id (`str`):
            The repository.
        figures (`dict[str, str]`, *optional*):
            Paths of its figures, relative to the card, by name.

    Returns:
        [`~huggingface_hub.ModelCard`]: The card.
    """
    section = _report_section("", report, repo_id, False, {f"/{name}": path for name, path in (figures or {}).items()})
    return ModelCard.from_template(
        ModelCardData(library_name="trl-interfere", tags=TAGS),
        template_path=str(TEMPLATES / "report_card.md"),
        report=section,
        repo_id=repo_id,
        versions=report.versions,
    )


def score_table(matrix: ScoreMatrix) -> str:
    """
    Scores as a table in Markdown.

    Args:
        matrix ([`ScoreMatrix`]):
            The scores.

    Returns:
        `str`: One row per stage, a dash where there is no score.
    """
    header = ["stage"]
    for domain in matrix.domains:
        count = next((len(values[domain]) for values in matrix.values if domain in values), 0)
        header.append(f"{domain} (n={count})")
    rows = [
        [stage] + [_cell(matrix.interval(row, domain) if domain in values else None) for domain in matrix.domains]
        for row, (stage, values) in enumerate(zip(matrix.stages, matrix.values, strict=True))
    ]
    return markdown_table(header, rows)


def markdown_table(header: list[str], rows: Iterable[list[str]]) -> str:
    """
    A table in Markdown, the first column to the left and the others to the right.

    Args:
        header (`list[str]`):
            Names of the columns.
        rows (`Iterable[list[str]]`):
            Cells.

    Returns:
        `str`: The table.
    """
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _card_data(run: RunFolder, license: str | None, final: StageRecord | None) -> ModelCardData:
    adapter = final is not None and (run.weights(final) / "adapter_config.json").is_file()
    base, _ = split_revision(run.base_model)
    extra: dict[str, Any] = {}
    if "/" in base and not Path(base).exists():
        extra = {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    benchmarks = run.manifest.about.get("benchmarks", {}).values()
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
        license=license,
        pipeline_tag="text-generation",
        tags=TAGS,
        datasets=sorted({parse_benchmark(name)[0] for name in benchmarks}) or None,
        **extra,
    )


def _title(run: RunFolder, repo_id: str | None) -> str:
    return repo_id.split("/")[-1] if repo_id else (run.manifest.run_name or run.folder.absolute().name)


def _of_lab(run: RunFolder) -> bool:
    return run.results is not None and "steps_per_stage" in run.results


def _base(run: RunFolder) -> str:
    base, revision = split_revision(run.base_model)
    if _of_lab(run):
        return "The model of the lab of `trl-interfere`"
    name = f"[{base}](https://huggingface.co/{base})" if "/" in base else f"`{base}`"
    return name if revision is None else f"{name} (revision `{revision}`)"


def _order(run: RunFolder) -> list[str]:
    return [stage["domain"] for stage in run.manifest.identity.get("schedule", [])]


def _sampling(config: dict[str, Any]) -> str:
    if "score_temperature" not in config:
        return ""
    temperature, samples = config["score_temperature"], config.get("score_samples", 1)
    how = "decoded greedily" if temperature == 0 else f"sampled at temperature {temperature:g}"
    return f", {how}" + (f", mean of {samples} completions" if samples > 1 else "")


def _cell(interval: Interval | None, spec: str = ".1f") -> str:
    return "—" if interval is None else f"{interval:{spec}}"


def _summary_table(summary: ScoreSummary) -> str:
    names = [name for name in ("forgetting", "backward_transfer", "forward_transfer") if getattr(summary, name)]
    rows = [
        [domain, *(_cell(getattr(summary, name).get(domain), "+.1f") for name in names)] for domain in summary.score
    ]
    rows.append(["average", *(_cell(summary.average.get(name), "+.1f") for name in names)])
    return markdown_table(["domain", *(name.replace("_", " ") for name in names)], rows)


def _refresh_table(summary: ScoreSummary) -> str:
    rows = [[domain, "refreshed", _cell(share, ".0%")] for domain, share in summary.recovered.items()]
    rows += [[domain, "other", f"{_cell(change, '+.1f')} points"] for domain, change in summary.collateral.items()]
    return markdown_table(["domain", "", "recovered, or change"], rows) if rows else ""


def _report_section(
    name: str, report: InterferenceReport, repo_id: str | None, revisions: bool, figures: dict[str, str]
) -> dict[str, Any]:
    _, _, body = report.to_markdown().partition("\n")
    table = re.sub(r"^(#+ )", r"##\1", body, flags=re.MULTILINE).strip()  # below the heading of the report
    before, after = (
        published_checkpoint(checkpoint, repo_id) if repo_id and revisions else published_name(checkpoint)
        for checkpoint in (report.before, report.after)
    )
    shown = {path.split("/", 1)[1]: address for path, address in figures.items() if path.startswith(f"{name}/")}
    return {
        "title": f"{report.earlier}, after {', '.join(report.later)}",
        "before": before,
        "after": after,
        "table": table,
        "figures": [
            (_CAPTIONS.get(figure, figure.replace("_", " ").capitalize()), path) for figure, path in shown.items()
        ],
    }


def _rollback_section(results: dict[str, Any] | None) -> dict[str, Any]:
    if results is None or not results.get("rollback"):
        return {"rollback": "", "rollback_pair": "", "rollback_split": "", "rollback_n": ""}
    rows = [row for row in results["rollback"] if row["pair"] == 0]
    pair = results["pairs"][0]
    kinds = {**dict.fromkeys(_CONTROLS, "control"), "interpolation": "baseline"}
    cells = []
    for row in rows:
        kind = kinds.get(row["criterion"], "repair")
        share = "nothing was lost"
        if row["recovered"] is not None:
            share = f"{Interval(row['recovered'], row['low'], row['high'], row['n']):.0%}"
        cells.append(
            [
                row["criterion"] + (f" (mean of {row['draws']} draws)" if row["draws"] > 1 else ""),
                kind,
                f"{row['budget']:.3g} of {row['scope']}",
                f"{row['step']:.3g}" + (" (best)" if row["step_rule"] == "optimal" else ""),
                share,
                ", ".join(f"{name} {change:+.1f}" for name, change in row["collateral"].items()),
            ]
        )
    header = ["by", "", "share of routes", "step", "recovered", "change of the others"]
    return {
        "rollback": markdown_table(header, cells),
        "rollback_pair": f"{pair['earlier']}, damaged by {', '.join(pair['later'])},",
        "rollback_split": rows[0]["split"],
        "rollback_n": rows[0]["n"],
    }


def _settings(run: RunFolder, repo_id: str | None) -> str:
    config = run.manifest.identity.get("config", {})
    place = "`interference/stages.json`" if repo_id else "`stages.json`"
    names = ("seed", "learning_rate", "max_steps", "num_generations", "beta")
    shown = ", ".join(f"`{name}` {config[name]}" for name in names if name in config)
    return f"All settings are in {place}" + (f"; {shown}." if shown else ".")


def _command(run: RunFolder) -> str:
    if _of_lab(run):
        results = run.results
        order, steps = ",".join(results["order"]), results["steps_per_stage"]
        return f"trl-interfere lab --seed {results['seed']} --order {order} --steps {steps}"
    return "trl-interfere train --config train.yaml  # with the domains and the settings of this card"
