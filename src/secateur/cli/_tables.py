"""What the commands print: plain numbers with their units."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from secateur.cli._boundary import out

if TYPE_CHECKING:
    from secateur.report import Check, Measured, Page, RunReport


def print_before_after(report: RunReport) -> None:
    """Accuracy, MACs, parameters, file size and latency of the original and the compressed model."""
    from secateur.cost import format_count

    title = ", ".join(filter(None, (report.model, report.budget)))
    table = plain_table(title, ("", "before", "after", "change"), numbers=3)
    before, after = report.before, report.after
    if before.accuracy is not None and after.accuracy is not None:
        change = f"{100 * (after.accuracy.top1 - before.accuracy.top1):+.2f} points"
        table.add_row(f"test accuracy (n = {after.accuracy.n})", _accuracy(before), _accuracy(after), change)
    for name, old, new in (("MACs", before.macs, after.macs), ("parameters", before.params, after.params)):
        table.add_row(name, format_count(old), format_count(new), _relative(old, new))
    if after.weights != after.params:
        counts = format_count(before.weights), format_count(after.weights)
        table.add_row("non-zero parameters", *counts, _relative(before.weights, after.weights))
    if before.size_bytes is not None and after.size_bytes is not None:
        sizes = f"{format_count(before.size_bytes)}B", f"{format_count(after.size_bytes)}B"
        table.add_row("weights file", *sizes, _relative(before.size_bytes, after.size_bytes))
    for record in report.latency:
        name = f"latency, {record.runtime}, {record.threads} thread, batch {record.batch_size}"
        times = f"{1e3 * record.before[1]:.3g} ms", f"{1e3 * record.after[1]:.3g} ms"
        table.add_row(name, *times, f"{record.speedup[1]:.2f} x the speed")
    if report.efficiency is not None:
        efficiency = [f"{value:.2f}" for value in report.efficiency]
        table.add_row("Performance Efficiency over non-zero parameters (ours)", "1.00", efficiency[0], "")
        table.add_row("Performance Efficiency over MACs (ours)", "1.00", efficiency[1], "")
    out().print(table)


def print_steps(report: RunReport) -> None:
    """Accuracy on the way."""
    way = " -> ".join(f"{step.name} {100 * step.accuracy.top1:.2f} %" for step in report.steps)
    out().print(Text(f"Test accuracy: {way}"), soft_wrap=True)


def print_exports(report: RunReport) -> None:
    """Files for other runtimes: size, and of those in 8-bit integers accuracy and time beside the float file's."""
    from secateur.cost import format_count

    if not report.exports:
        return
    columns = ("file", "size", "difference", "accuracy", "in float", "same answer", "time", "float file's")
    table = plain_table("Files for other runtimes", columns, numbers=len(columns) - 1)
    for file in report.exports:
        accuracies = (file.accuracy, file.float_accuracy)
        shares = [None if each is None else each.top1 for each in accuracies] + [file.agreement]
        times = () if file.latency is None else (file.latency.after[1], file.latency.before[1])
        table.add_row(
            file.name,
            f"{format_count(file.size_bytes)}B",
            "" if file.difference is None else f"{file.difference:.1e}",
            *("" if share is None else f"{100 * share:.2f} %" for share in shares),
            *(f"{1e3 * seconds:.3g} ms" for seconds in times),
        )
    out().print(table)


def print_checks(checks: Iterable[Check]) -> None:
    """What was verified."""
    table = plain_table("Checks", ("check", "", "largest difference", "detail"), numbers=0)
    for check in checks:
        difference = ""
        if check.max_rel is not None and check.tolerance is not None:
            difference = f"{check.max_rel:.1e} (at most {check.tolerance:.0e})"
        table.add_row(
            check.name, "passed" if check.passed else Text("FAILED", style="bold red"), difference, check.detail
        )
    out().print(table)


def print_written(paths: Iterable[Path]) -> None:
    """What was written, with sizes."""
    from secateur.cost import format_count

    for path in paths:
        out().print(Text(f"Wrote {path} ({format_count(path.stat().st_size)}B)"), soft_wrap=True)


def print_page(page: Page) -> None:
    """The tables of a page."""
    for shown in page.tables:
        table = plain_table(shown.title, shown.columns, numbers=len(shown.columns) - 1)
        for row in shown.rows:
            table.add_row(*row)
        out().print(table)
    for note in page.notes:
        out().print(Text(note), soft_wrap=True)


def plain_table(title: str, columns: tuple[str, ...], *, numbers: int) -> Table:
    """An empty table; the last ``numbers`` columns are to the right."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    for place, column in enumerate(columns):
        right = place >= len(columns) - numbers
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def _accuracy(measured: Measured) -> str:
    assert measured.accuracy is not None
    return f"{100 * measured.accuracy.top1:.2f} %"


def _relative(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %" if before else ""
