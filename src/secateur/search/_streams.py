"""Which widths go together where the branches of residual streams have widths of their own."""

from dataclasses import dataclass

import numpy as np

from secateur.graph import ChannelGraph, Role

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


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
        into = ((axis.name, axis.into or "") for axis in graph.prunable)
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
