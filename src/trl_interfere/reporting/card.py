"""The cards of runs, stages, reports and repairs, as the README of a folder or of a repository."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..analysis.report import InterferenceReport, top_share
from ..checkpoint import published_name
from ..evaluation.bootstrap import Interval
from ..evaluation.score_matrix import ScoreMatrix
from ..revision import parse_benchmark, published_checkpoint, split_revision, stage_revision
from ..run import Run, StageRecord
from ..tables import code, fenced, markdown_table, plain
from .claims import report_claims
from .verdict import flipped, losses, read_repair, share_of, verdict


TEMPLATE = Path(__file__).parent / "templates" / "card.md"
TAGS = ["trl-interfere", "trl", "grpo"]
LONGEST = 600  # characters of an example
_CAPTIONS = {
    "module_cosines": "Gradient cosines by layer and module",
    "sparsity": "Share of the parameters that hardly change",
    "overlaps": "Overlap of the routes that are active",
    "damage_concentration": "Share of the damage in the most damaged routes",
    "damage_by_layer": "Damage by layer and kind of route",
    "eigenvalues": "Second-order damage along the leading directions",
}


def analysis_card(
    run: Run,
    repo_id: str | None = None,
    license: str | None = None,
    figures: Mapping[str, str] | None = None,
    revisions: bool = False,
    final: StageRecord | None = None,
) -> ModelCard:
    """
    The card of a run, for its folder or for a repository. Every figure in it stands in `stages.json`, the files of
    scores, `report.json` or `repair.json`, or follows from them. Text of the run is shown as text. `figures` holds
    paths relative to the card: `"scores"`, `"<report>/<figure>"`, and `"page"`, the run as a page. With `revisions`
    the stages are revisions of the repository; `final` is the stage with the weights on `main`, else the last one.
    """
    figures = figures or {}
    final = final or next((record for record in reversed(run.stages) if record.folder is not None), None)
    matrix, repair = ScoreMatrix.from_run(run), read_repair(run)
    lost = losses(run, matrix) if run.stages else {}
    worst = next(iter(lost), None)
    examples, regained = flipped(run, worst) if worst else ([], False)
    load, place = _load(repo_id) if repo_id else "", repo_id or run.folder.absolute().name
    if repair:
        load = _load(repo_id or f"{place}/{run.final.folder}", place, subfolder="repair")
    reports = []
    for name, folder in run.reports.items():
        shown = {key[len(name) + 1 :]: path for key, path in figures.items() if key.startswith(f"{name}/")}
        report = InterferenceReport.from_pretrained(folder)
        reports.append(_report(report, shown, repo_id if revisions else None))
    return _render(
        _metadata(run, license, final),
        title=plain(repo_id.split("/")[-1] if repo_id else run.run_name or place),
        intro=f"{_base(run)} was tuned by reinforcement learning on {_listed(run.order)}, one after the other, "
        "with `trl-interfere` on [TRL](https://github.com/huggingface/trl).",
        verdict=plain(verdict(run, matrix, repair)) if run.stages else "",
        scores=_scores(run, matrix, lost, repair),
        scores_note=f"0 to 100, on test prompts{_sampling(run)}; brackets hold 95% intervals over prompts.",
        figures=figures,
        examples=[_example(example) for example in examples],
        examples_domain=plain(worst or ""),
        examples_healed=regained,
        healed=_healed(repair),
        load_note="The repair is a LoRA adapter over the last stage:" if repair else "Load the model:",
        load=load,
        reports=reports,
        made=_made(run, final, matrix, repo_id, revisions),
        limits=True,
        lab=_of_lab(run),
    )


def stage_card(run: Run, record: StageRecord, repo_id: str, license: str | None = None) -> ModelCard:
    """The short card of the revision of a stage."""
    header, *rows = [[plain(cell) for cell in row] for row in ScoreMatrix.from_run(run).rows()]
    shown = [row for row in rows if row[0] in ("0-base", plain(record.name))]
    return _render(
        _metadata(run, license, record),
        title=plain(f"{repo_id.split('/')[-1]}, after stage {record.name}"),
        intro=f"{_base(run)} in the middle of a sequence of stages on {_listed(run.order)}: the model after stage "
        f"{plain(record.name)} ({record.kind}, {record.steps} steps). The whole story is the card of the revision "
        f"[main](https://huggingface.co/{repo_id}).",
        scores=markdown_table(header, shown) if run.domains else "",
        scores_note="0 to 100, with 95% intervals over prompts.",
        load_note="Load the model:",
        load=_load(repo_id, revision=stage_revision(record.name)),
    )


def report_card(report: InterferenceReport, repo_id: str, figures: Mapping[str, str] | None = None) -> ModelCard:
    """The card of a repository that holds a report and no model; paths of its figures by name."""
    section = _report(report, figures or {})
    load = f'from trl_interfere import InterferenceReport\nreport = InterferenceReport.from_pretrained("{repo_id}")'
    return _render(
        ModelCardData(library_name="trl-interfere", tags=TAGS),
        title=f"Interference: {section['title']}",
        intro="What an update did to an earlier domain, and through which routes of the network.",
        reports=[section],
        load_note="Read the report:",
        load=load,
    )


def repair_card(repair: dict[str, Any], repo_id: str, base: str, license: str | None = None) -> ModelCard:
    """The card of a repository that holds a repair, from its `repair.json`: a LoRA adapter over the model `base`."""
    return _render(
        _data("peft", base, license=license, tags=[*TAGS, "repair"]),
        title=plain(repo_id.split("/")[-1]),
        intro=f"A LoRA adapter that gives {code(base)} back what later stages of its training took, without training.",
        scores=_repair_scores(repair),
        scores_note="0 to 100, on test prompts; brackets hold 95% intervals over prompts.",
        healed=_healed(repair),
        load_note="Load it:",
        load=_load(base, repo_id),
    )


def report_markdown(report: InterferenceReport) -> str:
    """A report as a page to read: `report.md`."""
    title = f"# Interference: {plain(', '.join(report.later))} on {plain(report.earlier)}"
    return f"{title}\n\n{_report_text(report)}\n"


def _render(data: ModelCardData, **parts: Any) -> ModelCard:
    return ModelCard.from_template(data, template_path=str(TEMPLATE), **{"figures": {}, **parts})


def _metadata(run: Run, license: str | None, final: StageRecord | None) -> ModelCardData:
    adapter = final is not None and (run.folder / final.folder / "adapter_config.json").is_file()
    base, _ = split_revision(run.identity.get("base_model", "unknown"))
    datasets = sorted({parse_benchmark(name)[0] for name in run.about.get("benchmarks", {}).values()})
    return _data("peft" if adapter else "transformers", base, license=license, tags=TAGS, datasets=datasets or None)


def _data(library: str, base: str, **fields: Any) -> ModelCardData:
    if _on_hub(base):
        fields |= {"base_model": base, "base_model_relation": "adapter" if library == "peft" else "finetune"}
    return ModelCardData(library_name=library, pipeline_tag="text-generation", **fields)


def _on_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()


def _of_lab(run: Run) -> bool:
    return (run.folder / "results.json").is_file()


def _base(run: Run) -> str:
    base, revision = split_revision(run.identity.get("base_model", "unknown"))
    if _of_lab(run):
        return "The model of the lab of `trl-interfere`"
    name = f"[{plain(base)}](https://huggingface.co/{base})" if _on_hub(base) else code(base)
    return name if revision is None else f"{name} (revision {code(revision)})"


def _listed(names: list[str]) -> str:
    names = [plain(name) for name in names]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _sampling(run: Run) -> str:
    config = run.identity.get("config", {})
    if "score_temperature" not in config:
        return ""
    temperature, samples = config["score_temperature"], config.get("score_samples", 1)
    how = f"sampled at temperature {temperature:g}" if temperature else "decoded greedily"
    return f", {how}" + (f", mean of {samples} completions" if samples > 1 else "")


def _scores(run: Run, matrix: ScoreMatrix, lost: dict[str, Interval], repair: dict[str, Any] | None) -> str:
    if repair is not None or not matrix.domains:
        return _repair_scores(repair) if repair else ""
    end, rows = run.final.index, []
    for domain in matrix.domains:
        if domain in matrix.values[end]:
            peak, final = (matrix.interval(row, domain) for row in (matrix.peak(domain, end), end))
            points = f"{lost[domain]:.1f}" if domain in lost else "not beyond chance"
            rows.append([f"{plain(domain)} (n={final.n})", f"{peak.value:.1f}", f"{final.value:.1f}", points])
    return markdown_table(["domain", "peak", "final", "lost, in points"], rows)


def _repair_scores(repair: dict[str, Any]) -> str:
    models = ("peak", "final", "healed")
    rows = [
        [f"{plain(domain)} (n={entry['n']})", *(f"{entry[name]:.1f}" for name in models), share_of(entry)]
        for domain, entry in repair["domains"].items()
    ]
    return markdown_table(["domain", *models, "recovered"], rows)


def _example(example: dict[str, Any]) -> dict[str, Any]:
    def block(text: str) -> str:
        return fenced(text if len(text) <= LONGEST else text[: LONGEST - 1] + "…")

    answers = [(f"Answer {stage}:", block(text)) for stage, text in example["answers"]]
    return {"prompt": block(example["prompt"]), "answers": answers}


def _healed(repair: dict[str, Any] | None) -> str:
    if repair is None:
        return ""
    cost = repair["cost"]
    rank = f", rank {repair['rank']}" if repair.get("rank") else ""
    references = f", from {repair['references']} references a domain" if repair.get("references") else ""
    flips = [
        f"- {plain(domain)}: {entry['lost']} prompts lost, {entry['regained']} regained, {entry['newly_lost']} new."
        for domain, entry in repair["domains"].items()
        if entry.get("lost") is not None
    ]
    parts = [
        f"By {plain(str(repair.get('method', 'unknown')))} rollback{rank}{references}, without training: "
        f"{share_of(repair['recovered_all'])} of all that was lost came back; the worst change of another domain is "
        f"{repair['worst']:+.1f} points.",
        f"It took {cost['sequences_forward']} sequences forward, {cost['sequences_backward']} backward, and "
        f"{cost['seconds']:.0f} seconds.",
        "\n".join(flips),
    ]
    return "\n\n".join(filter(None, parts))


def _load(base: str, adapter: str | None = None, **options: str) -> str:
    """Lines that load a model, with an adapter over it."""
    chosen = "".join(f', {name}="{value}"' for name, value in options.items())
    load, model = "from transformers import AutoModelForCausalLM\n", "model = AutoModelForCausalLM.from_pretrained"
    if adapter is None:
        return f'{load}\n{model}("{base}"{chosen})'
    adapted = f'model = PeftModel.from_pretrained(model, "{adapter}"{chosen})'
    return f'from peft import PeftModel; {load}{model}("{base}")\n{adapted}'


def _report(report: InterferenceReport, figures: Mapping[str, str], repo_id: str | None = None) -> dict[str, Any]:
    before, after = (
        published_checkpoint(checkpoint, repo_id) if repo_id else published_name(checkpoint)
        for checkpoint in (report.before, report.after)
    )
    return {
        "title": f"{plain(report.earlier)}, after {plain(', '.join(report.later))}",
        "before": code(before),
        "after": code(after),
        "text": _report_text(report),
        "figures": [(_CAPTIONS.get(key, plain(key)), path) for key, path in figures.items()],
    }


def _report_text(report: InterferenceReport) -> str:
    error = "" if report.second_order_error is None else f" ± {report.second_order_error:.1e}"
    share = "undefined, since routes did no damage"
    if report.concentration:
        share = f"{100 * top_share(report.routes['damage'], 0.02):.1f}% of all that is attributed to routes"
    references = ", ".join(
        f"{name} {entry['n']} of {entry['considered']} prompts, {entry['tokens']} tokens"
        for name, entry in report.references.items()
    )
    cosine, further = report.cosines["global"], {}
    if named := ", ".join(f"{part} {share:.1%}" for part, share in report.outside_weights.items() if share >= 0.005):
        further["weights outside routes"] = f"{sum(report.outside_weights.values()):.1%} ({named})"
    if report.switching is not None:
        tokens = f"{report.switched} of {report.references[report.earlier]['tokens']} tokens"
        further["by switching experts"] = f"{report.switching:+.4f} nats per token ({tokens})"
    rows = {
        "loss before, after": f"{report.loss_before:.4f}, {report.loss_after:.4f} nats per token",
        "damage": f"{report.damage:+.4f} nats per token",
        "first order ∇L·δ": f"{report.first_order:+.4f} nats per token",
        "second order ½ δᵀHδ": f"{report.second_order:+.4f}{error} nats per token",
        "attributed to routes": f"{report.attributed:+.4f} nats per token",
        "outside routes": f"{report.outside_routes:+.4f} nats per token",
        **further,
        "residual (quadrature and rounding)": f"{report.residual:+.2e} nats per token",
        "damage in the top 2% of routes": share,
        "gradient cosine, whole model": "undefined" if cosine is None else f"{cosine:+.3f}",
        "references": f"{references} ({report.config['reference']})",
        "stored as, computed in": f"{report.dtype}, {report.computed_in}",
    }
    title = "What [arXiv 2606.02398](https://arxiv.org/abs/2606.02398) claims, each figure beside its control:"
    lines = [f"- {name}: {plain(value)}" for name, value in rows.items()] + ["", title, ""]
    for claim, *cells in report_claims(report):
        figure, value, control, paper = map(plain, cells)
        lines.append(f"- **{claim}**. {figure}: **{value}**. Control: {control}. Paper: {paper}.")
    return "\n".join(lines)


def _made(run: Run, final: StageRecord | None, matrix: ScoreMatrix, repo_id: str | None, revisions: bool) -> str:
    header = ["stage", "kind", "steps", *map(plain, matrix.domains)]
    rows = []
    for record, values in zip(run.stages, matrix.values, strict=True):
        name = plain(record.name)
        if revisions and repo_id and record.folder is not None:
            name = f"[{name}](https://huggingface.co/{repo_id}/tree/{stage_revision(record.name)})"
        means = (f"{100 * values[domain].mean():.1f}" if domain in values else "—" for domain in matrix.domains)
        rows.append([name, record.kind, str(record.steps), *means])
    config = run.identity.get("config", {})
    names = ("seed", "learning_rate", "max_steps", "num_generations", "beta")
    shown = ", ".join(f"`{name}` {plain(str(config[name]))}" for name in names if name in config)
    command = "trl-interfere train recipe.yaml"
    if _of_lab(run):
        command = f"trl-interfere lab --seed {config.get('seed', 0)} --order {','.join(run.order)} "
        command += f"--steps {config.get('max_steps', 100)}"
    versions = (final.versions if final else {}) | run.about.get("hardware", {})
    place = "`interference/stages.json`" if repo_id else "`stages.json`"
    weights = f"The weights are those after {plain(final.name)}. " if final else ""
    parts = [
        markdown_table(header, rows),
        f"{weights}All settings are in {place}" + (f"; {shown}." if shown else "."),
        f"```bash\n{command}\n```",
        "\n".join(f"- {plain(name)}: {plain(str(value))}" for name, value in versions.items()),
    ]
    return "\n\n".join(filter(None, parts))
