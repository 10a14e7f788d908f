"""Options of a command: one dataclass, from flags and from YAML (`--config FILE`), as in TRL."""

import argparse
import dataclasses
import inspect
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from trl import TrlParser

from ..recipe import check_names


# A launcher sets OMP_NUM_THREADS to 1, whatever there is; where processes were started by hand it is their share.
_CORES = os.cpu_count() or 1
_GIVEN = os.environ.get("OMP_NUM_THREADS", "") if "LOCAL_WORLD_SIZE" not in os.environ else ""
_THREADS = max(1, int(_GIVEN) if _GIVEN.isdecimal() else _CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
_MOST_THREADS = max(64, _CORES)

Command = TypeVar("Command", bound="Options")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a dataclass of options, with its line of help."""
    kind = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**kind, metadata={"help": help, **metadata})


@dataclass(kw_only=True)
class Options:
    """Options of every command."""

    threads: int = option(_THREADS, "threads to compute with; results repeat for the same number")

    def __post_init__(self):
        at_least(self, threads=1)
        if self.threads > _MOST_THREADS:
            raise ValueError(f"--threads: expected at most {_MOST_THREADS}, found {self.threads}")

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


def at_least(options: Any, **least: float) -> None:
    """Refuse numbers below a limit; `None` is none."""
    for name, limit in least.items():
        value = getattr(options, name)
        if value is not None and not limit <= value < float("inf"):
            raise ValueError(f"--{name}: expected {limit} or more, found {value}")


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


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """One spelling of each option, and defaults that say something."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        several = " ..." if action.nargs == "+" else ""
        value = getattr(action.type, "__name__", "str") + several if action.nargs in (None, "+") else ""
        return f"{action.option_strings[0]} {value}".strip()

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.default not in (None, [], False, True, argparse.SUPPRESS)
        return super()._get_help_string(action) if shown else action.help or ""


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


def parse(
    command: type[Command], arguments: list[str], positional: str, example: str, rest: bool = False
) -> Command | tuple[Command, list[str]]:
    """
    Options of a command; with `rest` also what is left, else that is refused. `positional` names the options that
    stand first without their names, with a `*` before one that takes several values.
    """
    name = command.__module__.rpartition(".")[2]
    names = [part.lstrip("*") for part in positional.split()]
    shown = " ".join(part.lstrip("*").upper() + " ..." * part.startswith("*") for part in positional.split())
    parser = _Parser(
        command,
        usage=argparse.SUPPRESS,
        description=f"Example:\n  {example}\n\n{' '.join(['trl-interfere', name, shown]).strip()} [options]\n\n"
        + inspect.cleandoc(command.__doc__ or ""),
        formatter_class=_Help,
        allow_abbrev=False,
    )
    negated = {action.dest for action in parser._actions if action.option_strings[0].startswith("--no_")}
    for action in parser._actions:
        if action.option_strings[0].startswith("--no_"):
            action.help = f"do not {action.help}"
        elif action.dest in {*names, *negated}:  # what stands first, and what is so by default
            action.help = argparse.SUPPRESS
    flags = {action.dest for action in parser._actions if action.nargs == "?"}
    if "--config" in arguments[-1:]:
        raise ValueError("--config: expected a YAML file")
    try:
        found, left = parser.parse_args_and_config(
            _named(arguments, positional.split(), flags), return_remaining_strings=True
        )
    except yaml.YAMLError as error:
        raise ValueError(f"--config: expected YAML, found something else ({error})") from error
    for place in names:
        if getattr(found, place) in ("", []):
            raise ValueError(f"{name}: expected {shown} first, found no {place}. Example: {example}")
    known = [entry.name for entry in dataclasses.fields(command)]
    for argument in [] if rest else left:
        if not argument.startswith("--"):
            raise ValueError(f"{name}: expected {shown} first and then options, found {argument!r}")
        check_names({argument[2:].split("=")[0].replace("-", "_"): None}, known, f"{name}, command line")
    return (found, left) if rest else found


def _named(arguments: list[str], positional: list[str], flags: set[str]) -> list[str]:
    """The command line with names for what stands first without one, or behind flags that take no value."""
    for _ in list(arguments):
        if arguments[0].removeprefix("--").replace("-", "_") in flags:
            arguments = [*arguments[1:], arguments[0]]
    first = next((place for place, text in enumerate(arguments) if text.startswith("-")), len(arguments))
    values, named = arguments[:first], []
    for name in positional:
        taken = len(values) if name.startswith("*") else min(1, len(values))
        if taken:
            named += [f"--{name.lstrip('*')}", *values[:taken]]
        values = values[taken:]
    return [*named, *values, *arguments[first:]]
