"""What a run says in a sentence, and the prompts that show it."""

import json
import math
from collections.abc import Iterable
from typing import Any

from ..evaluation.bootstrap import Interval
from ..evaluation.flips import flips
from ..evaluation.metrics import forgetting
from ..evaluation.score_matrix import ScoreMatrix
from ..run import Run, read_json


REPAIR_NAME = "repair.json"
_FIGURES = ("peak", "final", "healed", "recovered", "low", "high", "n", "lost", "regained", "newly_lost")


def read_repair(run: Run) -> dict[str, Any] | None:
    """Content of the `repair.json` of a run, with its figures looked at; `None` where nothing was healed."""
    path = run.repair / REPAIR_NAME
    if not path.is_file():
        return None
    content = read_json(path, 1)
    try:
        figures = [entry.get(name) for entry in content["domains"].values() for name in _FIGURES]
        figures += [content["worst"], *content["recovered_all"].values(), *content["cost"].values()]
        unfit = [value for value in figures if value is not None and not _is_number(value)]
        if unfit or any(entry.get(name) is None for entry in content["domains"].values() for name in _FIGURES[:3]):
            raise ValueError(f"a figure that is no finite number ({unfit[:1] or 'none'})")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected the figures of a repair, found something else ({error!r:.200})") from error
    return content


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


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
    return f"{100 * value:.0f}%" + ("" if low is None or high is None else f" [{100 * low:.0f}, {100 * high:.0f}]")


def passes(cost: dict[str, float]) -> float:
    """Cost in passes of one sequence: a sampled completion and a forward pass count once, a backward pass twice."""
    weights = {"sampled": 1, "forward": 1, "backward": 2}
    return sum(weight * cost.get(f"sequences_{kind}", 0) for kind, weight in weights.items())


def arm_of(row: dict[str, Any]) -> dict[str, Any]:
    """A repair as `plot_pareto` takes it, from its record or from a row of [`~repair.comparison.Comparison`]."""
    name, cost, share = row["arm"], row.get("cost") or {}, row["recovered_all"]
    if name == "heal":
        name = f"heal, {row.get('method', 'subspace')}" + (f" of rank {row['rank']}" if row.get("rank") else "")
    elif name == "routes":
        name = f"{100 * row['budget']:g}% of {row['scope']} by {row['criterion']}"
    figures = {"recovered": share.get("value"), "low": share.get("low"), "high": share.get("high")}
    figures = {key: value if value is not None and math.isfinite(value) else None for key, value in figures.items()}
    return {"name": name, **figures, "worst": row["worst"], "sequences": passes(cost) or None}


def flipped(run: Run, domain: str, count: int = 3) -> tuple[list[dict[str, Any]], bool]:
    """
    Prompts of a domain that the final stage lost, with what each stage wrote: those that a heal brought back where
    there is one, and whether they are such.
    """
    heal = next((record for record in reversed(run.stages) if record.kind == "heal" and domain in record.scores), None)
    stages = [("at its peak", run.peak(domain)), ("at the end", run.final), *([("healed", heal)] if heal else [])]
    rows = {name: run.rows(record, domain) for name, record in stages}
    scores = {name: [row["score"] for row in of_stage] for name, of_stage in rows.items()}
    peak, end = scores["at its peak"], scores["at the end"]
    lost = flips(peak, end).lost
    regained = flips(end, scores["healed"], peak).regained if heal else []
    chosen = list(regained if len(regained) else lost)[:count]
    examples = [
        {
            "prompt": prompt_text(
                next((rows[name][place]["prompt"] for name in rows if rows[name][place]["prompt"]), None)
            ),
            "answers": [(name, answer_text(of_stage[place])) for name, of_stage in rows.items()],
        }
        for place in map(int, chosen)
    ]
    return [example for example in examples if example["prompt"]], bool(len(regained))


def prompt_text(prompt: Any) -> str:
    """A prompt as it is read: of a conversation its turns, one below the other."""
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    if isinstance(prompt, Iterable) and all(isinstance(turn, dict) for turn in prompt):
        return "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in prompt)
    return json.dumps(prompt, ensure_ascii=False)


def answer_text(row: dict[str, Any]) -> str:
    """The first completion of a prompt."""
    first = next(iter(row["completions"]), "")
    return first if isinstance(first, str) else prompt_text(first)
