"""Passes that take turns, so that whatever else slows the machine down slows all of them down."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from secateur.latency._clock import Clock, no_garbage_collection

Pass = Callable[[], object]
"""One forward pass, finished when it returns."""

_LEAST_TURN_S = 0.02
"""A turn repeats short passes until it takes at least this long, far above the clock's and the call's overhead."""
_MOST_CALLS = 1000


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of a measured quantity.

    Attributes:
        lower: First quartile.
        median: The middle.
        upper: Third quartile.
    """

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        """The quartiles of at least two values."""
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    @property
    def spread(self) -> float:
        """(upper - lower) / median, dimensionless: half of all values lie within."""
        return (self.upper - self.lower) / self.median


def take_turns(passes: Sequence[Pass], clock: Clock, rounds: int, warmup: int) -> list[tuple[float, ...]]:
    """Seconds per call of every pass in each round; the order is turned round from one round to the next."""
    calls = [_calls_per_turn(run, clock) for run in passes]
    found: list[tuple[float, ...]] = []
    forth = range(len(passes))
    with no_garbage_collection():
        for number in range(warmup + rounds):
            order = forth if number % 2 == 0 else reversed(forth)
            turn = {which: seconds_per_call(passes[which], calls[which], clock) for which in order}
            if number >= warmup:
                found.append(tuple(turn[which] for which in forth))
    return found


def seconds_per_call(run: Pass, calls: int, clock: Clock) -> float:
    """Mean over some calls in a row."""
    begin = clock.read()
    for _ in range(calls):
        run()
    return (clock.read() - begin) / calls


def _calls_per_turn(run: Pass, clock: Clock) -> int:
    run()
    return min(_MOST_CALLS, max(1, round(_LEAST_TURN_S / max(seconds_per_call(run, 3, clock), 1e-9))))
