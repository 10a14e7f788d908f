"""What commands print: tables and text, never escape codes of foreign text."""

import io
import os
import shutil
import sys
from typing import TextIO

from rich.console import Console

from ..tables import printable


def plain(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def console(file: TextIO | None = None) -> Console:
    """Where tables are printed. In a log they are not cut at the 80 columns that rich takes for one."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    width = shutil.get_terminal_size().columns if known else 140
    return Console(file=file, width=width, color_system=None, highlight=False, emoji=False)


def show(*parts: object) -> None:
    """Print text and tables."""
    text = io.StringIO()
    for part in parts:
        if isinstance(part, str):  # a terminal wraps it, and a path in a log stays whole
            text.write(part + "\n")
        else:
            console(text).print(part)
    print(plain(text.getvalue()), end="", flush=True)
