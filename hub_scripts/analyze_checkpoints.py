# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-interfere"]
# ///
"""
Analyse what happened between two revisions of a model, push the report, then reload and compare it.

On Hugging Face Jobs (`--config` is the YAML file of the training in a data set repository; it names the domains):

    hf jobs uv run --flavor a10g-large --timeout 2h --secrets HF_TOKEN \
        https://huggingface.co/datasets/USER/SCRIPTS/resolve/main/analyze_checkpoints.py \
        --before USER/MODEL@stage-2-math --after USER/MODEL@stage-4-writing --base USER/MODEL@stage-1-code \
        --earlier math --later qa,writing --config USER/RUNS:train.yaml --repo USER/MODEL

On your own machine, with a local file or with the domains of the lab:

    uv run hub_scripts/analyze_checkpoints.py --before USER/MODEL@stage-1-math --after USER/MODEL@stage-2-qa \
        --earlier math --later qa --lab --repo USER/MODEL
"""

import argparse
import sys
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="checkpoint before the update: folder, user/repo@revision")
    parser.add_argument("--after", required=True, help="checkpoint after the update")
    parser.add_argument("--base", help="checkpoint that the earlier domain's own training started from")
    parser.add_argument("--earlier", required=True, help="domain that may have been damaged")
    parser.add_argument("--later", required=True, help="domains of the update, separated by commas")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="YAML file of the training, or user/dataset:file.yaml on the Hub")
    source.add_argument("--lab", action="store_true", help="the domains of the lab")
    parser.add_argument("--repo", help="model repository that the report goes to; none: it stays in --output-dir")
    parser.add_argument("--output-dir", default="report", help="folder of the report")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dtype", default="float32", help="data type to compute in")
    return parser.parse_args()


def config_file(config: str) -> Path:
    """The file itself, or the one in a snapshot of a data set repository."""
    if Path(config).is_file():
        return Path(config)
    repo_id, _, name = config.partition(":")
    if not name or repo_id.count("/") != 1:
        raise ValueError(f"--config: expected a file that exists or user/dataset:file.yaml, found {config!r}")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo_id, repo_type="dataset")) / name


def main() -> None:
    args = arguments()
    import numpy as np

    from trl_interfere import InterferenceAnalyzer, InterferenceConfig, InterferenceReport

    names = args.later.split(",")
    if args.lab:
        from trl_interfere.lab.domains import lab_domain

        domains = {name: lab_domain(name) for name in (args.earlier, *names)}
        settings = {"reference": "dataset", "reference_column": "answer", "batch_size": 64}
    else:
        from trl_interfere.recipe import load_run_file

        run = load_run_file(config_file(args.config))
        domains, settings = {domain.name: domain for domain in run.domains}, run.analysis
    for name in (args.earlier, *names):
        if name not in domains:
            raise ValueError(f"unknown domain {name!r}, expected some of {sorted(domains)}")
    analyzer = InterferenceAnalyzer.from_pretrained(
        args.before, args.after, base=args.base, config=InterferenceConfig(**settings), dtype=args.dtype
    )
    report = analyzer.analyze(domains[args.earlier], [domains[name] for name in names], progress=print)
    report.save_pretrained(args.output_dir)
    print(report.to_markdown())
    if args.repo is not None:
        result = report.push_to_hub(args.repo, private=args.private or None)
        print(f"published: {result.url}")
        pulled = InterferenceReport.from_pretrained(result.repo_id)
        same = pulled.routes.keys() == report.routes.keys() and all(
            np.array_equal(pulled.routes[name], values) for name, values in report.routes.items()
        )
        if not same or pulled.damage != report.damage:
            raise ValueError(f"{result.repo_id}: expected the report that was pushed, found another one")
        print(f"verified: {result.repo_id}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
