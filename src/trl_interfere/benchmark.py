"""Names of benchmarks on the Hub."""

import re


_NAME = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<task>[\w./-]+))?")


def parse_benchmark(name: str) -> tuple[str, str | None, str]:
    """Read the name of a benchmark."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"benchmark: expected user/dataset, user/dataset@revision or user/dataset:task, found {name!r}"
        )
    return match["id"], match["revision"], match["task"] or "default"
