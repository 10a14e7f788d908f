# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-interfere"]
# ///
"""
Roll damaged routes back after a published report, push the repair as a LoRA adapter, then reload and compare it.

On Hugging Face Jobs:

    hf jobs uv run --flavor a10g-small --timeout 1h --secrets HF_TOKEN \
        https://huggingface.co/datasets/USER/SCRIPTS/resolve/main/rollback_and_push.py \
        --report USER/MODEL --criterion damage --budget 0.02 --scope mlp --repo USER/MODEL-rollback

On your own machine:

    uv run hub_scripts/rollback_and_push.py --report USER/MODEL --budget 0.02 --repo USER/MODEL-rollback

Nothing is scored here: score the adapter with `trl-interfere evaluate` beside random controls before you trust it.
"""

import argparse
import sys


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", required=True, help="report: user/repo, user/repo@revision or a folder")
    parser.add_argument("--repo", required=True, help="repository of the adapter; made if there is none")
    parser.add_argument("--criterion", default="damage", help="what routes are ranked by")
    parser.add_argument("--budget", type=float, default=0.02, help="share of the routes of the scope")
    parser.add_argument("--scope", default="mlp", help="mlp, attention or joint")
    parser.add_argument("--step", type=float, default=1.0, help="1 restores the routes, more goes beyond")
    parser.add_argument("--protection", type=float, default=0.0, help="weight of what later domains owe a route")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random criteria")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    import torch

    from trl_interfere import InterferenceReport, Repair, RouteRollback

    rollback = RouteRollback(args.criterion, args.budget, args.scope, args.step, args.protection, args.seed)
    repair = rollback.fit(InterferenceReport.from_pretrained(args.report))
    print(f"published: {repair.push_to_hub(args.repo, private=args.private or None)}")
    expected, pulled = (found.merge().state_dict() for found in (repair, Repair.from_pretrained(args.repo)))
    for name, tensor in expected.items():
        if not torch.equal(pulled[name], tensor):
            raise ValueError(f"{args.repo}, tensor {name}: expected what was pushed, found another")
    print(f"verified: {args.repo}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
