"""The claims of arXiv 2606.02398 as figures, each with the control that a sceptic asks for."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..analysis.report import InterferenceReport
from ..evaluation.metrics import forgetting
from ..evaluation.score_matrix import ScoreMatrix
from ..tables import markdown_table
from .verdict import share_of


class Claim(NamedTuple):
    """One figure that speaks for or against a claim, beside its control and what the paper reports (Qwen3-4B)."""

    claim: str
    figure: str
    value: str
    control: str
    paper: str


def claims_table(claims: list[Claim]) -> str:
    """Claims as a table in Markdown."""
    return markdown_table(("claim", "figure", "here", "control", "paper"), claims)


def report_claims(report: InterferenceReport) -> list[Claim]:
    """The claims that one analysis speaks to, on edits, activity, gradients and damage, as far as it has them."""
    parts = (_sparsity, _overlaps, _gradients, _second_order, _concentration)
    return [claim for part in parts for claim in part(report)]


def _sparsity(report: InterferenceReport) -> list[Claim]:
    if report.updates is None:
        return []
    whole, claim = report.updates["update"]["whole"], "edits are sparse and tiny"
    control = f"stored as {whole['dtype']}: {whole['identical']:.1%} identical to the bit"
    if report.identical_in_bfloat16 is not None:
        control += f"; had both been stored in bfloat16: {report.identical_in_bfloat16:.1%} identical"
    absolute, relative = f"{whole['below_absolute']:.1%}", f"{whole['below_relative']:.1%}"
    return [
        Claim(claim, "parameters with |δ| < 1e-7", absolute, control, "77% to 89%"),
        Claim(claim, "parameters with |δ| ≤ 1e-3 |θ|", relative, control, "relative change below 1e-3"),
    ]


def _overlaps(report: InterferenceReport) -> list[Claim]:
    changed, active = report.overlaps.get("changed"), report.overlaps.get("active", {})
    rows = [] if changed is None else [_overlap("edit", f"{report.earlier}'s own training and the update", changed)]
    return rows + [_overlap("activity", f"{first} and {second}", kinds) for first, second, kinds in _pairs(active)]


def _pairs(overlaps: dict[str, dict[str, Any]]) -> list[tuple[str, str, Any]]:
    return [(first, second, kinds) for first, row in overlaps.items() for second, kinds in row.items()]


def _overlap(measure: str, pair: str, kinds: dict[str, Any]) -> Claim:
    claim, paper = {
        "edit": ("changed neurons barely overlap", "below 0.19"),
        "activity": ("active neurons overlap", "heavily among math, code, QA; less with writing"),
    }[measure]
    found = kinds["mlp"]
    value = f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}] over {found['units']} layers"
    control = f"chance {found['chance']:.3f}; shuffled within layers {found['shuffled']:.3f} "
    control += f"[{found['shuffled_low']:.3f}, {found['shuffled_high']:.3f}]"
    return Claim(claim, f"Jaccard of the top 10% MLP channels by {measure}: {pair}", value, control, paper)


def _gradients(report: InterferenceReport) -> list[Claim]:
    claim, rows = "orthogonal-gradient paradox", []
    for name, entry in report.cosines.get("by_domain", {}).items():
        if entry.get("global") is None:
            continue
        control = "no halves to take an interval from"
        if entry.get("ceiling") == 0:
            control = "gradients of two halves of the references do not agree: cosines of this size are noise"
        elif entry.get("ceiling") is not None:
            control = f"noise of the gradients allows ±{entry['ceiling']:.3f}"
        figure = f"gradient cosine of the whole model: {report.earlier} and {name}"
        rows.append(Claim(claim, figure, _cosine(entry["global"], entry), control, "about 0 (math and QA)"))
        for key, sign in (("most_conflicting", "conflict"), ("most_synergistic", "synergise")):
            if found := entry.get(key):
                figure = f"{key.replace('_', ' ')} module of {report.earlier} and {name}: {found['module']}"
                control = f"chosen as the extreme of {found['of']} modules"
                rows.append(Claim(claim, figure, _cosine(found["cosine"], found), control, f"some modules {sign}"))
    return rows


def _cosine(value: float, entry: dict[str, Any]) -> str:
    ends = entry.get("interval")
    return f"{value:+.3f}" + ("" if ends is None else f" [{ends[0]:+.3f}, {ends[1]:+.3f}]")


def _second_order(report: InterferenceReport) -> list[Claim]:
    error = "" if report.second_order_error is None else f" ± {report.second_order_error:.1e}"
    value = f"{report.damage:+.4f} = {report.first_order:+.4f} + {report.second_order:+.4f}{error} + higher order"
    control = "no random update was taken (subspace_size=0)"
    if report.subspace is not None:
        found, random = (report.subspace[name]["second_order"] for name in ("update", "random"))
        control = (
            f"second order by routes of a random update of equal norm in every tensor {random:+.4f}, of this one "
            f"{found:+.4f} (on {report.subspace['references']} references)"
        )
    figure = f"damage of {report.earlier} in nats per token: first order + second order"
    return [Claim("damage is second order", figure, value, control, "first-order term small")]


def _concentration(report: InterferenceReport) -> list[Claim]:
    claim, paper, rows = "damage is low-dimensional", "concentrates in a shared conflict subspace", []
    if report.concentration:
        shares = report.concentration.items()
        value = ", ".join(f"{part:.1%} in {100 * float(share):g}%" for share, part in shares)
        control = "evenly spread: each share equals the share of routes; above 100% other routes were improved"
        rows.append(Claim(claim, "attributed damage in the most damaged routes", value, control, paper))
    if report.subspace is not None:
        spectra = [report.subspace[name] for name in ("update", "random")]
        count = len(spectra[0]["eigenvalues"])
        leading = [_of_second_order(sum(entry["shares"]) if entry["shares"] else None, entry) for entry in spectra]
        routes = [_of_second_order(entry["top_routes"].get("0.02"), entry) for entry in spectra]
        dimensions = [f"{entry['effective_dimension']:.2f}" for entry in spectra]
        for figure, (found, random) in (
            (f"second-order damage in the top {count} eigenvectors of route space", leading),
            ("second-order damage in the top 2% of routes", routes),
            (f"effective dimension of the {count} leading eigenvalues", dimensions),
        ):
            rows.append(Claim(claim, figure, found, f"random update of equal norm {random}", paper))
    return rows


def _of_second_order(share: float | None, entry: dict[str, Any]) -> str:
    return "undefined" if share is None else f"{share:.1%} of {entry['second_order']:+.1e}"


def edit_claims(changed: dict[str, dict[str, Any]]) -> list[Claim]:
    """Overlap of the routes that each two stages of a run changed most, one row for each pair of domains."""
    return [_overlap("edit", f"stages {first} and {second}", kinds) for first, second, kinds in _pairs(changed)]


def forgetting_claims(matrix: ScoreMatrix) -> list[Claim]:
    """How far each domain that was trained before the last one fell from its peak by the end of the last training."""
    last = matrix.last_training(-1)
    if last is None:
        return []
    claim, rows = "sequential forgetting", []
    for domain in matrix.domains:
        lost = forgetting(matrix, domain, last)
        if math.isnan(lost.value):  # undefined for the domain trained last
            continue
        peak, end, base = (matrix.interval(row, domain) for row in (matrix.peak(domain, last), last, 0))
        figure = f"{domain}: points lost from the peak to the end of the sequence (n={lost.n})"
        value = f"{lost:.1f}, from {peak.value:.1f} to {end.value:.1f}"
        rows.append(Claim(claim, figure, value, f"base {base:.1f}", "math 66.49 to 57.66; code 52.67 to 50.47"))
    domain = matrix.stage_kind(last)[1]
    if domain in matrix.domains:
        start, end, base = (matrix.interval(row, domain) for row in (last - 1, last, 0))
        figure = f"{domain}, trained last: score before and after its stage (n={end.n})"
        paper = "creative writing climbs to 86.52"
        rows.append(Claim(claim, figure, f"{start:.1f} to {end:.1f}", f"base {base:.1f}", paper))
    return rows


def refresh_claims(rivals: Sequence[dict[str, Any]], domain: str) -> list[Claim]:
    """What a refresh of a domain recovered, and how far it contracted the conflict subspace."""
    rows = {row["arm"]: row for row in rivals}
    refresh, other = rows.get("refresh"), rows.get("interpolation")
    if refresh is None:
        return []
    steps = f"after {refresh['steps']} steps"
    figure = f"share of the lost {domain} score {steps} (n={refresh['domains'][domain]['n']}); changes in points"
    control = "no interpolation was measured"
    if other is not None:
        control = f"interpolation of all weights, no training: {_share(other, domain)}"
    paper = "94.9%; code +0.58, QA +0.15, writing -0.56; mean 64.25 to 66.39"
    claims = [Claim("refresh heals", figure, _share(refresh, domain), control, paper)]
    if found := refresh.get("contraction"):
        size = found["directions"]
        figure = f"‖P_S(θ_t - θ*_A)‖ / ‖P_S δ_B‖ {steps}, S of {size} directions"
        control = f"{size} random directions of route space {found['random']:.3f}; all routes {found['routes']:.3f}"
        claim, paper = "refresh contracts the conflict subspace (Theorem 1)", "a bound (1 - αμ)^t below 1; no figure"
        claims.append(Claim(claim, figure, f"{found['subspace']:.3f}", control, paper))
    return claims


def rollback_claims(rivals: Sequence[dict[str, Any]], domain: str) -> list[Claim]:
    """What rolling routes back recovered, by `"damage"` at each budget, beside other criteria at their best steps."""
    paper = {(0.02, "mlp"): "20.4% of the loss; QA -0.06", (0.32, "joint"): "73.6% of the loss"}
    routes, claims = [row for row in rivals if row["arm"] == "routes"], []
    for row in routes:
        if row["criterion"] != "damage":
            continue
        place = (row["budget"], row["scope"])
        others = [other for other in routes if (other["budget"], other["scope"]) == place and other is not row]
        control = "; ".join(f"{other['criterion']} {_share(other, domain)}" for other in others)
        figure = (
            f"share of the lost {domain} score: damage, {100 * row['budget']:g}% of {row['scope']}, "
            f"best step {row['chosen']:.2g}; changes in points"
        )
        cells = (_share(row, domain), control or "none at this budget", paper.get(place, "not reported"))
        claims.append(Claim("rollback, training-free", figure, *cells))
    return claims


def _share(row: dict[str, Any], domain: str) -> str:
    """Recovered share of a domain with its interval, and what the others paid."""
    found = row["domains"][domain]
    changes = ", ".join(f"{name} {other['change']['value']:+.1f}" for name, other in row["domains"].items())
    return f"{'nothing was lost' if found['recovered'] is None else share_of(found)}; {changes}"
