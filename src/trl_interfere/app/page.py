"""The page: a story, a comparison, two models side by side, and a rollback that is measured while one waits."""

import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import gradio as gr
from matplotlib.figure import Figure

from ..analysis.report import InterferenceReport
from . import figures, html, tables
from .catalog import Catalog, store_upload
from .completion import MAX_PROMPT, HubModels, check_prompt, complete, complete_on_server, load_folder
from .stored_run import StoredRun
from .story import tell


try:  # ZeroGPU lends its device to functions that ask for it
    from spaces import GPU as on_gpu
except ImportError:

    def on_gpu(function):
        return function


VIEWS = {
    "scores": "Scores after every stage",
    "lines": "Skills over the stages",
    "cosines": "Gradients: layer by module",
    "damage": "Damage by layer",
    "overlaps": "Overlap of routes",
    "repair": "Repairs and controls",
    "table": "Table of all figures",
    "card": "Card",
}
NOTES = {
    "scores": "Each row is the model after a stage. A score that sinks down its column was damaged by a later stage.",
    "lines": "The same over time, with 95% intervals over prompts.",
    "cosines": "Do the gradients of the earlier and the later skill point the same way? Purple: "
    "they agree. Orange: they "
    "oppose each other. Near 0 over the whole model, although single modules conflict.",
    "damage": "How the loss of the earlier skill rose, by layer, and how few routes (channels, heads) carry it.",
    "overlaps": "Do two skills use, or change, the same routes? Below the diagonal what was measured, above it what "
    "shuffling the routes within layers gives.",
    "repair": "How much of the lost score each repair gives back, with 95% intervals. `random` "
    "and `random_matched` are "
    "controls: a criterion that does not beat them has found nothing.",
    "table": "Search and filter; the CSV holds all rows.",
    "card": "What was published with the run.",
}
TABLES = {"scores": "Scores", "damage": "Damage", "repair": "Repairs"}
TABS = ("story", "compare", "try", "rollback")
MAX_MODELS = 8
MAX_UPLOADS = 8
MAX_UPLOAD = "256mb"
SERVER = "a server (OpenAI protocol)"
ROLLED_BACK = "lab, 2% of the MLP channels rolled back"
LAB_START = "lab, before any training"
EXAMPLE = "Q: 26-23 A:"  # of the test split; seed 0 of the lab knows it after math and not at the end
CRITERIA = ("damage", "second_order", "first_order", "route_conflict", "magnitude", "random_matched")

# The address of the page follows the view; a Space lives in a frame, whose parent shows the address.
_SHOW_LINK = """(query) => {
  if (query === undefined || query === null) { return query; }
  window.history.replaceState(null, "", window.location.pathname + "?" + query);
  if (window.parent !== window) { window.parent.postMessage({ queryString: query }, "https://huggingface.co"); }
  return window.location.origin + window.location.pathname + "?" + query;
}"""
_CLICK = "() => document.querySelector('#{0} a, a#{0}, button#{0}, #{0} button')?.click()"


class Page:
    """
    What the handlers of the page share.

    Args:
        catalog ([`Catalog`]):
            The runs that may be shown.
        lab (`pathlib.Path`, *optional*):
            Packed run of the lab.
        endpoints (`Sequence[str]`, *optional*):
            Servers that may be asked. Defaults to any, which is for a page that only its owner sees.
    """

    def __init__(self, catalog: Catalog, lab: Path | None = None, endpoints: Sequence[str] | None = None):
        self.catalog, self.lab, self.endpoints = catalog, lab, endpoints
        self._bench = None
        self._lock = threading.Lock()
        self._hub_models = HubModels()
        self._local: dict[str, tuple[Any, Any]] = {}

    # Compare

    def runs(self, names: Sequence[str], uploads: dict[str, str]) -> tuple[list[StoredRun], list[str]]:
        """The chosen runs that can be read, and what is wrong with the others."""
        runs, problems = [], []
        for name in list(names or [])[:MAX_MODELS]:
            try:
                runs.append(self.catalog.open(str(name), uploads))
            except (ValueError, OSError) as error:
                problems.append(str(error))
        return runs, problems

    def reports(self, runs: Sequence[StoredRun], chosen: Sequence[str] | None):
        """The chosen reports of the runs, by name; of each run the first one where none is chosen."""
        named, problems = [], []
        for run in runs:
            for position, name in enumerate(run.reports):
                label = report_label(run, name)
                if (position == 0) if chosen is None else (label in chosen):
                    try:
                        named.append((label, run.report(name)))
                    except (ValueError, OSError) as error:
                        problems.append(str(error))
        return named, problems

    def figure(
        self, view: str, runs: Sequence[StoredRun], reports: Sequence[tuple[str, InterferenceReport]]
    ) -> Figure:
        """One of the figures of the comparison."""
        if view == "scores":
            return figures.score_maps(runs)
        if view == "lines":
            return figures.domain_lines(runs)
        if view == "cosines":
            return figures.cosine_maps(reports)
        if view == "damage":
            return figures.damage_figure(reports)
        if view == "repair":
            return figures.repair_figure(runs)
        entries = [
            (f"{name}: active", report.overlaps["active"]) for name, report in reports if report.overlaps.get("active")
        ]
        entries += [
            (f"{run.name}: changed by the stages", run.results["changed"]) for run in runs if run.results["changed"]
        ]
        return figures.overlap_maps(entries)

    def compare(self, names, chosen, view, table, uploads):
        """Message, figure, table, card and link of a choice."""
        view = view if view in VIEWS else "scores"
        runs, problems = self.runs(names, uploads)
        reports, more = self.reports(runs, chosen) if view in ("cosines", "damage", "overlaps", "table") else ([], [])
        problems += more
        shown, rows, text = "", None, ""
        try:
            if view == "table":
                rows = self._table(table, runs, reports)
            elif view == "card":
                text = "\n\n---\n\n".join(f"# {_plain(run.name)}\n\n{html.card(run.read_card())}" for run in runs)
            elif runs:
                shown = html.figure(figures.to_svg(self.figure(view, runs, reports)), VIEWS[view])
        except (ValueError, OSError) as error:
            problems.append(str(error))
        message = html.notice(" · ".join(problems))
        if not names:
            message = html.notice("Choose a run above, find one on the Hub, or upload a report.json.", bad=False)
        return (
            message + (f'<p class="ti-detail">{NOTES[view]}</p>' if runs else ""),
            gr.HTML(value=shown, visible=bool(shown)),
            gr.Dataframe(value=rows, visible=rows is not None),
            gr.Radio(visible=view == "table"),
            gr.Markdown(value=text, visible=bool(text)),
            link(names, chosen, view),
        )

    def _table(self, table, runs, reports):
        if table == "damage":
            return tables.damage_table(reports)
        return tables.repair_table(runs) if table == "repair" else tables.score_table(runs)

    def choices(self, names, uploads):
        """The reports of the chosen runs, the first of each chosen."""
        runs, _ = self.runs(names, uploads)
        labels = [report_label(run, name) for run in runs for name in run.reports]
        first = [report_label(run, next(iter(run.reports))) for run in runs if run.reports]
        return gr.Dropdown(choices=labels, value=first)

    def export_csv(self, names, chosen, view, table, uploads):
        """File of the table that belongs to the view."""
        runs, problems = self.runs(names, uploads)
        reports, more = self.reports(runs, chosen)
        kind = {"cosines": "damage", "damage": "damage", "overlaps": "damage", "repair": "repair", "table": table}
        kind = kind.get(view, "scores")
        if not runs:
            return None, html.notice("; ".join(problems) or "nothing is chosen")
        path = Path(tempfile.mkdtemp(prefix="trl-interfere-")) / f"{kind}.csv"
        self._table(kind, runs, reports).to_csv(path, index=False)
        return str(path), html.notice("; ".join(problems + more))

    def export_png(self, names, chosen, view, uploads):
        """File of the figure."""
        if view not in VIEWS or view in ("table", "card"):
            return None, html.notice("this view has no figure: choose another one, or export CSV")
        runs, problems = self.runs(names, uploads)
        reports, more = self.reports(runs, chosen)
        try:
            content = figures.to_png(self.figure(view, runs, reports))
        except (ValueError, OSError) as error:
            return None, html.notice(str(error))
        path = Path(tempfile.mkdtemp(prefix="trl-interfere-")) / f"{view}.png"
        path.write_bytes(content)
        return str(path), html.notice("; ".join(problems + more))

    def upload(self, files, names, uploads):
        """Take an uploaded report in, for this visitor."""
        try:
            if len(uploads) >= MAX_UPLOADS:
                raise ValueError(f"upload: expected at most {MAX_UPLOADS} reports, reload the page to begin anew")
            name, folder = store_upload([Path(path) for path in files or []])
        except (ValueError, OSError) as error:
            return gr.skip(), uploads, html.notice(str(error))
        number, free = 2, name
        while free in uploads or free in self.catalog.folders:
            free, number = f"{name} ({number})", number + 1
        uploads = {**uploads, free: str(folder)}
        names = [*(names or []), free]
        return self._offered(names, uploads), uploads, html.notice(f"{free} was added.", bad=False)

    def _offered(self, names, uploads, found: Sequence[str] = ()):
        offered = list(dict.fromkeys([*self.catalog.names, *uploads, *found, *names]))
        return gr.Dropdown(choices=offered, value=names)

    def find(self, words, names, uploads):
        """Look for repositories on the Hub."""
        try:
            found = self.catalog.search(words or "")
        except ValueError as error:
            return gr.skip(), html.notice(str(error))
        text = f"{len(found)} repositories were found; they stand in the list." if found else "None was found."
        return self._offered(names or [], uploads, found), html.notice(text, bad=False)

    # Story

    def story(self, name):
        """The first screen."""
        try:
            run = self.catalog.open(str(name or ""))
            report = run.report(next(iter(run.reports))) if run.reports else None
            parts = html.story(tell(run, report), run.name)
            if run.stages:
                label = "Score of every skill after every stage"
                parts += f"<h3>{label}</h3>" + html.figure(figures.to_svg(figures.domain_lines([run])), label)
            return parts
        except (ValueError, OSError) as error:
            return html.notice(str(error))

    # Try it

    def models(self) -> list[str]:
        """Models that can be asked without a download."""
        names = []
        if self.lab is not None:
            from ..lab.packed import packed_stages

            names = [LAB_START, *(f"lab, {_stage_words(name)}" for name in packed_stages(self.lab)), ROLLED_BACK]
        return [*names, *self._folders(), SERVER]

    def _folders(self) -> dict[str, Path]:
        return {
            f"{name}/{path.parent.name}": path.parent
            for name, folder in self.catalog.folders.items()
            for path in sorted(folder.glob("stages/*/config.json"))
            if path.resolve().is_relative_to(folder.resolve())
        }

    def ask(self, model, prompt, tokens, temperature, seed, endpoint, served, key) -> str:
        """What one model answers, as HTML."""
        try:
            check_prompt(prompt, int(tokens), temperature)
            text = self._answer(model, prompt, int(tokens), temperature, int(seed), endpoint, served, key)
            from ..lab.verdict import verdict

            return html.answer(f"{model}: {served}" if model == SERVER else model, text, verdict(prompt, text))
        except (ValueError, OSError, RuntimeError) as error:
            return html.notice(str(error))

    def _answer(self, model, prompt, tokens, temperature, seed, endpoint, served, key) -> str:
        if model == SERVER:
            if self.endpoints is not None and endpoint not in self.endpoints:
                raise ValueError(f"endpoint: expected one of {list(self.endpoints)}, found {str(endpoint)[:80]!r}")
            return complete_on_server(endpoint, served, prompt, tokens, temperature, seed, key)
        if self.lab is not None and model == ROLLED_BACK:
            from ..repair.route_rollback import RouteRollback

            return self.bench().complete(prompt, RouteRollback(), temperature, seed, tokens)
        return _complete_on_device(*self._load(str(model)), prompt, tokens, temperature, seed)

    def _load(self, model: str):
        with self._lock:
            folders = self._folders()
            if model in self._local:
                return self._local[model]
            if self.lab is not None and model.startswith("lab, "):
                from transformers import AutoTokenizer

                from ..lab.build import MODEL_FOLDER
                from ..lab.packed import load_packed, packed_stages

                stages = {f"lab, {_stage_words(name)}": name for name in packed_stages(self.lab)}
                if model != LAB_START and model not in stages:
                    raise ValueError(f"model: expected one of {self.models()}, found {model[:80]!r}")
                loaded = load_packed(self.lab, stages.get(model)), AutoTokenizer.from_pretrained(MODEL_FOLDER)
            elif model in folders:
                loaded = load_folder(folders[model])
            elif self.catalog.hub:
                return self._hub_models.load(model)
            else:
                raise ValueError(f"model: expected one of {self.models()}, found {model[:80]!r}")
            if len(self._local) >= MAX_MODELS:
                self._local.pop(next(iter(self._local)))
            self._local[model] = loaded
            return loaded

    # Roll back live

    def bench(self):
        """Both checkpoints of the lab, loaded once."""
        if self.lab is None:
            raise ValueError("no packed run of the lab is here: make one with space/pack_lab.py")
        with self._lock:
            if self._bench is None:
                from ..lab.live import LiveRollback

                self._bench = LiveRollback(self.lab)
            return self._bench

    def roll_back(self, criterion, budget, step, scope):
        """A rollback as predicted and as measured."""
        try:
            bench = self.bench()
            result = bench.measure(str(criterion), float(budget) / 100, float(step), str(scope))
        except (TypeError, ValueError, OSError) as error:
            return html.notice(str(error)), ""
        measured, control = result.measured, result.control
        worst = min(measured.collateral, key=lambda name: measured.collateral[name].value)
        share = measured.recovered
        back, low, high = (100 * value for value in (share.value, share.low, share.high))
        lead = (
            f"{measured.routes} of the network's parts were put back. They return {back:.0f}% of the lost "
            f"{bench.earlier} score (95%: {low:.0f} to {high:.0f}); "
            f"as many random ones {100 * control.recovered.value:.0f}%. "
            f"Worst change elsewhere: {worst} {measured.collateral[worst].value:+.1f} points."
        )
        later = " and ".join(bench.later)
        detail = (
            f"Loss: {100 * result.predicted_loss:.0f}% predicted to come back, {100 * measured.loss:.0f}% measured. "
            f"Mean loss of {later}: {result.predicted_later_loss:+.4f} by attribution (an upper estimate), "
            f"{measured.later_loss:+.4f} measured. Scores on {bench.prompts} test prompts per skill, losses on the "
            f"selection split, one random draw; {result.seconds:.1f} s."
        )
        svg = figures.to_svg(figures.live_figure(result, bench.earlier))
        shown = html.figure(svg, "Recovered share and change of the other skills")
        return f'<p class="ti-lead">{lead}</p><p class="ti-detail">{detail}</p>', shown


@on_gpu
def _complete_on_device(model, tokenizer, prompt, tokens, temperature, seed):
    return complete(model, tokenizer, prompt, tokens, temperature, seed)


def report_label(run: StoredRun, name: str) -> str:
    """
    Name of a report among those of several runs.

    Args:
        run ([`StoredRun`]):
            Its run.
        name (`str`):
            Its name there.

    Returns:
        `str`: The name.
    """
    return run.name if name == "report" else f"{run.name} · {name}"


def link(names, chosen, view, tab: str = "compare") -> str:
    """
    Query that restores a comparison.

    Args:
        names (`list[str]`):
            Chosen runs. Uploads are left out, since they are their visitor's.
        chosen (`list[str]`):
            Chosen reports.
        view (`str`):
            Key of `VIEWS`.
        tab (`str`, *optional*, defaults to `"compare"`):
            Tab of the page.

    Returns:
        `str`: The query.
    """
    pairs = [("tab", tab), ("view", view)]
    pairs += [("model", name) for name in names or [] if not str(name).startswith("upload: ")]
    pairs += [("report", name) for name in chosen or [] if not str(name).startswith("upload: ")]
    return urlencode(pairs)


def _plain(text: str) -> str:
    return text.replace("<", "").replace("`", "")


def _stage_words(name: str) -> str:
    return f"after stage {name}"


def build_page(
    folders: Sequence[Path] = (),
    lab: Path | None = None,
    hub: bool = True,
    endpoints: Sequence[str] | None = None,
) -> gr.Blocks:
    """
    The page.

    Args:
        folders (`Sequence[pathlib.Path]`, *optional*):
            Folders of runs or reports. Nothing outside them is read.
        lab (`pathlib.Path`, *optional*):
            Packed run of the lab, which is shown first and can be rolled back.
        hub (`bool`, *optional*, defaults to `True`):
            Whether repositories on the Hub may be read.
        endpoints (`Sequence[str]`, *optional*):
            Servers that may be asked. Defaults to any, which is for a page that only its owner sees.

    Returns:
        [`gradio.Blocks`]: The page, for [`launch`].

    Raises:
        `ValueError`: If a folder holds no run.
    """
    catalog = Catalog([*([lab] if lab else []), *folders], hub=hub)
    page = Page(catalog, lab, endpoints)
    first = catalog.names[:1]
    with gr.Blocks(title="Interference", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        uploads = gr.State({})
        gr.HTML(
            "<h1>When a model learns one skill, what happens to the others?</h1>"
            '<p class="ti-lead">Language models are often trained by reinforcement learning on one skill after '
            "another. A later skill can damage an earlier one. This page shows what was trained, what broke, in which "
            "parts of the network, and what repaired it, with the controls beside every repair.</p>"
        )
        with gr.Tabs() as tabs:
            with gr.Tab("The story", id="story"):
                told = gr.Dropdown(
                    catalog.names,
                    value=first[0] if first else None,
                    label="Run",
                    visible=len(catalog.names) > 1,
                    elem_id="story-run",
                )
                story = gr.HTML(elem_id="story")
                with gr.Row():
                    to_compare = gr.Button("Compare runs", elem_id="to-compare")
                    to_rollback = gr.Button("Roll back live", visible=lab is not None, elem_id="to-rollback")
                with gr.Accordion("Words used here", open=False):
                    gr.Markdown(
                        "**Stage**: one training on one skill. **Route**: the smallest part "
                        "that is compared: an MLP channel or an "
                        "attention head. **Damage**: how much the loss of the earlier skill "
                        "rose. **Rollback**: putting "
                        "routes back to their earlier weights. **Control**: as many routes "
                        "drawn at random. **Refresh**: a "
                        "short new training on the damaged skill. The lab model is small and "
                        "tuned so that interference "
                        "shows; it is no evidence about large models."
                    )
            with gr.Tab("Compare models", id="compare"):
                names = gr.Dropdown(
                    catalog.names,
                    value=first,
                    multiselect=True,
                    max_choices=MAX_MODELS,
                    allow_custom_value=hub,
                    label="Runs" + (" (or type user/repo)" if hub else ""),
                    elem_id="models",
                )
                with gr.Accordion("Find more: Hub, upload", open=False, elem_id="more"):
                    with gr.Row():
                        words = gr.Textbox(label="Part of a name; repositories with the tag trl-interfere", scale=3)
                        search = gr.Button("Search the Hub", interactive=hub, scale=1)
                    files = gr.File(
                        label="report.json, and routes.safetensors for figures over routes (up to 256 MB)",
                        file_count="multiple",
                        file_types=[".json", ".safetensors"],
                        elem_id="upload",
                    )
                    outcome = gr.HTML(elem_id="outcome")
                view = gr.Radio(
                    [(label, key) for key, label in VIEWS.items()], value="scores", label="View", elem_id="view"
                )
                reports = gr.Dropdown(
                    [], multiselect=True, label="Analyses", elem_id="reports", max_choices=MAX_MODELS
                )
                message = gr.HTML(elem_id="message")
                plot = gr.HTML(elem_id="plot")
                table = gr.Radio(
                    [(label, key) for key, label in TABLES.items()],
                    value="scores",
                    label="Table",
                    visible=False,
                    elem_id="table-kind",
                )
                frame = gr.Dataframe(
                    visible=False, interactive=False, show_search="filter", elem_id="table", wrap=True
                )
                text = gr.Markdown(visible=False, elem_id="card", latex_delimiters=[])
                with gr.Row():
                    csv, png = gr.Button("Export CSV", elem_id="csv"), gr.Button("Export PNG", elem_id="png")
                csv_file = gr.DownloadButton(visible="hidden", elem_id="csv-file")
                png_file = gr.DownloadButton(visible="hidden", elem_id="png-file")
                address = gr.Textbox(label="Link to this view", interactive=False, buttons=["copy"], elem_id="link")
            with gr.Tab("Try it", id="try"):
                _try_tab(page)
            with gr.Tab("Roll back live", id="rollback", visible=lab is not None) as live:
                measure = _rollback_tab(page)

        chosen = [names, reports, view, table, uploads]
        drawn = [message, plot, frame, table, text, address]
        compare = {
            "fn": page.compare,
            "inputs": chosen,
            "outputs": drawn,
            "show_progress": "minimal",
            "trigger_mode": "always_last",
        }
        linked = {"fn": None, "inputs": address, "outputs": address, "js": _SHOW_LINK}
        names.input(page.choices, [names, uploads], reports, show_progress="hidden").then(**compare).then(**linked)
        gr.on([reports.input, view.input, table.input], **compare).then(**linked)
        search.click(page.find, [words, names, uploads], [names, outcome])
        files.upload(page.upload, [files, names, uploads], [names, uploads, outcome]).then(
            page.choices, [names, uploads], reports
        ).then(**compare).then(**linked)
        csv.click(page.export_csv, chosen, [csv_file, message]).success(None, js=_CLICK.format("csv-file"))
        png.click(page.export_png, [names, reports, view, uploads], [png_file, message]).success(
            None, js=_CLICK.format("png-file")
        )
        told.input(page.story, told, story)
        to_compare.click(lambda: gr.Tabs(selected="compare"), None, tabs)
        # A tab that the page opens by itself does not report that it was selected.
        to_rollback.click(lambda: gr.Tabs(selected="rollback"), None, tabs).then(**measure)
        live.select(**measure)

        def restore(request: gr.Request):
            query = request.query_params
            asked = query.getlist("model")[:MAX_MODELS] or first
            wanted = query.get("view") if query.get("view") in VIEWS else "scores"
            runs, _ = page.runs(asked, {})
            labels = [report_label(run, name) for run in runs for name in run.reports]
            picked = [name for name in query.getlist("report") if name in labels]
            picked = picked or [report_label(run, next(iter(run.reports))) for run in runs if run.reports]
            tab = query.get("tab") if query.get("tab") in TABS else "story"
            offered = list(dict.fromkeys([*catalog.names, *asked]))  # also what cannot be read: the message names it
            return (
                gr.Tabs(selected=tab),
                gr.Dropdown(choices=offered, value=asked),
                gr.Dropdown(choices=labels, value=picked),
                wanted,
                page.story(first[0])
                if first
                else html.notice("No run was chosen; find one under Compare models.", bad=False),
            )

        def linked_rollback(criterion, budget, step, scope, request: gr.Request):
            asked = request.query_params.get("tab") == "rollback" and lab is not None
            return page.roll_back(criterion, budget, step, scope) if asked else (gr.skip(), gr.skip())

        blocks.load(linked_rollback, measure["inputs"], measure["outputs"], show_progress="minimal")
        blocks.load(restore, None, [tabs, names, reports, view, story], show_progress="hidden").then(**compare)
    blocks.page = page
    return blocks


def _try_tab(page: Page) -> None:
    offered = page.models()
    lab = [name for name in offered if name.startswith("lab, ")]
    gr.HTML(
        '<p class="ti-lead">The same prompt to two models. For prompts of the lab, its verifier says whether the '
        "answer is right.</p>"
    )
    with gr.Row():
        skill = gr.Dropdown(
            ["math", "code", "qa", "writing"], value="math", label="Example of", elem_id="skill", scale=1
        )
        another = gr.Button("Another example", elem_id="example", scale=1)
    prompt = gr.Textbox(label="Prompt", value=EXAMPLE, lines=2, max_length=MAX_PROMPT, elem_id="prompt")
    with gr.Row():
        sides = [
            gr.Dropdown(
                offered,
                value=default,
                label=label,
                allow_custom_value=page.catalog.hub,
                elem_id=f"side-{key}",
                info="Or type user/repo, or user/repo@revision." if page.catalog.hub else None,
            )
            for label, key, default in (
                ("First model", "a", lab[1] if len(lab) > 1 else offered[0]),
                ("Second model", "b", lab[-2] if len(lab) > 1 else offered[0]),
            )
        ]
    with gr.Accordion("Settings; server with OpenAI's protocol (vLLM)", open=False):
        with gr.Row():
            tokens = gr.Slider(1, 512, value=16, step=1, label="Longest answer (tokens)")
            temperature = gr.Slider(0, 2, value=0, step=0.1, label="Temperature")
            seed = gr.Number(value=0, precision=0, label="Seed")
        with gr.Row():
            known = list(page.endpoints or [])
            endpoint = gr.Dropdown(
                known or ["http://127.0.0.1:8000/v1"],
                value=(known or ["http://127.0.0.1:8000/v1"])[0],
                label="Address",
                allow_custom_value=page.endpoints is None,
                interactive=page.endpoints != [],
                elem_id="endpoint",
            )
            served = gr.Textbox(label="Its model (empty: the first)", max_length=200, elem_id="served")
            key = gr.Textbox(label="Key, if it needs one", type="password", max_length=400)
    ask = gr.Button("Ask both", variant="primary", elem_id="ask")
    with gr.Row():
        answers = [gr.HTML(elem_id="answer-a"), gr.HTML(elem_id="answer-b")]

    def example(name):
        from ..lab.domains import TASKS, lab_rows

        rows = lab_rows(name if name in TASKS else "math", "test", 64)
        return rows[int.from_bytes(os.urandom(2)) % len(rows)]["prompt"]

    gr.on([skill.input, another.click], example, skill, prompt)
    rest = [prompt, tokens, temperature, seed, endpoint, served, key]
    for side, answer in zip(sides, answers, strict=True):
        ask.click(page.ask, [side, *rest], answer, concurrency_limit=2)


def _rollback_tab(page: Page) -> dict[str, Any]:
    gr.HTML(
        '<p class="ti-lead">The lab model lost part of its math while it learned qa and writing. Put some of its '
        "parts back to where they were after math, without any training, and see what returns and what the others "
        "pay.</p>"
    )
    with gr.Row():
        budget = gr.Slider(
            0.5, 32, value=2, step=0.5, label="Budget: share of the routes put back (%)", elem_id="budget"
        )
        step = gr.Slider(0, 3, value=1, step=0.25, label="Step: 1 restores them, more goes beyond", elem_id="step")
    with gr.Row():
        criterion = gr.Dropdown(list(CRITERIA), value="damage", label="Chosen by", elem_id="criterion")
        scope = gr.Radio(["mlp", "attention", "joint"], value="mlp", label="Among", elem_id="scope")
    lead = gr.HTML(elem_id="live-text")
    plot = gr.HTML(elem_id="live-plot")
    measure = {
        "fn": page.roll_back,
        "inputs": [criterion, budget, step, scope],
        "outputs": [lead, plot],
        "trigger_mode": "always_last",
        "concurrency_limit": 1,
    }
    gr.on([budget.release, step.release, criterion.input, scope.input], **measure)
    return measure


def launch(blocks: gr.Blocks, **arguments) -> Any:
    """
    Start the page.

    Args:
        blocks ([`gradio.Blocks`]):
            The page.
        **arguments:
            For [`gradio.Blocks.launch`].

    Returns:
        `Any`: What that returns.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    theme = gr.themes.Soft(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    return blocks.launch(
        theme=theme,
        css_paths=Path(__file__).with_name("style.css"),
        max_file_size=MAX_UPLOAD,
        footer_links=["settings"],
        **arguments,
    )
