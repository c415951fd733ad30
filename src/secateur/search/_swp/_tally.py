"""How fairly and how fully a supernet was trained."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.search._space import IntArray
from secateur.search._swp._options import Options, Rows, StageOptions


class Tally:
    """Counts how often every channel that may go was trained, and the candidates that were.

    Args:
        options: The choices.
    """

    def __init__(self, options: Options):
        self._options = options
        costs = options.problem.costs
        self._times = {costs.axes[axis]: Counter[int]() for stage in options.of_stage for axis in stage.axes}
        self._seen: list[set[int]] = [set() for _ in options.of_stage]
        self._holders = {name: _holders(options, name) for name in self._times}

    def add(self, rows: Rows) -> None:
        """Note that a network was trained."""
        for stage, seen, row in zip(self._options.of_stage, self._seen, rows, strict=True):
            seen.add(_number(stage, row))
        subnet, axes = self._options.subnet(rows), self._options.problem.costs.axes
        removed = frozenset(subnet.removed_blocks)
        widths = dict(zip(axes, subnet.widths, strict=True))
        for name, times in self._times.items():
            if not all(holders & removed for holders in self._holders[name]):
                times[widths[name]] += 1

    @property
    def fairness(self) -> float:
        """How often the channel trained least was trained, per time of the one trained most; the least over all axes.

        A channel learns in every network that is wide enough for it and has its block. 1 is fair, 0 means that some
        never learnt.
        """
        if not any(self._seen):
            return 1.0
        sizes = self._options.problem.evidence.graph.sizes
        return min((times[sizes[name]] / max(times.total(), 1) for name, times in self._times.items()), default=1.0)

    @property
    def candidates(self) -> list[dict[str, float]]:
        """For each stage: log10 of how many candidates it has, and how many of them were trained."""
        return [
            {"log10": math.log10(stage.size), "trained": len(seen)}
            for stage, seen in zip(self._options.of_stage, self._seen, strict=True)
        ]

    def to_json(self) -> dict[str, object]:
        """Everything, as plain data."""
        times = {name: sorted(times.items()) for name, times in self._times.items()}
        return {"times": times, "seen": [sorted(seen) for seen in self._seen]}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Inverse of `to_json`."""
        times: Mapping[str, Sequence[tuple[int, int]]] = saved["times"]
        self._times = {name: Counter(dict(pairs)) for name, pairs in times.items()}
        self._seen = [set(numbers) for numbers in saved["seen"]]


def _number(stage: StageOptions, row: IntArray) -> int:
    """Of a candidate among all of its stage: one whole number, since a long training meets hundreds of thousands."""
    number = 0
    for top, chosen in zip(stage.tops.tolist(), row.tolist(), strict=True):
        number = number * (top + 1) + chosen
    return number


def _holders(options: Options, axis: str) -> list[frozenset[str]]:
    """For each tensor with the channels of an axis, the blocks that it goes with."""
    graph = options.problem.evidence.graph
    return [
        frozenset(block.name for block in graph.removable if site.tensor in block.tensors)
        for site in graph.by_name[axis].sites
    ]
