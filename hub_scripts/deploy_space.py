# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-interfere"]
# ///
"""
Publish the folder of the Gradio app as a Space, then list and compare what is there.

On Hugging Face Jobs (the job needs the folder: name a repository that holds it):

    hf jobs uv run --flavor cpu-basic --timeout 10m --secrets HF_TOKEN \
        https://huggingface.co/datasets/USER/SCRIPTS/resolve/main/deploy_space.py \
        --folder USER/SCRIPTS:space --repo USER/interference

On your own machine:

    uv run hub_scripts/deploy_space.py --folder space --repo USER/interference
"""

import argparse
import hashlib
import sys
from pathlib import Path


HIDDEN = (".git", "__pycache__", ".venv", ".env", ".DS_Store", ".gradio", ".pytest_cache", ".ruff_cache")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="space", help="folder of the app, or user/dataset:folder on the Hub")
    parser.add_argument("--repo", required=True, help="the Space, user/name; made if there is none")
    parser.add_argument("--sdk", default="gradio", help="gradio, docker or static")
    parser.add_argument("--private", action="store_true", help="make a new Space private")
    parser.add_argument("--hardware", help="hardware of a new Space, e.g. cpu-upgrade")
    parser.add_argument("--collection", help="title of a collection to add the Space to")
    return parser.parse_args()


def app_folder(folder: str) -> Path:
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
    from huggingface_hub import hf_hub_download

    from trl_interfere.hub.push import add_to_collection
    from trl_interfere.hub.upload import PlannedRevision, Uploader

    folder = app_folder(args.folder)
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not set(path.relative_to(folder).parts) & set(HIDDEN)
    }
    for name in ("README.md", *(["app.py"] if args.sdk == "gradio" else [])):
        if name not in files:
            raise ValueError(f"{folder}: expected {name}, found {sorted(files)}")
    uploader = Uploader(args.repo, "space", command=" ".join(["uv run", *sys.argv]))
    url = uploader.create(args.private or None, space_sdk=args.sdk, space_hardware=args.hardware)
    uploader.upload(PlannedRevision("main", files, managed=["[!.]*"]), "App")
    print(f"published: {url}")
    if args.collection is not None:
        print(f"collection: {add_to_collection(uploader, args.collection)}")
    for name, path in files.items():
        pulled = Path(hf_hub_download(uploader.repo_id, name, repo_type="space"))
        if hashlib.sha256(pulled.read_bytes()).digest() != hashlib.sha256(path.read_bytes()).digest():
            raise ValueError(f"{uploader.repo_id}, {name}: expected what was pushed, found another file")
    print(f"verified: {len(files)} files of {uploader.repo_id}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
