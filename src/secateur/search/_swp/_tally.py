"""How fairly and how fully a supernet was trained."""

import math
from collections.abc import Sequence

import numpy as np

from secateur.search._space import IntArray
from secateur.search._swp._options import Options, Rows


class Tally:
    """Counts how often every candidate of every choice was trained.

    Args:
        options: The choices.
    """

    def __init__(self, options: Options):
        self._options = options
        self._times: list[list[IntArray]] = [
            [np.zeros(int(top) + 1, dtype=np.int64) for top in stage.tops] for stage in options.of_stage
        ]
        self._seen: list[set[tuple[int, ...]]] = [set() for _ in options.of_stage]

    def add(self, rows: Rows) -> None:
        """Note that a network was trained."""
        for times, seen, row in zip(self._times, self._seen, rows, strict=True):
            numbers = tuple(row.tolist())
            seen.add(numbers)
            for count, number in zip(times, numbers, strict=True):
                count[number] += 1

    @property
    def fairness(self) -> float:
        """How often the channel trained least was trained, per time of the one trained most; the least over all axes.

        A channel learns in every network that is wide enough for it. 1 is fair, 0 means that some never learnt.
        """
        ratios = [
            float(count[-1] / count.sum())
            for stage, times in zip(self._options.of_stage, self._times, strict=True)
            for count in times[: len(stage.axes)]
            if count.sum()
        ]
        return min(ratios, default=1.0)

    @property
    def candidates(self) -> list[dict[str, float]]:
        """For each stage: log10 of how many candidates it has, and how many of them were trained."""
        return [
            {"log10": math.log10(stage.size), "trained": len(seen)}
            for stage, seen in zip(self._options.of_stage, self._seen, strict=True)
        ]

    def to_json(self) -> dict[str, object]:
        """Everything, as plain data."""
        times = [[count.tolist() for count in stage] for stage in self._times]
        return {"times": times, "seen": [sorted(map(list, seen)) for seen in self._seen]}

    def restore(self, saved: dict[str, list[list[Sequence[int]]]]) -> None:
        """Inverse of `to_json`."""
        self._times = [[np.array(count, dtype=np.int64) for count in stage] for stage in saved["times"]]
        self._seen = [{tuple(numbers) for numbers in stage} for stage in saved["seen"]]
