"""The time of one layer at a few widths, and at those between them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from secateur.cost._polynomial import FloatArray, IntArray

ALIGNMENTS = (16, 8, 4, 1)
"""Kernels work on vectors of channels: a width is as quick as the largest of these that divides it lets it be."""


def alignment(widths: IntArray) -> IntArray:
    """The first of `ALIGNMENTS` that divides each width, of the same shape; 16 divides 0."""
    found = np.ones_like(widths)
    for divisor in reversed(ALIGNMENTS):
        found[widths % divisor == 0] = divisor
    return found


@dataclass(frozen=True, eq=False)
class TimeGrid:
    """Seconds of a layer, measured on a grid of numbers of channels.

    A time between measured ones is interpolated linearly in each direction, among the widths of the same alignment
    alone: 63 channels lie between 31 and 95, not between 48 and 64, so the steps of the kernels are kept. A width
    beyond the measured ones takes the time of the last. Where nothing of its alignment was measured, the next better
    aligned widths stand for it. Along each direction times of one alignment never fall, whatever the clock said.

    Attributes:
        outs: (o,) output channels, ascending.
        reads: (r,) input channels of a group, ascending.
        seconds: (o, r) as measured.
    """

    outs: IntArray
    reads: IntArray
    seconds: FloatArray

    def at(self, outs: IntArray, reads: IntArray) -> FloatArray:
        """Seconds at whole widths.

        Args:
            outs: (n,).
            reads: (n,).
        """
        (low, high, share), (first, last, part) = self._lookup_outs.at(outs), self._lookup_reads.at(reads)
        table = self._rising
        near = table[low, first] * (1 - part) + table[low, last] * part
        far = table[high, first] * (1 - part) + table[high, last] * part
        return near * (1 - share) + far * share

    def at_tensor(self, outs: torch.Tensor, reads: torch.Tensor) -> torch.Tensor:
        """Seconds at real-valued widths (...), among the best aligned and the largest; differentiable."""
        rows, columns = _best_aligned(self.outs), _best_aligned(self.reads)
        table = torch.as_tensor(self._rising[np.ix_(rows, columns)], dtype=outs.dtype, device=outs.device)
        low, high, share = _between(self.outs[rows], outs)
        first, last, part = _between(self.reads[columns], reads)
        near = table[low, first] * (1 - part) + table[low, last] * part
        far = table[high, first] * (1 - part) + table[high, last] * part
        return near * (1 - share) + far * share

    @cached_property
    def _rising(self) -> FloatArray:
        rising = self.seconds.astype(np.float64)
        for rows in _by_alignment(self.outs):
            for columns in _by_alignment(self.reads):
                part = rising[np.ix_(rows, columns)]
                rising[np.ix_(rows, columns)] = np.maximum.accumulate(np.maximum.accumulate(part, axis=0), axis=1)
        return rising

    @cached_property
    def _lookup_outs(self) -> "_Lookup":
        return _Lookup.of(self.outs)

    @cached_property
    def _lookup_reads(self) -> "_Lookup":
        return _Lookup.of(self.reads)


@dataclass(frozen=True, eq=False)
class _Lookup:
    """For every whole number up to the largest node: the nodes around it, and how far it is to the upper one."""

    low: IntArray
    high: IntArray
    share: FloatArray

    @classmethod
    def of(cls, nodes: IntArray) -> "_Lookup":
        values = np.arange(nodes[-1] + 1, dtype=np.int64)
        low, high = np.zeros_like(values), np.zeros_like(values)
        share = np.zeros(len(values))
        present, wanted = alignment(nodes), alignment(values)
        for divisor in ALIGNMENTS:
            mine = np.flatnonzero(wanted == divisor)
            usable = np.flatnonzero(present == _stand_in(divisor, present))
            place = np.searchsorted(nodes[usable], values[mine])
            above, below = np.minimum(place, len(usable) - 1), np.maximum(place - 1, 0)
            low[mine], high[mine] = usable[below], usable[above]
            gap = np.maximum(nodes[high[mine]] - nodes[low[mine]], 1)
            share[mine] = np.clip((values[mine] - nodes[low[mine]]) / gap, 0, 1)
        return cls(low, high, share)

    def at(self, values: IntArray) -> tuple[IntArray, IntArray, FloatArray]:
        inside = np.clip(values, 0, len(self.low) - 1)
        return self.low[inside], self.high[inside], self.share[inside]


def _stand_in(divisor: int, present: IntArray) -> int:
    """The alignment of the nodes for widths of an alignment: its own, the next better, else the best of the worse."""
    there = {int(each) for each in present}
    better = [each for each in reversed(ALIGNMENTS) if each >= divisor and each in there]
    return better[0] if better else max(there)


def _by_alignment(nodes: IntArray) -> list[IntArray]:
    found = alignment(nodes)
    return [np.flatnonzero(found == divisor) for divisor in ALIGNMENTS if (found == divisor).any()]


def _best_aligned(nodes: IntArray) -> IntArray:
    """The nodes of the best alignment that has two of them, and the largest of all; all if none has two."""
    found = next((mine for mine in _by_alignment(nodes) if len(mine) > 1), np.arange(len(nodes)))
    return np.union1d(found, [len(nodes) - 1])


def _between(nodes: IntArray, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers of the nodes around real values, and the share of the upper one; beyond the ends there is no slope."""
    places = torch.as_tensor(nodes, dtype=values.dtype, device=values.device)
    high = torch.searchsorted(places, values.detach().contiguous()).clamp(0, len(nodes) - 1)
    low = (high - 1).clamp_min(0)
    return low, high, ((values - places[low]) / (places[high] - places[low]).clamp_min(1)).clamp(0, 1)
