# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-interfere"]
# ///
"""
Train a model through domains in sequence, push every stage, then reload what was pushed and compare it.

On Hugging Face Jobs (`--config` is a YAML file in a data set repository, which holds its data files too):

    hf jobs uv run --flavor a10g-large --timeout 8h --secrets HF_TOKEN \
        https://huggingface.co/datasets/USER/SCRIPTS/resolve/main/train_sequential.py \
        --config USER/RUNS:train.yaml --repo USER/MODEL --private

On your own machine, with a local file or with the model of the lab:

    uv run hub_scripts/train_sequential.py --config train.yaml --repo USER/MODEL
    uv run hub_scripts/train_sequential.py --lab --steps 5 --prompts 16 --repo USER/MODEL

A job that was stopped goes on from a kept `--output-dir` with the same command.
"""

import argparse
import hashlib
import sys
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="YAML file of the run, or user/dataset:file.yaml on the Hub")
    source.add_argument("--lab", action="store_true", help="the model and the domains of the lab")
    parser.add_argument("--repo", required=True, help="model repository, user/repo; made if there is none")
    parser.add_argument("--output-dir", default="out", help="folder of the run; started again, it goes on")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--collection", help="title of a collection to add the model to")
    parser.add_argument("--steps", type=int, default=100, help="of the lab: optimizer steps of a stage")
    parser.add_argument("--prompts", type=int, default=512, help="of the lab: test prompts of a domain")
    parser.add_argument("--order", default="code,math,qa,writing", help="of the lab: domains, separated by commas")
    parser.add_argument("--seed", type=int, default=0, help="of the lab: seed of the training")
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


def verify(folder: Path, repo: str) -> None:
    """Download every revision and compare the weights with those on disk, byte by byte."""
    from huggingface_hub import hf_hub_download

    from trl_interfere.hub.run_folder import RunFolder
    from trl_interfere.revision import stage_revision

    run = RunFolder.read(folder)
    pairs = [(stage_revision(record.name), run.weights(record)) for record in run.trained]
    for revision, weights in [*pairs, ("main", run.weights(run.trained[-1]))]:
        for path in sorted(weights.glob("*.safetensors")):
            digests = [
                hashlib.sha256(Path(file).read_bytes()).hexdigest()
                for file in (path, hf_hub_download(repo, path.name, revision=revision))
            ]
            if digests[0] != digests[1]:
                raise ValueError(f"{repo}@{revision}, {path.name}: expected sha256 {digests[0]}, found {digests[1]}")
        print(f"verified: {repo}@{revision}")


def main() -> None:
    args = arguments()
    from trl_interfere.hub.push import push_run

    if args.lab:
        from trl_interfere.lab.pipeline import Lab

        order = args.order.split(",")
        Lab(args.output_dir, seed=args.seed, order=order, steps=args.steps, prompts=args.prompts).run()
    else:
        from trl_interfere.training.recipe_trainer import build_trainer

        trainer = build_trainer(config_file(args.config), {"output_dir": args.output_dir})
        trainer.train(resume_from_checkpoint=True)
    result = push_run(
        args.output_dir, args.repo, stages=True, private=args.private or None, collection=args.collection
    )
    print(f"published: {result.url}")
    verify(Path(args.output_dir), result.repo_id)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
