"""The page: what was lost, which prompts, what brought them back at what price, and where in the network."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from ..reporting import plots
from . import html
from .catalog import Catalog
from .live_tab import live_tab
from .saved_page import TITLE, save_page
from .scored import Scored
from .views import MAPS, arms_of, flips_table, repairs_of, scores_of, where_figure


TABS = ("verdict", "prompts", "repairs", "live", "where")
FLIPS = ("all", "lost", "regained", "newly lost", "gained", "kept", "wrong in both")
MAX_RUNS = 6
MAX_PROMPTS = 5000  # in the table
EMPTY = "Choose a run above, or name user/repo on the Hub."
KEYS = ("tab", "run", "domain", "from", "to", "prompt", "kind", "report", "figure")  # of the address
OFFERED = ("domain", "from", "to", "report")  # by the first run

# The handlers that draw the page, and the controls that each reads.
NEEDS = {
    "verdict": ("run",),
    "flips": ("run", "domain", "from", "to"),
    "prompts": ("run", "domain", "from", "to", "kind"),
    "answers": ("run", "domain", "prompt"),
    "repairs": ("run",),
    "where": ("run", "report", "figure"),
}
# The address of the page follows the view, but for the view that it asks for (there is no tab until that one is
# restored); a Space lives in a frame, and its parent shows the address.
_SHOW_LINK = f"""(...values) => {{
  if (!values[0]) return;
  const pairs = {list(KEYS)}.flatMap((key, at) => [values[at] ?? []].flat().map((value) => [key, value]));
  const query = new URLSearchParams(pairs).toString();
  window.history.replaceState(null, "", window.location.pathname + "?" + query);
  if (window.parent !== window) {{ window.parent.postMessage({{ queryString: query }}, "https://huggingface.co"); }}
}}"""
_CLICK = "() => document.querySelector('#file a, a#file, button#file, #file button')?.click()"


def _view(handler: Callable[..., str]) -> Callable[..., str]:
    """A handler of the chosen runs that shows what is wrong in place of its view; nothing without a run."""

    @wraps(handler)
    def safe(self, names, *chosen):
        found, _ = self.open(names)
        try:
            return handler(self, found, *chosen) if found else ""
        except (ValueError, OSError) as error:
            return html.notice(str(error))

    return safe


class Page:
    """The parts of the page, and what its handlers share."""

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

    def choices(self, names, query: Mapping[str, str]) -> tuple[str, dict[str, tuple[list[str], str | None]]]:
        """The message; domains, models and reports of the first run, each with the one that `query` asks for."""
        found, message = self.open(names)
        offered: dict[str, Any] = {key: ([], None) for key in OFFERED}
        if found:
            first, (before, after) = found[0], found[0].pair()
            most = max(first.matrix.domains, key=lambda name: len(first.flips(name, before, after).lost))
            offered = {"domain": (first.matrix.domains, most), "from": (first.models, before)}
            offered |= {"to": (first.models, after), "report": ([*first.reports], next(iter(first.reports), None))}
        asked = {key: query[key] if query.get(key) in names else default for key, (names, default) in offered.items()}
        return message, {key: (names, asked[key]) for key, (names, _) in offered.items()}

    @_view
    def verdict(self, found):
        """The verdict on each run, and the scores of the first one."""
        return html.verdicts((one.name, one.verdict) for one in found) + scores_of(found[0])

    @_view
    def flips(self, found, domain, before, after):
        """Numbers of prompts that flipped, by domain."""
        return flips_table(found[0], before, after) if domain in found[0].matrix.domains else ""

    def prompts(self, names, domain, before, after, kind) -> pd.DataFrame:
        """The prompts of a domain that became what is asked for."""
        header, rows = ["prompt", "became", f"score, {before}", f"score, {after}", "text"], []
        found, _ = self.open(names)
        if found and domain in found[0].matrix.domains:
            with suppress(ValueError, OSError):  # the view above says what is wrong
                rows = [row for row in found[0].prompts(domain, before, after) if kind in ("all", row[1])]
        return pd.DataFrame(rows[:MAX_PROMPTS], columns=header)

    @_view
    def answers(self, found, domain, number):
        """What every stage wrote on a prompt."""
        return "" if number is None else html.answers(domain, int(number), *found[0].answers(domain, int(number)))

    @_view
    def repairs(self, found):
        """The repairs of all chosen runs: figure and table."""
        if arms := arms_of(found):
            return repairs_of(arms, "Every repair, with 95% intervals")
        return html.notice("No run of these has a repair: trl-interfere heal RUN", bad=False)

    @_view
    def where(self, found, report, view):
        """Maps of layers and modules, or another figure of a report."""
        if figure := where_figure(found[0], report, view):
            return html.figure(figure, view)
        return html.notice("There is no report and no repair: trl-interfere analyze RUN", bad=False)

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
    with gr.Blocks(title="Interference", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        parts = _lay_out(page.catalog, lab)
        _connect(page, parts, blocks)
    return blocks


def _lay_out(catalog: Catalog, lab: Path | None) -> dict[str, Any]:
    """Put all parts on the page; by name those that the handlers read or write."""
    gr.HTML(
        f'<h1>{TITLE}</h1><p class="ti-detail">A model was trained on one domain after the other. Scores are 0 to 100 '
        "on test prompts; brackets are 95% intervals over prompts.</p>"
    )
    with gr.Row():
        run = gr.Dropdown(
            catalog.names,
            value=catalog.names[:1],
            multiselect=True,
            max_choices=MAX_RUNS,
            allow_custom_value=catalog.hub,
            label="Runs; the first one is shown in Prompts and Where" + " (or type user/repo)" * catalog.hub,
            elem_id="runs",
            scale=4,
        )
        save = gr.Button("Save as HTML", elem_id="save", scale=1)
    file = gr.DownloadButton(visible="hidden", elem_id="file")
    with gr.Accordion("Find runs on the Hub", open=False, visible=catalog.hub):
        words = gr.Textbox(label="Part of a name", max_length=96)
        search, outcome = gr.Button("Search"), gr.HTML()
    message, drawn, live = _html("message"), {}, None
    with gr.Tabs() as tabs:
        with gr.Tab("Verdict", id="verdict"):
            drawn["verdict"] = _html("verdict")
        with gr.Tab("Prompts", id="prompts"):
            with gr.Row():
                domain = gr.Dropdown([], label="Domain", elem_id="domain")
                before = gr.Dropdown([], label="From", elem_id="before")
                after = gr.Dropdown([], label="To", elem_id="after")
            drawn["flips"] = _html("flips")
            kind = gr.Radio(FLIPS, value="all", label="Prompts that are", elem_id="kind")
            drawn["prompts"] = gr.Dataframe(
                interactive=False, show_search="filter", wrap=True, max_height=420, elem_id="prompts", type="array"
            )
            prompt = gr.Number(label="Prompt to read", precision=0, value=None, elem_id="number")
            drawn["answers"] = _html("answers")
        with gr.Tab("Repairs", id="repairs"):
            drawn["repairs"] = _html("repairs")
        with gr.Tab("Heal live", id="live", visible=lab is not None):
            if lab is not None:
                live = live_tab(lab)
        with gr.Tab("Where", id="where"):
            with gr.Row():
                report = gr.Dropdown([], label="Report", elem_id="report")
                figure = gr.Dropdown([MAPS, *plots.PLOTS], value=MAPS, label="Figure", elem_id="figure")
            drawn["where"] = _html("where")
    tab = gr.Textbox("", visible="hidden")
    controls = dict(zip(KEYS, (tab, run, domain, before, after, prompt, kind, report, figure), strict=True))
    return {
        **{"controls": controls, "drawn": drawn, "live": live, "tabs": tabs, "message": message, "save": save},
        **{"file": file, "words": words, "search": search, "outcome": outcome},
    }


def _html(name: str) -> gr.HTML:
    return gr.HTML(elem_id=name, padding=False)


def _connect(page: Page, parts: dict[str, Any], blocks: gr.Blocks) -> None:
    """Say what follows when something is chosen: one event draws all of it, part by part, then the address."""
    controls, drawn, live, tabs, message = (parts[key] for key in ("controls", "drawn", "live", "tabs", "message"))
    inputs, run = [*controls.values()], controls["run"]
    offered = [message, *(controls[key] for key in OFFERED)]

    def draw(values: dict[str, Any], *names: str) -> Iterator[dict[Any, Any]]:
        for name in names:
            yield {drawn[name]: getattr(page, name)(*(values[key] for key in NEEDS[name]))}

    def draw_all(values: dict[str, Any], query: Mapping[str, str]) -> Iterator[dict[Any, Any]]:
        """What the chosen runs offer, then every view of it."""
        text, offer = page.choices(values["run"], query)
        shown = {controls[key]: gr.Dropdown(choices=names, value=value) for key, (names, value) in offer.items()}
        yield {message: text} | shown
        yield from draw(values | {key: value for key, (_, value) in offer.items()}, *drawn)

    def follow(event: Callable[..., Any], handler: Callable[..., Any], *outputs: Any) -> None:
        drawing = event(handler, inputs, [*outputs], show_progress="minimal", trigger_mode="always_last")
        drawing.then(None, inputs, None, js=_SHOW_LINK)

    def redraw(event: Callable[..., Any], *names: str) -> None:
        def handler(*values):
            yield from draw(dict(zip(KEYS, values, strict=True)), *names)

        follow(event, handler, *(drawn[name] for name in names))

    def choose(*values):
        yield from draw_all(dict(zip(KEYS, values, strict=True)), {})

    def read_row(event: gr.SelectData, *values):
        number = int(event.row_value[0])
        yield {controls["prompt"]: number}
        yield from draw(dict(zip(KEYS, values, strict=True)) | {"prompt": number}, "answers")

    def restore(request: gr.Request):
        query, known = request.query_params, page.catalog.names
        asked = query.getlist("run")[:MAX_RUNS] or known[:1]
        number = query.get("prompt", "")
        values = {"run": asked, "prompt": int(number) if number.isdecimal() and len(number) < 9 else None}
        for key, names in (("tab", TABS), ("kind", FLIPS), ("figure", [MAPS, *plots.PLOTS])):
            values[key] = query.get(key) if query.get(key) in names else names[0]
        runs = gr.Dropdown(choices=list(dict.fromkeys([*known, *asked])), value=asked)  # the message names the bad
        shown = {controls[key]: value for key, value in values.items()} | {run: runs}
        yield {tabs: gr.Tabs(selected=values["tab"])} | shown
        yield from draw_all(values, query)

    follow(run.input, choose, *offered, *drawn.values())
    redraw(partial(gr.on, [controls[key].input for key in ("domain", "from", "to")]), "flips", "prompts", "answers")
    redraw(partial(gr.on, [controls[key].input for key in ("report", "figure")]), "where")
    redraw(controls["kind"].input, "prompts")
    redraw(controls["prompt"].submit, "answers")
    follow(drawn["prompts"].select, read_row, controls["prompt"], drawn["answers"])
    parts["search"].click(page.find, [parts["words"], run], [run, parts["outcome"]])
    before, after = controls["from"], controls["to"]
    parts["save"].click(page.save, [run, before, after], [parts["file"], message]).success(None, js=_CLICK)
    for item in tabs.children:
        selected = item.select(None, controls["tab"], controls["tab"], js=f"(tab) => tab && '{item.id}'")
        selected.then(None, inputs, None, js=_SHOW_LINK)
    blocks.load(restore, None, [tabs, *inputs, message, *drawn.values()], show_progress="minimal")
    if live is not None:
        tabs.children[TABS.index("live")].select(**live)

        def asked(request: gr.Request, *settings: Any):
            if request.query_params.get("tab") == "live":
                return live["fn"](*settings)
            return [gr.skip() for _ in live["outputs"]]

        blocks.load(asked, live["inputs"], live["outputs"], show_progress="minimal")


def launch(blocks: gr.Blocks, **arguments: Any) -> Any:
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
