"""
Can the damage of a stage be foretold? Forecasts from gradients and moments before each stage of the repair study's
runs, against the points that the earlier domains then lost. Into docs/data/forecast.json.

    python benchmarks/repair_study.py --parts train --jobs 2
    python benchmarks/forecast.py --output-dir repair-study

With g_i and g_j the gradients of an earlier domain i and of the next stage's domain j at the weights where that stage
begins, s = -η T sign(g_j) a step of Adam's size at learning rate η over T steps, and C_i the second moments of what a
layer W gets on domain i:

- gradient cosine: -cos(g_i, g_j);
- first order: g_i s, the loss that the step would add;
- shared inputs: mean over layers of tr(C_i C_j) / (‖C_i‖ ‖C_j‖);
- output change: (Σ tr(s C_i sᵀ) / Σ tr(W C_i Wᵀ))^½ over layers;
- learning rate: η T, which looks at no weights and no data.

The size of the update, ‖δ‖ / ‖θ‖, is known only after the stage and stands beside them. Prints Spearman's rank
correlation of each with the points lost, with 95% intervals from a bootstrap over seeds, and that of its difference
from the cosine.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from repair_study import ORDERS, StudyRun
from torch import nn

from trl_interfere.analysis.config import InterferenceConfig
from trl_interfere.analysis.gradients import mean_gradient
from trl_interfere.analysis.references import References, collect_references
from trl_interfere.lab import MODEL_FOLDER
from trl_interfere.lab.pipeline import LEARNING_RATE, STAGE_LEARNING_RATES
from trl_interfere.models import load_model, load_tokenizer
from trl_interfere.repair.activation_moments import ActivationMoments


FORECASTS = ("gradient cosine", "first order", "shared inputs", "output change", "learning rate", "size of the update")
BATCH_SIZE, RESAMPLES = 64, 2000


def moments(model: nn.Module, references: References) -> dict[str, torch.Tensor]:
    """Mean second moments of what every linear layer of the blocks gets, by name of its weight."""
    found: dict[str, ActivationMoments] = {}
    mask: torch.Tensor

    def note(name: str):
        def hook(module, args):
            inputs = args[0].flatten(0, -2)[mask]
            if name not in found:
                found[name] = ActivationMoments(inputs.shape[1])
            found[name].add(inputs, inputs)

        return hook

    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    handles = [layer.register_forward_pre_hook(note(f"{name}.weight")) for name, layer in layers.items()]
    with torch.no_grad():
        for batch in references.batches(BATCH_SIZE, 0, torch.device("cpu")):
            mask = batch["attention_mask"].bool().flatten()
            model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    for handle in handles:
        handle.remove()
    for sums in found.values():
        sums.finish(reduce=False)
    return {name: sums.moments / sums.count for name, sums in found.items()}


def rows_of(run: StudyRun) -> list[dict]:
    """A row for each stage and each domain that was trained before it."""
    config = InterferenceConfig(reference="dataset", reference_column="answer", max_prompts=64)
    tokenizer, order, rows = load_tokenizer(MODEL_FOLDER), run.order, []
    references = {
        name: collect_references(None, tokenizer, run.lab.domains[name], config, run.lab.domains[name].train_dataset)
        for name in order
    }
    for position in range(1, len(order)):
        later, model = order[position], load_model(run.stage(order[position - 1]))
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        after = {name: parameter.detach() for name, parameter in load_model(run.stage(later)).named_parameters()}
        size = norm({n: after[n] - before[n] for n in before}) / norm(before)
        names = order[: position + 1]
        gradients = {
            n: mean_gradient(model, references[n].batches(BATCH_SIZE, 0, torch.device("cpu")))[1] for n in names
        }
        inputs = {n: moments(model, references[n]) for n in names}
        length = STAGE_LEARNING_RATES.get(later, LEARNING_RATE) * run.run.trained(later).steps
        step = {n: -length * g.sign() for n, g in gradients[later].items()}
        for earlier in names[:-1]:
            own, other, uses = gradients[earlier], gradients[later], inputs[earlier]
            overlap = [
                float((uses[n] * inputs[later][n]).sum() / (uses[n].norm() * inputs[later][n].norm())) for n in uses
            ]
            changed, given = (sum(energy(w[n], uses[n]) for n in uses) for w in (step, before))
            lost = run.run.scores(run.run.trained(order[position - 1]), earlier) - run.run.scores(
                run.run.trained(later), earlier
            )
            found = (-dot(own, other) / (norm(own) * norm(other)), dot(own, step), np.mean(overlap),
                     (changed / given) ** 0.5, length, size)  # fmt: skip
            rows.append({**run.labels, "earlier": earlier, "later": later, "lost": 100 * float(np.mean(lost)),
                         "n": len(lost), **dict(zip(FORECASTS, map(float, found), strict=True))})  # fmt: skip
    return rows


def dot(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return sum(float((value.double() * right[name].double()).sum()) for name, value in left.items())


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return dot(tensors, tensors) ** 0.5


def energy(weight: torch.Tensor, inputs: torch.Tensor) -> float:
    """tr(W C Wᵀ)."""
    weight = weight.double()
    return float(((weight @ inputs) * weight).sum())


def correlations(table: pd.DataFrame) -> dict[str, dict]:
    """Rank correlation of each forecast with what was lost."""
    seeds, generator = sorted(table["seed"].unique()), np.random.default_rng(0)
    by_seed = {seed: part for seed, part in table.groupby("seed")}
    drawn = [
        ranked(pd.concat([by_seed[seed] for seed in generator.choice(seeds, len(seeds))])) for _ in range(RESAMPLES)
    ]
    whole, samples = ranked(table), pd.DataFrame(drawn)
    results = {}
    for name in FORECASTS:
        low, high = np.percentile(samples[name], (2.5, 97.5))
        more = np.percentile(samples[name] - samples["gradient cosine"], (2.5, 97.5))
        results[name] = {"value": whole[name], "low": low, "high": high, "over_cosine": list(more)}
    return results


def ranked(table: pd.DataFrame) -> pd.Series:
    ranks = table[["lost", *FORECASTS]].rank()
    return ranks.corr()["lost"][list(FORECASTS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("repair-study"), help="folder of the study's runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder that the data are written to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = [StudyRun(arguments.output_dir, seed, order) for seed in arguments.seeds for order in ORDERS]
    rows = [row for run in runs for row in rows_of(run)]
    results = correlations(pd.DataFrame(rows))
    command = "python benchmarks/forecast.py"
    data = {"schema_version": 1, "command": command, "unit": "lost: points of 100", "correlations": results}
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = json.dumps({**data, "rows": []}, indent=1).replace('"rows": []', f'"rows": [\n{lines}\n ]')
    (arguments.docs / "data" / "forecast.json").write_text(f"{text}\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
