"""What a stranger calls things is shown, on every page and in every table, and does nothing there."""

import csv
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur._json import brief
from secateur._text import PAGE, csv_cell, csv_text, html_text, visible
from secateur.report import Page, PageTable, write_page
from secateur.report.graph_drawing import dot, svg

BIDI = "".join(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)))
HOSTILE = f"a\x1b[31m\x00\x7f\x9b{BIDI}\u200b\u2028\ufeff\udcff\U000e0041"


def shows(text: str) -> bool:
    return all(c.isprintable() or c in PAGE for c in text)


def test_the_escapes_are_those_of_json():
    assert visible("a\u202eb\x1b\x7f") == r"a\u202eb\u001b\u007f"
    assert json.loads(f'"{visible(BIDI)}"') == BIDI
    assert visible("\r\n\t") == "\\r\n\t"
    assert visible("\r\n\t", keep="") == r"\r\n\t"
    assert visible("\U000e0041") == r"\U000e0041"
    assert visible("Größe 漢 →") == "Größe 漢 →"


@given(st.text())
def test_any_text_can_be_written_and_no_printable_character_changes(text: str):
    for shown in (visible(text), brief(text, most=10**6), html_text(text)):
        assert shows(shown)
        shown.encode()
    assert visible(text) == text if shows(text) and "\u00a0" not in text and "\u202f" not in text else True
    assert [c for c in visible(text) if c.isprintable() and c not in "\\0123456789abcdefrnuU"] == [
        c for c in text if c.isprintable() and c not in "\\0123456789abcdefrnuU"
    ]


@pytest.mark.parametrize(
    "cell", ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "'=1", "=cmd|' /C calc'!A0", "＝1"]
)
def test_a_spreadsheet_computes_nothing(cell: str):
    assert csv_cell(cell).startswith("'")
    assert csv_text(csv_cell(cell)) == visible(cell, keep="\t")


@pytest.mark.parametrize("cell", ["-1.5", "+3", "1e-9", "-inf", "0", "loss", "", "a=b"])
def test_numbers_and_words_stay(cell: str):
    assert csv_cell(cell) == cell


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C"])))
def test_cells_come_back(text: str):
    stream = io.StringIO()
    csv.writer(stream).writerow([csv_cell(text), "x"])
    (row,) = csv.reader(io.StringIO(stream.getvalue()))
    assert csv_text(row[0]) == visible(text, keep="\t")


class _Words(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_data(self, data: str) -> None:
        self.found.append(data)


def test_pages_show_escapes(tmp_path: Path):
    page = Page(
        HOSTILE, ((HOSTILE, HOSTILE),), (HOSTILE,), (PageTable(HOSTILE, (HOSTILE,), ((HOSTILE,),)),), command=HOSTILE
    )
    text = write_page(tmp_path / "page.html", page).read_text(encoding="utf-8")
    assert shows(text)
    words = _Words()
    words.feed(text)
    assert sum("\\u202e" in word for word in words.found) >= 7


def test_drawings_show_escapes():
    from torch import nn, zeros

    from secateur.graph import trace

    graph = trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), zeros(2, 3))
    for draw in (svg, dot):
        found = draw(graph, HOSTILE)
        assert shows(found)
        assert "u202e" in found


def test_tables_of_epochs_hold_no_formula(tmp_path: Path):
    from secateur.train import CsvLog, Silent

    for epoch in range(2):  # The second part of a run reads what the first one has written.
        with CsvLog(tmp_path / "history.csv", Silent()).start("=loop", epochs=2, steps=1, done=epoch) as loop:
            loop.epoch(epoch + 1, {"=HYPERLINK()": -0.5, "loss\u202e": 1.0}, "")
    with (tmp_path / "history.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0][2:] == ["'=HYPERLINK()", "loss\\u202e"]
    assert [row[0] for row in rows[1:]] == ["'=loop"] * 2
    assert [row[2] for row in rows[1:]] == ["-0.5"] * 2
