"""From the cells of the study to a table, a page, and the answer in numbers."""

import html
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks._record import RESULTS, table
from benchmarks.study.plan import Order, Pruned, Taught
from secateur._files import atomic_file
from secateur._provenance import Provenance
from secateur.report import Page, PageTable

Row = Mapping[str, Any]

_WAYS = tuple((taught, order) for taught in (Taught.KD, Taught.KD_AND_HINTS) for order in Order)


def write_parquet(path: Path, rows: Sequence[Row]) -> Path:
    """One row per cell, a column for each number."""
    with atomic_file(path) as part:
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), part)
    return path


def gains(rows: Iterable[Row], pruned: Pruned, taught: Taught, order: Order) -> list[float]:
    """How much better a way is than labels alone, for each family, size and seed of one kind of pruning; fractions."""
    found = {_key(row): float(row["accuracy"]) for row in rows if row["pruned"] == pruned}
    places = sorted({key[:3] for key in found})
    pairs = (
        (found.get((*place, taught.value, order.value)), found.get((*place, Taught.LABELS.value, Order.BOTH.value)))
        for place in places
    )
    return [one - other for one, other in pairs if one is not None and other is not None]


def page_of(all_rows: Sequence[Row], facts: tuple[tuple[str, str], ...], provenance: Provenance) -> Page:
    """The page of a study, without families whose teacher guesses: nothing can be learned from it."""
    rows = [row for row in all_rows if not guesses(row["teacher_accuracy"])]
    machine = ", ".join(f"{name} {value}" for name, value in provenance.machine.items())
    cpu = sum(float(row["cpu_s"]) for row in all_rows)
    return Page(
        title="Pruning and distillation: which kinds suit each other?",
        facts=(*facts, ("machine", machine), ("date", provenance.date), ("CPU time of the cells", f"{cpu:.0f} s")),
        notes=(
            "Short training on few images, if the settings above say so: compare ways with each other, not with "
            "published numbers.",
            "Weights are set to zero in place: MACs and latency stay. Cut channels are really gone.",
            "Performance Efficiency is our definition: (accuracy / teacher's accuracy) / (size / teacher's size).",
            "The two kinds of pruning have different protocols: weights are pruned step by step during the recovery "
            "and are not repaired; channels are cut at once before it, and repaired.",
            *_left_out(all_rows),
        ),
        tables=(
            _gain_table(rows),
            size_table(rows),
            equal_size_table(rows),
            *(_family_table(rows, family) for family in _distinct(rows, "family")),
        ),
        command=provenance.command,
    )


CLASSES = 10
"""Of CIFAR-10, which the tables are about; with more classes chance is lower, and the bound stays on the safe side."""


def guesses(accuracy: object) -> bool:
    """Return whether an accuracy is about that of guessing: at most half as much again as one in ten."""
    return float(str(accuracy)) <= 1.5 / CLASSES


def _left_out(rows: Sequence[Row]) -> tuple[str, ...]:
    gone = sorted({str(row["family"]) for row in rows if guesses(row["teacher_accuracy"])})
    return (f"Left out, since their teachers are at chance: {', '.join(gone)}.",) if gone else ()


def equal_size_table(rows: Sequence[Row]) -> PageTable:
    """Return what weight pruning gains over channel pruning at the same number of non-zero parameters."""
    lines: list[tuple[str, ...]] = []
    for family in _distinct(rows, "family"):
        found = equal_size_gains([row for row in rows if row["family"] == family])
        sizes = sorted({size for size, _ in found})
        shown = ", ".join(f"{100 * size:g} %" for size in sizes) or "none"
        lines.append((str(family), shown, _points([gain for _, gain in found])))
    return PageTable(
        "Weights against channels at equal non-zero size",
        ("family", "MACs of the cut networks compared", "weights minus channels"),
        tuple(lines),
        "Points of test accuracy, mean and standard error over ways and seeds. The accuracy under weight pruning is "
        "read between its sizes, linearly, at the non-zero parameters of the cut network; sizes outside are not "
        "compared.",
    )


_OUTSIDE = 0.02
"""A size so near to the largest or smallest of the others counts as equal to it."""


def equal_size_gains(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Return kept MACs, and accuracy with pruned weights minus that with cut channels, for each comparable cut."""
    found: list[tuple[float, float]] = []
    for cut in (row for row in rows if row["pruned"] == Pruned.CHANNELS):
        points = sorted(
            (float(row["nonzero"]), float(row["accuracy"]))
            for row in rows
            if row["pruned"] != Pruned.CHANNELS and _key(row)[2:] == _key(cut)[2:]
        )
        size = float(cut["nonzero"])
        if not points or not (1 - _OUTSIDE) * points[0][0] <= size <= (1 + _OUTSIDE) * points[-1][0]:
            continue
        accuracy = float(np.interp(size, [x for x, _ in points], [y for _, y in points]))
        found.append((float(cut["kept"]), accuracy - float(cut["accuracy"])))
    return found


def _gain_table(rows: Sequence[Row]) -> PageTable:
    lines: list[tuple[str, ...]] = []
    for taught, order in _WAYS:
        cells = [gains(rows, pruned, taught, order) for pruned in Pruned]
        lines.append((f"{taught.value}: {order.value}", *map(_points, cells), _difference(*cells)))
    return PageTable(
        "What distillation adds to labels alone",
        ("way", "weights pruned", "channels cut", "weights minus channels"),
        tuple(lines),
        "Points of test accuracy, mean and standard error over families, sizes and seeds. A positive last column says "
        "that weight pruning gains more from the teacher.",
    )


def size_table(rows: Sequence[Row]) -> PageTable:
    """Return the gains for each size: a mean over sizes hides networks that gain 0 whatever taught them."""
    sizes = _sizes(rows)
    lines: list[tuple[str, ...]] = []
    for taught, order in _WAYS:
        parts = ([row for row in rows if (row["pruned"], row["kept"]) == size] for size in sizes)
        found = (gains(part, Pruned(kind), taught, order) for part, (kind, _) in zip(parts, sizes, strict=True))
        lines.append((f"{taught.value}: {order.value}", *map(_points, found)))
    return PageTable(
        "The same for every size",
        ("way", *map(_column, sizes)),
        tuple(lines),
        "Points of test accuracy, mean and standard error over families and seeds.",
    )


def _family_table(rows: Sequence[Row], family: object) -> PageTable:
    own = [row for row in rows if row["family"] == family]
    sizes = _sizes(own)
    ways = [(Taught.LABELS, Order.BOTH), *_WAYS]
    lines: list[tuple[str, ...]] = []
    for taught, order in ways:
        name = "labels alone" if taught is Taught.LABELS else f"{taught.value}: {order.value}"
        chosen = [row for row in own if (row["taught"], row["order"]) == (taught.value, order.value)]
        lines.append((name, *(_accuracy_of(chosen, size) for size in sizes)))
    first = own[0]
    return PageTable(
        str(family),
        ("way", *map(_column, sizes)),
        tuple(lines),
        f"Test accuracy, mean and spread (half the range) over the seeds, then Performance Efficiency over non-zero "
        f"parameters. Teacher: {100 * float(first['teacher_accuracy']):.2f} %.",
    )


def _sizes(rows: Sequence[Row]) -> list[tuple[str, float]]:
    """What was pruned, and how much of it stayed; the most first."""
    return sorted({(str(row["pruned"]), float(row["kept"])) for row in rows}, key=lambda pair: (pair[0], -pair[1]))


def _column(size: tuple[str, float]) -> str:
    kind, kept = size
    return f"{'macs' if kind == Pruned.CHANNELS else 'weights'} {100 * kept:g} %"


def _accuracy_of(rows: Sequence[Row], size: tuple[str, float]) -> str:
    chosen = [row for row in rows if (row["pruned"], row["kept"]) == size]
    if not chosen:
        return "none"
    accuracies = [100 * float(row["accuracy"]) for row in chosen]
    efficiency = statistics.fmean(float(row["efficiency_params"]) for row in chosen)
    # A single value has no spread, and what guesses has no efficiency that means anything.
    half = f" ± {(max(accuracies) - min(accuracies)) / 2:.2f}" if len(accuracies) > 1 else ""
    mean = statistics.fmean(accuracies)
    shown = "at chance" if guesses(mean / 100) else f"PE {efficiency:.2f}"
    return f"{mean:.2f}{half} % ({shown})"


def _points(values: Sequence[float]) -> str:
    if not values:
        return "none"
    error = f" ± {100 * _error(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):+.2f}{error} (n = {len(values)})"


def _difference(weights: Sequence[float], channels: Sequence[float]) -> str:
    if not weights or not channels:
        return "none"
    if min(len(weights), len(channels)) < 2:
        return f"{100 * (statistics.fmean(weights) - statistics.fmean(channels)):+.2f}"
    error = (_error(weights) ** 2 + _error(channels) ** 2) ** 0.5
    return f"{100 * (statistics.fmean(weights) - statistics.fmean(channels)):+.2f} ± {100 * error:.2f}"


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean of two values or more."""
    return statistics.stdev(values) / len(values) ** 0.5


def _key(row: Row) -> tuple[object, ...]:
    return row["family"], row["kept"], row["seed"], row["taught"], row["order"]


def _distinct(rows: Sequence[Row], name: str) -> list[object]:
    return list(dict.fromkeys(row[name] for row in rows))


def write_tables(folder: Path = RESULTS / "study") -> Path:
    """Write ``study.md`` beside the results of a study: the tables of its page as text."""
    # Records of the first release spell "distil", and are read as they are.
    rows = [
        {**row, "order": re.sub(r"distil\b", "distill", row["order"])}
        for row in pq.read_table(folder / "results.parquet").to_pylist()
    ]
    settings = json.loads((folder / "study.json").read_text())
    shown = html.unescape((folder / "study.html").read_text())
    date = re.search(r"\d{4}-\d\d-\d\dT[\d:+]+", shown)
    page = page_of(rows, (), Provenance.here("", 0))
    parts = [
        f"# {page.title}",
        f"{date.group() if date else 'Undated'}. `results.parquet` has a row for each of the {len(rows)} cells, "
        "`study.html` the same tables.",
        "\n".join(f"- {name}: {value}" for name, value in settings.items()),
        "\n".join(page.notes),
    ]
    for each in page.tables:
        parts += [f"## {each.title}", each.text, table([*each.columns], [[*row] for row in each.rows])]
    path = folder / "study.md"
    path.write_text("\n\n".join(part.strip() for part in parts) + "\n")
    return path
