"""`trl-interfere compare`."""

import os
from dataclasses import dataclass
from pathlib import Path

from .options import Options, option, parse


EXAMPLE = "trl-interfere compare lab-out out"


@dataclass(kw_only=True)
class CompareOptions(Options):
    """Show runs and reports side by side, in a page on this machine."""

    runs: list[str] = option([], "folders of runs or reports, or folders of such folders")
    host: str = option("127.0.0.1", "address to listen on")
    port: int | None = option(None, "port; by default a free one from 7860 on")
    hub: bool = option(True, "let the page read repositories of the Hub")
    browser: bool = option(True, "open the page")
    threads: int = option(1, "threads to compute with")  # a small model gains nothing by more

    def __post_init__(self):
        super().__post_init__()
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ValueError(f"--port: expected 1 to 65535, found {self.port}")


def main(arguments: list[str]) -> None:
    options = parse(CompareOptions, arguments, "*runs", EXAMPLE)
    try:
        from ..app.page import build_page, launch
    except ImportError as error:
        raise ImportError(f"compare: pip install 'trl-interfere[space]' ({error})") from error
    from ..app.catalog import is_packed_lab

    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))  # torch is loaded when a model is asked
    folders = [Path(folder) for folder in options.runs]
    lab = next((folder for folder in folders if is_packed_lab(folder)), None)
    page = build_page([folder for folder in folders if folder != lab], lab=lab, hub=options.hub)
    launch(page, server_name=options.host, server_port=options.port, inbrowser=options.browser)
