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
    from huggingface_hub import HfApi, hf_hub_download

    folder = app_folder(args.folder)
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not set(path.relative_to(folder).parts) & set(HIDDEN)
    }
    for name in ("README.md", *(["app.py"] if args.sdk == "gradio" else [])):
        if name not in files:
            raise ValueError(f"{folder}: expected {name}, found {sorted(files)}")
    api, space = HfApi(), {"repo_id": args.repo, "repo_type": "space"}
    url = api.create_repo(
        **space, space_sdk=args.sdk, space_hardware=args.hardware, private=args.private or None, exist_ok=True
    )
    api.upload_folder(
        **space, folder_path=folder, allow_patterns=list(files), delete_patterns="*", commit_message="App"
    )
    print(f"published: {url}")
    if args.collection is not None:
        slug = api.create_collection(args.collection, namespace=url.repo_id.split("/")[0], exists_ok=True).slug
        api.add_collection_item(slug, url.repo_id, item_type="space", exists_ok=True)
        print(f"collection: {slug}")
    for name, path in files.items():
        pulled = Path(hf_hub_download(args.repo, name, repo_type="space"))
        if hashlib.sha256(pulled.read_bytes()).digest() != hashlib.sha256(path.read_bytes()).digest():
            raise ValueError(f"{url.repo_id}, {name}: expected what was pushed, found another file")
    print(f"verified: {len(files)} files of {url.repo_id}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
