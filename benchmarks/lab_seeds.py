"""
Run the lab with several seeds and average what it shows.

    python benchmarks/lab_seeds.py --output-dir lab-seeds --seeds 0 1 2

Each seed takes the time of one `trl-interfere lab`; finished runs are read and not repeated. Prints a Markdown table
with one column per seed, and on the last line the means as one JSON object.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from trl_interfere.reporting.verdict import arm_of


def figures(results: dict, report: dict) -> dict[str, float]:
    """
    The figures of one run that the lab is built to show.

    Args:
        results (`dict`):
            Content of `results.json`.
        report (`dict`):
            Content of `report.json` of the first pair.

    Returns:
        `dict[str, float]`: Name to value; scores in points, recovered shares in percent.
    """
    scores = {stage["domain"]: stage["scores"] for stage in results["stages"] if stage["kind"] == "train"}
    before = dict(zip(results["order"], [results["stages"][0]["scores"], *scores.values()], strict=False))
    earlier = results["pairs"][0]["earlier"]
    last = scores[results["order"][-1]]
    found = {f"{name}: gain of its own stage": scores[name][name]["value"] - before[name][name]["value"]
             for name in results["order"]}  # fmt: skip
    found[f"{earlier}: loss from its stage to the end"] = scores[earlier][earlier]["value"] - last[earlier]["value"]
    for pair in results["pairs"]:
        label = f"{earlier} and {'+'.join(pair['later'])}"
        damage = pair["loss_after"] - pair["loss_before"]
        found |= {
            f"{label}: whole-model cosine": pair["global_cosine"],
            f"{label}: lowest module cosine": pair["most_conflicting"]["cosine"],
            f"{label}: highest module cosine": pair["most_synergistic"]["cosine"],
            f"{label}: damage (nats per token)": damage,
            f"{label}: first order (nats per token)": pair["first_order"],
            f"{label}: second order (nats per token)": pair["second_order"],
            f"{label}: residual of the attribution (% of damage)": 100
            * abs(damage - pair["attributed"] - pair["outside_routes"])
            / abs(damage),
        }
    whole = report["updates"]["update"]["whole"]
    found["parameters with |δ| < 1e-7, stored in float32 (%)"] = 100 * whole["below_absolute"]
    found["parameters identical had both been stored in bfloat16 (%)"] = 100 * report["identical_in_bfloat16"]
    for word, rows in (("changed", results["edits"]["changed"]), ("active", report["overlaps"]["active"])):
        for first, row in rows.items():
            for second, kinds in row.items():
                pair = " and ".join(sorted((first, second)))
                found[f"{word} MLP channels, Jaccard of {pair}"] = kinds["mlp"]["value"]
                found[f"{word} MLP channels, {pair}, shuffled within layers"] = kinds["mlp"]["shuffled"]
    for label, spectrum in (("the update", report["subspace"]["update"]), ("random", report["subspace"]["random"])):
        count = len(spectrum["eigenvalues"])
        found[f"second order, {label}: by routes (nats per token)"] = spectrum["second_order"]
        found[f"second order, {label}: in the top {count} eigenvectors (%)"] = 100 * sum(spectrum["shares"])
        found[f"second order, {label}: effective dimension"] = spectrum["effective_dimension"]
    for row in filter(None, [results["healed"], *results["rivals"]]):
        arm = arm_of(row)
        label = arm["name"] + (", protected" if row.get("protection") else "")
        found[f"{label}: worst change of another domain"] = arm["worst"]
        if arm["recovered"] is not None:
            found[f"{label}: recovered (%)"] = 100 * arm["recovered"]
        for name, left in (row.get("contraction") or {}).items():
            if isinstance(left, float):
                found[f"{label}: distance left, {name} (%)"] = 100 * left
    found["seconds"] = sum(results["seconds"].values())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("lab-seeds"), help="one folder per seed is made in it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds")
    parser.add_argument("--threads", type=int, default=1, help="threads; results repeat for the same number")
    arguments = parser.parse_args()
    runs = {}
    for seed in arguments.seeds:
        folder = arguments.output_dir / f"seed-{seed}"
        if not (folder / "results.json").exists():
            command = [sys.executable, "-m", "trl_interfere", "lab", "--output_dir", str(folder), "--seed", str(seed)]
            subprocess.run([*command, "--threads", str(arguments.threads)], check=True, stdout=subprocess.DEVNULL)
        results = json.loads((folder / "results.json").read_text())
        report = folder / "analysis" / results["pairs"][0]["earlier"] / "report.json"
        runs[seed] = figures(results, json.loads(report.read_text()))
    names = [name for name in runs[arguments.seeds[0]] if all(name in run for run in runs.values())]
    means = {name: float(np.mean([run[name] for run in runs.values()])) for name in names}
    print("| figure | mean | " + " | ".join(f"seed {seed}" for seed in runs) + " |")
    print("| --- | ---: |" + " ---: |" * len(runs))
    for name in names:
        print(f"| {name} | {means[name]:.3g} | " + " | ".join(f"{run[name]:.3g}" for run in runs.values()) + " |")
    print(json.dumps({"seeds": arguments.seeds, **means}))


if __name__ == "__main__":
    main()
