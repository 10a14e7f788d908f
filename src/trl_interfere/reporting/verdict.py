"""What a run says in a sentence, and the prompts that show it."""

import math
from typing import Any

from ..evaluation.bootstrap import Interval
from ..evaluation.flips import flips
from ..evaluation.metrics import forgetting
from ..evaluation.score_matrix import ScoreMatrix
from ..run import Run, read_json


REPAIR_NAME = "repair.json"
_NEEDED = ("peak", "final", "healed")
_FIGURES = ("recovered", "low", "high", "n", "lost", "regained", "newly_lost")


def read_repair(run: Run) -> dict[str, Any] | None:
    """Content of the `repair.json` of a run, with its figures looked at; `None` where nothing was healed."""
    path = run.repair / REPAIR_NAME
    if not path.is_file():
        return None
    content = read_json(path, 1)
    try:
        entries = content["domains"].values()
        figures = [content["worst"], *content["recovered_all"].values(), *content["cost"].values()]
        figures += [entry.get(name) for entry in entries for name in _FIGURES]
        figures = [entry[name] for entry in entries for name in _NEEDED] + [one for one in figures if one is not None]
        if unfit := [one for one in figures if type(one) not in (int, float) or not math.isfinite(one)]:
            raise ValueError(f"a figure that is no finite number ({unfit[0]})")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected the figures of a repair, found something else ({error!r:.200})") from error
    return content


def losses(run: Run, matrix: ScoreMatrix) -> dict[str, Interval]:
    """Points from the peak to the final stage, largest first, of the domains that lost more than chance explains."""
    end = run.final.index
    scored = [domain for domain in matrix.domains if domain in matrix.values[end]]
    found = {domain: forgetting(matrix, domain, end) for domain in scored} if end else {}
    lost = {domain: points for domain, points in found.items() if points.low > 0}
    return dict(sorted(lost.items(), key=lambda item: -item[1].value))


def verdict(run: Run, matrix: ScoreMatrix, repair: dict[str, Any] | None = None) -> str:
    """What was lost, and what a repair brought back at what price, with 95% intervals."""
    lost = losses(run, matrix)
    if not lost:
        return "Nothing was lost beyond chance: no domain fell from its peak by more than its interval over prompts."
    parts, since = [], ""
    for domain, points in lost.items():
        peak = matrix.interval(matrix.peak(domain, run.final.index), domain).value
        healed = repair["domains"].get(domain) if repair else None
        back = f", and is healed to {healed['healed']:.1f}" if healed else ""
        if healed and healed["peak"] < peak - 0.05:  # its own stage, which a heal goes back to, had lost some already
            since = " since each domain's own stage"
        parts.append(
            f"{domain} lost {points.value:.1f} of {peak:.1f} points [{points.low:.1f}, {points.high:.1f}]{back}"
        )
    text = "; ".join(parts) + "."
    if repair is None:
        return text
    worst, share = repair["worst"], share_of(repair["recovered_all"])
    price = "no other domain paid" if worst >= 0 else f"the worst change of another domain is {worst:+.1f} points"
    return f"{text} Without training, {share} of all that was lost{since} came back; {price}."


def share_of(entry: dict[str, Any]) -> str:
    """A recovered share with its interval."""
    value, low, high = (entry.get(name) for name in ("value" if "value" in entry else "recovered", "low", "high"))
    if value is None:
        return "—"
    return f"{value:.0%}" + ("" if low is None or high is None else f" [{100 * low:.0f}, {100 * high:.0f}]")


def passes(cost: dict[str, float]) -> float:
    """Cost in passes of one sequence: a sampled completion and a forward pass count once, a backward pass twice."""
    sampled, forward, backward = (cost.get(f"sequences_{kind}", 0) for kind in ("sampled", "forward", "backward"))
    return sampled + forward + 2 * backward


def arm_of(row: dict[str, Any]) -> dict[str, Any]:
    """A repair as `plot_pareto` takes it, from its record or from a row of [`~repair.comparison.Comparison`]."""
    name, cost, share = row["arm"], row.get("cost") or {}, row["recovered_all"]
    if name == "heal":
        name = f"heal, {row.get('method', 'subspace')}" + (f" of rank {row['rank']}" if row.get("rank") else "")
    elif name == "routes":
        name = f"{100 * row['budget']:g}% of {row['scope']} by {row['criterion']}"
    known = {key: value for key, value in share.items() if value is not None and math.isfinite(value)}
    figures = {"recovered": known.get("value"), "low": known.get("low"), "high": known.get("high")}
    return {"name": name, **figures, "worst": row["worst"], "sequences": passes(cost) or None}


def flipped(run: Run, domain: str, count: int = 3) -> tuple[list[dict[str, Any]], bool]:
    """
    Prompts of a domain that the final stage lost, with what each stage wrote: those that a heal brought back where
    there is one, and whether they are such.
    """
    heal = next((record for record in reversed(run.stages) if record.kind == "heal" and domain in record.scores), None)
    stages = {"at its peak": run.peak(domain), "at the end": run.final} | ({"healed": heal} if heal else {})
    rows = {name: run.rows(record, domain) for name, record in stages.items()}
    peak, end, *healed = ([row["score"] for row in of_stage] for of_stage in rows.values())
    regained = flips(end, *healed, peak).regained if heal else []
    chosen = regained if len(regained) else flips(peak, end).lost
    examples = []
    for place in map(int, chosen[:count]):
        at = {name: of_stage[place] for name, of_stage in rows.items()}
        if prompt := next(filter(None, (prompt_text(row["prompt"]) for row in at.values())), ""):
            examples.append({"prompt": prompt, "answers": [(name, answer_text(row)) for name, row in at.items()]})
    return examples, bool(len(regained))


def prompt_text(prompt: Any) -> str:
    """A prompt as it is read: of a conversation its turns, one below the other."""
    if not isinstance(prompt, list):
        return str(prompt or "")
    turns = (turn if isinstance(turn, dict) else {"content": turn} for turn in prompt)
    return "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in turns)


def answer_text(row: dict[str, Any]) -> str:
    """The first completion of a prompt."""
    return prompt_text(next(iter(row["completions"]), ""))
