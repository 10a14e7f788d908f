"""Options of a command: one dataclass, from flags and from YAML (`--config FILE`)."""

import argparse
import inspect
import os
import re
import warnings
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, TypeVar, get_args, get_origin

from ..recipe import check_names, read_yaml, typed


# A launcher sets OMP_NUM_THREADS to 1, whatever there is; where processes were started by hand it is their share.
_CORES = os.cpu_count() or 1
_GIVEN = os.environ.get("OMP_NUM_THREADS", "") if "LOCAL_WORLD_SIZE" not in os.environ else ""
_THREADS = max(1, int(_GIVEN) if _GIVEN.isdecimal() else _CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

Command = TypeVar("Command", bound="Options")


def option(default: Any, help: str, least: float | None = None, most: float | None = None, **metadata: Any) -> Any:
    """A field of a dataclass of options, with its line of help, and the least and the most that it may be."""
    kind = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**kind, metadata={"help": help, "least": least, "most": most, **metadata})


@dataclass(kw_only=True)
class Options:
    """Options of every command."""

    threads: int = option(_THREADS, "threads to compute with; results repeat for the same number", 1, max(64, _CORES))

    def __post_init__(self):
        for entry in fields(self):
            value, least, most = (getattr(self, entry.name), *map(entry.metadata.get, ("least", "most")))
            if None not in (value, least) and not (least <= value < float("inf") and (most is None or value <= most)):
                limits = f"{least} or more" if most is None else f"{least} to {most}"
                raise ValueError(f"--{entry.name}: expected {limits}, found {value}")

    def prepare(self) -> None:
        """Set threads, and silence what a user can do nothing about."""
        import torch
        import transformers
        from datasets import disable_progress_bars

        torch.set_num_threads(self.threads)
        transformers.utils.logging.disable_progress_bar()
        disable_progress_bars()
        # TRL still passes options under names that transformers has renamed.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")
        warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator.*")


def empty_folder(name: str) -> Path:
    """The folder of `--output_dir`, which must be new or empty."""
    folder = Path(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output_dir: expected an empty or a new folder, found {folder}")
    return folder


def pairs(values: list[str] | None, name: str) -> dict[str, str]:
    """`name=value` pairs of an option."""
    for value in values or []:
        if not all(value.partition("=")[::2]):
            raise ValueError(f"--{name}: expected name=value, found {value!r}")
    return dict(value.split("=", 1) for value in values or [])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))

    def add(self, entry: Field, first: bool) -> None:
        """An option of a dataclass; with `first` it stands without its name."""
        kind, about = entry.type, entry.metadata["help"]
        if isinstance(kind, UnionType):  # with None
            kind = get_args(kind)[0]
        listed = get_origin(kind) is list
        kind = get_args(kind)[0] if listed else kind
        if first:
            self.add_argument(entry.name, nargs="*" if listed else "?", help=about)
        elif kind is bool:
            prefix, words = ("no_", "do not ") if entry.default else ("", "")
            action = "store_false" if entry.default else "store_true"
            self.add_argument(f"--{prefix}{entry.name}", action=action, dest=entry.name, help=words + about)
        else:
            about += f" (default: {entry.default})" if isinstance(entry.default, (int, float, str)) else ""
            settings = {"nargs": "+" if listed else None, "choices": entry.metadata.get("choices")}
            self.add_argument(f"--{entry.name}", type=kind, metavar=kind.__name__, help=about, **settings)


def parse(
    command: type[Command], arguments: list[str], positional: str, example: str, rest: bool = False
) -> Command | tuple[Command, list[str]]:
    """
    Options of a command; with `rest` also what is left, else that is refused. `positional` names the options that
    stand first without their names, with a `*` before one that takes several values.
    """
    name = command.__module__.rpartition(".")[2]
    shown = " ".join(part.lstrip("*").upper() + " ..." * part.startswith("*") for part in positional.split())
    usage = f"{' '.join(['trl-interfere', name, shown]).strip()} [options]"
    parser = _Parser(
        usage=argparse.SUPPRESS,
        description=f"Example:\n  {example}\n\n{usage}\n\n{inspect.getdoc(command)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    known, places = {entry.name: entry for entry in fields(command)}, positional.replace("*", "").split()
    for entry in (known[option] for option in dict.fromkeys([*places, *known])):
        parser.add(entry, entry.name in places)
    parser.add_argument("--config", metavar="FILE", type=Path, help="options from YAML")
    # Names may be spelt with `-`.
    spelt = [re.sub("^--[^=]+", lambda found: "--" + found[0][2:].replace("-", "_"), word) for word in arguments]
    found, left = parser.parse_known_args(spelt)
    given = vars(found)
    if (path := given.pop("config", None)) is not None:
        content = read_yaml(path)
        check_names(content, known, str(path))
        given = typed(command, content, str(path)) | given
    for argument in [] if rest else left:
        if not argument.startswith("--"):
            raise ValueError(f"{name}: expected {shown} first and then options, found {argument!r}")
        check_names({argument[2:].split("=")[0]: None}, known, f"{name}, command line")
    options = command(**given)
    for place in places:
        if getattr(options, place) in ("", []):
            raise ValueError(f"{name}: expected {shown} first, found no {place}. Example: {example}")
    return (options, left) if rest else options
