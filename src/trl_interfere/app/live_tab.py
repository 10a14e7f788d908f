"""The tab that heals the lab's model while one waits."""

import threading
from pathlib import Path
from typing import Any

import gradio as gr

from ..reporting import plots
from ..reporting.verdict import share_of
from ..run import Run
from . import html


try:  # ZeroGPU lends its device to functions that ask for it
    from spaces import GPU as on_gpu
except ImportError:

    def on_gpu(function):
        return function


MODELS = ("peak", "final", "healed")


class Bench:
    """The packed run in memory, loaded when it is first asked."""

    def __init__(self, lab: Path):
        self.lab, self._live, self._lock = lab, None, threading.Lock()

    def live(self):
        from ..lab.live import LiveHeal

        with self._lock:
            self._live = self._live or LiveHeal(self.lab)
            return self._live

    def offered(self) -> tuple[list[str], list[str], list[str]]:
        """All domains, those that can be healed, and those of them that have lost something."""
        from ..lab.live import damaged_since, own_stages

        run = Run(self.lab)
        peaks = own_stages(run)
        return list(run.final.scores), list(peaks), damaged_since(run, peaks)

    def heal(self, domains, protect, references, rank, control=False):
        """What a heal did: text, map of the layers, prompts that came back, and the command."""
        try:
            result = _heal(self.live(), domains or [], protect or [], int(references), int(rank), control)
        except (ValueError, OSError, RuntimeError) as error:
            return html.notice(str(error)), gr.Plot(visible=False), "", gr.skip()
        figures = result.figures
        kind = "Control: every domain got the references of another one. " if control else ""
        lead = (
            f"{kind}{share_of(figures['recovered_all'])} of what was lost came back; the worst change of a domain is "
            f"{figures['worst']:+.1f} points. It took {result.seconds:.1f} seconds, scoring included."
        )
        rows = [
            [name, *(f"{entry[key]:.1f}" for key in MODELS), _interval(entry["change"])]
            + [str(entry[key]) for key in ("regained", "newly_lost")]
            for name, entry in figures["domains"].items()
        ]
        header = ["domain", "peak", "final", "healed", "change [95%]", "regained", "newly lost"]
        count = next(iter(figures["domains"].values()))["n"]
        table = html.table(header, rows, f"Scores, 0 to 100, on {count} test prompts of each domain")
        examples = ""
        for number, one in enumerate(result.examples, start=1):
            models = [{"model": key, "text": one[key], "score": one[f"{key}_score"]} for key in MODELS]
            examples += html.answers(one["domain"], number, one["prompt"], models)
        figure = plots.plot_layer_maps(plots.correction_maps(result.layers))
        chosen = " ".join(f"--domain {name}" for name in domains)
        command = f"trl-interfere heal lab-out {chosen} --rank {int(rank)}"
        text = f'<p class="ti-lead">{lead}</p>{table}'
        return text, gr.Plot(figure, visible=True), examples and f"<h3>Prompts that came back</h3>{examples}", command


def _interval(change: dict[str, float]) -> str:
    return f"{change['value']:+.1f} [{change['low']:+.1f}, {change['high']:+.1f}]"


@on_gpu
def _heal(live, domains, protect, references, rank, control):
    return live.heal(domains, protect, references, rank, control)


def live_tab(lab: Path) -> dict[str, Any]:
    """Put the parts of the tab into the page; what starts it when it is opened."""
    bench = Bench(lab)
    names, healable, damaged = bench.offered()
    gr.HTML(
        '<p class="ti-detail">The lab’s model (0.9 million parameters) is healed here: layer by layer, the weights '
        "with which it computes again what it computed at each domain’s peak. No training, no labels, "
        "only forward passes over a few completions of each domain.</p>"
    )
    with gr.Row():
        domains = gr.CheckboxGroup(healable, value=damaged, label="Heal", elem_id="live-heal")
        protect = gr.CheckboxGroup(names, value=names, label="Protect", elem_id="live-protect")
    with gr.Row():
        references = gr.Slider(8, 128, value=64, step=8, label="References of each domain", elem_id="live-references")
        rank = gr.Slider(1, 64, value=64, step=1, label="Rank of the change of each layer", elem_id="live-rank")
    with gr.Row():
        start = gr.Button("Heal", variant="primary", elem_id="live-start")
        control = gr.Button("Control: references shuffled between domains", elem_id="live-control")
    text = gr.HTML(elem_id="live-text")
    maps = gr.Plot(show_label=False, elem_id="live-maps", visible=False)
    examples = gr.HTML(elem_id="live-examples")
    command = gr.Code("trl-interfere heal lab-out", language="shell", label="The same in a shell", interactive=False)
    inputs, outputs = [domains, protect, references, rank], [text, maps, examples, command]
    settings = {"inputs": inputs, "outputs": outputs, "concurrency_limit": 1, "trigger_mode": "always_last"}
    start.click(bench.heal, **settings)
    control.click(lambda *chosen: bench.heal(*chosen, control=True), **settings)
    return {"fn": bench.heal, **settings}
