"""A run in four sentences: what was trained, what broke, where, and what repaired it."""

from dataclasses import dataclass

from ..analysis.report import InterferenceReport, top_share
from .figures import repair_rows
from .stored_run import StoredRun


@dataclass(frozen=True)
class Statement:
    """
    One part of the story.

    Args:
        question (`str`):
            What it answers.
        figure (`str`):
            The number that answers it.
        answer (`str`):
            The same as a sentence.
        detail (`str`, *optional*, defaults to `""`):
            Interval, number of prompts, and control.
    """

    question: str
    figure: str
    answer: str
    detail: str = ""


def tell(run: StoredRun, report: InterferenceReport | None = None) -> list[Statement]:
    """
    What happened in a run.

    Args:
        run ([`StoredRun`]):
            The run.
        report ([`InterferenceReport`], *optional*):
            Analysis of the damage.

    Returns:
        `list[Statement]`: As many of the four as the run has figures for.
    """
    statements = []
    trained = [stage for stage in run.stages if stage["kind"] == "train"]
    if trained:
        order = [stage["domain"] for stage in trained]
        steps = trained[0]["steps"]
        statements.append(
            Statement(
                "What was trained",
                f"{len(order)} skills",
                f"One language model learned {_listed(order)} by reinforcement, one after the other.",
                "" if steps is None else f"{steps} optimizer steps each; every skill scored after every stage.",
            )
        )
    fall = _largest_fall(run, report.earlier if report else None)
    if fall is not None:
        domain, peak, end, later = fall
        lost = peak["value"] - end["value"]
        statements.append(
            Statement(
                "What broke",
                f"−{lost:.0f} points" if lost > 0 else "nothing",
                f"The skill {domain} scored {peak['value']:.0f} of 100 after its own stage and "
                f"{end['value']:.0f} after {later}.",
                f"95% intervals {peak['low']:.0f} to {peak['high']:.0f} and {end['low']:.0f} to {end['high']:.0f}, "
                f"{int(end['n'])} unseen prompts.",
            )
        )
    if report is not None:
        statements.append(_where(report))
    repair = _repaired(run)
    if repair is not None:
        statements.append(repair)
    return statements


def _where(report: InterferenceReport) -> Statement:
    cosine = report.cosines["global"]
    whole = "undefined" if cosine is None else f"{cosine:+.2f}"
    detail = (
        f"The gradients of the skills look unrelated (cosine {whole}), and yet the loss rose by {report.damage:+.3f}."
    )
    if not report.attributed > 0:
        return Statement("Where", "no routes", "The parts that we can attribute damage to were not damaged.", detail)
    share = top_share(report.routes["damage"], 0.02)
    carried = f"carry {100 * share:.0f}% of the damage to {report.earlier}."
    answer = f"2% of the network's small parts (channels and heads) {carried}"
    if share > 1:
        answer += " Above 100%: other parts were improved."
    return Statement("Where", f"{100 * share:.0f}% in 2%", answer, detail)


def _repaired(run: StoredRun) -> Statement | None:
    rows = repair_rows(run)
    best = [row for row in rows if row["criterion"] == "damage" and row["step_rule"] == "optimal"]
    best = best or [row for row in rows if row["criterion"] == "damage"]
    if not best:
        return None
    row = best[0]
    parts = [f"95% interval {100 * row['low']:.0f} to {100 * row['high']:.0f}%"]
    control = next(
        (other for other in rows if other["criterion"] == "random" and other["step_rule"] == row["step_rule"]), None
    )
    if control is not None:
        parts.append(f"random parts instead: {100 * control['recovered']:.0f}%")
    refresh = run.results["refresh"]
    if refresh and refresh["recovered"] is not None:
        parts.append(f"{refresh['steps']} steps of new training instead: {100 * refresh['recovered']:.0f}%")
    if row["collateral"]:
        name = min(row["collateral"], key=row["collateral"].get)
        parts.append(f"worst price: {name} {row['collateral'][name]:+.1f} points")
    return Statement(
        "What repaired it",
        f"{100 * row['recovered']:.0f}% back",
        f"Putting {100 * row['budget']:g}% of the MLP channels back to where they were, without any training, "
        f"returned {100 * row['recovered']:.0f}% of the lost score.",
        "; ".join(parts) + ".",
    )


def _largest_fall(run: StoredRun, earlier: str | None):
    trained = [stage for stage in run.stages if stage["kind"] == "train"]
    if len(trained) < 2:
        return None
    last = trained[-1]
    falls = []
    for stage in trained[:-1]:
        domain = stage["domain"]
        if domain in stage["scores"] and domain in last["scores"] and domain == (earlier or domain):
            later = [other["domain"] for other in trained[trained.index(stage) + 1 :]]
            falls.append((domain, stage["scores"][domain], last["scores"][domain], _listed(later)))
    return max(falls, key=lambda fall: fall[1]["value"] - fall[2]["value"], default=None)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
