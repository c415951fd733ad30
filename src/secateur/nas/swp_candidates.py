"""What there is to choose from in every stage, as tables of whole numbers.

Candidates of every stage, and what is known of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from secateur._arrays import FloatArray, IntArray
from secateur.errors import BudgetError
from secateur.graph.stages import Stage
from secateur.nas.common import Depths, Widths
from secateur.nas.supernet import Subnet
from secateur.nas.swp_table import CostArray, StageTable, undominated
from secateur.search.base import SearchContext


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

    problem: SearchContext
    stages: tuple[Stage, ...]
    of_stage: tuple[StageOptions, ...]

    @classmethod
    def of(
        cls, problem: SearchContext, stages: Sequence[Stage], widths: Widths | None, depths: Depths | None
    ) -> "Options":
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
        # A stream that crosses a cut stays whole, however narrow its branches: the next stage has learned to read that.
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


def _of_stage(problem: SearchContext, stage: Stage, widths: Widths | None, depths: Depths | None) -> StageOptions:
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


_TRIES = 20
"""So many draws for each candidate that is wanted; a space that is nearly used up gives fewer."""


class StageCandidates:
    """The candidates of every stage that were judged, their losses, and which ones to judge next.

    Args:
        options: The choices.
        seed: Of what is drawn.

    Attributes:
        rounds: Rounds judged.
        rows: For each stage its candidates, in the order in which they were judged.
        losses: For each stage their losses.
    """

    def __init__(self, options: Options, seed: int):
        self._options, self._seed = options, seed
        self.rounds = 0
        self.rows: list[list[IntArray]] = [[] for _ in options.of_stage]
        self.losses: list[list[float]] = [[] for _ in options.of_stage]

    def proposed(self, count: int) -> list[Rows]:
        """Up to ``count`` networks with a new candidate in every stage that has any left.

        In the first round the candidates are spread over all sizes. Later ones descend from those that no other one of
        their stage beats in loss and size: each choice comes from one of two parents, and some move by a step.

        Where a stage has no new candidate its first is taken again.
        """
        draw = np.random.default_rng((self._seed, self.rounds))
        new = [self._new(number, count, draw) for number in range(len(self._options.of_stage))]
        most = max(map(len, new))
        firsts = [(self.rows[n] or new[n])[0] for n in range(len(new))]
        return [
            tuple(rows[at] if at < len(rows) else first for rows, first in zip(new, firsts, strict=True))
            for at in range(most)
        ]

    def judged(self, proposed: Sequence[Rows], losses: FloatArray) -> None:
        """Enter what was proposed.

        Args:
            proposed: By `proposed`.
            losses: (networks, stages).
        """
        for stage, (rows, known) in enumerate(zip(self.rows, self.losses, strict=True)):
            seen = {tuple(row.tolist()) for row in rows}
            for number, network in enumerate(proposed):
                row = network[stage]
                if tuple(row.tolist()) not in seen:
                    seen.add(tuple(row.tolist()))
                    rows.append(row)
                    known.append(float(losses[number, stage]))
        self.rounds += 1

    def network(self, picked: Sequence[int]) -> Rows:
        """The candidates of these numbers, one of each stage."""
        return tuple(rows[number] for rows, number in zip(self.rows, picked, strict=True))

    def table(self) -> StageTable:
        """Losses and costs of all candidates so far."""
        problem, options = self._options.problem, self._options
        tiny = self._costs([options.tiny])
        base = {field: values[0].item() for field, values in tiny.items()}
        costs: dict[str, list[CostArray]] = {field: [] for field in base}
        for stage, rows in enumerate(self.rows):
            networks = [(*options.tiny[:stage], row, *options.tiny[stage + 1 :]) for row in rows]
            for field, values in self._costs(networks).items():
                costs[field].append(np.maximum(values - base[field], 0))
        losses = tuple(np.array(known, dtype=np.float64) for known in self.losses)
        return StageTable(losses, {field: tuple(found) for field, found in costs.items()}, base, problem.limits)

    def _costs(self, networks: Sequence[Rows]) -> Mapping[str, CostArray]:
        """Cost of whole networks by field, (networks,) each."""
        both = [self._options.network(rows) for rows in networks]
        widths, blocks = np.stack([widths for widths, _ in both]), np.stack([blocks for _, blocks in both])
        problem = self._options.problem
        return problem.costs.fields({"macs", *problem.limits}, widths, blocks)

    def _new(self, stage: int, count: int, draw: np.random.Generator) -> list[IntArray]:
        options, seen = self._options.of_stage[stage], {tuple(row.tolist()) for row in self.rows[stage]}
        found: list[IntArray] = []
        parents = self._parents(stage)
        first = [options.tops, np.zeros_like(options.tops)] if self.rounds == 0 else []
        for number in range(count * _TRIES):
            if len(found) == min(count, options.size - len(self.rows[stage])):
                break
            if number < len(first):
                row = first[number]
            else:
                row = _child(options, parents, draw) if len(parents) else _spread(options, draw)
            if tuple(row.tolist()) not in seen:
                seen.add(tuple(row.tolist()))
                found.append(row)
        return found

    def _parents(self, stage: int) -> list[IntArray]:
        """The candidates of a stage that no other one beats in loss and limited costs, from the best loss on."""
        if self.rounds == 0 or not self.rows[stage]:
            return []
        table = self.table()
        whole = table.whole
        costs = np.stack([whole.costs[field][stage] for field in table.limits])
        best = undominated(whole.losses[stage], costs)
        best = best[np.argsort(whole.losses[stage][best], kind="stable")]
        return [self.rows[stage][number] for number in best.tolist()]

    def to_json(self) -> dict[str, object]:
        """Everything, as plain data."""
        rows = [[row.tolist() for row in stage] for stage in self.rows]
        return {"rounds": self.rounds, "rows": rows, "losses": self.losses}

    def restore(self, saved: Mapping[str, list[list[object]]]) -> None:
        """Inverse of `to_json`."""
        self.rounds = int(saved["rounds"])  # type: ignore[call-overload]
        self.rows = [[np.array(row, dtype=np.int64) for row in stage] for stage in saved["rows"]]
        self.losses = [[float(loss) for loss in stage] for stage in saved["losses"]]  # type: ignore[arg-type]


def _spread(options: StageOptions, draw: np.random.Generator) -> IntArray:
    """A candidate about a size that is drawn: independent choices alone would nearly all have the middle size."""
    middle, width = draw.uniform(-0.25, 1.25), 0.35
    noise = draw.uniform(-width, width, len(options.tops))
    return np.rint(np.clip(middle + noise, 0, 1) * options.tops).astype(np.int64)


def _child(options: StageOptions, parents: Sequence[IntArray], draw: np.random.Generator) -> IntArray:
    """Each choice from one of two neighboring parents, about one and a half of them moved by up to two steps."""
    at = int(draw.integers(len(parents)))
    other = min(max(at + int(draw.integers(-2, 3)), 0), len(parents) - 1)
    genes = np.where(draw.random(len(options.tops)) < 0.5, parents[at], parents[other])
    moved = draw.random(len(options.tops)) < 1.5 / max(len(options.tops), 1)
    steps = draw.choice([-2, -1, 1, 2], len(options.tops), p=[0.15, 0.35, 0.35, 0.15])
    return np.clip(np.where(moved, genes + steps, genes), 0, options.tops).astype(np.int64)
