"""A finished run of the lab, packed to be shown: small enough to lie in a repository."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..run import REPORT_NAME, STAGES_NAME, Run, write_atomically
from . import MODEL_FOLDER
from .domains import lab_rows


DELTA_NAME = "delta.safetensors"
KEPT = ("repair.json", REPORT_NAME, "routes.safetensors")


def pack(folder: Path, target: Path) -> int:
    """
    Copy what the page needs of a run: scores by prompt, reports, the record of the repair, and the weights of the
    final stage and of every domain's own, as bfloat16 differences from the model that ships with the package.

    The differences are small beside the weights, so that their rounding is 2⁻⁹ of what a stage has changed and not of
    the weights themselves.
    """
    run = Run(folder)
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    kept = [run.folder / name for name in (STAGES_NAME, "results.json", "rivals.json")]
    kept += [place / name for place in (run.repair, *run.reports.values()) for name in KEPT]
    for path in filter(Path.is_file, kept):
        copy = part / path.relative_to(run.folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    own = [run.trained(domain) for domain in run.final.scores]
    healed = {run.final.name, *(record.name for record in own if record is not None)}
    for record in run.stages:
        for domain, entry in record.scores.items():
            rows, prompts = run.rows(record, domain), lab_rows(domain, "test", entry["n"])
            rows = [{**row, "prompt": source["prompt"]} for row, source in zip(rows, prompts, strict=True)]
            write_atomically(part / entry["file"], "".join(json.dumps(row) + "\n" for row in rows))
        if record.name in healed and record.folder is not None:
            _write_delta(Path(run.weights(record)), part / record.folder)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def _write_delta(weights: Path, target: Path) -> None:
    with (
        safe_open(weights / "model.safetensors", framework="pt") as after,
        safe_open(MODEL_FOLDER / "model.safetensors", framework="pt") as before,
    ):
        pairs = {key: (after.get_tensor(key), before.get_tensor(key)) for key in after.keys()}
        delta = {key: (new.double() - old.double()).to(torch.bfloat16) for key, (new, old) in pairs.items()}
    target.mkdir(parents=True)
    save_file(delta, target / DELTA_NAME)


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a packed run of the lab."""
    return (folder / STAGES_NAME).is_file() and any(folder.glob(f"stages/*/{DELTA_NAME}"))


def unpack(folder: Path, stage: str, target: Path) -> Path:
    """Write the model after a stage with weights as a whole checkpoint, in float32."""
    known = {path.parent.name: path for path in folder.glob(f"stages/*/{DELTA_NAME}")}
    if stage not in known:
        raise ValueError(f"stage: expected one of {sorted(known)}, found {stage!r}")
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    with safe_open(known[stage], framework="pt") as file, torch.no_grad():
        for name in file.keys():
            parameters[name].add_(file.get_tensor(name).float())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(MODEL_FOLDER).save_pretrained(target)
    return target
