"""The candidates of every stage in SWP: what there is to choose from, and which candidates have been scored.

A candidate is a row of whole numbers: one for each axis and one for each chain of blocks of its stage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from secateur._arrays import FloatArray, IntArray
from secateur.errors import BudgetError
from secateur.graph.stages import Stage
from secateur.nas.common import Depths, Widths
from secateur.nas.supernet import Subnet
from secateur.nas.swp_table import CostArray, StageTable, nondominated_indices
from secateur.search.base import SearchContext


@dataclass(frozen=True, eq=False)
class StageOptions:
    """What there is to choose in one stage: a number for each axis, then one for each chain of blocks.

    Attributes:
        axes: Numbers of the prunable axes with several candidate widths.
        widths: For each of them its candidate widths, ascending, the full one last.
        chains: For each chain with several candidate depths: the numbers of its removable blocks, in order.
        depths: For each of them the candidate numbers of first blocks that stay, ascending, all blocks last.
    """

    axes: tuple[int, ...]
    widths: tuple[tuple[int, ...], ...]
    chains: tuple[tuple[int, ...], ...]
    depths: tuple[tuple[int, ...], ...]

    @cached_property
    def max_numbers(self) -> IntArray:
        """(axes + chains,) the highest number of each: the row of the full stage. All zeros are the smallest one."""
        return np.array([len(row) - 1 for row in (*self.widths, *self.depths)], dtype=np.int64)

    @property
    def size(self) -> int:
        """The number of candidates."""
        # Python ints, because large stages have more candidates than int64 can count.
        return int(np.prod([int(top) + 1 for top in self.max_numbers], dtype=object))

    def write_(self, row: IntArray, widths: IntArray, blocks: IntArray) -> None:
        """Write a candidate into the widths (axes,) and the presence of the blocks (blocks,), 0 or 1, of a network."""
        for axis, of, number in zip(self.axes, self.widths, row[: len(self.axes)].tolist(), strict=True):
            widths[axis] = of[number]
        for chain, of, number in zip(self.chains, self.depths, row[len(self.axes) :].tolist(), strict=True):
            blocks[list(chain[of[number] :])] = 0


CandidateRows = tuple[IntArray, ...]
"""A network as one candidate, a row of whole numbers, for each stage."""


@dataclass(frozen=True, eq=False)
class CandidateSpace:
    """What there is to choose in all stages; everything else stays whole.

    Attributes:
        context: Gives costs and names.
        stages: The stages in order of execution.
        of_stage: The options of each.
    """

    context: SearchContext
    stages: tuple[Stage, ...]
    of_stage: tuple[StageOptions, ...]

    @classmethod
    def of(
        cls, context: SearchContext, stages: Sequence[Stage], widths: Widths | None, depths: Depths | None
    ) -> "CandidateSpace":
        """Find what the search space leaves to choose in the stages.

        Args:
            context: Gives the allowed widths and the chains of blocks.
            stages: Those of the context's model.
            widths: None leaves all axes whole.
            depths: None keeps all blocks.

        Raises:
            BudgetError: If there is nothing to choose.
        """
        options = cls(context, tuple(stages), tuple(_stage_options(context, stage, widths, depths) for stage in stages))
        if all(len(stage.max_numbers) == 0 for stage in options.of_stage):
            raise BudgetError(
                "`space` must leave some axis inside of a stage two widths, or some chain of blocks two depths; got "
                "none with a choice. Lower divisor, min_width or min_kept_fraction, search depths too, untie the "
                "branches, or cut the model into fewer stages."
            )
        return options

    @property
    def largest(self) -> CandidateRows:
        """The full net."""
        return tuple(stage.max_numbers for stage in self.of_stage)

    @property
    def smallest(self) -> CandidateRows:
        """The smallest network: the smallest candidate of every stage."""
        return tuple(np.zeros_like(stage.max_numbers) for stage in self.of_stage)

    def sample(self, draw: np.random.Generator) -> CandidateRows:
        """Draw a network; every number is uniform and independent of the others."""
        return tuple(draw.integers(0, stage.max_numbers + 1, dtype=np.int64) for stage in self.of_stage)

    def network_sizes(self, rows: CandidateRows) -> tuple[IntArray, IntArray]:
        """Return the widths (axes,) and the presence of the removable blocks (blocks,), 0 or 1, of a network."""
        costs = self.context.costs
        widths, blocks = costs.sizes.copy(), costs.present.copy()
        for stage, row in zip(self.of_stage, rows, strict=True):
            stage.write_(row, widths, blocks)
        # A branch is at most as wide as its stream, and a stream that only sums branches is as wide as the widest one.
        fitted = self.context.streams.fitted(widths[None])[0]
        # A stream that crosses a cut stays whole, however narrow its branches are: in training the next stage has only
        # seen the full net's feature.
        fitted[self._crossing] = costs.sizes[self._crossing]
        return fitted, blocks

    @cached_property
    def _crossing(self) -> list[int]:
        """Numbers of the axes that are only sums of branches and belong to no stage."""
        inside = {name for stage in self.stages for name in stage.axes}
        return [number for number, _ in self.context.streams.sums if self.context.costs.axes[number] not in inside]

    def subnet(self, rows: CandidateRows) -> Subnet:
        """Return the subnet with these candidates."""
        widths, blocks = self.network_sizes(rows)
        removed = [name for name, kept in zip(self.context.costs.blocks, blocks.tolist(), strict=True) if not kept]
        return Subnet(tuple(widths.tolist()), tuple(sorted(removed)))


def _stage_options(context: SearchContext, stage: Stage, widths: Widths | None, depths: Depths | None) -> StageOptions:
    graph, costs = context.inputs.graph, context.costs
    # The width of a stream that is only a sum follows from its branches.
    sums = {costs.axes[stream] for stream, _ in context.streams.sums}
    by_axis = {
        number: widths.of(context.levels[number])
        for number, name in enumerate(costs.axes)
        if widths is not None and name in stage.axes and name not in sums
    }
    by_axis = {number: found for number, found in by_axis.items() if len(found) > 1}
    column = {name: number for number, name in enumerate(costs.blocks)}
    # Of a chain that crosses a cut, each stage chooses how many of its own blocks stay.
    inside = (tuple(column[b.name] for b in chain if b.name in stage.blocks) for chain in graph.chains)
    chains = tuple(chain for chain in inside if chain) if depths is not None else ()
    by_chain = tuple(depths.of(len(chain)) for chain in chains) if depths is not None else ()
    return StageOptions(tuple(by_axis), tuple(by_axis.values()), chains, by_chain)


_DRAWS_PER_CANDIDATE = 20
"""Draws for each candidate asked for. If nearly all candidates are known, fewer new ones are found."""


class StageCandidates:
    """The candidates of every stage that have been scored, their losses, and the choice of those to score next.

    Args:
        options: What there is to choose.
        seed: Random seed.

    Attributes:
        rounds: Number of rounds scored.
        rows: For each stage its candidates, in the order in which they were scored.
        losses: For each stage their losses.
    """

    def __init__(self, options: CandidateSpace, seed: int):
        self._options, self._seed = options, seed
        self.rounds = 0
        self.rows: list[list[IntArray]] = [[] for _ in options.of_stage]
        self.losses: list[list[float]] = [[] for _ in options.of_stage]

    def propose(self, count: int) -> list[CandidateRows]:
        """Propose up to ``count`` networks with a new candidate in every stage that has any left.

        In the first round the candidates are spread over all sizes. Later ones descend from those that are not
        dominated within their stage in loss and cost: each number comes from one of two parents, and some are moved by
        a step or two. A stage without a new candidate repeats its first one.
        """
        # Seeded by the round, so that a resumed search proposes what the interrupted one did. Within the stages this is
        # evolution, where a generation costs a pass; between them an exact method costs next to nothing.
        draw = np.random.default_rng((self._seed, self.rounds))
        new = [self._propose_for_stage(number, count, draw) for number in range(len(self._options.of_stage))]
        most = max(map(len, new))
        # Networks are whole, so a stage without a new candidate takes part with a known one, which `record` ignores.
        firsts = [(self.rows[n] or new[n])[0] for n in range(len(new))]
        return [
            tuple(rows[at] if at < len(rows) else first for rows, first in zip(new, firsts, strict=True))
            for at in range(most)
        ]

    def record(self, proposed: Sequence[CandidateRows], losses: FloatArray) -> None:
        """Record the losses of proposed networks, and end the round.

        Args:
            proposed: The networks that `propose` returned.
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

    def rows_of(self, picked: Sequence[int]) -> CandidateRows:
        """Return the network of the candidates with these numbers, one of each stage."""
        return tuple(rows[number] for rows, number in zip(self.rows, picked, strict=True))

    def table(self) -> StageTable:
        """Return the losses and costs of all candidates so far."""
        context, options = self._options.context, self._options
        smallest = self._costs([options.smallest])
        base = {field: values[0].item() for field, values in smallest.items()}
        costs: dict[str, list[CostArray]] = {field: [] for field in base}
        for stage, rows in enumerate(self.rows):
            # A candidate costs what it adds to the smallest network, which is the base of the table.
            networks = [(*options.smallest[:stage], row, *options.smallest[stage + 1 :]) for row in rows]
            for field, values in self._costs(networks).items():
                # A wider layer may take less time than a narrower one, but costs in a table are not negative.
                costs[field].append(np.maximum(values - base[field], 0))
        losses = tuple(np.array(known, dtype=np.float64) for known in self.losses)
        return StageTable(losses, {field: tuple(found) for field, found in costs.items()}, base, context.limits)

    def _costs(self, networks: Sequence[CandidateRows]) -> Mapping[str, CostArray]:
        """Costs of whole networks by field, (networks,) each."""
        both = [self._options.network_sizes(rows) for rows in networks]
        widths, blocks = np.stack([widths for widths, _ in both]), np.stack([blocks for _, blocks in both])
        context = self._options.context
        # MACs are reported even if they are not limited.
        return context.costs.fields({"macs", *context.limits}, widths, blocks)

    def _propose_for_stage(self, stage: int, count: int, draw: np.random.Generator) -> list[IntArray]:
        options, seen = self._options.of_stage[stage], {tuple(row.tolist()) for row in self.rows[stage]}
        found: list[IntArray] = []
        parents = self._parents(stage)
        # Without the smallest candidate of every stage, no combination might fit a budget that `SWP.least` allows.
        first = [options.max_numbers, np.zeros_like(options.max_numbers)] if self.rounds == 0 else []
        for number in range(count * _DRAWS_PER_CANDIDATE):
            if len(found) == min(count, options.size - len(self.rows[stage])):
                break
            if number < len(first):
                row = first[number]
            else:
                row = _sample_child(options, parents, draw) if len(parents) else _sample_spread(options, draw)
            if tuple(row.tolist()) not in seen:
                seen.add(tuple(row.tolist()))
                found.append(row)
        return found

    def _parents(self, stage: int) -> list[IntArray]:
        """The candidates of a stage that are not dominated in loss and limited costs, from the best loss on."""
        if self.rounds == 0 or not self.rows[stage]:
            return []
        table = self.table()
        whole = table.as_integers
        costs = np.stack([whole.costs[field][stage] for field in table.limits])
        best = nondominated_indices(whole.losses[stage], costs)
        best = best[np.argsort(whole.losses[stage][best], kind="stable")]
        return [self.rows[stage][number] for number in best.tolist()]

    def to_json(self) -> dict[str, object]:
        """Return everything as plain data."""
        rows = [[row.tolist() for row in stage] for stage in self.rows]
        return {"rounds": self.rounds, "rows": rows, "losses": self.losses}

    def restore(self, saved: Mapping[str, list[list[object]]]) -> None:
        """Take over what `to_json` returned."""
        self.rounds = int(saved["rounds"])  # type: ignore[call-overload]
        self.rows = [[np.array(row, dtype=np.int64) for row in stage] for stage in saved["rows"]]
        self.losses = [[float(loss) for loss in stage] for stage in saved["losses"]]  # type: ignore[arg-type]


def _sample_spread(options: StageOptions, draw: np.random.Generator) -> IntArray:
    """Draw a candidate around a random size.

    Independent uniform numbers alone would give nearly all candidates a middle size.
    """
    # The middle may lie outside of [0, 1], so that some candidates have all numbers at their lowest or highest.
    middle, width = draw.uniform(-0.25, 1.25), 0.35
    noise = draw.uniform(-width, width, len(options.max_numbers))
    return np.rint(np.clip(middle + noise, 0, 1) * options.max_numbers).astype(np.int64)


def _sample_child(options: StageOptions, parents: Sequence[IntArray], draw: np.random.Generator) -> IntArray:
    """Take each number from one of two neighboring parents, and move about 1.5 of them by one or two steps."""
    # Parents are in order of loss, so neighbors are alike in loss and size, and their child is as well.
    at = int(draw.integers(len(parents)))
    other = min(max(at + int(draw.integers(-2, 3)), 0), len(parents) - 1)
    genes = np.where(draw.random(len(options.max_numbers)) < 0.5, parents[at], parents[other])
    moved = draw.random(len(options.max_numbers)) < 1.5 / max(len(options.max_numbers), 1)
    steps = draw.choice([-2, -1, 1, 2], len(options.max_numbers), p=[0.15, 0.35, 0.35, 0.15])
    return np.clip(np.where(moved, genes + steps, genes), 0, options.max_numbers).astype(np.int64)
