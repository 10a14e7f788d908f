import io

import pytest
from rich.console import Console

from trl_interfere.tables import code, console_table, fenced, markdown_table, plain


HOSTILE = "<script>x</script> ![i](http://a/b.png) | `c` **b** [l](javascript:x)\n```mermaid\ngraph\n```\x1b[31m"


def test_a_bar_does_not_end_a_cell():
    lines = markdown_table(["a", "b"], [["|δ| < 1", r"c\|d"]]).splitlines()
    assert lines == ["| a | b |", "| --- | ---: |", r"| \|δ\| < 1 | c\|d |"]


def test_foreign_text_is_text():
    shown = plain(HOSTILE)
    assert not set(shown) & set("<>`*|\n\x1b") and "](" not in shown
    assert "mermaid" in shown and plain("a 1-b, c.d") == "a 1-b, c.d"
    assert code("a`b|c\nd") == "`a'b/c d`"


@pytest.mark.parametrize("text", [HOSTILE, "````\nx", ""])
def test_a_block_ends_with_its_text(text):
    first, *inner, last = fenced(text).splitlines()
    assert first == last + "text" and set(last) == {"`"}
    assert not any(line.strip().startswith(last) for line in inner)


def test_console_table_shows_markup_and_no_escape_codes():
    console = Console(file=io.StringIO(), width=100)
    console.print(console_table("[bold]t", ["[red]a", "b"], [["[link=x]y", "\x1b[31mz"]]))
    text = console.file.getvalue()
    assert all(part in text for part in ("[bold]t", "[red]a", "[link=x]y", "?[31mz")) and "\x1b" not in text
