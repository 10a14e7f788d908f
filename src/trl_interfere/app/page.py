"""The page: what was lost, which prompts, what brought them back at what price, and where in the network."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import gradio as gr
import pandas as pd

from ..reporting import plots
from . import html
from .catalog import Catalog
from .live_tab import live_tab
from .saved_page import save_page
from .scored import Scored
from .views import FLIP_HEADER, FLIP_NOTE, MAPS, arms_of, flip_rows, repairs_of, where_figure


TABS = ("verdict", "prompts", "repairs", "live", "where")
FLIPS = ("all", "lost", "regained", "newly lost", "gained", "kept", "wrong in both")
MAX_RUNS = 6
MAX_PROMPTS = 5000  # in the table
EMPTY = "Choose a run above, or name user/repo on the Hub."

# The address of the page follows the view; a Space lives in a frame, and its parent shows the address.
_SHOW_LINK = """(query) => {
  if (query) {
    window.history.replaceState(null, "", window.location.pathname + "?" + query);
    if (window.parent !== window) { window.parent.postMessage({ queryString: query }, "https://huggingface.co"); }
  }
  return query;
}"""
_CLICK = "() => document.querySelector('#file a, a#file, button#file, #file button')?.click()"


class Page:
    """What the handlers of the page share."""

    def __init__(self, catalog: Catalog):
        self.catalog = catalog

    def open(self, names: Sequence[str] | None) -> tuple[list[Scored], str]:
        """The chosen runs that can be read, and what is wrong with the others."""
        found, problems = [], []
        for name in list(names or [])[:MAX_RUNS]:
            try:
                found.append(self.catalog.open(str(name)))
            except (ValueError, OSError) as error:
                problems.append(str(error))
        return found, html.notice(" · ".join(problems)) if names else html.notice(EMPTY, bad=False)

    def verdict(self, names):
        """Message, verdicts, and the figures of the first run."""
        found, message = self.open(names)
        if not found:
            return message, "", gr.Plot(visible=False), gr.Plot(visible=False)
        first = found[0]
        text = html.verdicts((one.name, one.verdict) for one in found)
        return (
            message,
            text,
            gr.Plot(plots.plot_scores(first.matrix), visible=True),
            gr.Plot(plots.plot_score_matrix(first.matrix), visible=True),
        )

    def choices(self, names):
        """Domains, models and reports of the first run."""
        found, _ = self.open(names)
        if not found:
            return [gr.Dropdown(choices=[], value=None) for _ in range(4)]
        first, (before, after) = found[0], found[0].pair()
        domain, *_ = sorted(first.matrix.domains, key=lambda name: -len(first.flips(name, before, after).lost))
        report = next(iter(first.reports), None)
        return [
            gr.Dropdown(choices=first.matrix.domains, value=domain),
            gr.Dropdown(choices=first.models, value=before),
            gr.Dropdown(choices=first.models, value=after),
            gr.Dropdown(choices=list(first.reports), value=report),
        ]

    def flips(self, names, domain, before, after, kind):
        """The matrix of flips, the table of the prompts of a domain, and nothing opened."""
        found, message = self.open(names)
        if not found or domain not in found[0].matrix.domains:
            return message, pd.DataFrame(), ""
        try:
            matrix, rows = flip_rows(found[0], before, after), found[0].prompts(domain, before, after)
        except (ValueError, OSError) as error:
            return html.notice(str(error)), pd.DataFrame(), ""
        rows = [row for row in rows if kind in ("all", row[1])]
        header = ["prompt", "became", f"score, {before}", f"score, {after}", "text"]
        caption = f"Prompts from {before} to {after}, with the peak of each domain beside them"
        note = (
            f"{FLIP_NOTE} {min(len(rows), MAX_PROMPTS)} of {len(rows)} prompts of {domain} are listed; choose one "
            "to read all answers."
        )
        matrix = html.table(FLIP_HEADER, matrix, caption) + f'<p class="ti-detail">{html.escape(note)}</p>'
        return message + matrix, pd.DataFrame(rows[:MAX_PROMPTS], columns=header), ""

    def answers(self, names, domain, number) -> str:
        """What every stage wrote on a prompt."""
        found, message = self.open(names)
        if not found or number is None:
            return message
        try:
            count = len(found[0].rows(found[0].models[-1], domain))
            if not 0 <= int(number) < count:
                raise ValueError(f"prompt: expected 0 to {count - 1}, found {number}")
            return html.answers(domain, int(number), *found[0].answers(domain, int(number)))
        except (ValueError, OSError) as error:
            return html.notice(str(error))

    def repairs(self, names):
        """The repairs of all chosen runs: figure and table."""
        found, message = self.open(names)
        arms = arms_of(found)
        if not arms:
            return message + html.notice("No run of these has a repair: trl-interfere heal RUN", bad=False), ""
        return message, repairs_of(arms, "Every repair, with 95% intervals")

    def where(self, names, report, view):
        """Maps of layers and modules, or another figure of a report."""
        found, message = self.open(names)
        try:
            figure = where_figure(found[0], report, view) if found else None
        except (ValueError, OSError) as error:
            figure, message = None, html.notice(str(error))
        if found and figure is None and not message:
            message = html.notice("There is no report and no repair: trl-interfere analyze RUN", bad=False)
        return message, gr.Plot(figure, visible=figure is not None)

    def find(self, words, names):
        """Look for repositories on the Hub."""
        try:
            found = self.catalog.search(words or "")
        except ValueError as error:
            return gr.skip(), html.notice(str(error))
        offered = list(dict.fromkeys([*self.catalog.names, *found, *(names or [])]))
        text = f"{len(found)} repositories were found; they stand in the list of runs."
        return gr.Dropdown(choices=offered, value=names), html.notice(text, bad=False)

    def save(self, names, before, after):
        """A file with everything, that needs no server."""
        found, message = self.open(names)
        if not found:
            return None, message
        path = Path(tempfile.mkdtemp(prefix="trl-interfere-")) / "interference.html"
        try:
            path.write_text(save_page(found, before, after), encoding="utf-8")
        except (ValueError, OSError) as error:
            return None, html.notice(str(error))
        return str(path), message


def build_page(folders: Sequence[Path] = (), lab: Path | None = None, hub: bool = True) -> gr.Blocks:
    """The page."""
    page = Page(Catalog([*([lab] if lab else []), *folders], hub=hub))
    catalog, first = page.catalog, page.catalog.names[:1]
    with gr.Blocks(title="Interference", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.HTML(
            "<h1>What did later training break, and did it come back?</h1>"
            '<p class="ti-detail">A model was trained on one domain after the other. Scores are 0 to 100 on test '
            "prompts; brackets are 95% intervals over prompts.</p>"
        )
        with gr.Row():
            names = gr.Dropdown(
                catalog.names,
                value=first,
                multiselect=True,
                max_choices=MAX_RUNS,
                allow_custom_value=hub,
                label="Runs; the first one is shown in Prompts and Where" + (" (or type user/repo)" if hub else ""),
                elem_id="runs",
                scale=4,
            )
            save = gr.Button("Save as HTML", elem_id="save", scale=1)
        file = gr.DownloadButton(visible="hidden", elem_id="file")
        with gr.Accordion("Find runs on the Hub", open=False, visible=hub):
            words = gr.Textbox(label="Part of a name", max_length=96)
            search, outcome = gr.Button("Search"), gr.HTML()
        with gr.Tabs() as tabs:
            with gr.Tab("Verdict", id="verdict"):
                message, text = gr.HTML(elem_id="message", padding=False), gr.HTML(elem_id="verdict", padding=False)
                lines = gr.Plot(label="Score of every domain over the stages", show_label=False, elem_id="lines")
                matrix = gr.Plot(label="Scores of all stages", show_label=False, elem_id="matrix")
            with gr.Tab("Prompts", id="prompts"):
                with gr.Row():
                    domain = gr.Dropdown([], label="Domain", elem_id="domain")
                    before = gr.Dropdown([], label="From", elem_id="before")
                    after = gr.Dropdown([], label="To", elem_id="after")
                flips = gr.HTML(elem_id="flips", padding=False)
                kind = gr.Radio(FLIPS, value="all", label="Prompts that are", elem_id="kind")
                prompts = gr.Dataframe(
                    interactive=False, show_search="filter", wrap=True, max_height=420, elem_id="prompts", type="array"
                )
                number = gr.Number(label="Prompt to read", precision=0, value=None, elem_id="number")
                answers = gr.HTML(elem_id="answers", padding=False)
            with gr.Tab("Repairs", id="repairs"):
                priced, pareto = gr.HTML(elem_id="priced", padding=False), gr.HTML(elem_id="pareto", padding=False)
            with gr.Tab("Heal live", id="live", visible=lab is not None):
                start_live = live_tab(lab) if lab is not None else None
            with gr.Tab("Where", id="where"):
                with gr.Row():
                    report = gr.Dropdown([], label="Report", elem_id="report")
                    view = gr.Dropdown([MAPS, *plots.PLOTS], value=MAPS, label="Figure", elem_id="view")
                place, maps = gr.HTML(elem_id="place", padding=False), gr.Plot(show_label=False, elem_id="maps")
        address = gr.Textbox(visible="hidden", elem_id="address")
        tab = gr.State("verdict")

        shown = {"show_progress": "minimal", "trigger_mode": "always_last"}
        models = [names, domain, before, after]
        draw_verdict = {"fn": page.verdict, "inputs": names, "outputs": [message, text, lines, matrix], **shown}
        choose = {"fn": page.choices, "inputs": names, "outputs": [domain, before, after, report]}
        draw_flips = {"fn": page.flips, "inputs": [*models, kind], "outputs": [flips, prompts, answers], **shown}
        draw_repairs = {"fn": page.repairs, "inputs": names, "outputs": [priced, pareto], **shown}
        draw_where = {"fn": page.where, "inputs": [names, report, view], "outputs": [place, maps], **shown}
        read = {"fn": page.answers, "inputs": [names, domain, number], "outputs": answers, **shown}
        linked = {"fn": link, "inputs": [tab, *models, number], "outputs": address, "show_progress": "hidden"}

        def follow(event):
            event.then(**linked).then(None, address, address, js=_SHOW_LINK)

        def draw_all(event):
            return event.then(**draw_verdict).then(**draw_flips).then(**read).then(**draw_repairs).then(**draw_where)

        follow(draw_all(names.input(**choose)))
        follow(gr.on([domain.input, before.input, after.input, kind.input], **draw_flips))
        follow(gr.on([report.input, view.input], **draw_where))
        follow(number.submit(**read))
        prompts.select(_chosen, None, number).then(**read).then(**linked).then(None, address, address, js=_SHOW_LINK)
        search.click(page.find, [words, names], [names, outcome])
        save.click(page.save, [names, before, after], [file, message]).success(None, js=_CLICK)
        for item in tabs.children:
            follow(item.select(lambda name=item.id: name, None, tab, show_progress="hidden"))
        if start_live is not None:
            tabs.children[TABS.index("live")].select(**start_live)

        def restore(request: gr.Request):
            query = request.query_params
            asked = query.getlist("run")[:MAX_RUNS] or first
            offered = list(dict.fromkeys([*catalog.names, *asked]))  # also what cannot be read: the message names it
            wanted = query.get("tab") if query.get("tab") in TABS else "verdict"
            chosen = page.choices(asked)
            for choice, key in zip(chosen, ("domain", "from", "to"), strict=False):
                if query.get(key) in [value for _, value in choice.choices]:
                    choice.value = query[key]
            given = query.get("prompt", "")
            return (
                gr.Tabs(selected=wanted),
                gr.Dropdown(choices=offered, value=asked),
                *chosen,
                wanted,
                (int(given) if given.isdecimal() and len(given) < 9 else None),
            )

        loaded = blocks.load(
            restore, None, [tabs, names, domain, before, after, report, tab, number], show_progress="hidden"
        )
        draw_all(loaded)
        if start_live is not None:

            def asked(domains, protect, references, rank, request: gr.Request):
                if request.query_params.get("tab") != "live":
                    return [gr.skip() for _ in start_live["outputs"]]
                return start_live["fn"](domains, protect, references, rank)

            blocks.load(asked, start_live["inputs"], start_live["outputs"], show_progress="minimal")
    return blocks


def _chosen(event: gr.SelectData) -> int:
    return int(event.row_value[0])


def link(tab, names, domain, before, after, number) -> str:
    """Query that restores a view."""
    pairs = [("tab", tab), *(("run", name) for name in names or [])]
    pairs += [("domain", domain), ("from", before), ("to", after), ("prompt", number)]
    return urlencode([(key, value) for key, value in pairs if value is not None])


def launch(blocks: gr.Blocks, **arguments) -> Any:
    """Start the page."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    theme = gr.themes.Base(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(
        # A contrast of 4.5 for text on what it stands on.
        **{f"{name}_text_color": "*neutral_800" for name in ("block_title", "block_label", "block_info")},
        **{name: "*primary_700" for name in ("color_accent", "button_primary_background_fill")},
    )
    css = Path(__file__).with_name("style.css")
    return blocks.launch(theme=theme, css_paths=css, footer_links=[], **arguments)
