"""The claims of arXiv 2606.02398 as figures, each with the control that a sceptic asks for."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..evaluation.metrics import forgetting
from ..evaluation.score_matrix import ScoreMatrix
from ..tables import markdown_table


if TYPE_CHECKING:
    from ..analysis.report import InterferenceReport
    from ..analysis.stage_edits import StageEdits


@dataclass(frozen=True)
class Claim:
    """
    One figure that speaks for or against a claim.

    Args:
        claim (`str`):
            The claim.
        figure (`str`):
            What was measured.
        value (`str`):
            The figure, with its interval where it has one.
        control (`str`):
            What it is to be compared with, and that figure.
        paper (`str`):
            What the paper reports on Qwen3-4B-Thinking-2507.
    """

    claim: str
    figure: str
    value: str
    control: str
    paper: str

    def to_dict(self) -> dict[str, str]:
        """The row by column."""
        return asdict(self)


def claims_table(claims: list[Claim]) -> str:
    """Claims as a table in Markdown."""
    rows = [(claim.claim, claim.figure, claim.value, claim.control, claim.paper) for claim in claims]
    return markdown_table(("claim", "figure", "here", "control", "paper"), rows)


def report_claims(report: "InterferenceReport") -> list[Claim]:
    """
    The claims that one analysis speaks to: those on edits, activity, gradients and the damage.

    Args:
        report ([`InterferenceReport`]):
            The analysis.

    Returns:
        `list[Claim]`: Rows; what the report lacks is left out.
    """
    return [
        *_sparsity(report),
        *_changed(report.overlaps.get("changed"), report.earlier),
        *_active(report.overlaps.get("active", {})),
        *_gradients(report),
        *_second_order(report),
        *_concentration(report),
    ]


def _sparsity(report: "InterferenceReport") -> list[Claim]:
    if report.updates is None:
        return []
    whole = report.updates["update"]["whole"]
    same = report.identical_in_bfloat16
    control = f"stored as {whole['dtype']}: {_percent(whole['identical'])} identical to the bit"
    if same is not None:
        control += f"; had both been stored in bfloat16: {_percent(same)} identical"
    claim = "edits are sparse and tiny"
    absolute, relative = _percent(whole["below_absolute"]), _percent(whole["below_relative"])
    return [
        Claim(claim, "parameters with |δ| < 1e-7", absolute, control, "77% to 89%"),
        Claim(claim, "parameters with |δ| ≤ 1e-3 |θ|", relative, control, "relative change below 1e-3"),
    ]


def _changed(overlap: dict[str, dict[str, Any]] | None, earlier: str) -> list[Claim]:
    if overlap is None:
        return []
    figure = f"Jaccard of the top 10% MLP channels by edit: {earlier}'s own training and the update"
    return [Claim("changed neurons barely overlap", figure, *_overlap_cells(overlap["mlp"]), "below 0.19")]


def _active(overlaps: dict[str, dict[str, dict[str, Any]]]) -> list[Claim]:
    paper = "heavily among math, code, QA; less with writing"
    return [
        Claim(
            "active neurons overlap",
            f"Jaccard of the top 10% MLP channels by activity: {first} and {second}",
            *_overlap_cells(kinds["mlp"]),
            paper,
        )
        for first, row in overlaps.items()
        for second, kinds in row.items()
    ]


def _overlap_cells(overlap: dict[str, Any]) -> tuple[str, str]:
    return (
        f"{overlap['value']:.3f} [{overlap['low']:.3f}, {overlap['high']:.3f}] over {overlap['units']} layers",
        f"chance {overlap['chance']:.3f}; shuffled within layers {overlap['shuffled']:.3f} "
        f"[{overlap['shuffled_low']:.3f}, {overlap['shuffled_high']:.3f}]",
    )


def _gradients(report: "InterferenceReport") -> list[Claim]:
    claim, rows = "orthogonal-gradient paradox", []
    for name, entry in report.cosines.get("by_domain", {}).items():
        if entry.get("global") is None:
            continue
        value, control = f"{entry['global']:+.3f}", "no halves to take an interval from"
        if entry.get("interval") is not None:
            value += " [{:+.3f}, {:+.3f}]".format(*entry["interval"])
        if entry.get("ceiling") is not None:
            control = f"noise of the gradients allows ±{entry['ceiling']:.3f}"
            if entry["ceiling"] == 0:
                control = "gradients of two halves of the references do not agree: cosines of this size are noise"
        figure = f"gradient cosine of the whole model: {report.earlier} and {name}"
        rows.append(Claim(claim, figure, value, control, "about 0 (math and QA)"))
        for key, sign in (("most_conflicting", "conflict"), ("most_synergistic", "synergise")):
            found = entry.get(key)
            if found is not None:
                value = f"{found['cosine']:+.3f}"
                if found["interval"] is not None:
                    value += " [{:+.3f}, {:+.3f}]".format(*found["interval"])
                figure = f"{key.replace('_', ' ')} module of {report.earlier} and {name}: {found['module']}"
                control = f"chosen as the extreme of {found['of']} modules"
                rows.append(Claim(claim, figure, value, control, f"some modules {sign}"))
    return rows


def _second_order(report: "InterferenceReport") -> list[Claim]:
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


def _concentration(report: "InterferenceReport") -> list[Claim]:
    claim, paper, rows = "damage is low-dimensional", "concentrates in a shared conflict subspace", []
    if report.concentration:
        value = ", ".join(
            f"{_percent(part)} in {100 * float(share):g}%" for share, part in report.concentration.items()
        )
        figure = "attributed damage in the most damaged routes"
        rows.append(
            Claim(
                claim,
                figure,
                value,
                "evenly spread: each share equals the share of routes; above 100% other routes were improved",
                paper,
            )
        )
    if report.subspace is not None:
        found, random = report.subspace["update"], report.subspace["random"]
        count = len(found["eigenvalues"])
        for figure, share in (
            (f"second-order damage in the top {count} eigenvectors of route space", _of_eigenvectors),
            ("second-order damage in the top 2% of routes", _of_routes),
        ):
            value, control = (
                f"{_percent(share(entry))} of {entry['second_order']:+.1e}"
                if share(entry) is not None
                else "undefined"
                for entry in (found, random)
            )
            rows.append(Claim(claim, figure, value, f"random update of equal norm {control}", paper))
        figure = f"effective dimension of the {len(found['eigenvalues'])} leading eigenvalues"
        sizes = [f"{entry['effective_dimension']:.2f}" for entry in (found, random)]
        rows.append(Claim(claim, figure, sizes[0], f"random update of equal norm {sizes[1]}", paper))
    return rows


def _of_eigenvectors(spectrum: dict[str, Any]) -> float | None:
    return sum(spectrum["shares"]) if spectrum["shares"] else None


def _of_routes(spectrum: dict[str, Any]) -> float | None:
    return spectrum["top_routes"].get("0.02")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def edit_claims(edits: "StageEdits") -> list[Claim]:
    """Overlap of the routes that each two stages of a run changed most, one row for each pair of domains."""
    rows = []
    for first, row in edits.changed.items():
        for second, kinds in row.items():
            found = kinds["mlp"]
            rows.append(
                Claim(
                    "changed neurons barely overlap",
                    f"Jaccard of the top 10% MLP channels by edit: stages {first} and {second}",
                    *_overlap_cells(asdict(found)),
                    "below 0.19",
                )
            )
    return rows


def forgetting_claims(matrix: ScoreMatrix) -> list[Claim]:
    """How far each domain that was trained before the last one fell from its peak by the end of the last training."""
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


def refresh_claims(rivals: Sequence[dict[str, Any]], domain: str) -> list[Claim]:
    """What a refresh of a domain recovered, and how far it contracted the conflict subspace."""
    rows = {row["arm"]: row for row in rivals}
    refresh, control = rows.get("refresh"), rows.get("interpolation")
    if refresh is None:
        return []
    claims = [
        Claim(
            "refresh heals",
            f"share of the lost {domain} score after {refresh['steps']} steps "
            f"(n={refresh['domains'][domain]['n']}); changes in points",
            _share(refresh, domain),
            "no interpolation was measured"
            if control is None
            else f"interpolation of all weights, no training: {_share(control, domain)}",
            "94.9%; code +0.58, QA +0.15, writing -0.56; mean 64.25 to 66.39",
        )
    ]
    contraction = refresh.get("contraction")
    if contraction is not None:
        size = contraction["directions"]
        claims.append(
            Claim(
                "refresh contracts the conflict subspace (Theorem 1)",
                f"‖P_S(θ_t - θ*_A)‖ / ‖P_S δ_B‖ after {refresh['steps']} steps, S of {size} directions",
                f"{contraction['subspace']:.3f}",
                f"{size} random directions of route space {contraction['random']:.3f}; "
                f"all routes {contraction['routes']:.3f}",
                "a bound (1 - αμ)^t below 1; no figure",
            )
        )
    return claims


def rollback_claims(rivals: Sequence[dict[str, Any]], domain: str) -> list[Claim]:
    """What rolling routes back recovered, by `"damage"` at each budget, beside other criteria at their best steps."""
    paper = {(0.02, "mlp"): "20.4% of the loss; QA -0.06", (0.32, "joint"): "73.6% of the loss"}
    routes = [row for row in rivals if row["arm"] == "routes"]
    claims = []
    for row in routes:
        if row["criterion"] != "damage":
            continue
        place = (row["budget"], row["scope"])
        others = [other for other in routes if (other["budget"], other["scope"]) == place and other is not row]
        claims.append(
            Claim(
                "rollback, training-free",
                f"share of the lost {domain} score: damage, {100 * row['budget']:g}% of {row['scope']}, "
                f"best step {row['chosen']:.2g}; changes in points",
                _share(row, domain),
                "; ".join(f"{other['criterion']} {_share(other, domain)}" for other in others)
                or "none at this budget",
                paper.get(place, "not reported"),
            )
        )
    return claims


def _share(row: dict[str, Any], domain: str) -> str:
    """Recovered share of a domain with its interval, and what the others paid."""
    found = row["domains"][domain]
    changes = ", ".join(f"{name} {other['change']['value']:+.1f}" for name, other in row["domains"].items())
    if found["recovered"] is None:
        return f"nothing was lost; {changes}"
    return f"{100 * found['recovered']:.0f}% [{100 * found['low']:.0f}, {100 * found['high']:.0f}]; {changes}"
