# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-interfere"]
# ///
"""
Train a model through domains in sequence, heal it, push everything, then fetch each branch anew and compare it.

On Hugging Face Jobs (`--recipe` is a YAML file in a data set repository, with the prompts beside it):

    hf jobs uv run --flavor a10g-large --timeout 8h --secrets HF_TOKEN \
        https://huggingface.co/datasets/USER/SCRIPTS/resolve/main/train_sequential.py \
        --recipe USER/RUNS:train.yaml --repo USER/MODEL

On your own machine:

    uv run hub_scripts/train_sequential.py --recipe train.yaml --output-dir out --repo USER/MODEL

Started again with the same folder, it goes on where it stopped.
"""

import argparse
import hashlib
import sys
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="YAML file of the training, or user/dataset:file.yaml")
    parser.add_argument("--repo", required=True, help="model repository, user/name; made if there is none")
    parser.add_argument("--output-dir", default="out", help="folder of the run")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--collection", help="title of a collection to add the model to")
    return parser.parse_args()


def recipe_file(recipe: str) -> Path:
    """The file itself, or the one in a snapshot of a data set repository."""
    if Path(recipe).is_file():
        return Path(recipe)
    repo_id, _, name = recipe.partition(":")
    if not name or repo_id.count("/") != 1:
        raise ValueError(f"--recipe: expected a file that exists or user/dataset:file.yaml, found {recipe!r}")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo_id, repo_type="dataset")) / name


def verify(folder: str, repo: str) -> None:
    """Compare what was pushed with what the Hub gives back."""
    from huggingface_hub import hf_hub_download

    from trl_interfere import Run
    from trl_interfere.hub.plan import plan_run

    for branch, files in plan_run(Run(folder), repo).branches.items():
        for path, content in files.items():
            if isinstance(content, Path):
                pulled = Path(hf_hub_download(repo, path, revision=branch))
                digests = [hashlib.sha256(place.read_bytes()).hexdigest() for place in (content, pulled)]
                if digests[0] != digests[1]:
                    raise ValueError(f"{repo}@{branch}, {path}: expected sha256 {digests[0]}, found {digests[1]}")
        print(f"verified: {repo}@{branch}")


def main() -> None:
    args = arguments()
    from trl_interfere.cli import main as command
    from trl_interfere.hub.push import push_folder

    command(["train", str(recipe_file(args.recipe)), "--output_dir", args.output_dir, "--resume"])
    command(["heal", args.output_dir])
    result = push_folder(args.output_dir, args.repo, private=args.private or None, collection=args.collection)
    print(f"published: {result.url}")
    verify(args.output_dir, result.repo_id)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
