"""What there is to choose from in every stage, as tables of whole numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from secateur.errors import BudgetError
from secateur.graph import Stage
from secateur.search._problem import Problem
from secateur.search._ratios import Depths, Widths
from secateur.search._space import IntArray
from secateur.supernet import Subnet


@dataclass(frozen=True, eq=False)
class StageOptions:
    """The choices of one stage. A candidate is a row of whole numbers, one per axis and then one per chain of blocks.

    Attributes:
        axes: Numbers of the prunable axes that have a choice.
        widths: For each of them its candidate widths, ascending, the full one last.
        chains: For each chain of blocks that has a choice: the numbers of its removable blocks, in order.
        depths: For each of them how many of the first blocks may stay, ascending, all last.
    """

    axes: tuple[int, ...]
    widths: tuple[tuple[int, ...], ...]
    chains: tuple[tuple[int, ...], ...]
    depths: tuple[tuple[int, ...], ...]

    @cached_property
    def tops(self) -> IntArray:
        """(choices,) the largest number of each; all together are the whole stage, all zeros the tiny one."""
        return np.array([len(row) - 1 for row in (*self.widths, *self.depths)], dtype=np.int64)

    @property
    def size(self) -> int:
        """How many candidates there are."""
        return int(np.prod([int(top) + 1 for top in self.tops], dtype=object))

    def write_(self, row: IntArray, widths: IntArray, blocks: IntArray) -> None:
        """Enter a candidate into the widths (axes,) and the presences of the blocks (blocks,) of a network."""
        for axis, of, number in zip(self.axes, self.widths, row[: len(self.axes)].tolist(), strict=True):
            widths[axis] = of[number]
        for chain, of, number in zip(self.chains, self.depths, row[len(self.axes) :].tolist(), strict=True):
            blocks[list(chain[of[number] :])] = 0


Rows = tuple[IntArray, ...]
"""One candidate for each stage."""


@dataclass(frozen=True, eq=False)
class Options:
    """The choices of all stages; what is not among them stays whole.

    Attributes:
        problem: For costs and names.
        stages: In order of execution.
        of_stage: The choices of each.
    """

    problem: Problem
    stages: tuple[Stage, ...]
    of_stage: tuple[StageOptions, ...]

    @classmethod
    def of(cls, problem: Problem, stages: Sequence[Stage], widths: Widths | None, depths: Depths | None) -> "Options":
        """The choices that the space leaves in the stages.

        Args:
            problem: For the allowed widths and the chains of blocks.
            stages: Of the problem's model.
            widths: None leaves all axes whole.
            depths: None keeps all blocks.

        Raises:
            BudgetError: If there is nothing to choose.
        """
        options = cls(problem, tuple(stages), tuple(_of_stage(problem, stage, widths, depths) for stage in stages))
        if all(len(stage.tops) == 0 for stage in options.of_stage):
            raise BudgetError(
                "`space` must leave some axis inside of a stage two widths, or some chain of blocks two depths; got "
                "none with a choice. Lower divisor, min_width or min_kept_fraction, search depths too, untie the "
                "branches, or cut the model into fewer stages."
            )
        return options

    @property
    def whole(self) -> Rows:
        """The full net."""
        return tuple(stage.tops for stage in self.of_stage)

    @property
    def tiny(self) -> Rows:
        """The smallest candidate of every stage."""
        return tuple(np.zeros_like(stage.tops) for stage in self.of_stage)

    def drawn(self, draw: np.random.Generator) -> Rows:
        """A candidate of every stage, each choice uniform and independent of the others."""
        return tuple(draw.integers(0, stage.tops + 1, dtype=np.int64) for stage in self.of_stage)

    def network(self, rows: Rows) -> tuple[IntArray, IntArray]:
        """Widths (axes,) and presences of the removable blocks (blocks,) of the net with these candidates."""
        costs = self.problem.costs
        widths, blocks = costs.sizes.copy(), costs.present.copy()
        for stage, row in zip(self.of_stage, rows, strict=True):
            stage.write_(row, widths, blocks)
        fitted = self.problem.streams.fitted(widths[None])[0]
        # A stream that crosses a cut stays whole, however narrow its branches: the next stage has learnt to read that.
        fitted[self._crossing] = costs.sizes[self._crossing]
        return fitted, blocks

    @cached_property
    def _crossing(self) -> list[int]:
        """Numbers of the axes that are nothing but sums of branches and are in no stage."""
        inside = {name for stage in self.stages for name in stage.axes}
        return [number for number, _ in self.problem.streams.sums if self.problem.costs.axes[number] not in inside]

    def subnet(self, rows: Rows) -> Subnet:
        """The net with these candidates."""
        widths, blocks = self.network(rows)
        removed = [name for name, kept in zip(self.problem.costs.blocks, blocks.tolist(), strict=True) if not kept]
        return Subnet(tuple(widths.tolist()), tuple(sorted(removed)))


def _of_stage(problem: Problem, stage: Stage, widths: Widths | None, depths: Depths | None) -> StageOptions:
    graph, costs = problem.evidence.graph, problem.costs
    # Streams that are nothing but sums follow their branches.
    sums = {costs.axes[stream] for stream, _ in problem.streams.sums}
    by_axis = {
        number: widths.of(problem.levels[number])
        for number, name in enumerate(costs.axes)
        if widths is not None and name in stage.axes and name not in sums
    }
    by_axis = {number: found for number, found in by_axis.items() if len(found) > 1}
    column = {name: number for number, name in enumerate(costs.blocks)}
    inside = (tuple(column[b.name] for b in chain if b.name in stage.blocks) for chain in graph.chains)
    chains = tuple(chain for chain in inside if chain) if depths is not None else ()
    by_chain = tuple(depths.of(len(chain)) for chain in chains) if depths is not None else ()
    return StageOptions(tuple(by_axis), tuple(by_axis.values()), chains, by_chain)
