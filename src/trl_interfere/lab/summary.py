"""What a run of the lab says: the tables at its end and `report.md`."""

from pathlib import Path
from typing import Any

from rich.console import Console

from ..evaluation.score_matrix import ScoreMatrix
from ..reporting.claims import Claim, claims_table
from ..reporting.verdict import arm_of, share_of
from ..run import Run, write_atomically
from ..tables import console_table, markdown_table


Table = tuple[list[str], list[list[str]]]


def _pair_rows(results: dict[str, Any]) -> Table:
    parts = {"first_order": "1st order", "second_order": "2nd order", "attributed": "by routes"}
    parts["outside_routes"] = "outside"
    rows = []
    for pair in results["pairs"]:
        low, high = pair["most_conflicting"], pair["most_synergistic"]
        nats = [pair["loss_after"] - pair["loss_before"], *(pair[name] for name in parts)]
        rows.append(
            [
                f"{pair['earlier']}, {'+'.join(pair['later'])}",
                f"{pair['global_cosine']:+.3f}",
                *(f"{module['module']} {module['cosine']:+.2f}" for module in (low, high)),
                *(f"{value:+.4f}" for value in nats),
            ]
        )
    return ["earlier, later", "cosine", "lowest module", "highest module", "damage", *parts.values()], rows


def _repair_rows(results: dict[str, Any]) -> Table:
    settings = {
        "heal": "rank {rank}, {references} references",
        "routes": "step {chosen:g}",
        "interpolation": "share {chosen:g}",
        "refresh": "{steps} steps",
    }
    rows = []
    for row in filter(None, [results["healed"], *results["rivals"]]):
        changes = (row["domains"][domain]["change"]["value"] for domain in results["order"])
        name = arm_of(row)["name"] + (", protected" if row.get("protection") else "")
        share = share_of(row["recovered_all"])
        rows.append([name, settings[row["arm"]].format(**row), share, *(f"{change:+.1f}" for change in changes)])
    return ["repair", "setting", "recovered of all it was to restore", *results["order"]], rows


def print_summary(results: dict[str, Any], folder: str | Path, console: Console) -> None:
    """Print the tables of a run: scores, pairs, and the repairs."""
    console.print(ScoreMatrix.from_run(Run(folder)).to_table())
    console.print(console_table("Damage of the earlier domain, in nats per token", *_pair_rows(results)))
    title = "Repairs: what came back, and the change of every domain in points"
    console.print(console_table(title, *_repair_rows(results)))


def write_report(results: dict[str, Any], folder: str | Path) -> None:
    """Write `report.md`."""
    header, *scores = ScoreMatrix.from_run(Run(folder)).rows()
    nothing = "" if results["healed"] else "Nothing was healed: no domain lost more than the interval of its loss."
    text = f"""# Lab, seed {results["seed"]}

A model of about one million parameters was tuned with GRPO on {", ".join(results["order"])}, one after the other,
{results["steps_per_stage"]} steps each. Scores are sampled at temperature 1 on test prompts that no stage has seen;
intervals are 95%, bootstrapped over prompts.

## What was trained

{markdown_table(header, scores)}

![Scores](figures/scores.png)

## What broke, and where

Losses are mean negative log-likelihoods, in nats per token, of the data set's own answers on the selection split.
Damage is attributed to routes by integrated gradients along the update; its parts by routes and outside routes add up
to the damage.

{markdown_table(*_pair_rows(results))}

![Gradient cosines](figures/module_cosines.png)

![Damage concentration](figures/damage_concentration.png)

## What repaired it

`heal` restores every earlier domain that later stages have not made better; its adapter lies in `repair/`. The others
restore {results["pairs"][0]["earlier"]}. Steps and shares were chosen on the selection split: the highest mean
of all domains with which none loses more than a point. All figures are from the test split.

{markdown_table(*_repair_rows(results))}

{nothing}

![Repairs](figures/pareto.png)

## The claims of arXiv 2606.02398

The paper measured Qwen3-4B-Thinking-2507; its figures are for orientation. Figures of edits, activity, gradients and
damage are of the first pair above, if they do not name stages.

{claims_table([Claim(**row) for row in results["claims"]])}

![Sparsity](figures/sparsity.png)

![Routes that the stages changed](figures/changed_overlaps.png)

![Routes that are active](figures/overlaps.png)

![Damage by layer](figures/damage_by_layer.png)

![Eigenvalues of the damage on route space](figures/eigenvalues.png)

Training: {", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in results["seconds"].items() if seconds)}.
"""
    write_atomically(Path(folder) / "report.md", text)
