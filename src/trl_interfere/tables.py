"""Tables in Markdown and for the terminal, and text from elsewhere that is shown in Markdown."""

import re
from collections.abc import Iterable, Sequence

from rich.table import Table


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, the first column to the left and the others to the right; a bar does not end a cell."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    cells = ([re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def console_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """The same for the terminal; text in square brackets is text, and escape codes do not reach the terminal."""
    table = Table(title=printable(title).replace("[", r"\["), title_justify="left")
    for position, name in enumerate(header):
        table.add_column(printable(name).replace("[", r"\["), justify="right" if position else "left", overflow="fold")
    for row in rows:
        table.add_row(*(printable(cell).replace("[", r"\[") for cell in row))
    return table


def printable(text: str) -> str:
    """Text from elsewhere without control characters."""
    return "".join(character if character.isprintable() else "?" for character in text)


def plain(text: str) -> str:
    """Text from elsewhere as one line that Markdown and HTML show as it is."""
    text = printable(" ".join(text.split()))
    return re.sub(r"[\\`*_#<>~$&|]|\](?=[(\[:])", lambda mark: f"&#{ord(mark[0])};", text)


def code(text: str) -> str:
    """A name from elsewhere in a code span."""
    return f"`{printable(' '.join(text.split())).replace('`', chr(39)).replace('|', '/')}`"


def fenced(text: str) -> str:
    """Text from elsewhere as a block that ends with the text and not within it."""
    text = "\n".join(map(printable, text.splitlines()))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
