# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-interfere"]
# ///
"""
Analyse what happened between two revisions of a model, push the report, then reload and compare it.

On Hugging Face Jobs (the recipe is the YAML file of the training in a data set repository; it names the domains):

    hf jobs uv run --flavor a10g-large --timeout 2h --secrets HF_TOKEN \
        https://huggingface.co/datasets/USER/SCRIPTS/resolve/main/analyze_checkpoints.py \
        --peak math=USER/MODEL@stage-2-math --final USER/MODEL@stage-4-writing --base USER/MODEL@stage-1-code \
        --later qa writing --recipe USER/RUNS:train.yaml --repo USER/MODEL

On your own machine:

    uv run hub_scripts/analyze_checkpoints.py --peak math=USER/MODEL@stage-1-math --final USER/MODEL@stage-2-qa \
        --later qa --recipe train.yaml --repo USER/MODEL
"""

import argparse
import sys
from pathlib import Path


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="YAML file of the training, or user/dataset:file.yaml")
    parser.add_argument("--repo", help="model repository that the report goes to; none: it stays in --output-dir")
    parser.add_argument("--output-dir", default="report", help="folder of the report")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    return parser.parse_known_args()  # the others are those of trl-interfere analyze


def recipe_file(recipe: str) -> Path:
    """The file itself, or the one in a snapshot of a data set repository."""
    if Path(recipe).is_file():
        return Path(recipe)
    repo_id, _, name = recipe.partition(":")
    if not name or repo_id.count("/") != 1:
        raise ValueError(f"--recipe: expected a file that exists or user/dataset:file.yaml, found {recipe!r}")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo_id, repo_type="dataset")) / name


def main() -> None:
    args, others = arguments()
    import numpy as np

    from trl_interfere import InterferenceReport
    from trl_interfere.cli import main as command
    from trl_interfere.hub.push import push_folder

    command(["analyze", "--recipe", str(recipe_file(args.recipe)), "--output_dir", args.output_dir, *others])
    if args.repo is None:
        return
    result = push_folder(args.output_dir, args.repo, private=args.private or None)
    print(f"published: {result.url}")
    report, pulled = (InterferenceReport.from_pretrained(place) for place in (args.output_dir, result.repo_id))
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
