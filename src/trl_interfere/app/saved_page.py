"""One page without a server: verdicts, figures, tables and flips in a file that opens anywhere."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from . import html
from .scored import Scored
from .views import arms_of, flips_table, repairs_of, scores_of, where_figure


TITLE = "What did later training break, and did it come back?"
MAX_OPEN = 40  # prompts of each domain that can be read
# Nothing is fetched, and nothing but the script below runs.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_BODY = "body { font-family: system-ui, sans-serif; max-width: 1100px; margin: 0 auto; padding: 16px; }\n"
_SCRIPT = """
for (const table of document.querySelectorAll("table.ti-sort")) {
  const field = Object.assign(document.createElement("input"), {placeholder: "filter", ariaLabel: "filter the table"});
  table.parentElement.before(field);
  field.oninput = () => {
    for (const row of table.tBodies[0].rows) {
      row.hidden = !row.innerText.toLowerCase().includes(field.value.toLowerCase());
    }
  };
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    const button = Object.assign(document.createElement("button"), {textContent: cell.textContent});
    let up = false;
    cell.replaceChildren(button);
    button.onclick = () => {
      up = !up;
      cell.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows].sort((a, b) =>
        a.cells[column].innerText.localeCompare(b.cells[column].innerText, undefined, {numeric: true}));
      table.tBodies[0].append(...(up ? rows : rows.reverse()));
    };
  });
}
"""


def save_page(found: Sequence[Scored], before: str | None = None, after: str | None = None) -> str:
    """The page of some runs as one file of HTML."""
    parts = [f"<h1>{TITLE}</h1>", html.verdicts((one.name, one.verdict) for one in found)]
    if arms := arms_of(found):
        parts += ["<h2>Repairs</h2>", repairs_of(arms, mark="ti-sort")]
    for one in found:
        pair = (before, after) if before in one.models and after in one.models else one.pair()
        parts += [f"<h2>{escape(one.name)}</h2>", scores_of(one), _flips(one, *pair)]
        if maps := where_figure(one, next(iter(one.reports), None)):
            parts += ["<h3>Where</h3>", html.figure(maps, "Measures of layers and modules")]
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Interference</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_BODY}{style}</style></head>"
        f"<body><main>{''.join(parts)}</main><script>{_SCRIPT}</script></body></html>"
    )


def _flips(one: Scored, before: str, after: str) -> str:
    parts, kinds = [flips_table(one, before, after, "ti-sort")], ("regained", "newly lost", "lost")
    for domain in one.matrix.domains:
        rows = one.prompts(domain, before, after)
        turned = [row for kind in kinds for row in rows if row[1] == kind]
        opened = "".join(
            f"<details><summary>{escape(kind)}: prompt {number}, {escape(text[:80])}</summary>"
            f"{html.answers(domain, number, *one.answers(domain, number))}</details>"
            for number, kind, _, _, text in turned[:MAX_OPEN]
        )
        if opened:
            title = f"{domain}: {min(len(turned), MAX_OPEN)} of {len(turned)} prompts that flipped"
            parts.append(f"<details><summary>{escape(title)}</summary>{opened}</details>")
    return "".join(parts)
