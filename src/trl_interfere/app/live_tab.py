"""The tab that repairs the lab's model while one waits."""

from pathlib import Path
from typing import Any

import gradio as gr

from ..reporting import layer_maps, plots
from ..reporting.verdict import share_of
from . import html


try:  # ZeroGPU lends its device to functions that ask for it
    from spaces import GPU as on_gpu
except ImportError:

    def on_gpu(function):
        return function


MODELS = ("peak", "final", "healed")
HEAL, ROUTES = "heal", "route rollback"
CONTROLS = {HEAL: "every domain got the references of another one", ROUTES: "the routes were chosen at random"}


def live_tab(lab: Path) -> dict[str, Any]:
    """Put the parts of the tab into the page; what starts it when it is opened."""
    from ..lab.live import LiveHeal

    live = LiveHeal(lab)
    gr.HTML(
        '<p class="ti-detail">The lab’s model (0.9 million parameters) is healed here: layer by layer, the weights '
        "with which it computes again what it computed at each domain’s peak. No training, no labels, "
        "only forward passes over a few completions of each domain. The paper’s route rollback moves the routes that "
        "carry the damage of the first chosen domain back.</p>"
    )
    method = gr.Radio([HEAL, ROUTES], value=HEAL, label="Repair", elem_id="live-method")
    with gr.Row():
        domains = gr.CheckboxGroup(list(live.peaks), value=live.damaged, label="Heal", elem_id="live-heal")
        protect = gr.CheckboxGroup(live.domains, value=live.domains, label="Protect", elem_id="live-protect")
    with gr.Row():
        references = gr.Slider(8, 128, value=64, step=8, label="References of each domain", elem_id="live-references")
        rank = gr.Slider(1, 64, value=64, step=1, label="Rank of the change of each layer", elem_id="live-rank")
        budget = gr.Slider(1, 64, value=32, step=1, label="Routes rolled back (%)", visible=False)
    with gr.Row():
        start = gr.Button("Heal", variant="primary", elem_id="live-start")
        control = gr.Button("Control: what it brings back by chance", elem_id="live-control")
    outputs = [gr.HTML(elem_id=f"live-{name}") for name in ("text", "maps", "examples")]
    command = gr.Code("trl-interfere heal lab-out", language="shell", label="The same in a shell", interactive=False)
    inputs = [method, domains, protect, references, rank, budget]

    def repair(*chosen: Any, control: bool = False) -> tuple[Any, ...]:
        try:
            return _shown(*_repair(live, control, *chosen), control)
        except (ValueError, OSError, RuntimeError) as error:
            return html.notice(str(error)), "", "", gr.skip()

    queue = {"concurrency_limit": 1, "trigger_mode": "always_last"}
    settings = {"inputs": inputs, "outputs": [*outputs, command], **queue}
    start.click(repair, **settings)
    control.click(lambda *chosen: repair(*chosen, control=True), **settings)
    method.input(lambda name: [gr.Slider(visible=(name == kind)) for kind in (HEAL, HEAL, ROUTES)],
                 method, [references, rank, budget])  # fmt: skip
    return {"fn": repair, **settings}


@on_gpu
def _repair(live, control, method, domains, protect, references, rank, budget):
    """What the repair did, its name, and the command that does the same."""
    if method == HEAL:
        result = live.heal(domains, protect, int(references), int(rank), control)
        options = " ".join([f"--domain {name}" for name in domains] + [f"--rank {int(rank)}"])
        return result, method, f"trl-interfere heal lab-out {options}"
    domain = next((name for name in domains if name in live.reports), None)
    options = f"--domain {domain} --budget {budget / 100:g} --scope joint --protection 1"
    return live.rollback(domain, budget / 100, control), method, f"trl-interfere rollback lab-out {options}"


def _shown(result, method, command, control):
    """Text, map of the layers, prompts that came back, and the command."""
    figures = result.figures
    lead = (
        f"{f'Control: {CONTROLS[method]}. ' if control else ''}{share_of(figures['recovered_all'])} of what was lost "
        f"came back; the worst change of a domain is {figures['worst']:+.1f} points. It took {result.seconds:.1f} "
        "seconds, scoring included."
    )
    rows = []
    for name, entry in figures["domains"].items():
        scores, change = (f"{entry[key]:.1f}" for key in MODELS), html.interval(entry["change"])
        rows.append([name, *scores, change, entry["regained"], entry["newly_lost"]])
    header = ["domain", *MODELS, "change [95%]", "regained", "newly lost"]
    count = next(iter(figures["domains"].values()))["n"]
    table = html.table(header, rows, f"Scores, 0 to 100, on {count} test prompts of each domain")
    examples = ""
    for number, one in enumerate(result.examples, start=1):
        models = [{"model": key, "text": one[key], "score": one[f"{key}_score"]} for key in MODELS]
        examples += html.answers(one["domain"], number, one["prompt"], models)
    drawn = plots.plot_layer_maps(layer_maps.repair_maps(result.record))
    lead, maps = f'<p class="ti-lead">{lead}</p>{table}', html.figure(drawn, "What the repair changes, by layer")
    return lead, maps, examples and f"<h3>Prompts that came back</h3>{examples}", command
