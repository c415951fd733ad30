"""The page of a comparison: complete, escaped, one file, and small enough."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from compared import comparison_of, failed_run, many, run_of

from secateur.report import comparison_page, figures
from secateur.report.comparison_page import render_comparison, write_comparison

HAS_PLOTLY = bool(figures.packed_plotly())
needs_plotly = pytest.mark.skipif(not HAS_PLOTLY, reason="the package plotly is not installed (extra report)")
PAIR = comparison_of(
    run_of("a", seed=0, score=1.0), run_of("b", seed=0, score=0.5), failed_run("c"), notes=("Look here.",),
    command="secateur compare --seeds 1",
)  # fmt: skip


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_the_page_holds_the_numbers_and_escapes_them():
    page = render_comparison(PAIR)
    for words in ("a is best", "Look here.", "secateur compare --seeds 1", "99.00 %", "1.00 ms", "20.0 k",
                  "BudgetError: out of &lt;b&gt;reach&lt;/b&gt;"):  # fmt: skip
        assert words in page.replace("\u00a0", " "), words
    assert "<script>alert" not in page
    assert "<b>reach" not in page


def test_every_section_is_labeled_by_its_heading():
    tags = Tags(render_comparison(PAIR)).seen
    ids = {attrs["id"] for _, attrs in tags if "id" in attrs}
    labels = [attrs.get("aria-labelledby") for tag, attrs in tags if tag == "section"]
    assert labels
    assert all(label in ids for label in labels)


def test_without_plotly_the_page_has_its_tables_and_no_script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comparison_page, "page_script", lambda: None)
    page = render_comparison(PAIR)
    assert "<script" not in page
    assert "script-src" not in page
    assert "All runs" in page
    assert "pip install" in page


@needs_plotly
def test_the_script_is_there_once_and_nothing_else_may_run():
    page = render_comparison(PAIR)
    tags = Tags(page).seen
    packed = [attrs for tag, attrs in tags if tag == "script" and attrs.get("id") == "plotly-packed"]
    running = [attrs for tag, attrs in tags if tag == "script" and "type" not in attrs]
    assert len(packed) == len(running) == 1
    (policy,) = re.findall(r'content="(default-src[^"]*)"', page)
    assert policy.startswith("default-src 'none';")
    assert f"script-src 'nonce-{running[0]['nonce']}'" in policy
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)


@needs_plotly
def test_figures_are_json_that_plotly_takes():
    figure = figures.pareto_figure(PAIR)
    data = json.loads(figure.json)
    assert [trace["name"] for trace in data["data"]] == ["a", "b", "not beaten", "original"]
    assert [choice["title"] for choice in data["layout"]["meta"]["switch"]] == [
        "MACs", "Parameters", "Latency, s", "File size, bytes",
    ]  # fmt: skip
    assert "@" not in json.dumps(figure.to_plotly())
    assert "&lt;script" in figure.json.replace("\\u0026", "&")


def test_json_inside_of_a_page_ends_nothing():
    assert figures.script_json({"a": "</script><!-- & \u2028", "b": float("nan")}) == (
        '{"a":"\\u003c/script\\u003e\\u003c!-- \\u0026 \\u2028","b":null}'
    )


@pytest.mark.parametrize(("count", "most"), [(18, 4_000_000), (200, 8_000_000)])
def test_pages_are_small(tmp_path: Path, count: int, most: int):
    assert write_comparison(tmp_path / "page.html", many(count)).stat().st_size < most
