"""Scores in the form that the Hub shows on the pages of models and benchmarks: `.eval_results/*.yaml`."""

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from ..benchmark import parse_benchmark
from .run_folder import RunFolder


def eval_result_files(run: RunFolder, source_url: str | None = None) -> dict[str, bytes]:
    """
    One file for each domain whose scores are those of a benchmark on the Hub, with the score after the last stage.

    Args:
        run ([`RunFolder`]):
            The run.
        source_url (`str`, *optional*):
            Address of the scores of each prompt.

    Returns:
        `dict[str, bytes]`: Content by path in the repository.
    """
    files = {}
    for domain, entry, name in _scored(run):
        dataset, revision, task = parse_benchmark(name)
        result = EvalResultEntry(
            dataset_id=dataset,
            task_id=task,
            value=entry["value"],
            dataset_revision=revision,
            source_url=source_url,
            source_name=None if source_url is None else "Scores of each prompt",
            notes=_notes(run, entry),
        )
        text = yaml.safe_dump(eval_result_entries_to_yaml([result]), sort_keys=False)
        files[f".eval_results/{domain}.yaml"] = text.encode()
    return files


def model_index(run: RunFolder) -> list[EvalResult]:
    """
    The same scores in the legacy form, `model-index` of the card.

    Args:
        run ([`RunFolder`]):
            The run.

    Returns:
        `list[EvalResult]`: One for each domain that names a benchmark.
    """
    results = []
    for domain, entry, name in _scored(run):
        dataset, revision, task = parse_benchmark(name)
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=dataset,
                dataset_name=domain,
                dataset_config=None if task == "default" else task,
                dataset_revision=revision,
                metric_type="score",
                metric_value=entry["value"],
                metric_name="score",
            )
        )
    return results


def _scored(run: RunFolder) -> list[tuple[str, dict, str]]:
    benchmarks = run.manifest.about.get("benchmarks", {})
    scores = run.stages[-1].scores if run.stages else {}
    return [(domain, entry, benchmarks[domain]) for domain, entry in scores.items() if domain in benchmarks]


def _notes(run: RunFolder, entry: dict) -> str:
    config = run.manifest.identity.get("config", {})
    sampling = f"temperature {config['score_temperature']:g}" if "score_temperature" in config else "see the card"
    return (
        f"after stage {run.stages[-1].name}; n={entry['n']}, 95% interval [{entry['low']:.1f}, {entry['high']:.1f}]; "
        f"{sampling}"
    )
