"""
What the page of comparisons costs.

    python benchmarks/compare_page.py

Makes four reports of a model of 36 layers and about 350,000 routes (9,728 MLP channels, 32 query and 8 key/value
heads in each layer, as Qwen3-4B has) with random figures, and draws every view of them in a process of its own:
`draw_seconds` is the time of the longest view, `all_views_seconds` that of all of them, reading included,
`peak_mb` the most memory that the process held, imports included. `ready_seconds` is the time from the start of
another process to the answer of the page with the lab in it, and `live_seconds` the longest of four measurements of
the live rollback, each of other routes (its threads are those of OMP_NUM_THREADS). Prints one JSON object on the last
line.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


LAYERS, CHANNELS, QUERIES, KEYS = 36, 9728, 32, 8
LAB = Path(__file__).parents[1] / "space" / "data" / "lab"
MEASURES = (
    "damage",
    "first_order",
    "second_order",
    "later_damage",
    "edit_size",
    "activity_earlier",
    "activity_later",
    "opposed",
    "earlier_edit_size",
)
DOMAINS = ("code", "math", "qa", "writing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--reports", type=int, default=4, help="number of reports (default: %(default)s)")
    parser.add_argument("--draw", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ready", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--live", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.draw:
        return draw(args.draw)
    if args.ready:
        return ready()
    if args.live:
        return live()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.reports):
            make_report(Path(folder) / f"model-{seed}", seed)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        drawn = run("--draw", folder)
    start = time.perf_counter()
    answered = run("--ready")["answered"]
    results = {"reports": args.reports, "routes": routes(), "disk_mb": round(size / 2**20), **drawn}
    print(json.dumps({**results, "ready_seconds": round(answered - start, 2), **run("--live")}))


def run(*arguments: str) -> dict:
    command = [sys.executable, __file__, *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(next(line for line in output.splitlines() if line.startswith("{")))


def routes() -> int:
    return LAYERS * (CHANNELS + QUERIES + KEYS)


def make_report(folder: Path, seed: int) -> None:
    import numpy as np

    from trl_interfere.analysis.report import InterferenceReport

    rng = np.random.default_rng(seed)
    overlap = {
        "value": 0.6,
        "low": 0.5,
        "high": 0.7,
        "over": "references",
        "units": 64,
        "routes": LAYERS * CHANNELS,
        "first": 1,
        "second": 1,
        "common": 1,
        "chance": 0.053,
        "shuffled": 0.1,
        "shuffled_low": 0.09,
        "shuffled_high": 0.11,
    }
    active = {
        first: {second: {"mlp": overlap} for second in DOMAINS[number + 1 :]}
        for number, first in enumerate(DOMAINS[:-1])
    }
    modules = {
        f"layers.{layer}.{part}": rng.normal(0, 0.1)
        for layer in range(LAYERS)
        for part in ("attention", "mlp", "norm")
    }
    tensors = {
        f"model.layers.{layer}.{number}.weight": rng.normal(0, 0.1) for layer in range(LAYERS) for number in range(11)
    }
    cosines = {"global": 0.01, "modules": modules, "tensors": tensors, "by_domain": {}}
    InterferenceReport(
        before="before",
        after="after",
        base="base",
        earlier="math",
        later=["qa", "writing"],
        dtype="bfloat16",
        references={"math": {"kind": "correct", "n": 64, "considered": 128, "tokens": 9000}},
        loss_before=0.2,
        loss_after=0.4,
        first_order=-0.01,
        second_order=0.1,
        attributed=0.19,
        outside_routes=0.01,
        later_loss_before={"qa": 1.0},
        later_loss_after={"qa": 0.5},
        cosines=cosines,
        config={"reference": "correct", "active_share": 0.1},
        versions={},
        routes={name: rng.normal(1e-6, 1e-5, size=routes()) for name in MEASURES},
        overlaps={"active": active},
        route_counts={"mlp": [CHANNELS] * LAYERS, "query": [QUERIES] * LAYERS, "key_value": [KEYS] * LAYERS},
    ).save_pretrained(folder)


def draw(folder: Path) -> None:
    from trl_interfere.app.catalog import Catalog
    from trl_interfere.app.page import VIEWS, Page

    page = Page(Catalog([folder], hub=False))
    seconds = {}
    for view in VIEWS:
        start = time.perf_counter()
        message, *_ = page.compare(page.catalog.names, None, view, "damage", {})
        seconds[view] = time.perf_counter() - start
        if "alert" in message:
            raise ValueError(f"{view}: {message}")
    longest = max(seconds, key=seconds.get)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {"draw_seconds": round(seconds[longest], 2), "longest_view": longest}
    print(json.dumps({**figures, "all_views_seconds": round(sum(seconds.values()), 2), "peak_mb": round(peak)}))


def live() -> None:
    from trl_interfere.lab.live import LiveRollback

    rollback, seconds = LiveRollback(LAB), []
    for budget in (0.005, 0.02, 0.08, 0.32):
        start = time.perf_counter()
        rollback.measure("damage", budget)
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"live_seconds": round(max(seconds), 2)}))


def ready() -> None:
    import httpx

    from trl_interfere.app.page import build_page, launch

    blocks = build_page(lab=LAB, hub=False)
    _, address, _ = launch(blocks, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    httpx.get(address).raise_for_status()
    print(json.dumps({"answered": time.perf_counter()}), flush=True)
    blocks.close()


if __name__ == "__main__":
    main()
