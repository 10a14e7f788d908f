"""Pieces of the page. Whatever comes from a run, a model or a visitor is escaped here."""

import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure


def notice(text: str, bad: bool = True) -> str:
    """A message to the visitor; nothing without one."""
    if not text:
        return ""
    role, sign = ("alert", "⚠") if bad else ("status", "ℹ")
    return f'<div class="ti-notice" role="{role}">{sign} {escape(text[:600])}</div>'


def interval(change: dict[str, float]) -> str:
    """A change in points with its interval."""
    return "{value:+.1f} [{low:+.1f}, {high:+.1f}]".format_map(change)


def verdicts(found: Iterable[tuple[str, str]]) -> str:
    """Name and verdict of each run."""
    parts = (f'<h3>{escape(name)}</h3><p class="ti-lead">{escape(text)}</p>' for name, text in found)
    return "".join(f'<section class="ti-card">{part}</section>' for part in parts)


def answers(domain: str, number: int, prompt: str, found: Sequence[dict[str, Any]]) -> str:
    """What every model wrote on a prompt."""
    cells = "".join(
        f'<section class="ti-answer"><h4>{escape(one["model"])}</h4><pre>{escape(one["text"]) or "(nothing)"}</pre>'
        f'<p class="ti-{"right" if one["score"] >= 0.5 else "wrong"}">{_sign(one["score"])}'
        f"{escape(': ' + one['reason'] if one.get('reason') else '')}</p></section>"
        for one in found
    )
    return (
        f'<h3>{escape(domain)}, prompt {number}</h3><pre class="ti-prompt">{escape(prompt) or "(not kept)"}</pre>'
        f'<div class="ti-cards">{cells}</div>'
    )


def _sign(score: float) -> str:
    return {1: "✓ right, 1", 0: "✗ wrong, 0"}.get(score, f"{'✓' if score >= 0.5 else '✗'} {score:.2f}") + " of 1"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "", mark: str = "") -> str:
    """A table; the first cell of a row is its head."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{escape(str(first))}</th>' + "".join(f"<td>{escape(str(cell))}</td>" for cell in rest)
        for first, *rest in rows
    )
    title = f'<p class="ti-detail">{escape(caption)}</p>' if caption else ""
    return (
        f'{title}<div class="ti-scroll" tabindex="0" role="region" aria-label="{escape(caption or "table")}">'
        f'<table class="ti-table {mark}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def figure(drawn: Figure, label: str) -> str:
    """A figure that scrolls sideways where the screen is narrow."""
    return f'<figure class="ti-plot" tabindex="0">{svg(drawn, label)}</figure>'


def svg(drawn: Figure, label: str) -> str:
    """A figure as an element of a page; the points that `drawn.hover` lists name themselves under the pointer."""
    buffer, points = io.StringIO(), 72 * drawn.get_figwidth()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "trl-interfere"}):
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    # As wide as the page, but readable on a phone and not huge on a wall.
    style = f"min-width:{0.9 * points:.0f}px;max-width:{1.6 * points:.0f}px"
    text = text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}" style="{style}"', 1)
    for place, point in getattr(drawn, "hover", {}).items():
        text = text.replace(f'<g id="{place}">', f"<g><title>{escape(point)}</title>")
    return text
