"""The axes of a graph under construction, and the extents of channels in their widths."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from secateur.graph._channels import ChannelAxis, Extent, IntArray


@dataclass(eq=False)
class Solution:
    """Axes under construction; freezing an axis only fills `reason`."""

    axes: list[ChannelAxis]
    axis_of: IntArray
    channel_of: IntArray
    root: IntArray
    reasons: dict[int, str] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Full width of every axis by name."""
        return {axis.name: axis.size for axis in self.axes}

    def measure(self, ids: IntArray) -> Extent | None:
        """Extent of a vector of ids; None if it holds only a part of an axis that may be pruned."""
        roots = self.root[ids]
        owner = self.axis_of[roots]
        base, terms = 0, list[tuple[str, int]]()
        for number in np.unique(owner):
            here = owner == number
            total = int(here.sum())
            if number < 0 or int(number) in self.reasons:
                base += total
                continue
            axis = self.axes[number]
            times = np.bincount(self.channel_of[roots[here]], minlength=axis.size)
            if times.min() != times.max():
                return None
            terms.append((axis.name, int(times[0])))
        return Extent(base, tuple(sorted(terms)))

    def freeze(self, vectors: Iterable[IntArray], reason: str) -> bool:
        """Freeze every axis these ids belong to; True if that is news."""
        numbers = {int(n) for ids in vectors for n in np.unique(self.axis_of[self.root[ids]]) if n >= 0}
        return self._freeze_numbers(numbers, reason)

    def freeze_named(self, names: Iterable[str], reason: str) -> bool:
        """Freeze axes by name; True if that is news."""
        wanted = set(names)
        return self._freeze_numbers({n for n, axis in enumerate(self.axes) if axis.name in wanted}, reason)

    def _freeze_numbers(self, numbers: set[int], reason: str) -> bool:
        news = numbers - set(self.reasons)
        self.reasons.update(dict.fromkeys(sorted(news), reason))
        return bool(news)
