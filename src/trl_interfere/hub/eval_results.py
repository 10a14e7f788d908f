"""Scores in the form that the Hub shows on the pages of models and benchmarks: `.eval_results/*.yaml`."""

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from ..benchmark import parse_benchmark
from ..run import Run


def eval_result_files(run: Run) -> dict[str, bytes]:
    """One file for each domain that names a benchmark on the Hub, with the score after the final stage."""
    config = run.identity.get("config", {})
    sampling = f"temperature {config['score_temperature']:g}" if "score_temperature" in config else "see the card"
    files = {}
    for domain, name in run.about.get("benchmarks", {}).items():
        if domain not in run.final.scores:
            continue
        entry = run.final.scores[domain]
        dataset, revision, task = parse_benchmark(name)
        interval = f"95% interval [{entry['low']:.1f}, {entry['high']:.1f}]"
        result = EvalResultEntry(
            dataset_id=dataset,
            task_id=task,
            value=entry["value"],
            dataset_revision=revision,
            notes=f"after stage {run.final.name}; n={entry['n']}, {interval}; {sampling}",
        )
        text = yaml.safe_dump(eval_result_entries_to_yaml([result]), sort_keys=False)
        files[f".eval_results/{domain}.yaml"] = text.encode()
    return files
