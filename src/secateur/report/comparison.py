"""The records of a comparison of strategies, and the winner at each budget with its uncertainty."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, cast

from secateur.tasks.base import Metric

_Z95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""


def _no_widths() -> dict[str, tuple[int, int]]:
    return {}


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison, finished or failed.

    Attributes:
        strategy: Its name in the comparison.
        budget: As text.
        seed: Its seed.
        round: Number of the round, from 0; only the best strategies of a round run in the next one, with more epochs.
        epochs: Training epochs in all, equal within a round.
        search_epochs: How many of them the search of the strategy took.
        seconds: Wall-clock seconds.
        train_seconds: How many of them the training after the cut took.
        error: Why it failed; empty if it did not.
        macs: Multiply-accumulates for one input.
        params: Parameters.
        size_bytes: Size of the weights file.
        latency_s: Median seconds of one pass on the target, or None.
        speedup: Original time / time, or None.
        score: On the validation images, which the winner is chosen on.
        n: Number of validation images.
        test_score: On the test images, on which nothing is chosen.
        test_n: Number of test images.
        verified: Whether all checks passed.
        widths: Channels before and after, by axis, in order of execution.
        removed_blocks: Names of removed blocks.
        right: Whether each validation image is classified right, as a string of 0 and 1; empty for other tasks.
        warnings: What the run warned of.
    """

    strategy: str
    budget: str
    seed: int
    round: int
    epochs: int
    search_epochs: int
    seconds: float
    train_seconds: float = 0.0
    error: str = ""
    macs: int = 0
    params: int = 0
    size_bytes: int | None = None
    latency_s: float | None = None
    speedup: float | None = None
    score: float = math.nan
    n: int = 0
    test_score: float = math.nan
    test_n: int = 0
    verified: bool = False
    widths: Mapping[str, tuple[int, int]] = field(default_factory=_no_widths)
    removed_blocks: tuple[str, ...] = ()
    right: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Strategy, budget, seed and round in words."""
        return f"{self.strategy}, {self.budget}, seed {self.seed}" + (f", round {self.round}" if self.round else "")

    @property
    def ok(self) -> bool:
        """Whether it finished, with a score that is a number."""
        return not self.error and math.isfinite(self.score)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; numbers that are not finite are null."""
        found = asdict(self)
        return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in found.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ComparedRun":
        """Inverse of `to_json`.

        Raises:
            TypeError, KeyError, ValueError: If the object is not one that `to_json` made.
        """
        given = dict(data)
        for name in ("score", "test_score"):
            given[name] = math.nan if given[name] is None else float(given[name])
        given["widths"] = {axis: (int(old), int(new)) for axis, (old, new) in given["widths"].items()}
        given["removed_blocks"], given["warnings"] = tuple(given["removed_blocks"]), tuple(given["warnings"])
        return cls(**given)


@dataclass(frozen=True)
class Winner:
    """The best strategy at one budget, by the mean validation score over the seeds of the last complete round.

    Attributes:
        budget: The budget.
        strategy: Name of the winner; empty if every run failed.
        score: Its mean validation score.
        least: Its lowest score over the seeds.
        most: Its highest score over the seeds.
        seeds: Number of seeds.
        test_score: Its mean score on the test images.
        runner_up: The next strategy, or empty.
        ahead: Mean score of the winner - that of the runner-up, positive where it is better.
        low: Lower end of the 95 % interval of ``ahead``; NaN if it is unknown.
        high: Upper end.
        runs: Number of runs at the budget, failed ones included.
    """

    budget: str
    strategy: str = ""
    score: float = math.nan
    least: float = math.nan
    most: float = math.nan
    seeds: int = 0
    test_score: float = math.nan
    runner_up: str = ""
    ahead: float = math.nan
    low: float = math.nan
    high: float = math.nan
    runs: int = 0

    @property
    def clear(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low > 0

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; numbers that are not finite are null."""
        return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in asdict(self).items()}

    def sentence(self, metric: Metric) -> str:
        """The winner in words."""
        if not self.strategy:
            return f"{self.budget}: {'every run failed' if self.runs else 'no run was made'}."
        best = "is best" if self.runner_up else "alone has finished"
        said = f"{self.budget}: {self.strategy} {best}, {metric.text(self.score)} validation {metric.words}"
        said += f" (mean of {self.seeds} seeds, {metric.text(self.least)} to {metric.text(self.most)})"
        said = said if self.seeds > 1 else f"{said.partition(' (mean')[0]} (one seed)"
        if math.isfinite(self.test_score):
            said += f", {metric.text(self.test_score)} on the test images"
        if not self.runner_up:
            return f"{said}."
        lead = metric.change(0.0, self.ahead).lstrip("+")
        said += f". Ahead of {self.runner_up} by {lead}" if self.ahead > 0 else f". Level with {self.runner_up}"
        if not math.isfinite(self.low):
            return f"{said}; one seed and no images in common, so nothing is known of the uncertainty."
        said += f" (95 %: {metric.change(0.0, self.low)} to {metric.change(0.0, self.high)})"
        return f"{said}." if self.clear else f"{said}, which can be chance."


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison found out.

    Attributes:
        model: Name of the model.
        data: Name of the data, with its sizes.
        metric: What the scores are.
        original: The uncut model: MACs, parameters and scores; its strategy is ``original``.
        runs: All runs, failed ones too.
        winners: One for each budget.
        notes: What a reader must know.
        command: The exact command or call.
        versions: Package name to version.
        machine: The machine in words.
        date: ISO 8601.
        files: What was written.
    """

    model: str
    data: str
    metric: Metric
    original: ComparedRun
    runs: tuple[ComparedRun, ...]
    winners: tuple[Winner, ...]
    notes: tuple[str, ...] = ()
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    machine: Mapping[str, str] = field(default_factory=dict[str, str])
    date: str = ""
    files: tuple[Path, ...] = ()

    def __repr__(self) -> str:
        failed = sum(bool(run.error) for run in self.runs)
        title = f"Comparison of {len(self.runs)} runs of {self.model}" + (
            f", {failed} of which failed" if failed else ""
        )
        lines = [f"  {winner.sentence(self.metric)}" for winner in self.winners]
        return "\n".join((f"{title}:", *lines, *(f"  wrote {path}" for path in self.files[:2])))

    def _repr_html_(self) -> str:
        from secateur.search.base import html_table

        columns = {
            "budget": [winner.budget for winner in self.winners],
            "winner": [winner.strategy for winner in self.winners],
            f"validation {self.metric.words}": [self.metric.text(winner.score) for winner in self.winners],
            "in words": [winner.sentence(self.metric) for winner in self.winners],
        }
        return html_table(f"{len(self.runs)} runs of {self.model}", columns)

    def write_parquet(self, path: Path) -> None:
        """Write the runs as a table, one row for each; widths, blocks and warnings are JSON text."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [run.to_json() for run in self.runs]
        for row in rows:
            row.update({name: json.dumps(row[name]) for name in ("widths", "removed_blocks", "warnings")})
        pq.write_table(pa.Table.from_pylist(rows), path)


def find_winner(budget: str, runs: Sequence[ComparedRun], metric: Metric) -> Winner:
    """Return the winner among the runs of one budget.

    The standard error of the difference from the runner-up has two parts that add up in squares: that of the images, by
    the differences of the two strategies image by image (each averaged over the seeds), where the task has one answer
    for each image; and that of the seeds, by the differences seed by seed, where there are two or more. As the seeds'
    differences hold some of the images' too, the interval is rather too wide than too narrow.

    Args:
        budget: The budget.
        runs: Its runs, of any round. The last round counts in which at least one strategy has finished all seeds.
        metric: What the scores are.
    """
    last = _last_round(runs)
    by_name: dict[str, list[ComparedRun]] = {}
    for run in last:
        by_name.setdefault(run.strategy, []).append(run)
    ranked = sorted(by_name, key=lambda name: -mean(metric.key(run.score) for run in by_name[name]))
    if not ranked:
        return Winner(budget, runs=len(runs))
    best = by_name[ranked[0]]
    scores = [run.score for run in best]
    tests = [run.test_score for run in best]
    found = Winner(budget, ranked[0], mean(scores), min(scores), max(scores), len(best), mean(tests), runs=len(runs))
    if len(ranked) < 2:
        before = [run for run in runs if run.ok and run.round == best[0].round - 1 and run.strategy != ranked[0]]
        if not before:
            return found
        # In the last round of several it ran alone: it is compared as it was in the round before.
        return _with_lead(found, [r for r in runs if r.ok and r.round == before[0].round], metric)
    return _with_lead(found, last, metric)


def _with_lead(winner: Winner, runs: Sequence[ComparedRun], metric: Metric) -> Winner:
    """The winner with its lead over the next strategy among the runs of one round."""
    by_name: dict[str, dict[int, ComparedRun]] = {}
    for run in runs:
        by_name.setdefault(run.strategy, {})[run.seed] = run
    mine = by_name.pop(winner.strategy, None)
    if not mine or not by_name:
        return winner
    second = max(by_name, key=lambda name: mean(metric.key(run.score) for run in by_name[name].values()))
    other = by_name[second]
    ahead = mean(metric.key(r.score) for r in mine.values()) - mean(metric.key(r.score) for r in other.values())
    pairs = [(mine[seed], other[seed]) for seed in sorted(mine.keys() & other.keys())]
    variance = [part for part in (_variance_of_images(pairs), _variance_of_seeds(pairs, metric)) if part is not None]
    if not variance:
        return replace(winner, runner_up=second, ahead=ahead)
    half = _Z95 * math.sqrt(sum(variance))
    return replace(winner, runner_up=second, ahead=ahead, low=ahead - half, high=ahead + half)


def _last_round(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """The finished runs of the last round that counts, of the strategies with all of their seeds."""
    for number in sorted({run.round for run in runs}, reverse=True):
        mine = [run for run in runs if run.round == number]
        seeds = max(len({run.seed for run in mine if run.strategy == name}) for name in {r.strategy for r in mine})
        full = {run.strategy for run in mine if len([r for r in mine if r.ok and r.strategy == run.strategy]) == seeds}
        if full:
            return [run for run in mine if run.strategy in full]
    return [run for run in runs if run.ok]


def _variance_of_images(pairs: Sequence[tuple[ComparedRun, ComparedRun]]) -> float | None:
    pairs = [(a, b) for a, b in pairs if a.right and len(a.right) == len(b.right)]
    if not pairs:
        return None
    sums = [0.0] * min(len(a.right) for a, _ in pairs)
    for a, b in pairs:
        for place in range(len(sums)):
            sums[place] += (a.right[place] == "1") - (b.right[place] == "1")
    per_image = [each / len(pairs) for each in sums]
    return stdev(per_image) ** 2 / len(per_image) if len(per_image) > 1 else None


def _variance_of_seeds(pairs: Sequence[tuple[ComparedRun, ComparedRun]], metric: Metric) -> float | None:
    if len(pairs) < 2:
        return None
    return stdev(metric.key(a.score) - metric.key(b.score) for a, b in pairs) ** 2 / len(pairs)


def unbeaten_runs(runs: Sequence[ComparedRun], cost: str, metric: Metric) -> tuple[int, ...]:
    """Return the positions of the runs that no other one beats in both cost and score, the cheapest first.

    Args:
        runs: The runs; failed ones and those without the cost are left out.
        cost: A field of `ComparedRun`, such as ``macs``.
        metric: What the scores are.
    """
    known = [at for at, run in enumerate(runs) if run.ok and getattr(run, cost) is not None]
    found: list[int] = []
    for at in sorted(known, key=lambda at: (cast(float, getattr(runs[at], cost)), -metric.key(runs[at].score))):
        if not found or metric.key(runs[at].score) > metric.key(runs[found[-1]].score):
            found.append(at)
    return tuple(found)
