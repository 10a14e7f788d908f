"""What a run of the lab says: the table at its end and `report.md`."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..reporting.claims import Claim, claims_table
from ..run import stage_name, write_atomically


def _score_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    names = results["order"]
    header = ["stage", *(f"{name} (n={results['stages'][0]['scores'][name]['n']})" for name in names)]
    rows = []
    for stage in results["stages"]:
        cells = [stage["scores"][name] for name in names]
        rows.append(
            [stage_name(stage["index"], stage["kind"], stage["domain"])]
            + [f"{cell['value']:.1f} [{cell['low']:.1f}, {cell['high']:.1f}]" for cell in cells]
        )
    return header, rows


def _pair_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["earlier, later", "cosine", "lowest module", "highest module", "damage", "1st order", "2nd order",
              "by routes", "outside"]  # fmt: skip
    rows = []
    for pair in results["pairs"]:
        low, high = pair["most_conflicting"], pair["most_synergistic"]
        rows.append(
            [
                f"{pair['earlier']}, {'+'.join(pair['later'])}",
                f"{pair['global_cosine']:+.3f}",
                f"{low['module']} {low['cosine']:+.2f}",
                f"{high['module']} {high['cosine']:+.2f}",
                f"{pair['loss_after'] - pair['loss_before']:+.4f}",
                f"{pair['first_order']:+.4f}",
                f"{pair['second_order']:+.4f}",
                f"{pair['attributed']:+.4f}",
                f"{pair['outside_routes']:+.4f}",
            ]
        )
    return header, rows


def _rollback_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["repair", "damage by", "budget", "step", "recovered", "change of the others"]
    rows = []
    for row in results["rollback"]:
        pair = results["pairs"][row["pair"]]
        draws = f" (mean of {row['draws']} draws)" if row["draws"] > 1 else ""
        rule = "best " if row["step_rule"] == "optimal" else ""
        rows.append(
            [
                row["criterion"] + draws,
                "+".join(pair["later"]),
                f"{100 * row['budget']:g}% {row['scope']}",
                f"{rule}{row['step']:.2g}",
                _percent(row),
                _collateral(row["collateral"]),
            ]
        )
    refresh = results["refresh"]
    if refresh is not None:
        later = "+".join(results["pairs"][0]["later"])
        rows.append(
            ["refresh", later, f"{refresh['steps']} steps", "", _percent(refresh), _collateral(refresh["collateral"])]
        )
    return header, rows


def _percent(row: dict[str, Any]) -> str:
    if row["recovered"] is None:
        return "nothing was lost"
    return f"{100 * row['recovered']:.0f}% [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"


def _collateral(changes: dict[str, float]) -> str:
    return ", ".join(f"{name} {change:+.1f}" for name, change in changes.items())


def print_summary(results: dict[str, Any], console: Console) -> None:
    """
    Print the tables of a run: scores, pairs, and the repairs of 2% of the routes beside their controls.

    Args:
        results (`dict`):
            Content of `results.json`.
        console ([`rich.console.Console`]):
            Where to print.
    """
    shown = {**results, "rollback": [row for row in results["rollback"] if row["pair"] == 0 and row["budget"] == 0.02]}
    for title, (header, rows) in (
        ("Score after each stage (0 to 100, 95% interval)", _score_rows(results)),
        ("Damage of the earlier domain, in nats per token", _pair_rows(results)),
        ("Repair: recovered share of the lost score (95% interval)", _rollback_rows(shown)),
    ):
        table = Table(title=title, title_justify="left")
        for position, name in enumerate(header):
            table.add_column(name, justify="left" if position == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def write_report(results: dict[str, Any], folder: str | Path) -> None:
    """
    Write `report.md`.

    Args:
        results (`dict`):
            Content of `results.json`.
        folder (`str` or `pathlib.Path`):
            Folder of the run.
    """
    text = f"""# Lab, seed {results["seed"]}

A model of about one million parameters was tuned with GRPO on {", ".join(results["order"])}, one after the other,
{results["steps_per_stage"]} steps each. Scores are sampled at temperature 1 on test prompts that no stage has seen;
intervals are 95%, bootstrapped over prompts.

## What was trained

{_markdown(*_score_rows(results))}

![Scores](figures/score_matrix.png)

## What broke, and where

Losses are mean negative log-likelihoods, in nats per token, of the data set's own answers on the selection split.
Damage is attributed to routes by integrated gradients along the update; its parts by routes and outside routes add up
to the damage.

{_markdown(*_pair_rows(results))}

![Gradient cosines](figures/module_cosines.png)

![Damage concentration](figures/damage_concentration.png)

## What repaired it

Routes and steps were chosen on the selection split; recovery is measured on the test split. The best step is the
one with the highest mean score of all domains on the selection split. `random` and `random_matched` (same layers,
updates of like size) are controls and take the step of `damage`. `damage_protected` subtracts from a route what
the later domains owe it. `interpolation` takes back a share (the step) of all weights.

{_markdown(*_rollback_rows(results))}

{"" if results["refresh"] else "There was no refresh: no domain fell by more than 2 points with an interval above 0."}

![Rollback](figures/rollback_curve.png)

## The claims of arXiv 2606.02398

The paper measured Qwen3-4B-Thinking-2507; its figures are for orientation. Figures of edits, activity, gradients and
damage are of the first pair above, if they do not name stages.

{claims_table([Claim(**row) for row in results["claims"]])}

![Sparsity](figures/sparsity.png)

![Routes that the stages changed](figures/changed_overlaps.png)

![Routes that are active](figures/overlaps.png)

![Damage by layer](figures/damage_by_layer.png)

![Eigenvalues of the damage on route space](figures/eigenvalues.png)

Time: {", ".join(f"{part} {seconds:.0f} s" for part, seconds in results["seconds"].items())}.
"""
    write_atomically(Path(folder) / "report.md", text)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
