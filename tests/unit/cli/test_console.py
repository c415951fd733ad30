"""Whatever a stranger calls things, the terminal shows it and does nothing."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from secateur._text import visible
from secateur.cli.output import PlainConsole

HOSTILE = "\x1b[31mred\x1b]0;title\x07\x9b2J\u202egnp.exe\u200b\udcff\r\x08"


def shown(what: object) -> str:
    stream = io.StringIO()
    PlainConsole(file=stream, width=200, highlight=False, markup=False).print(what)
    return stream.getvalue()


def table(text: str) -> Table:
    found = Table(text, title=Text(text))
    found.add_row(text)
    return found


@pytest.mark.parametrize("kind", [str, Text, table, Tree])
def test_nothing_but_printable_characters_is_written(kind):
    found = shown(kind(HOSTILE))
    assert all(c.isprintable() or c == "\n" for c in found)
    assert "red" in found
    found.encode()


def test_ordinary_text_is_as_it_was():
    assert shown(Text("layer1.0 → 64, 93.4 %\tÄ 漢")) == "layer1.0 → 64, 93.4 %   Ä 漢\n"


def test_styles_still_reach_a_terminal():
    stream = io.StringIO()
    PlainConsole(file=stream, force_terminal=True, color_system="standard").print(Text("bad\x1b[0m", style="red"))
    assert stream.getvalue() == "\x1b[31mbad\\u001b[0m\x1b[0m\n"


@given(st.text())
def test_any_text_can_be_written(text: str):
    found = visible(text)
    assert all(c.isprintable() or c in "\n\t" for c in found)
    assert "".join(visible(c) for c in text) == found
    assert all(visible(c) == c for c in text if c.isprintable() or c in "\n\t")
    found.encode()
