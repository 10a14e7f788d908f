"""`trl-interfere compare`."""

import os
from dataclasses import dataclass
from pathlib import Path

from .evaluate import main as evaluate
from .options import Options, option, parse


EXAMPLE = "trl-interfere compare out other-run    (or: compare model-a model-b --recipe domains.yaml)"


@dataclass(kw_only=True)
class CompareOptions(Options):
    """Show runs, or any checkpoints with --recipe, side by side in a page on this machine."""

    runs: list[str] = option([], "folders of runs or evaluations, or of such folders; with --recipe checkpoints")
    recipe: str | None = option(None, "YAML file that names the domains on which checkpoints are scored first")
    output_dir: str = option("comparison", "with --recipe: folder of the scores, new or empty")
    host: str = option("127.0.0.1", "address to listen on")
    port: int | None = option(None, "port; by default a free one from 7860 on", least=1, most=65535)
    hub: bool = option(True, "let the page read repositories of the Hub")
    browser: bool = option(True, "open the page")
    threads: int = option(1, "threads to compute with")  # a small model gains nothing by more


def main(arguments: list[str]) -> None:
    options = parse(CompareOptions, arguments, "*runs", EXAMPLE)
    try:
        from ..app.page import build_page, launch
    except ImportError as error:
        raise ImportError(f"compare: pip install 'trl-interfere[space]' ({error})") from error
    from ..lab.packed import is_packed

    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))  # torch is loaded when a model is asked
    folders = [Path(folder) for folder in options.runs]
    if options.recipe is not None:
        evaluate([*options.runs, "--recipe", options.recipe, "--output_dir", options.output_dir])
        folders = [Path(options.output_dir)]
    lab = next((folder for folder in folders if is_packed(folder)), None)
    page = build_page([folder for folder in folders if folder != lab], lab=lab, hub=options.hub)
    launch(page, server_name=options.host, server_port=options.port, inbrowser=options.browser)
