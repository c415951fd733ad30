"""docs/results.md is what its generator writes, and tables elsewhere have no number without a record."""

import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import results_page

ROOT = Path(__file__).resolve().parents[2]
NUMBER = re.compile(r"[+-]?\d+\.\d+")
WITH_RESULTS = (
    "README.md",
    "docs/distillation.md",
    "docs/export.md",
    "docs/benchmarks.md",
    "docs/guide.md",
    "docs/tasks.md",
)
MEASURED = re.compile(r"%|points|accuracy|gain", re.IGNORECASE)
"""A table whose header has one of these shows results."""
NO_RECORD = "no record"
"""Words that the paragraph before a table has if its numbers were not recorded."""


def test_the_page_is_what_the_records_say() -> None:
    assert results_page.PAGE.read_text() == results_page.text(), "run `python -m benchmarks.results_page`"


def tables(page: Path) -> list[tuple[str, str]]:
    """Return every table with the paragraph before it."""
    parts = re.split(r"\n\s*\n", page.read_text())
    return [(before, part) for before, part in pairwise(parts) if part.lstrip().startswith("|")]


def recorded() -> set[str]:
    pages = [results_page.PAGE, *sorted((ROOT / "benchmarks" / "results").rglob("*.md"))]
    return {number.lstrip("+-") for page in pages for number in NUMBER.findall(page.read_text())}


def missing(before: str, found: str, known: set[str]) -> list[str]:
    header = found.splitlines()[0]
    if NO_RECORD in before or not MEASURED.search(f"{header} {found if 'MACs kept' in header else ''}"):
        return []
    numbers = {number.lstrip("+-") for line in found.splitlines()[1:] for number in NUMBER.findall(line)}
    return sorted(number for number in numbers if number not in known)


@pytest.mark.parametrize("name", WITH_RESULTS)
def test_every_number_of_a_result_table_has_a_record(name: str) -> None:
    known = recorded()
    for before, found in tables(ROOT / name):
        assert missing(before, found, known) == [], f"{name}: no record of these numbers in\n{found}"


def test_a_number_without_a_record_is_found() -> None:
    lines = "| method | MACs kept | test % |\n| --- | --- | --- |\n| ours | 49.9 % | 99.99 % |"
    assert missing("As measured:", lines, {"49.9"}) == ["99.99"]
    assert missing("There is no record of these.", lines, {"49.9"}) == []
    readme = (ROOT / "README.md").read_text()
    assert "91.68" in readme
    assert "91.68" in recorded()


def test_one_run_has_no_spread() -> None:
    assert results_page.mean([0.5]) == "**50.00** (n = 1)"
    assert results_page.mean([0.5, 0.52]) == "**51.00** ± 1.41 (n = 2)"


def test_published_numbers_are_marked_as_such() -> None:
    page = results_page.PAGE.read_text()
    tail = page[page.index("## Published numbers") :]
    assert "These are the papers', not ours" in tail
    assert "93.69" in tail
    assert "93.69" not in page[: page.index("## Published numbers")]


@pytest.fixture
def tas_cifar10(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tas_cifar10

    yield tas_cifar10
    sys.modules.pop("tas_cifar10", None)


def test_the_recovery_fills_the_seconds_that_are_left(tas_cifar10) -> None:
    for seconds, each, images in (
        (300.0, 0.002, 45_000),
        (300.0, 0.01, 45_000),
        (10.0, 0.002, 45_000),
        (90.0, 0.002, 45_000),
    ):
        epochs, used = tas_cifar10.recovery_length(seconds, each, images)
        assert epochs * used * each <= seconds + 1e-9
        assert epochs * used * each > 0.99 * seconds
        assert used <= images
    assert tas_cifar10.recovery_length(-5.0, 0.01, 100) == (1, 1)


def test_every_setting_gives_all_methods_the_same_seconds(tas_cifar10) -> None:
    assert {"knapsack", "random"} <= set(tas_cifar10.METHODS)
    assert all(setting.seconds > 0 for setting in tas_cifar10.SETTINGS.values())
    for setting in tas_cifar10.FORMER:
        assert "Correction" in (ROOT / "benchmarks" / "results" / f"{setting.folder}.md").read_text()
        page = (ROOT / "benchmarks" / "results" / f"{setting.folder}.md").read_text()
        assert page == tas_cifar10.page(setting)
