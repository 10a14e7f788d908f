"""The claims of arXiv 2606.02398 on forgetting and repair, each with its control."""

from collections.abc import Sequence
from typing import Any

from ..analysis.stage_edits import StageEdits
from ..evaluation.forgetting import forgetting
from ..evaluation.score_matrix import ScoreMatrix
from .claims import Claim


def edit_claims(edits: StageEdits) -> list[Claim]:
    """
    Overlap of the routes that each two stages of a run changed most.

    Args:
        edits ([`~analysis.stage_edits.StageEdits`]):
            What each stage changed.

    Returns:
        `list[Claim]`: One row for each pair of domains.
    """
    rows = []
    for first, row in edits.changed.items():
        for second, kinds in row.items():
            found = kinds["mlp"]
            rows.append(
                Claim(
                    "changed neurons barely overlap",
                    f"Jaccard of the top 10% MLP channels by edit: stages {first} and {second}",
                    f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}] over {found.units} layers",
                    f"chance {found.chance:.3f}; shuffled within layers {found.shuffled:.3f} "
                    f"[{found.shuffled_low:.3f}, {found.shuffled_high:.3f}]",
                    "below 0.19",
                )
            )
    return rows


def forgetting_claims(matrix: ScoreMatrix) -> list[Claim]:
    """
    How far each domain fell from its peak by the end of the last training stage.

    Args:
        matrix ([`~evaluation.score_matrix.ScoreMatrix`]):
            Scores after each stage.

    Returns:
        `list[Claim]`: One row for each domain that was trained before the last one.
    """
    last = matrix.last_training(-1)
    if last is None:
        return []
    rows = []
    for domain in matrix.domains:
        lost = forgetting(matrix, domain, last)
        if not lost.value == lost.value:  # undefined for the domain trained last
            continue
        peak, end, base = (matrix.interval(row, domain) for row in (matrix.peak(domain, last), last, 0))
        rows.append(
            Claim(
                "sequential forgetting",
                f"{domain}: points lost from the peak to the end of the sequence (n={lost.n})",
                f"{lost:.1f}, from {peak.value:.1f} to {end.value:.1f}",
                f"base {base:.1f}",
                "math 66.49 to 57.66; code 52.67 to 50.47",
            )
        )
    domain, before = matrix.stage_kind(last)[1], last - 1
    if domain in matrix.domains:
        start, end = (matrix.interval(row, domain) for row in (before, last))
        rows.append(
            Claim(
                "sequential forgetting",
                f"{domain}, trained last: score before and after its stage (n={end.n})",
                f"{start:.1f} to {end:.1f}",
                f"base {matrix.interval(0, domain):.1f}",
                "creative writing climbs to 86.52",
            )
        )
    return rows


def refresh_claims(refresh: dict[str, Any] | None, rollback: Sequence[dict[str, Any]]) -> list[Claim]:
    """
    What a refresh recovered, and how far it contracted the conflict subspace.

    Args:
        refresh (`dict`, *optional*):
            `domain`, `steps`, `recovered`, `low`, `high`, `n`, `collateral` and `contraction`, see
            [`~lab.pipeline.Lab`].
        rollback (`Sequence[dict]`):
            Rows of training-free repairs, among them `"interpolation"`.

    Returns:
        `list[Claim]`: Rows; none without a refresh.
    """
    if refresh is None:
        return []
    rows = []
    control = next((row for row in rollback if row["criterion"] == "interpolation"), None)
    changes = {name: change["value"] for name, change in refresh.get("changes", {}).items()}
    own = [f"{refresh['domain']} {changes[refresh['domain']]:+.1f}"] if changes else []
    mean = [f"mean of all {sum(changes.values()) / len(changes):+.1f}"] if changes else []
    rows.append(
        Claim(
            "refresh heals",
            f"share of the lost {refresh['domain']} score after {refresh['steps']} steps (n={refresh['n']}); "
            "changes in points",
            f"{_share(refresh)}; {', '.join([*own, _collateral(refresh), *mean])}",
            "no interpolation was measured"
            if control is None
            else f"interpolation of all weights, no training: {_share(control)}; {_collateral(control)}",
            "94.9%; code +0.58, QA +0.15, writing -0.56; mean 64.25 to 66.39",
        )
    )
    contraction = refresh.get("contraction")
    if contraction is not None:
        size = contraction["directions"]
        rows.append(
            Claim(
                "refresh contracts the conflict subspace (Theorem 1)",
                f"‖P_S(θ_t - θ*_A)‖ / ‖P_S δ_B‖ after {refresh['steps']} steps, S of {size} directions",
                f"{contraction['subspace']:.3f}",
                f"{size} random directions of route space {contraction['random']:.3f}; "
                f"all routes {contraction['routes']:.3f}",
                "a bound (1 - αμ)^t below 1; no figure",
            )
        )
    return rows


def rollback_claims(rollback: Sequence[dict[str, Any]]) -> list[Claim]:
    """
    What rolling routes back recovered, with controls.

    Args:
        rollback (`Sequence[dict]`):
            Rows with `criterion`, `scope`, `budget`, `step`, `step_rule`, `recovered`, `low`, `high`, `collateral`.

    Returns:
        `list[Claim]`: One row for each budget and scope at which `"damage"` was measured, with the random controls
        at the same step beside it.
    """
    rows = []
    paper = {(0.02, "mlp"): "20.4% of the loss; QA -0.06", (0.32, "joint"): "73.6% of the loss"}
    for row in rollback:
        if row["criterion"] != "damage" or row["recovered"] is None:
            continue
        same = {name: row[name] for name in ("scope", "budget", "step_rule")}
        controls = [
            f"{other['criterion']} {_share(other)}"
            for other in rollback
            if same.items() <= other.items() and other["criterion"] in ("random", "random_matched", "route_conflict")
        ]
        rows.append(
            Claim(
                "rollback, training-free",
                f"share of the lost score: damage, {100 * row['budget']:g}% of {row['scope']}, step {row['step']:.2g}"
                f"{' (best)' if row['step_rule'] == 'optimal' else ''}; change of the others",
                f"{_share(row)}; {_collateral(row)}",
                "; ".join(controls) or "none at this budget",
                paper.get((row["budget"], row["scope"]), "not reported"),
            )
        )
    return rows


def _share(row: dict[str, Any]) -> str:
    if row["recovered"] is None:
        return "nothing was lost"
    return f"{100 * row['recovered']:.0f}% [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"


def _collateral(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {change:+.1f}" for name, change in row["collateral"].items())
