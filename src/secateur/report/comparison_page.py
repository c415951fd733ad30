"""The page of a comparison: the winners, an interactive picture of all runs, their layers and their numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur._text import PAGE, visible
from secateur.report import units
from secateur.report.comparison import ComparedRun, Comparison
from secateur.report.figures import COSTS, compared_widths, page_script, pareto_figure, script_json
from secateur.report.html import render_template, write_html

_COLUMNS = ("Strategy", "Budget", "Seed", "Validation", "Test", *(name for _, name, _ in COSTS), "Speed", "Epochs", "s")
_MOST_ROWS = 24
"""Rows of the picture of widths."""


@dataclass(frozen=True)
class RunRow:
    """A row of the table of runs.

    Attributes:
        at: The position of the run.
        name: The run in words.
        cells: The cells, as text.
        is_best: Whether it belongs to the winner at its budget.
    """

    at: int
    name: str
    cells: tuple[str, ...]
    is_best: bool


def write_comparison(path: Path | str, comparison: Comparison) -> Path:
    """Write the page of a comparison as one self-contained HTML file.

    Args:
        path: The file; replaced atomically.
        comparison: What to show. All of it is escaped.

    Returns:
        The absolute path of the file.

    Raises:
        OSError: If the file cannot be written.
    """
    return write_html(path, render_comparison(comparison))


def render_comparison(comparison: Comparison) -> str:
    """Return the page of a comparison as HTML."""
    metric, runs = comparison.metric, comparison.runs
    best = {(winner.strategy, winner.budget) for winner in comparison.winners}
    rows = [_row(at, run, comparison, (run.strategy, run.budget) in best) for at, run in enumerate(runs) if run.ok]
    failures = [(run.name, run.error or "the score is no number") for run in runs if not run.ok]
    return render_template(
        "compare.html",
        script=page_script(),
        model=comparison.model,
        data=comparison.data,
        date=units.moment(comparison.date),
        headline=_headline(comparison),
        metric_words=metric.words,
        verdicts=[(winner.sentence(metric), winner.clear) for winner in comparison.winners],
        notes=comparison.notes,
        pareto=pareto_figure(comparison) if rows else None,
        costs=[name for field, name, _ in COSTS if any(r.ok and getattr(r, field) is not None for r in runs)],
        widths=compared_widths(comparison, _best_runs(comparison)),
        columns=_COLUMNS,
        rows=rows,
        failures=failures,
        runs_json=script_json([_facts(run, comparison) for run in runs]),
        command=comparison.command,
        origin=[
            (label, value)
            for label, value in (
                ("Machine", _joined(comparison.machine)),
                ("Versions", _joined(comparison.versions)),
            )
            if value
        ],
    )


def _headline(comparison: Comparison) -> str:
    names = list(dict.fromkeys(winner.strategy for winner in comparison.winners if winner.strategy))
    if not names:
        return f"{comparison.model}: no run succeeded."
    if len(names) == 1 and all(winner.clear for winner in comparison.winners):
        return f"{comparison.model}: {names[0]} is best at every budget."
    clear = sum(winner.clear for winner in comparison.winners)
    every = len(comparison.winners)
    ahead = f"the lead is clear at {clear} of {every} budgets" if clear else "no lead is clear"
    return f"{comparison.model}: {' and '.join(names)} ahead; {ahead}."


def _row(at: int, run: ComparedRun, comparison: Comparison, is_best: bool) -> RunRow:
    metric = comparison.metric
    costs = [words(value) if (value := getattr(run, field)) is not None else "" for field, _, words in COSTS]
    cells = (
        run.strategy,
        run.budget,
        f"{run.seed}" + (f", round {run.round}" if run.round else ""),
        metric.text(run.score),
        metric.text(run.test_score) if math.isfinite(run.test_score) else "",
        *costs,
        "" if run.speedup is None else units.factor(run.speedup),
        f"{run.epochs}" + (f" ({run.search_epochs} search)" if run.search_epochs else ""),
        f"{run.seconds:.0f}",
    )
    return RunRow(at, run.name, cells, is_best)


def _facts(run: ComparedRun, comparison: Comparison) -> dict[str, Any]:
    """What a pinned run shows."""
    metric = comparison.metric
    facts = [[name, words(getattr(run, field))] for field, name, words in COSTS if getattr(run, field) is not None]
    if run.ok:
        facts.insert(0, [f"Validation {metric.words}", metric.text(run.score)])
    if math.isfinite(run.test_score):
        facts.insert(1, [f"Test {metric.words}", metric.text(run.test_score)])
    if run.removed_blocks:
        facts.append(["Without", ", ".join(run.removed_blocks)])
    facts.append(["Checks", "all passed" if run.verified else "one failed"])
    widths = [[visible(name, keep=PAGE), before, after] for name, (before, after) in run.widths.items()]
    return {
        "name": visible(run.name, keep=PAGE),
        "facts": [[label, visible(value, keep=PAGE)] for label, value in facts],
        "widths": widths,
    }


def _best_runs(comparison: Comparison) -> list[ComparedRun]:
    """The best seed of the last round of each strategy at each budget."""
    metric = comparison.metric
    found: dict[tuple[str, str], ComparedRun] = {}
    for run in comparison.runs:
        key = (run.budget, run.strategy)
        old = found.get(key)
        if run.ok and (old is None or (run.round, metric.key(run.score)) > (old.round, metric.key(old.score))):
            found[key] = run
    return [found[key] for key in sorted(found, key=lambda key: list(found).index(key))][:_MOST_ROWS]


def _joined(entries: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in entries.items())
