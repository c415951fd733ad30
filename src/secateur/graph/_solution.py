"""The axes of a graph under construction, and the extents of channels in their widths."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from secateur.graph._channels import ChannelAxis, Extent, IntArray
from secateur.graph._components import distinct

_Part = tuple[int, int, int | None]


@dataclass(eq=False)
class Solution:
    """Axes under construction; freezing an axis only fills `reason`."""

    axes: list[ChannelAxis]
    axis_of: IntArray
    channel_of: IntArray
    root: IntArray
    reasons: dict[int, str] = field(default_factory=dict)
    _counted: dict[int, tuple[IntArray, list[_Part]]] = field(default_factory=dict[int, tuple[IntArray, list[_Part]]])
    _lanes: dict[int, tuple[IntArray, IntArray, IntArray]] = field(
        default_factory=dict[int, tuple[IntArray, IntArray, IntArray]]
    )

    def lane(self, ids: IntArray) -> tuple[IntArray, IntArray]:
        """The number of the axis (-1 if none) and the channel of it that each of some ids belongs to."""
        known = self._lanes.get(id(ids))
        if known is None:
            roots = self.root[ids]
            known = self._lanes[id(ids)] = ids, self.axis_of[roots], self.channel_of[roots]
        return known[1:]

    @property
    def sizes(self) -> dict[str, int]:
        """Full width of every axis by name."""
        return {axis.name: axis.size for axis in self.axes}

    def measure(self, ids: IntArray) -> Extent | None:
        """Extent of a vector of ids; None if it holds only a part of an axis that may be pruned."""
        base, terms = 0, list[tuple[str, int]]()
        for number, total, times in self._census(ids):
            if number < 0 or number in self.reasons:
                base += total
            elif times is None:
                return None
            else:
                terms.append((self.axes[number].name, times))
        return Extent(base, tuple(sorted(terms)))

    def count(self, ids: IntArray, parts: list[tuple[int, int, int]]) -> None:
        """Tell what a vector of ids holds, where that is known without looking.

        Args:
            ids: A dimension of a stored tensor.
            parts: For each axis along it: its number, its positions, how often each of its channels. No axis twice.
        """
        rest = len(ids) - sum(total for _, total, _ in parts)
        self._counted[id(ids)] = ids, [*([(-1, rest, None)] if rest else []), *sorted(parts)]

    def _census(self, ids: IntArray) -> list[_Part]:
        """For each axis in a vector of ids: its number, its positions, how often each channel (None: unequally)."""
        known = self._counted.get(id(ids))
        if known is not None:
            return known[1]
        roots = self.root[ids]
        owner = self.axis_of[roots]
        # Nearly always they all belong to the same axis.
        alike = len(owner) > 0 and bool((owner == owner[0]).all())
        found: list[_Part] = []
        for number in [int(owner[0])] if alike else distinct(owner).tolist():
            here = roots if alike else roots[owner == number]
            times = None
            if number >= 0:
                counts = np.bincount(self.channel_of[here], minlength=self.axes[number].size)
                times = int(counts[0]) if counts.min() == counts.max() else None
            found.append((number, len(here), times))
        self._counted[id(ids)] = ids, found
        return found

    def axes_in(self, ids: IntArray) -> set[int]:
        """Numbers of the axes that a vector of ids belongs to."""
        return {number for number, _, _ in self._census(ids) if number >= 0}

    def freeze(self, vectors: Iterable[IntArray], reason: str) -> bool:
        """Freeze every axis these ids belong to; True if that is news."""
        return self._freeze_numbers(set[int]().union(*map(self.axes_in, vectors)), reason)

    def freeze_named(self, names: Iterable[str], reason: str) -> bool:
        """Freeze axes by name; True if that is news."""
        wanted = set(names)
        return self._freeze_numbers({n for n, axis in enumerate(self.axes) if axis.name in wanted}, reason)

    def _freeze_numbers(self, numbers: set[int], reason: str) -> bool:
        news = numbers - set(self.reasons)
        self.reasons.update(dict.fromkeys(sorted(news), reason))
        return bool(news)
