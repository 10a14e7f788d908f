"""
What the page costs.

    python benchmarks/compare_page.py

Makes four runs with random scores of 2,000 prompts for each of four domains after a base and four stages, each with a
report of a model of 36 layers and about 350,000 routes (9,728 MLP channels, 32 query and 8 key/value heads in each
layer, as Qwen3-4B has), and calls every view in a process of its own: `first_seconds` is the time of the first view,
reading included, `longest_seconds` that of the longest other one, `peak_mb` the most memory that the process held,
imports included. `heal_seconds` is the longest of three live heals of the lab, each of other references, and
`rollback_seconds` that of a live rollback of routes. Seconds are those of the processor, all threads together, so that
they are the same on a busy machine. Prints one JSON object on the last line.
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
PROMPTS = 2000
DOMAINS = ("code", "math", "qa", "writing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--runs", type=int, default=4, help="number of runs (default: %(default)s)")
    parser.add_argument("--draw", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--live", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.draw:
        return draw(args.draw)
    if args.live:
        return live()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.runs):
            make_run(Path(folder) / f"run-{seed}", seed)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        drawn = run("--draw", folder)
    results = {"runs": args.runs, "prompts": PROMPTS, "routes": routes(), "disk_mb": round(size / 2**20), **drawn}
    print(json.dumps({**results, **run("--live")}))


def run(*arguments: str) -> dict:
    command = [sys.executable, __file__, *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(next(line for line in output.splitlines() if line.startswith("{")))


def routes() -> int:
    return LAYERS * (CHANNELS + QUERIES + KEYS)


def make_run(folder: Path, seed: int) -> None:
    import numpy as np

    from trl_interfere.evaluation.bootstrap import score
    from trl_interfere.run import Run, StageRecord

    rng = np.random.default_rng(seed)
    run = Run.new(folder, {"base_model": "base", "schedule": [{"domain": name} for name in DOMAINS]})
    for index, domain in enumerate((None, *DOMAINS)):
        record = StageRecord(index, "train" if domain else "base", domain, None, 100, 0.0, {}, 0, {}, {})
        for name in DOMAINS:
            values = rng.integers(0, 2, size=PROMPTS).astype(float)
            prompts = [f"{name} {number}: " + "word " * 40 for number in range(PROMPTS)]
            file = run.write_scores(record.name, name, values, ["answer " * 40] * PROMPTS, prompts)
            record.scores[name] = {**score(values).to_dict(), "file": file}
        run.append(record)
    make_report(folder / "analysis" / "math", seed)


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
    from trl_interfere.app.page import Page
    from trl_interfere.app.views import MAPS

    page, seconds = Page(Catalog([folder], hub=False)), {}
    names, pair = page.catalog.names, ("2-math", "4-writing")
    views = {
        "verdict": lambda: page.verdict(names),
        "choices": lambda: page.choices(names, {}),
        "flips": lambda: page.flips(names, "math", *pair),
        "prompts": lambda: page.prompts(names, "math", *pair, "all"),
        "answers": lambda: page.answers(names, "math", 7),
        "repairs": lambda: page.repairs(names),
        "where": lambda: page.where(names, "math", MAPS),
        "concentration": lambda: page.where(names, "math", "damage_concentration"),
    }
    for view, show in views.items():
        start = time.process_time()
        shown = show()
        seconds[view] = round(time.process_time() - start, 2)
        if 'role="alert"' in str(shown):
            raise ValueError(f"{view}: {shown}")
    first = seconds.pop("verdict")
    longest = max(seconds, key=seconds.get)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {
        "first_seconds": first,
        "longest_seconds": seconds[longest],
        "longest_view": longest,
    }
    print(json.dumps({**figures, "peak_mb": round(peak)}))


def live() -> None:
    from trl_interfere.lab.live import LiveHeal

    bench, seconds = LiveHeal(LAB), []
    repairs = [lambda count=count: bench.heal(["math"], references=count) for count in (32, 64, 128)]
    for repair in (*repairs, lambda: bench.rollback("math", 0.32)):
        start = time.process_time()
        repair()
        seconds.append(round(time.process_time() - start, 2))
    print(json.dumps({"heal_seconds": max(seconds[:-1]), "rollback_seconds": seconds[-1]}))


if __name__ == "__main__":
    main()
