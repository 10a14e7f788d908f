"""Pieces of the page. Whatever comes from a run, a model or a visitor is escaped here."""

import re
from collections.abc import Sequence
from html import escape

from .story import Statement


def notice(text: str, bad: bool = True) -> str:
    """
    A message to the visitor.

    Args:
        text (`str`):
            The message.
        bad (`bool`, *optional*, defaults to `True`):
            Whether something went wrong.

    Returns:
        `str`: HTML, empty without a message.
    """
    if not text:
        return ""
    role, sign = ("alert", "⚠") if bad else ("status", "ℹ")
    return f'<div class="ti-notice" role="{role}">{sign} {escape(text[:600])}</div>'


def story(statements: Sequence[Statement], name: str) -> str:
    """
    The four statements about a run.

    Args:
        statements (`Sequence[Statement]`):
            The statements.
        name (`str`):
            Name of the run.

    Returns:
        `str`: HTML.
    """
    if not statements:
        return notice(f"{name}: this run has no scores and no report to tell of", bad=False)
    cards = "".join(
        f'<section class="ti-card"><h3>{number}. {escape(one.question)}</h3><p class="ti-figure">{escape(one.figure)}'
        f"</p><p>{escape(one.answer)}</p><p class='ti-detail'>{escape(one.detail)}</p></section>"
        for number, one in enumerate(statements, start=1)
    )
    return f'<div class="ti-cards">{cards}</div>'


def figure(svg: str, label: str) -> str:
    """
    A figure that scrolls sideways where the screen is narrow.

    Args:
        svg (`str`):
            The `<svg>` element.
        label (`str`):
            What it shows, for screen readers.

    Returns:
        `str`: HTML.
    """
    return f'<figure class="ti-plot" tabindex="0" aria-label="{escape(label)}">{svg}</figure>'


def answer(name: str, text: str, verdict: tuple[str, float] | None) -> str:
    """
    What a model answered.

    Args:
        name (`str`):
            Name of the model.
        text (`str`):
            Its answer.
        verdict (`tuple[str, float]`, *optional*):
            Domain and reward of the verifier.

    Returns:
        `str`: HTML.
    """
    if verdict is None:
        judged = '<span class="ti-verdict">no verifier knows this prompt</span>'
    else:
        domain, reward = verdict
        sign, word = ("✓", "right") if reward == 1 else ("✗", "wrong") if reward == 0 else ("◐", f"{reward:.2f} of 1")
        judged = (
            f'<span class="ti-verdict ti-{"right" if reward == 1 else "wrong"}">{sign} {word}, says {domain}</span>'
        )
    shown = escape(text) if text.strip() else "<em>(nothing)</em>"
    return f'<div class="ti-answer"><h4>{escape(name[:120])}</h4><pre>{shown}</pre>{judged}</div>'


def card(text: str) -> str:
    """
    Markdown of a card without HTML and without images, which would be fetched from anywhere.

    Args:
        text (`str`):
            The card.

    Returns:
        `str`: Markdown.
    """
    if text.startswith("---\n") and "\n---\n" in text[4:]:
        text = text[4:].split("\n---\n", 1)[1]  # metadata
    text = re.sub(r"!\[[^\]]*\](\([^)]*\)|\[[^\]]*\])?", "", text)
    return text.replace("![", "[").replace("&", "&amp;").replace("<", "&lt;")
