"""`trl-interfere evaluate`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.bootstrap import difference, score
from ..evaluation.flips import flips
from ..evaluation.metrics import recovered
from ..revision import split_revision
from ..run import STAGES_NAME, Run, write_json
from ..tables import console_table
from .options import Options, empty_folder, option, parse
from .output import show
from .runs import recipe_of, training_settings


EXAMPLE = "trl-interfere evaluate out/stages/4-writing out/repair --peak out/stages/2-math"
SCHEMA_VERSION = 2

Values = dict[str, np.ndarray]


@dataclass(kw_only=True)
class EvaluateOptions(Options):
    """Score checkpoints on the domains, and compare them prompt by prompt with one of them."""

    models: list[str] = option([], "runs (their last stage), models, adapters, or Hub ids (user/repo@branch)")
    against: str | None = option(None, "a model to compare the others with; by default the first")
    peak: str | None = option(None, "a model from before the loss: shows what came back of it")
    recipe: str | None = option(None, "YAML file that names the domains; by default the one of the run")
    domain: list[str] | None = option(None, "domains to score; all by default")
    split: str = option("test", "prompts to score on: test or selection")
    output_dir: str = option("evaluation", "folder of scores.json and the scores per prompt, new or empty")
    temperature: float | None = option(None, "0 is greedy; by default the one of the recipe", least=0)
    num_samples: int | None = option(None, "completions per prompt; by default as in the recipe", least=1)
    batch_size: int | None = option(None, "prompts to generate for at once", least=1)
    max_new_tokens: int | None = option(None, "longest completion", least=1)
    dtype: str | None = option(None, "data type of the weights; by default the one of the recipe")
    engine: str = option("transformers", "what completes the prompts: transformers, or vllm (an extra)")

    def __post_init__(self):
        super().__post_init__()
        if self.models:
            others = [name for name in (self.against, self.peak) if name is not None and name not in self.models]
            self.models = list(dict.fromkeys([*self.models, *others]))


def main(arguments: list[str]) -> None:
    options = parse(EvaluateOptions, arguments, "*models", EXAMPLE)
    options.prepare()
    from ..evaluation.checkpoints import chosen_domains, score_checkpoint
    from ..models import load_tokenizer

    output_dir = empty_folder(options.output_dir)
    run = run_of(options.models)
    recipe = recipe_of(run, options.recipe)
    domains = chosen_domains(recipe.domains, options.domain, options.split)
    settings = training_settings(
        recipe,
        score_temperature=options.temperature,
        score_samples=options.num_samples,
        score_batch_size=options.batch_size,
        score_max_new_tokens=options.max_new_tokens,
    )
    if options.dtype is not None:
        settings["model_init_kwargs"] = {**(settings["model_init_kwargs"] or {}), "dtype": options.dtype}
    places = [place_of(name) for name in options.models]
    for place in places:  # a name that does not exist must not cost the scores of those before it
        load_tokenizer(*place, trust_remote_code=bool(settings["trust_remote_code"]))
    entries, values, kept, bars = [], [], Run.new(output_dir, {}), sys.stderr.isatty()
    for position, (model, (folder, revision)) in enumerate(zip(options.models, places, strict=True)):
        found = score_checkpoint(folder, domains, settings, options.split, revision, options.engine, bars)
        figures, label = {}, f"{position}-{Path(model).name}"
        for domain, scores in found.items():
            file = kept.write_scores(label, domain, scores.samples, scores.completions, scores.prompts)
            figures[domain] = {**score(scores.values).to_dict(), "file": file}
        entries.append({"model": model, "scores": figures})
        values.append({domain: scores.samples for domain, scores in found.items()})
    against = options.models.index(options.against or options.models[0])
    peak = None if options.peak is None else values[options.models.index(options.peak)]
    for position, entry in enumerate(entries):
        entry["changes"] = {} if position == against else changes(values[position], values[against], peak)
    sampling = {name: settings[name] for name in settings if name.startswith("score_")}
    content = {"schema_version": SCHEMA_VERSION, "split": options.split, "engine": options.engine}
    content |= {"sampling": sampling, "against": options.models[against], "peak": options.peak, "models": entries}
    write_json(output_dir / "scores.json", content)
    print_evaluation(content)
    folder = "RUN" if run is None else run.folder
    show(f"The scores are in {output_dir}. Next: trl-interfere compare {folder}")


def run_of(models: list[str]) -> Run | None:
    """The run that one of the models is, or lies in."""
    folders = (folder for name in models for folder in (Path(name), *Path(name).resolve().parents))
    return next((Run(folder) for folder in folders if (folder / STAGES_NAME).is_file()), None)


def place_of(name: str) -> tuple[str, str | None]:
    """Folder or Hub id and revision of a checkpoint. A run stands for its last stage."""
    if (Path(name) / STAGES_NAME).is_file():
        run = Run(name)
        return str(run.weights(run.stages[-1])), None
    return split_revision(name)


def changes(after: Values, before: Values, peak: Values | None) -> dict[str, dict[str, Any]]:
    """For each domain points, flips beside what resampling alone flips, and recovered, from per-prompt samples."""
    found = {}
    for domain in after:
        means = [values[domain].mean(axis=1) for values in (after, before, *([peak] if peak else []))]
        flipped = flips(before[domain], after[domain], peak[domain] if peak else None)
        found[domain] = {
            "points": difference(means[0], means[1]).to_dict(),
            "flips": flipped.counts(),
            "expected_flips": flipped.expected,
        }
        if peak and np.isfinite((share := recovered(*means)).value):
            found[domain]["recovered"] = share.to_dict()
    return found


def print_evaluation(content: dict[str, Any]) -> None:
    """Scores, and beside one of the models changes, flips and recovered."""
    header = ["model", *(f"{name} (n={entry['n']})" for name, entry in content["models"][0]["scores"].items())]
    title = f"Score on the {content['split']} split (0 to 100, 95% interval)"
    rows = [[entry["model"], *map(_interval, entry["scores"].values())] for entry in content["models"]]
    show(console_table(title, header, rows))
    rows = []
    kinds = ("lost", "regained", "newly_lost")
    for entry in content["models"]:
        for domain, change in entry["changes"].items():
            by_chance = {kind: f" ({count:.1f} by chance)" for kind, count in change["expected_flips"].items()}
            cells = [f"{change['flips'][kind]}{by_chance.get(kind, '')}" for kind in kinds]
            share = _interval(change["recovered"], ".0%") if "recovered" in change else "—"
            rows.append([entry["model"], domain, _interval(change["points"]), share, *cells])
    if rows:
        title = f"Change against {content['against']} (points, paired 95% interval; prompts)"
        show(console_table(title, ["model", "domain", "points", "recovered", "lost", "regained", "newly lost"], rows))


def _interval(entry: dict[str, float], spec: str = ".1f") -> str:
    return f"{entry['value']:{spec}} [{entry['low']:{spec}}, {entry['high']:{spec}}]"
