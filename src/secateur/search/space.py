"""The widths that a search may choose, and which widths belong together in untied residual streams."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from secateur._arrays import IntArray
from secateur._kinds import settings
from secateur.errors import BudgetError, SelectionError
from secateur.graph.graph import ChannelAxis, ChannelGraph, Role
from secateur.graph.selection import check_patterns, matches_axis

_Number = TypeVar("_Number", int, float)


@settings
class AxisRule:
    """Other bounds for the axes that a pattern means.

    Attributes:
        pattern: Glob on the names of axes and modules, as in `secateur.graph.Choices`.
        min_width: Fewest channels such an axis may keep; None leaves it as it was.
        divisor: Its widths are multiples of this; None leaves it as it was.
        min_kept_fraction: Smallest part of its channels it may keep, 0 to 1; None leaves it as it was.

    Raises:
        BudgetError: If a field is out of range, or none is given.
        SelectionError: If the pattern is no text.
    """

    pattern: str
    min_width: int | None = None
    divisor: int | None = None
    min_kept_fraction: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SelectionError(f"`pattern` must be a name pattern, such as 'layer1.*'; got {self.pattern!r}.")
        if self.min_width is None and self.divisor is None and self.min_kept_fraction is None:
            raise BudgetError(
                f"`AxisRule` must set min_width, divisor or min_kept_fraction; got only the pattern {self.pattern!r}."
            )
        _check(_last(1, [self.min_width]), _last(1, [self.divisor]), _last(0.0, [self.min_kept_fraction]))

    def __str__(self) -> str:
        """The rule in words: ``layer1.*: divisor 8, min_width 16``."""
        fields = (("divisor", self.divisor), ("min_width", self.min_width), ("min_kept", self.min_kept_fraction))
        return f"{self.pattern}: {', '.join(f'{name} {value:g}' for name, value in fields if value is not None)}"


@settings
class SearchSpace:
    """The allowed widths of every prunable axis.

    A width is a multiple of lcm(divisor, the axis' own divisor) that is not below the minimum, or the full size: an
    axis may always stay whole. An axis too small for any other width stays whole.

    Attributes:
        min_width: Fewest channels an axis may keep.
        divisor: The positions that an axis keeps in any tensor are a multiple of it. 8 or 16 make a smaller model also
            a faster one on most hardware. Where every channel owns several positions they count: with 64 positions a
            head, any number of attention heads is a multiple of 8. None leaves it open: strategies that measure
            (`Fastest`, `WithinLatency`) try several, all others take 1.
        min_kept_fraction: Smallest part of its channels an axis may keep, 0 to 1; guards a layer against collapse: no
            importance can tell how much a layer that all but vanishes will be missed.
        rules: Other bounds for some axes. What a rule sets replaces the field above; where several rules mean an axis,
            the last one that sets a field holds.

    Raises:
        BudgetError: If a field is out of range.
    """

    min_width: int = 1
    divisor: int | None = None
    min_kept_fraction: float = 0.25
    rules: tuple[AxisRule, ...] = ()

    def __post_init__(self) -> None:
        _check(self.min_width, _last(1, [self.divisor]), self.min_kept_fraction)

    def widths(self, axis: ChannelAxis) -> IntArray:
        """The allowed widths of one axis, ascending; the last is its full size."""
        mine = [rule for rule in self.rules if matches_axis(rule.pattern, axis)]
        min_width = _last(self.min_width, [rule.min_width for rule in mine])
        usual = _last(1, [self.divisor])
        divisor = _last(usual // math.gcd(usual, _positions(axis)), [rule.divisor for rule in mine])
        fraction = _last(self.min_kept_fraction, [rule.min_kept_fraction for rule in mine])
        step = math.lcm(divisor, axis.divisor)
        least = max(min_width, math.ceil(fraction * axis.size - 1e-9))
        multiples = np.arange(step, axis.size, step, dtype=np.int64)
        return np.append(multiples[multiples >= least], axis.size)

    def levels(self, graph: ChannelGraph) -> tuple[IntArray, ...]:
        """The allowed widths of each prunable axis, in the order of ``graph.prunable``.

        Raises:
            SelectionError: If the pattern of a rule means no axis of the graph.
        """
        check_patterns((rule.pattern for rule in self.rules), graph, "rules")
        return tuple(self.widths(axis) for axis in graph.prunable)


def _positions(axis: ChannelAxis) -> int:
    """Positions of every channel in every tensor: their greatest common divisor; 1 if there are no tensors."""
    return math.gcd(*(site.index.shape[1] for site in axis.sites)) or 1


def _check(min_width: object, divisor: object, fraction: float) -> None:
    for name, value in (("min_width", min_width), ("divisor", divisor)):
        if type(value) is not int or value < 1:
            raise BudgetError(f"`{name}` must be a whole number of channels, at least 1; got {value!r}.")
    if not 0 <= fraction <= 1:
        raise BudgetError(f"`min_kept_fraction` must be from 0 to 1; got {fraction!r}.")


def _last(usual: _Number, others: Iterable[_Number | None]) -> _Number:
    for other in others:
        usual = usual if other is None else other
    return usual


@dataclass(frozen=True, eq=False)
class Streams:
    """The streams of an untied graph and their branches, as numbers of prunable axes; see `secateur.graph.untie`.

    Attributes:
        branches: (branches, 2) axis of each branch, and of its stream.
        sums: For each stream that is nothing but the sum of its branches: its axis, and theirs.
    """

    branches: IntArray
    sums: tuple[tuple[int, IntArray], ...]

    @classmethod
    def of(cls, graph: ChannelGraph) -> "Streams":
        """The streams of a graph; none if it is tied."""
        column = {axis.name: number for number, axis in enumerate(graph.prunable)}
        into = ((axis.name, axis.residual_axis or "") for axis in graph.prunable)
        pairs = np.array([(column[n], column[s]) for n, s in into if s in column], dtype=np.int64).reshape(-1, 2)
        sums: list[tuple[int, IntArray]] = []
        for stream in np.unique(pairs[:, 1]).tolist():
            sites = graph.prunable[stream].sites
            if not any(site.role is Role.OUTPUT and len(graph.tensors[site.tensor]) > 1 for site in sites):
                sums.append((stream, pairs[pairs[:, 1] == stream, 0]))
        return cls(pairs, tuple(sums))

    def fitted(self, widths: IntArray) -> IntArray:
        """The widths (n, axes) without what is of no use: a branch is never wider than the stream it is added into.

        And a stream that is nothing but the sum of its branches is as wide as the widest of them.
        """
        if not len(self.branches):
            return widths
        fitted = widths.copy()
        branches, streams = self.branches.T
        fitted[:, branches] = np.minimum(widths[:, branches], widths[:, streams])
        for stream, parts in self.sums:
            fitted[:, stream] = fitted[:, parts].max(axis=1)
        return fitted
