"""Settings of the training on the command line."""

import json
import re
from argparse import SUPPRESS, ArgumentError
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from transformers import HfArgumentParser

from ..recipe import check_names
from .config import SequentialGRPOConfig


def options_parser() -> HfArgumentParser:
    """Parser of all settings of [`SequentialGRPOConfig`], spelt with `_` or `-`."""
    parser = HfArgumentParser(
        SequentialGRPOConfig,
        prog="trl-interfere train",
        usage="%(prog)s FILE [options]",
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    described = dict(re.findall(r"^ {8}(\w+) \(.*\):\n((?: {12}.+\n)+)", SequentialGRPOConfig.__doc__, re.MULTILINE))
    for action in parser._actions:
        if action.dest in described:
            action.help = " ".join(described[action.dest].split()).replace("%", "%%")
    return parser


def parse_options(arguments: list[str], known: Iterable[str] = ()) -> dict[str, Any]:
    """Settings of [`SequentialGRPOConfig`] that stand on a command line, and no others."""
    parser = options_parser()
    for action in parser._actions:
        action.default, action.required = SUPPRESS, False
    try:
        given, rest = parser.parse_known_args(arguments)
    except ArgumentError as error:
        raise ValueError(f"command line: {error}") from error
    names = [entry.name for entry in fields(SequentialGRPOConfig) if entry.init]
    for argument in rest:
        if not argument.startswith("--"):
            raise ValueError(f"command line: expected options, found {argument!r}")
        check_names({argument[2:].split("=")[0].replace("-", "_"): None}, [*names, *known], "command line")
    options = vars(given)
    if "order" in options:  # also with commas, as in the other commands
        options["order"] = [name for part in options["order"] for name in part.split(",") if name]
    for name, value in options.items():
        if name == "stage_overrides" or (isinstance(value, str) and value.startswith("{")):
            try:
                options[name] = json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"command line, --{name}: expected JSON, found {value!r} ({error})") from error
            if not isinstance(options[name], dict):
                raise ValueError(f"command line, --{name}: expected settings by name, found {value!r}")
    return options
