"""Remove residual blocks, then channels."""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from secateur._batches import first_images
from secateur._kinds import settings
from secateur.architecture import Architecture
from secateur.cost.budget import Cost
from secateur.errors import BudgetError, DataError
from secateur.graph._record import shadow_copy
from secateur.graph.trace import Example
from secateur.prune.calibration import split_calibration
from secateur.prune.culprits import cut_exactly
from secateur.prune.cut import Repair
from secateur.prune.distance import OutputDistance
from secateur.prune.slice import apply_architecture, replace_modules_
from secateur.search.base import Proposal, SearchContext, Strategy
from secateur.search.ranking import Knapsack
from secateur.search.repaired import QUICK_REPAIRS, RepairedNetworks

_TRIED = 9
"""Numbers of removed blocks that are tried first, evenly spaced; then those beside the best."""

_FINALISTS = 3
"""Candidates that are repaired before one is taken."""


@dataclass(frozen=True)
class Without(Strategy):
    """Remove these residual blocks, and find the widths of the rest by another strategy.

    Attributes:
        strategy: Finds the widths.
        blocks: Their names.
    """

    strategy: Strategy
    blocks: tuple[str, ...]

    def find(self, context: SearchContext) -> Proposal:
        """Notes: those of the inner strategy."""
        graph = context.inputs.graph
        proposal = self.strategy.find(self._rest(context))
        # The widths of layers that are gone have no effect; they are kept whole.
        gone = {name for block in self.blocks for name in graph.blocks_by_name[block].tensors}
        idle = {a.name: range(a.size) for a in graph.prunable if all(s.tensor in gone for s in a.sites)}
        architecture = Architecture.of({**proposal.architecture.by_name, **idle}, self.blocks)
        return replace(proposal, architecture=architecture)

    @property
    def trains(self) -> bool:
        """Whether the inner strategy trains."""
        return self.strategy.trains

    def least(self, context: SearchContext) -> Cost:
        """Cost of the smallest widths without the blocks."""
        return self.strategy.least(self._rest(context))

    def _rest(self, context: SearchContext) -> SearchContext:
        return replace(context, costs=context.costs.without(self.blocks))


@dataclass(frozen=True, eq=False)
class _Candidate:
    """An architecture with some blocks removed.

    Attributes:
        distance: Of its outputs from the original's.
        architecture: Within the budget.
        notes: Of the inner strategy.
    """

    distance: float
    architecture: Architecture
    notes: Mapping[str, object]


@settings
class RemoveBlocks(Strategy):
    """Remove the residual blocks that matter least, and leave the rest of the budget to another strategy.

    Blocks are ranked by what their removal does to the outputs for the budget it spares:

        d(block) / p(block),   d = mean ||z' - z||^2 / mean ||z - mean(z)||^2,   p = spared share of the budget,

    with z the outputs of the model and z' those without the block, on the calibration images; no labels. For a number
    k of blocks, the first k are removed, and the inner strategy finds the widths with what they spare. Of the k from 0
    to ``max_fraction`` of all blocks, the three whose cut models have the least d are repaired, and the one with the
    least d then, on a quarter of the images that is held out from the repairs, is taken; of equal ones the smaller k.
    Of more than nine numbers, nine evenly spaced ones are tried, then those between the best and its neighbors. With
    several output tensors, d is the mean of their distances (see `secateur.prune.OutputDistance`).

    A model without blocks gives what the inner strategy gives.

    Attributes:
        strategy: Finds the widths.
        max_fraction: Largest fraction of the blocks that may be removed, 0 to 1.
        images: Most calibration images to look at, a whole number.
        repairs: Repairs of the last three candidates: those that will be made after the cut, or quicker ones like them.
            Without any, the candidate nearest to the original is taken, which says less of what repairs will leave.

    References:
        Removing whole blocks by the effect on the output: Veit et al., arXiv:1605.06431, Section 4.1; ranking them by
        it: Men et al. (ShortGPT), arXiv:2403.03853, by the similarity of a block's input and output instead.
    """

    strategy: Strategy = field(default_factory=Knapsack)
    max_fraction: float = 0.5
    images: int = 128
    repairs: tuple[Repair, ...] = QUICK_REPAIRS

    def __post_init__(self) -> None:
        if not 0 <= self.max_fraction <= 1:
            raise BudgetError(f"`max_fraction` must be a fraction of the blocks, 0 to 1; got {self.max_fraction!r}.")
        if type(self.images) is not int or self.images < 1:
            raise BudgetError(f"`images` must be a whole number of images, at least 1; got {self.images!r}.")

    def find(self, context: SearchContext) -> Proposal:
        """Notes: those of the inner strategy, ``disturbance`` (d by block), and d by number of blocks.

        The last as ``distance`` and, of those that were repaired, ``repaired``.

        Raises:
            DataError: If the model has blocks, and there are no images.
        """
        if self._most(context) == 0:
            return self.strategy.find(context)
        trials = _Trials(self.strategy, context, self._images(context))
        disturbance = self._disturbances(context, trials)
        spared = _spared(context)
        order = sorted(disturbance, key=lambda name: disturbance[name] / spared[name])
        most = min(self._most(context), len(order))
        for number in _spread(most):
            trials.remove(order[:number])
        for number in _between(trials.tried, trials.best, most):
            trials.remove(order[:number])
        if not trials.found:
            trials.remove(self._dearest(context))
        if not trials.found:
            raise BudgetError(
                f"`budget` must be within reach; got {context.budget}: not every block can be removed. Raise it."
            )
        distance = {number: candidate.distance for number, candidate in sorted(trials.found.items())}
        repaired = trials.repaired(self.repairs, _nearest(distance)[:_FINALISTS]) if self.repairs else {}
        best = trials.found[_nearest(repaired or distance)[0]]
        mine = {"disturbance": disturbance, "distance": _as_json(distance), "repaired": _as_json(repaired)}
        return Proposal(best.architecture, {**best.notes, **mine})

    def _disturbances(self, context: SearchContext, trials: "_Trials") -> dict[str, float]:
        """Effects of removing each block of the whole model; like scores, several searches share them."""
        context.progress(0.0, "blocks")
        found = context.score_cache.get(self)
        if found is None:
            effects = {name: np.array(distance) for name, distance in trials.disturbances().items()}
            found = context.score_cache.put(self, effects)
        return {name: float(distance) for name, distance in found.items()}

    @property
    def trains(self) -> bool:
        """Whether the inner strategy trains."""
        return self.strategy.trains

    def again(self, found: Architecture) -> Strategy:
        """Return a strategy that removes the same blocks."""
        return Without(self.strategy, found.removed_blocks)

    def least(self, context: SearchContext) -> Cost:
        """Cost of the smallest widths without the dearest blocks."""
        return Without(self.strategy, tuple(self._dearest(context))).least(context)

    def _most(self, context: SearchContext) -> int:
        """The largest number of blocks that may be removed."""
        return math.floor(self.max_fraction * len(context.costs.blocks) + 1e-9)

    def _dearest(self, context: SearchContext) -> list[str]:
        spared = _spared(context)
        return sorted(spared, key=lambda name: -spared[name])[: self._most(context)]

    def _images(self, context: SearchContext) -> list[Example]:
        """The first images, in their batches."""
        batches: list[Example] = [images for images, _ in context.inputs.batches]
        found = first_images(batches, self.images)
        if not found:
            raise DataError("`batches` must hold images for RemoveBlocks; got none. Pass calibration data.")
        return found


class _Trials:
    """Candidates without some blocks, for several numbers of blocks.

    Attributes:
        found: Candidates within the budget by the number of blocks removed.
        tried: Numbers of blocks that were tried.
    """

    def __init__(self, strategy: Strategy, context: SearchContext, images: Sequence[Example]):
        self._strategy, self._split = strategy, split_calibration(images)
        self._context = context
        self._model, self._graph = context.inputs.model, context.inputs.graph
        self._distance = OutputDistance(self._model, images)
        self.found: dict[int, _Candidate] = {}
        self.tried: set[int] = set()

    @property
    def best(self) -> int:
        """How many blocks the candidate nearest to the original lacks, the fewest of equals; -1 if there is none."""
        return next(iter(_nearest({number: candidate.distance for number, candidate in self.found.items()})), -1)

    def disturbances(self) -> dict[str, float]:
        """How far the outputs are from the original's without each single block that can be removed exactly."""
        everything = Architecture.of({}, (block.name for block in self._graph.removable))
        sound = cut_exactly(self._model, self._graph, everything).graph.removable
        found: dict[str, float] = {}
        for done, block in enumerate(sound):
            self._context.progress(0.3 * done / len(sound), f"without {block.name}")
            without = shadow_copy(self._model)
            replace_modules_(without, block.replacements)
            found[block.name] = self._distance.of(without)
        return found

    def remove(self, blocks: Sequence[str]) -> None:
        """Try without these; nothing is found if the budget is beyond reach then."""
        self.tried.add(len(blocks))
        rest = Without(self._strategy, tuple(blocks))
        if not self._context.budget.allows(rest.least(self._context), self._context.costs.original):
            return
        step = 0.4 * len(blocks) / (len(self._context.costs.blocks) + 1)
        self._context.progress(0.3 + step, f"{len(blocks)} blocks fewer")
        proposal = rest.find(replace(self._context, progress=_silent))
        small = apply_architecture(self._model, self._graph, proposal.architecture)
        self.found[len(blocks)] = _Candidate(self._distance.of(small), proposal.architecture, proposal.notes)

    def repaired(self, repairs: Sequence[Repair], numbers: Sequence[int]) -> dict[int, float]:
        """Distances of some candidates after repairs, on images that the repairs have not seen."""
        networks = RepairedNetworks(self._context, repairs, self._split.fit, self._split.held_out)
        distances: dict[int, float] = {}
        for number in numbers:
            self._context.progress(0.7 + 0.1 * len(distances), f"{number} blocks fewer, repaired")
            distances[number] = networks.distance.of(networks.cut(self.found[number].architecture).model)
        return distances


def blocks_by_worth(context: SearchContext, images: Sequence[Example]) -> list[str]:
    """Return the blocks that can be removed exactly, the one that matters least for the budget it spares first.

    They are ranked as `RemoveBlocks` ranks them, on some images.
    """
    disturbance, spared = _Trials(Knapsack(), context, images).disturbances(), _spared(context)
    return sorted(disturbance, key=lambda name: disturbance[name] / spared[name])


def _spared(context: SearchContext) -> dict[str, float]:
    """The share of the budget that each block costs in the full network; tiny if it costs none."""
    costs = context.costs
    rows = 1 - np.eye(len(costs.blocks), dtype=np.int64)
    full = np.broadcast_to(costs.sizes, (len(rows), len(costs.sizes)))
    shares = context.utilization(costs.sizes[None])[0] - context.utilization(full, rows)
    return {name: max(float(share), 1e-12) for name, share in zip(costs.blocks, shares, strict=True)}


def _nearest(distances: Mapping[int, float]) -> list[int]:
    """Numbers of blocks, the one with the least distance first; of equal ones the smallest."""
    return sorted(distances, key=lambda number: (distances[number], number))


def _as_json(distances: Mapping[int, float]) -> dict[str, float]:
    return {str(number): distance for number, distance in sorted(distances.items())}


def _spread(most: int) -> list[int]:
    """Numbers from 0 to ``most``: all of them, or as many evenly spaced ones as are tried at first."""
    return sorted({round(most * step / (_TRIED - 1)) for step in range(_TRIED)})


def _between(found: Container[int], best: int, most: int) -> list[int]:
    """The numbers next to the best one that were not tried, up to those that were."""
    unknown: list[int] = []
    for step in (-1, 1):
        number = best + step
        while 0 <= number <= most and number not in found:
            unknown.append(number)
            number += step
    return sorted(unknown)


def _silent(fraction: float, what: str) -> None:
    """Report no progress: the inner strategy knows only its own part."""
