"""A finished run of the lab, packed to be shown: small enough to lie in a repository."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..analysis.report import REPORT_NAME, ROUTES_NAME
from ..run import STAGES_NAME, read_json


# Pages list the stages of a packed run: torch is loaded where weights are.
if TYPE_CHECKING:
    from transformers import PreTrainedModel


DELTA_NAME = "delta.safetensors"
FILES = ("results.json", "report.md", STAGES_NAME)


def pack(run: Path, folder: Path, stages: list[str] | None = None, scores: bool = True) -> int:
    """
    Copy what the pages need: results, reports, scores by prompt, and the weights of some stages as bfloat16
    differences from the model that ships with the package.

    The differences are small beside the weights, so that their rounding is 2⁻⁹ of what a stage has changed and not of
    the weights themselves.

    Args:
        run (`pathlib.Path`):
            Folder of the run.
        folder (`pathlib.Path`):
            Where to put it; what is there is replaced.
        stages (`list[str]`, *optional*):
            Names of the stages whose weights are kept. Defaults to the two that its first report compares.
        scores (`bool`, *optional*, defaults to `True`):
            Whether to keep the score and the completion of each prompt.

    Returns:
        `int`: Bytes written.

    Raises:
        `ValueError`: If the run has not finished.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from .build import MODEL_FOLDER

    for name in FILES:
        if not (run / name).is_file():
            raise ValueError(f"{run}: expected a finished run of the lab with {name}, found none")
    reports = sorted(path.parent for path in run.glob(f"analysis/*/{REPORT_NAME}"))
    if not reports:
        raise ValueError(f"{run}: expected a report in analysis/, found none")
    if stages is None:
        content = read_json(reports[0] / REPORT_NAME, 3)
        stages = [Path(content[name]).name for name in ("before", "after")]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in FILES:
        shutil.copyfile(run / name, folder / name)
    for report in reports:
        target = folder / report.relative_to(run)
        target.mkdir(parents=True)
        for name in (REPORT_NAME, ROUTES_NAME, "report.md"):
            shutil.copyfile(report / name, target / name)
    if scores:
        shutil.copytree(run / "scores", folder / "scores")
    origin = MODEL_FOLDER / "model.safetensors"
    for name in stages:
        source = run / "stages" / name / "model.safetensors"
        if not source.is_file():
            raise ValueError(f"{source}: expected the weights of stage {name!r}, found none")
        with safe_open(source, framework="pt") as after, safe_open(origin, framework="pt") as before:
            delta = {
                key: (after.get_tensor(key).double() - before.get_tensor(key).double()).to(torch.bfloat16)
                for key in after.keys()
            }
        target = folder / "stages" / name
        target.mkdir(parents=True)
        save_file(delta, target / DELTA_NAME)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def packed_stages(folder: Path) -> list[str]:
    """
    Names of the stages whose weights were packed.

    Args:
        folder (`pathlib.Path`):
            Folder of the packed run.

    Returns:
        `list[str]`: Names, in order.
    """
    return sorted(path.parent.name for path in folder.glob(f"stages/*/{DELTA_NAME}"))


def load_packed(folder: Path, stage: str | None = None) -> "PreTrainedModel":
    """
    The model after a stage.

    Args:
        folder (`pathlib.Path`):
            Folder of the packed run.
        stage (`str`, *optional*):
            One of `packed_stages`. Defaults to the model before any training.

    Returns:
        [`~transformers.PreTrainedModel`]: The model, in float32.

    Raises:
        `ValueError`: If the weights of the stage were not packed.
    """
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    from .build import MODEL_FOLDER

    if stage is not None and stage not in packed_stages(folder):
        raise ValueError(f"{folder}: expected one of the stages {packed_stages(folder)}, found {stage!r}")
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()
    if stage is None:
        return model
    parameters = dict(model.named_parameters())
    with safe_open(folder / "stages" / stage / DELTA_NAME, framework="pt") as file, torch.no_grad():
        for name in file.keys():
            parameters[name].add_(file.get_tensor(name).float())
    return model
