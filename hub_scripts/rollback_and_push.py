# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-interfere"]
# ///
"""
Roll damaged routes back after a published report, push the LoRA adapter as a branch, then reload and compare it.

On Hugging Face Jobs:

    hf jobs uv run --flavor a10g-small --timeout 1h --secrets HF_TOKEN \
        https://huggingface.co/datasets/USER/SCRIPTS/resolve/main/rollback_and_push.py \
        --report USER/MODEL --criterion damage --budget 0.02 --scope mlp --branch rollback-math

On your own machine:

    uv run hub_scripts/rollback_and_push.py --report USER/MODEL --budget 0.02 --branch rollback-math

Nothing is scored here: score the branch with `trl-interfere evaluate` beside random controls before you trust it.
"""

import argparse
import sys
import tempfile
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", required=True, help="report: user/repo, user/repo@revision or a folder")
    parser.add_argument("--repo", help="repository of the adapter; defaults to that of the report")
    parser.add_argument("--branch", default="rollback", help="branch of the adapter")
    parser.add_argument("--criterion", default="damage", help="what routes are ranked by")
    parser.add_argument("--budget", type=float, default=0.02, help="share of the routes of the scope")
    parser.add_argument("--scope", default="mlp", help="mlp, attention or joint")
    parser.add_argument("--step", type=float, default=1.0, help="1 restores the routes, more goes beyond")
    parser.add_argument("--protection", type=float, default=0.0, help="weight of what later domains owe a route")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random criteria")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    return parser.parse_args()


CARD = """---
library_name: peft
base_model: {base}
pipeline_tag: text-generation
tags: [trl-interfere, trl, grpo, lora]
---

# {after}, rolled back

A LoRA adapter over `{after}`, from a training-free rollback with `trl-interfere`: the {budget:.3g} of {scope} routes
that are highest by `{criterion}` (protection {protection:g}, seed {seed}) move back toward `{before}` with step
{step:g}. The report is [{report}](https://huggingface.co/{repo}). The scores of this model were not measured here.
"""


def main() -> None:
    args = arguments()
    import torch

    from trl_interfere import InterferenceReport, RouteRollback
    from trl_interfere.hub.upload import PlannedRevision, Uploader
    from trl_interfere.models import load_model, load_tokenizer
    from trl_interfere.revision import split_revision

    repo = args.repo or split_revision(args.report)[0]
    if Path(repo).exists():
        raise ValueError("--repo: expected user/repo for the adapter of a report in a folder, found none")
    rollback = RouteRollback(args.criterion, args.budget, args.scope, args.step, args.protection, args.seed)
    report = InterferenceReport.from_pretrained(args.report)
    repair = rollback.fit(report)
    with tempfile.TemporaryDirectory() as folder:
        repair.save_pretrained(folder)
        load_tokenizer(report.after).save_pretrained(folder)
        files = {path.name: path for path in sorted(Path(folder).iterdir()) if path.is_file()}
        about = {**vars(rollback), "before": report.before, "after": report.after, "report": args.report, "repo": repo}
        files["README.md"] = CARD.format(base=split_revision(report.after)[0], **about).encode()
        uploader = Uploader(repo, command=" ".join(["uv run", *sys.argv]))
        print(f"published: {uploader.create(args.private or None)}, branch {args.branch}")
        uploader.upload(PlannedRevision(args.branch, files, managed=["[!.]*"]), f"Rollback by {args.criterion}")
    pulled, expected = load_model(f"{uploader.repo_id}@{args.branch}"), repair.merge()
    for name, parameter in pulled.named_parameters():
        if not torch.equal(parameter, expected.get_parameter(name)):
            raise ValueError(
                f"{uploader.repo_id}@{args.branch}, tensor {name}: expected what was pushed, found another"
            )
    print(f"verified: {uploader.repo_id}@{args.branch}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
