# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-interfere[metrics]"]
# ///
"""
Publish the evaluate modules as metric Spaces, then fetch each one anew and load it.

On Hugging Face Jobs (the job needs the folder: name a repository that holds it):

    hf jobs uv run --flavor cpu-basic --timeout 10m --secrets HF_TOKEN \
        https://huggingface.co/datasets/USER/SCRIPTS/resolve/main/publish_metrics.py \
        --folder USER/SCRIPTS:metrics --namespace USER

On your own machine:

    uv run hub_scripts/publish_metrics.py --folder metrics --namespace USER
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="metrics", help="folder of the modules, or user/dataset:folder on the Hub")
    parser.add_argument("--namespace", required=True, help="user or organisation that the Spaces belong to")
    parser.add_argument("--metrics", help="names, separated by commas; defaults to all")
    parser.add_argument("--private", action="store_true", help="make new Spaces private")
    return parser.parse_args()


def modules_folder(folder: str) -> Path:
    """The folder itself, or the one in a snapshot of a data set repository."""
    if Path(folder).is_dir():
        return Path(folder)
    repo_id, _, name = folder.partition(":")
    if not name or repo_id.count("/") != 1:
        raise ValueError(f"--folder: expected a folder that exists or user/dataset:folder, found {folder!r}")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo_id, repo_type="dataset", allow_patterns=[f"{name}/*"])) / name


def main() -> None:
    args = arguments()
    import evaluate
    from huggingface_hub import HfApi, snapshot_download

    api = HfApi()
    folder = modules_folder(args.folder)
    known = sorted(path.parent.name for path in folder.glob("*/*.py") if path.stem == path.parent.name)
    names = args.metrics.split(",") if args.metrics else known
    for name in names:
        if name not in known:
            raise ValueError(f"{folder}: expected some of {known}, found {name!r}")
    for name in names:
        space = {"repo_id": f"{args.namespace}/{name}", "repo_type": "space"}
        url = api.create_repo(**space, space_sdk="gradio", private=args.private or None, exist_ok=True)
        api.upload_folder(**space, folder_path=folder / name, commit_message=f"Metric {name}", delete_patterns="*")
        print(f"published: {url}")
        with tempfile.TemporaryDirectory() as scratch:
            # From its files, not by its id: evaluate asks huggingface.co alone for an id.
            pulled = shutil.copytree(snapshot_download(**space), Path(scratch) / name)
            metric = evaluate.load(str(pulled / f"{name}.py"), cache_dir=scratch)
            if metric.name != name:
                raise ValueError(f"{url.repo_id}: expected the metric {name!r}, found {metric.name!r}")
        print(f"verified: {url.repo_id}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
