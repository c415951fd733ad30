"""Strategies in words that are the same in every process.

What several searches of one model need not compute twice.

What a strategy is given, and what it gives back.

The verb: search an architecture within a budget."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from secateur._arrays import FloatArray, IntArray
from secateur.architecture import Architecture
from secateur.cost.budget import Budget, Cost, Limit, format_cost
from secateur.cost.macs import CostModel, Modeled
from secateur.cost.size import FileSize
from secateur.errors import BudgetError, SurgeryError
from secateur.graph.graph import ChannelGraph
from secateur.search.importance import Importance, ScoringInputs, checked_scores
from secateur.search.space import SearchSpace, Streams
from secateur.train.callbacks import Callbacks as Watch
from secateur.train.callbacks import Silent
from secateur.train.checkpoint import CheckpointPolicy
from secateur.train.config import TrainingData

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def stable_repr(thing: object) -> str:
    """A strategy or any part of one as text that is the same in every process: functions by their name."""
    if is_dataclass(thing) and not isinstance(thing, type):
        inside = ", ".join(f"{part.name}={stable_repr(getattr(thing, part.name))}" for part in fields(thing))
        return f"{type(thing).__name__}({inside})"
    return thing.__qualname__ if isinstance(thing, FunctionType) else repr(thing)


class ScoreCache:
    """Numbers of a whole model by who computed them: an importance its scores, a strategy what blocks are worth.

    They are known by identity: two importances that are equal may look at other data. Whoever computed something is
    kept too, so that nobody else gets the same identity.
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[object, dict[str, FloatArray]]] = {}

    def of(self, who: object, compute: Callable[[], dict[str, FloatArray]]) -> dict[str, FloatArray]:
        """What somebody computed before, or computes now."""
        if id(who) not in self._found:
            self._found[id(who)] = (who, compute())
        return self._found[id(who)][1]


ProgressCallback = Callable[[float, str], None]
"""Called with the finished fraction (0 to 1) and what is being done."""
_TINY = 1e-300
"""Stands for a limit of zero, half of nothing, which is met by nothing."""


@dataclass(frozen=True, eq=False)
class SearchContext:
    """One search: find an architecture of the space within the budget. The smallest one it can find is within it.

    Attributes:
        evidence: Model, graph, batches and seed.
        costs: Cost of any widths.
        budget: As the user gave it.
        space: As the user gave it.
        progress: To be called now and then.
        training: Training and validation images, or None.
        checkpoint: Folder for checkpoints of a strategy that trains, or None.
        watch: Shows the training of a strategy that trains.
        fabric: Device and precision of a strategy that trains, or None.
        remembered: What was computed of the whole model.
        saving: When a strategy that trains writes checkpoints, beside those at the ends of epochs.
    """

    evidence: ScoringInputs
    costs: CostModel
    budget: Budget
    space: SearchSpace
    progress: ProgressCallback
    training: TrainingData | None = None
    checkpoint: Path | None = None
    watch: Watch = field(default_factory=Silent)
    fabric: "Fabric | None" = None
    remembered: ScoreCache = field(default_factory=ScoreCache)
    saving: CheckpointPolicy = CheckpointPolicy()  # noqa: RUF009 -- frozen

    @cached_property
    def levels(self) -> tuple[IntArray, ...]:
        """Allowed widths per prunable axis, ascending; the last is the full size."""
        return self.space.levels(self.evidence.graph)

    @cached_property
    def limits(self) -> Mapping[str, float]:
        """Upper bounds by field of `Cost`, in its units."""
        return self.budget.limits(self.costs.original)

    def utilization(self, widths: IntArray, blocks: IntArray | None = None) -> FloatArray:
        """How full the budget is: the largest cost / limit over the limited fields; within the budget up to 1.

        Args:
            widths: (n, axes).
            blocks: (n or 1, blocks) which blocks are there; see `CostModel.of_widths`.

        Returns:
            (n,) dimensionless.
        """
        found = self.costs.fields(self.limits, self.streams.fitted(widths), blocks)
        return np.max([found[name] / max(limit, _TINY) for name, limit in self.limits.items()], axis=0)

    @cached_property
    def streams(self) -> Streams:
        """Which widths go together in an untied graph."""
        return Streams.of(self.evidence.graph)

    def scores(self, importance: Importance) -> dict[str, FloatArray]:
        """Scores of every prunable axis: name to (axis size,).

        Raises:
            ModelError: If they cannot be ranked (missing, mis-shaped, NaN or infinite).
        """
        evidence = self.evidence
        return self.remembered.of(
            importance, lambda: checked_scores(importance.scores(evidence), evidence.graph, importance)
        )

    @property
    def least(self) -> Cost:
        """Cost of the smallest widths of the space."""
        widths = np.array([levels[0] for levels in self.levels], dtype=np.int64)
        return self.costs.cost_of(self.streams.fitted(widths[None])[0])


@dataclass(frozen=True)
class Proposal:
    """What a strategy found.

    Attributes:
        architecture: Within the budget and the space.
        notes: What it learned on the way, as plain data (JSON), for the report.
        weights: The whole model's tensors as it has trained them, by name; None if it trains nothing.
    """

    architecture: Architecture
    notes: Mapping[str, object] = field(default_factory=dict[str, object])
    weights: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)


class Strategy(ABC):
    """An algorithm that finds an architecture. Implementations are frozen dataclasses; fields are configuration."""

    @abstractmethod
    def find(self, problem: SearchContext) -> Proposal:
        """Find an architecture within the budget: the same one for the same problem, whatever ran before."""

    @property
    def trains(self) -> bool:
        """Whether it trains: then one search takes long, and the same one again goes on from its checkpoint."""
        return False

    def again(self, found: Architecture) -> "Strategy":
        """What searches near to an architecture that it found, for slightly other costs or bounds; quicker than it."""
        return self

    def least(self, problem: SearchContext) -> Cost:
        """Cost of the smallest architecture that it could find: a budget below it is refused."""
        return problem.least


def keep_best(problem: SearchContext, widths: IntArray, scores: Mapping[str, FloatArray]) -> Architecture:
    """Keep the channels with the highest scores; of equal ones those with the lower index.

    A branch keeps channels of its stream only.

    Args:
        problem: For the axes.
        widths: (axes,) how many to keep.
        scores: Axis name to (axis size,).
    """
    width = dict(zip(problem.costs.axes, problem.streams.fitted(widths[None])[0], strict=True))
    best = {name: np.argsort(-scores[name], kind="stable") for name in problem.costs.axes}
    kept = {name: order[: width[name]] for name, order in best.items()}
    for axis in problem.evidence.graph.prunable:
        if axis.into in kept:
            inside = best[axis.name][np.isin(best[axis.name], kept[axis.into])]
            kept[axis.name] = inside[: width[axis.name]]
    return Architecture.of(kept)


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        architecture: Kept channels of every prunable axis, and removed blocks.
        cost: Its cost.
        original: Cost of the whole model.
        budget: The bounds it keeps to.
        strategy: The strategy and its configuration, as text.
        notes: What the strategy learned, as plain data; always ``utilization``: cost / limit by limited field.
        weights: What the search made of the whole model's tensors, by their names in its ``state_dict``: cut these
            instead of its own. None if the search trains nothing. Not part of the JSON object.
    """

    architecture: Architecture
    cost: Cost
    original: Cost
    budget: Budget
    strategy: str
    notes: dict[str, object] = field(default_factory=dict[str, object])
    weights: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, object]:
        """A JSON object with every field but the weights."""
        return {
            "architecture": self.architecture.to_json(),
            "cost": self.cost.to_json(),
            "original": self.original.to_json(),
            "budget": str(self.budget),
            "strategy": self.strategy,
            "notes": self.notes,
        }


@dataclass(frozen=True, eq=False)
class SearchTraining:
    """What a search is given for strategies that train.

    Attributes:
        data: Training and validation images, never test images; None if there are none.
        folder: Folder for checkpoints, from which an interrupted search is resumed; None writes none.
        checkpoints: When checkpoints are written, beside those at the ends of epochs.
        callbacks: Shows the training.
        fabric: Device and precision; None opens one, see `secateur.train.open_fabric`.
    """

    data: TrainingData | None = None
    folder: Path | None = None
    checkpoints: CheckpointPolicy = CheckpointPolicy()  # noqa: RUF009 -- frozen
    callbacks: Watch = Silent()  # noqa: RUF009 -- frozen
    fabric: "Fabric | None" = None


def search_architecture(
    model: nn.Module,
    graph: ChannelGraph,
    strategy: Strategy,
    *,
    budget: Budget | str,
    batches: Sequence[tuple[Tensor, Tensor]] = (),
    space: SearchSpace = SearchSpace(),  # noqa: B008 -- frozen
    seed: int = 0,
    progress: ProgressCallback | None = None,
    training: SearchTraining | None = None,
    latency: Modeled | None = None,
    remembered: ScoreCache | None = None,
) -> SearchResult:
    """Find which channels to keep so that the model costs no more than the budget.

    The result is never over a limit. It is at most 1 % under the limit that binds, unless the allowed widths are too
    coarse for that: then no single step up, and no step down of one axis against a step up of another, comes closer.
    Where blocks were removed, all that is left may be whole and the budget emptier.
    A model that is within the budget already is returned whole.

    Args:
        model: The traced model; it is not changed.
        graph: Its channel graph.
        strategy: The algorithm.
        budget: Upper bounds on the cost, or their text, such as "macs=50%".
        batches: (images, labels) pairs for strategies that look at data.
        space: The allowed widths.
        seed: For strategies that draw random numbers; the global random state is neither read nor changed.
        progress: Called with the finished fraction and a description.
        training: Images, checkpoints, callbacks and device for strategies that train.
        latency: Of any widths of the graph, such as ``fit_latency(...).model``; needed if the budget limits it.
        remembered: Shared by several searches of the same model, graph and batches, so that what is of the whole model
            is computed once; None means its own.

    Raises:
        BudgetError: If the budget cannot be read, limits a latency that nothing computes, or no architecture of the
            space is within it.
        SurgeryError: If the graph is not of this model, or the strategy leaves the space.
        ModelError: If the strategy finds weights or scores that are not finite.
        DataError: If the strategy needs batches or training images and there are none.
        TrainingError: If the training of a strategy fails, or its checkpoint is of another search.
        Stopped: If that was asked for while a strategy trains, see `secateur.train.stoppable`.
    """
    _check_traced(model, graph)
    limits = Budget.parse(budget) if isinstance(budget, str) else budget
    evidence = ScoringInputs(model, graph, tuple(batches), seed)
    costs = CostModel(graph, _more(model, graph, limits, latency))
    known = ScoreCache() if remembered is None else remembered
    given = training or SearchTraining()
    problem = SearchContext(
        evidence,
        costs,
        limits,
        space,
        progress or _silent,
        training=given.data,
        checkpoint=given.folder,
        watch=given.callbacks,
        fabric=given.fabric,
        remembered=known,
        saving=given.checkpoints,
    )
    if limits.allows(problem.costs.original, problem.costs.original):
        whole = Architecture.of({axis.name: range(axis.size) for axis in graph.prunable})
        return _found(problem, strategy, Proposal(whole))
    _check_feasible(problem, strategy)
    proposal = strategy.find(problem)
    _check_space(problem, strategy, proposal.architecture)
    return _found(problem, strategy, proposal)


def _more(model: nn.Module, graph: ChannelGraph, budget: Budget, latency: Modeled | None) -> list[Modeled]:
    """What computes the limited fields that a cost model does not have by itself."""
    more: list[Modeled] = [FileSize.of(model, graph)] if FileSize.field in budget.fields else []
    return more if latency is None else [*more, latency]


def _silent(fraction: float, what: str) -> None:
    """Report no progress."""


def _found(problem: SearchContext, strategy: Strategy, proposal: Proposal) -> SearchResult:
    architecture, notes = proposal.architecture, dict(proposal.notes)
    cost, original = problem.costs.cost(architecture), problem.costs.original
    if not problem.budget.allows(cost, original):
        raise BudgetError(f"`architecture` must be within {problem.budget}; got {cost} from {stable_repr(strategy)}.")
    notes["utilization"] = {
        name: getattr(cost, name) / limit if limit else 1.0 for name, limit in problem.limits.items()
    }
    return SearchResult(architecture, cost, original, problem.budget, stable_repr(strategy), notes, proposal.weights)


def _check_traced(model: nn.Module, graph: ChannelGraph) -> None:
    tensors = model.state_dict()
    for name, extents in graph.tensors.items():
        expected = tuple(extent.at(graph.sizes) for extent in extents)
        got = tuple(tensors[name].shape) if name in tensors else None
        # Buffers that are not part of the state (persistent=False) cannot be compared.
        if got != expected and (got is not None or name in graph.parameters):
            raise SurgeryError(
                f"`graph` must be traced from this model; {name!r} has shape {expected} there and {got} here. "
                "Trace the model again."
            )


def _check_feasible(problem: SearchContext, strategy: Strategy) -> None:
    """Refuse a budget that no architecture of the space is within, with the range that can be reached."""
    smallest, original = strategy.least(problem), problem.costs.original
    if problem.budget.allows(smallest, original):
        return
    ranges = (
        (limit, getattr(smallest, limit.field), getattr(original, limit.field)) for limit in problem.budget.of_cost
    )
    reach = ", ".join(_range(limit, least, most) for limit, least, most in ranges)
    space = problem.space
    way_out = (
        f"Raise the budget or lower min_width (now {space.min_width}), divisor (now {space.divisor}) or "
        f"min_kept_fraction (now {space.min_kept_fraction:g}); on the command line --min-width, --divisor, --min-kept."
        if problem.levels
        else "No axis of this model may be slimmed; its graph gives the reasons."
    )
    raise BudgetError(f"`budget` must be within reach; got {problem.budget}. Reachable: {reach}. {way_out}")


def _range(limit: Limit, least: float, most: float) -> str:
    low, high = format_cost(limit.field, least), format_cost(limit.field, most)
    return f"{limit.word} {low} ({100 * least / (most or 1):.1f} %) to {high}"


def _check_space(problem: SearchContext, strategy: Strategy, architecture: Architecture) -> None:
    widths = problem.costs.widths(architecture)
    for name, width, levels in zip(problem.costs.axes, widths, problem.levels, strict=True):
        if width not in levels:
            raise SurgeryError(
                f"`architecture` must keep allowed widths; {stable_repr(strategy)} keeps {width} channels of {name!r}, "
                f"{problem.space} allows {len(levels)} widths from {levels[0]} to {levels[-1]}."
            )
