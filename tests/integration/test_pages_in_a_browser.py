"""The pages in headless Chromium: figures are drawn, answer to pointer and keyboard, and nothing is requested."""

import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from compared import comparison_of, failed_run, many, run_of

from secateur.report.comparison_page import write_comparison
from secateur.report.figures import packed_plotly
from secateur.report.html import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("playwright") is None, reason="the package playwright is not installed"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)"),
    pytest.mark.skipif(not packed_plotly(), reason="the package plotly is not installed (extra report)"),
]
COMPARED = comparison_of(
    *(run_of(name, budget, seed, 0.9 - 0.1 * at, macs=20_000 - 4000 * at - 2000 * (budget == "macs<=30%"))
      for at, name in enumerate(("knapsack", "uniform", "pca"))
      for budget in ("macs<=50%", "macs<=30%") for seed in (0, 1)),
    failed_run("broken"),
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Open a page; at the end no error was logged and nothing else was requested."""
    said, asked, contexts = list[str](), list[str](), list[Any]()

    def open_page(path: Path, width: int = 1400, **settings: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-drawn]", timeout=30_000)
        return page

    yield open_page
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:image/"))] == []
    assert len([url for url in asked if url.startswith("file:")]) == len(contexts)
    for context in contexts:
        context.close()


def figure_points(page: Any, name: str) -> Any:
    return page.locator(f"#figure-{name} .scatterlayer .point")


def test_a_comparison_can_be_explored(opened: Any, tmp_path: Path):
    page = opened(write_comparison(tmp_path / "page.html", COMPARED))
    assert page.locator("#figure-pareto svg").count() > 0
    assert figure_points(page, "pareto").count() == 12 + 1
    box = figure_points(page, "pareto").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#figure-pareto .hovertext")
    hover = page.locator("#figure-pareto .hovertext").text_content()
    assert "knapsack" in hover
    assert "conv1: 8 of 16" in hover
    page.mouse.down()
    page.mouse.up()
    page.wait_for_selector("#pins .pinned")
    assert page.locator("#pins .pinned h3").all_inner_texts()[0].startswith("knapsack")
    # The keyboard pins the second one, and the third takes the place of the first.
    for row in (3, 4):
        page.locator("button[data-pin]").nth(row).focus()
        page.keyboard.press("Enter")
    assert page.locator("#pins .pinned").count() == 2
    assert page.locator("button[aria-pressed=true]").count() == 2
    assert "<script>alert(1)</script>" in page.locator("#pins .pinned").first.inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#pins .pinned").count() == 0
    before = page.locator("#figure-pareto .xtitle").text_content()
    page.locator("input[name=cost]").nth(1).check()
    page.wait_for_function("document.querySelector('#figure-pareto .xtitle').textContent === 'Parameters'")
    assert before == "MACs"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 420])
def test_nothing_is_wider_than_the_screen_and_text_has_contrast(opened: Any, tmp_path: Path, width: int, scheme: str):
    page = opened(write_comparison(tmp_path / "page.html", COMPARED), width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = (
        page.evaluate(f"getComputedStyle(document.querySelector('{where}')).{what}")
        for where, what in (("section p", "color"), ("section", "backgroundColor"))
    )
    assert contrast(ink, paper) >= 4.5
    axis = page.evaluate("getComputedStyle(document.querySelector('#figure-pareto .xtitle')).fill")
    assert contrast(axis, paper) >= 4.5


def contrast(one: str, other: str) -> float:
    """The contrast of two colors as WCAG 2 defines it."""

    def luminance(color: str) -> float:
        parts = [int(each) / 255 for each in re.findall(r"\d+", color)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_two_hundred_runs_are_drawn_in_time(opened: Any, tmp_path: Path):
    path = write_comparison(tmp_path / "page.html", many(200))
    assert path.stat().st_size < 8_000_000
    page = opened(path)
    assert figure_points(page, "pareto").count() == 200 + 1
    # Two seconds on a machine of its own; this one may be shared.
    assert int(page.evaluate("document.documentElement.dataset.drawn")) < 12_000


def test_the_report_of_a_run_is_drawn_and_prints(opened: Any, tmp_path: Path):
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        "verdict_run", Path(__file__).resolve().parents[1] / "unit" / "report" / "test_verdict.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = opened(write_report(tmp_path / "report.html", module.RUN))
    for name in ("kept", "layer-macs", "layer-seconds", "training", "classes", "sensitivity"):
        assert page.locator(f"#figure-{name} svg.main-svg").count() > 0, name
    assert page.locator("[role=img]:not([aria-label])").count() == 0
    page.emulate_media(media="print")
    assert page.locator("#figure-kept svg.main-svg").count() > 0
