"""The command `trl-interfere`: a file a command."""

import difflib
import os
import sys
from importlib import import_module

from .. import __version__
from .output import plain


COMMANDS = {
    "lab": "run the whole story on the embedded model",
    "train": "train a model through domains in sequence",
    "evaluate": "score checkpoints, prompt by prompt, beside one of them",
    "analyze": "show what a run broke, and where",
    "heal": "take back what a run broke, without training",
    "rollback": "move the most damaged routes back",
    "refresh": "train a damaged domain again for a few steps",
    "push": "publish a run",
    "compare": "show runs side by side in a page",
    "doctor": "show versions, devices, and what is missing",
}


def usage() -> str:
    lines = "\n".join(f"  {name:10}{what}" for name, what in COMMANDS.items())
    return (
        f"Example:\n  trl-interfere lab\n\ntrl-interfere COMMAND [options]\n\n{lines}\n\n"
        "trl-interfere COMMAND --help shows the options. Next: trl-interfere doctor"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run a command. Bad input ends with one message and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    name, *arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("--help", "-h", "--version"):
        print(__version__ if name == "--version" else usage())
        return
    try:
        if name not in COMMANDS:
            nearest = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"expected one of {', '.join(COMMANDS)}"
            raise ValueError(f"unknown command {name!r}, {hint}")
        code = import_module(f".{name}", __name__).main(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"Error: {plain(str(error))}", file=sys.stderr)
        code = 2
    if code:
        sys.exit(code)
