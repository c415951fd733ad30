"""Which runs a comparison makes: all at once, or in rounds that share a wall-clock budget (successive halving)."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from secateur.report.comparison import ComparedRun
from secateur.tasks.base import Metric

_MOST_EPOCHS = 300
"""Epochs of a run in a comparison with a time limit; more never pay in the recovery of a cut model."""


@dataclass(frozen=True)
class Cell:
    """One run that is to be made.

    Attributes:
        strategy: Name of the strategy.
        budget: The budget as text.
        seed: Seed of everything random.
        round: From 0.
        epochs: Training epochs in all, those of a search that trains included.
    """

    strategy: str
    budget: str
    seed: int
    round: int = 0
    epochs: int = 1

    @property
    def key(self) -> str:
        """A name for files."""
        words = re.sub(r"[^A-Za-z0-9.]+", "-", f"{self.strategy}-{self.budget}").strip("-.")[:80]
        return f"r{self.round}-{words}-s{self.seed}"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Cell":
        """Read an object with the fields.

        Raises:
            TypeError, KeyError, ValueError: If it is not one.
        """
        numbers = {name: int(data[name]) for name in ("seed", "round", "epochs")}
        return cls(str(data["strategy"]), str(data["budget"]), **numbers)


@dataclass(frozen=True)
class Rounds:
    """The plan of a comparison.

    Without a time limit there is one round, with the same number of epochs for every run. With one, the strategies of
    each budget run in rounds: after each, the better half goes on, until two are left for the last round. The time
    that is left is split evenly over the rounds that are left, and within a round over its runs: all get the same
    number of epochs, which is what fits.

    Attributes:
        strategies: Their names.
        budgets: As text.
        seeds: All seeds.
        epochs: Of every run without a time limit.
        least_epochs: Fewest epochs that every strategy can run with: one more than the longest search.
        seconds: The time limit, or None.
        metric: What the scores are.
        at_once: Runs that are made at the same time.

    References:
        Jamieson & Talwalkar, arXiv:1502.07943, for successive halving.
    """

    strategies: tuple[str, ...]
    budgets: tuple[str, ...]
    seeds: tuple[int, ...]
    epochs: int
    least_epochs: int
    seconds: float | None
    metric: Metric
    at_once: int = 1

    @property
    def count(self) -> int:
        """The number of rounds."""
        return 1 if self.seconds is None else max(2, math.ceil(math.log2(max(len(self.strategies), 1))))

    def first(self) -> tuple[Cell, ...]:
        """The runs of the first round, seed by seed, so that a comparison that is cut short is still a fair one."""
        epochs = self.epochs if self.seconds is None else self.least_epochs
        return self._cells(dict.fromkeys(self.budgets, self.strategies), 0, epochs)

    def following(self, runs: Sequence[ComparedRun], spent: float) -> tuple[Cell, ...]:
        """Return the runs of the next round; none if there is no further one, or no time for more epochs.

        Args:
            runs: All runs so far; the last round is complete.
            spent: Seconds since the beginning.
        """
        number = max((run.round for run in runs), default=0)
        if self.seconds is None or number + 1 >= self.count:
            return ()
        last = [run for run in runs if run.round == number]
        left = {budget: self._better_half([run for run in last if run.budget == budget]) for budget in self.budgets}
        amount = sum(map(len, left.values())) * len(self.seeds)
        timed = [run for run in last if run.ok]
        if not amount or not timed:
            return ()
        share = (self.seconds - spent) / (self.count - 1 - number) * self.at_once / amount
        # By the slower half, because all get as many epochs.
        trained = [run.train_seconds / max(run.epochs - run.search_epochs, 1) for run in timed]
        per_epoch = max(median(trained), mean(trained), 1e-6)
        fixed = mean(run.seconds - run.train_seconds for run in timed)
        epochs = min(math.floor((share - fixed) / per_epoch), _MOST_EPOCHS)
        if epochs <= last[0].epochs:
            return ()
        return self._cells(left, number + 1, epochs)

    def _better_half(self, runs: Sequence[ComparedRun]) -> tuple[str, ...]:
        """The strategies of a budget that go on; those with a failed run do not."""
        failed = {run.strategy for run in runs if not run.ok}
        names = [name for name in self.strategies if name not in failed and any(r.strategy == name for r in runs)]
        ranked = sorted(names, key=lambda name: -mean(self.metric.key(r.score) for r in runs if r.strategy == name))
        most = max(2, math.ceil(len({run.strategy for run in runs}) / 2))
        return tuple(ranked[:most])

    def _cells(self, left: Mapping[str, Sequence[str]], number: int, epochs: int) -> tuple[Cell, ...]:
        return tuple(
            Cell(strategy, budget, seed, number, epochs)
            for seed in self.seeds
            for budget, strategies in left.items()
            for strategy in strategies
        )
