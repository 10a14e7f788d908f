"""The examples of the page on the trainer print what it says they print, and the page on the API is whole."""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import trl_interfere
from trl_interfere.training.config import REFUSED_OPTIONS


PAGE = Path(__file__).parents[2] / "docs" / "trainer.md"
TEXT = PAGE.read_text(encoding="utf-8")
# A block of Python, and the block of text right after it: what it prints.
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


def comparable(text: str) -> str:
    """Decimals differ between machines, the breaks of lines between terminals, and bars between widths of columns."""
    text = re.sub(r"-?\d+\.\d+(e-?\d+)?", "<decimal>", re.sub(r"[━─┏┳┓┡╇┩└┴┘]", "", text))
    return "".join(text.split())


def test_examples_print_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    names = {"__name__": "__main__"}
    examples = list(EXAMPLE.finditer(TEXT))
    assert len(examples) == len(re.findall("^```python", TEXT, re.MULTILINE)) > 15
    for example in examples:
        code, expected = example.groups()
        line = TEXT[: example.start()].count("\n") + 1
        with redirect_stdout(StringIO()) as output:
            exec(compile("\n" * line + code, PAGE, "exec"), names)
        if expected is not None:
            printed = output.getvalue()  # after lines of the log
            assert comparable(printed).endswith(comparable(expected)), f"{PAGE}, line {line}:\n{printed}"


def test_refused_options_are_named():
    assert [option for option in REFUSED_OPTIONS if f"| `{option}` |" not in TEXT] == []


def test_everything_that_can_be_imported_is_listed():
    listed = (PAGE.parent / "api.md").read_text(encoding="utf-8")
    for name in trl_interfere.__all__[1:]:
        assert f"\n::: {getattr(trl_interfere, name).__module__}.{name}\n" in listed, name
