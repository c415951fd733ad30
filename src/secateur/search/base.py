"""Search an architecture within a budget: the function, what a strategy is given, and what it returns."""

import importlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from types import FunctionType
from typing import Any

import numpy as np
from torch import Tensor, nn

from secateur._arrays import FloatArray, IntArray
from secateur._caller_state import in_default_state
from secateur._json import finite
from secateur._text import html_text
from secateur.architecture import Architecture
from secateur.cost.budget import Budget, Cost, Limit, format_cost
from secateur.cost.macs import CostModel, FieldModel
from secateur.cost.size import FileSize
from secateur.errors import BudgetError, SurgeryError
from secateur.graph.graph import ChannelGraph
from secateur.prune.culprits import cut_exactly
from secateur.prune.narrow_branches import restrict_branches
from secateur.search.history import SearchHistory
from secateur.search.importance import Importance, ScoringInputs, checked_scores
from secateur.search.space import SearchSpace, Streams
from secateur.train.callbacks import Silent
from secateur.train.config import RunSettings, TrainingData


def stable_repr(thing: object) -> str:
    """Return a strategy or any part of one as text that is the same in every process: functions by their name."""
    if is_dataclass(thing) and not isinstance(thing, type):
        inside = ", ".join(f"{part.name}={stable_repr(getattr(thing, part.name))}" for part in fields(thing))
        return f"{type(thing).__name__}({inside})"
    return thing.__qualname__ if isinstance(thing, FunctionType) else repr(thing)


class ScoreCache:
    """Numbers of a whole model by the object that computed them: scores of importances, effects of removed blocks.

    Objects are known by identity, because two equal importances may look at different data. They are kept, so that no
    later object gets the identity of an earlier one.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[object, dict[str, FloatArray]]] = {}

    def get(self, owner: object) -> dict[str, FloatArray] | None:
        """Return what an object computed before; None if it did not."""
        return self._known[id(owner)][1] if id(owner) in self._known else None

    def put(self, owner: object, numbers: dict[str, FloatArray]) -> dict[str, FloatArray]:
        """Store and return what an object computed."""
        self._known[id(owner)] = (owner, numbers)
        return numbers


ProgressCallback = Callable[[float, str], None]
"""Called with the finished fraction (0 to 1) and what is being done."""
_SILENT_RUN = RunSettings(callbacks=Silent())
_MOST_SHOWN = 12
"""Axes in a printed result."""
_MOST_ROWS = 50
_TINY = 1e-300
"""Replaces a limit of zero in quotients; no cost is within it."""


@dataclass(frozen=True, eq=False)
class SearchContext:
    """One search: find an architecture of the space within the budget. The smallest one it can find is within it.

    Attributes:
        inputs: Model, graph, batches and seed.
        costs: Cost of any widths.
        budget: The bounds on the cost.
        space: The allowed widths.
        progress: Called by the strategy now and then.
        training: Training and validation images for strategies that train, or None.
        run: Checkpoints, callbacks and device for strategies that train.
        score_cache: Numbers of the whole model that were computed before.
    """

    inputs: ScoringInputs
    costs: CostModel
    budget: Budget
    space: SearchSpace
    progress: ProgressCallback
    training: TrainingData | None = None
    run: RunSettings = _SILENT_RUN
    score_cache: ScoreCache = field(default_factory=ScoreCache)

    @cached_property
    def levels(self) -> tuple[IntArray, ...]:
        """Allowed widths per prunable axis, ascending; the last is the full size."""
        return self.space.levels(self.inputs.graph)

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
        """The widths that belong together where residual branches have widths of their own."""
        return Streams.of(self.inputs.graph)

    def scores(self, importance: Importance) -> dict[str, FloatArray]:
        """Scores of every prunable axis: name to (axis size,).

        Raises:
            ModelError: If they cannot be ranked (missing, mis-shaped, NaN or infinite).
        """
        known = self.score_cache.get(importance)
        if known is None:
            scores = importance.scores(self.inputs)
            known = self.score_cache.put(importance, checked_scores(scores, self.inputs.graph, importance))
        return known

    @property
    def least(self) -> Cost:
        """Cost of the smallest widths of the space."""
        widths = np.array([levels[0] for levels in self.levels], dtype=np.int64)
        return self.costs.cost_of(self.streams.fitted(widths[None])[0])


@dataclass(frozen=True)
class Proposal:
    """An architecture that a strategy proposes.

    Attributes:
        architecture: Within the budget and the space.
        notes: Further findings as plain data (JSON), for secateur.json. What is NaN or infinite becomes None.
        weights: The whole model's tensors as it has trained them, by name; None if it trains nothing.
        history: How the search went, for the report; empty if it trains nothing.
    """

    architecture: Architecture
    notes: Mapping[str, object] = field(default_factory=dict[str, object])
    weights: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)
    history: SearchHistory = SearchHistory()  # noqa: RUF009 -- frozen

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", finite(self.notes))


@dataclass(frozen=True, repr=False)
class SearchResult:
    """The result of a search.

    Attributes:
        architecture: Kept channels of every prunable axis, and removed blocks.
        cost: Its cost.
        original: Cost of the whole model.
        budget: The bounds that the cost is within.
        strategy: The strategy and its configuration, as text.
        notes: Further findings as plain data; always ``utilization``: cost / limit by limited field. What is NaN or
            infinite is None, because the notes become part of secateur.json.
        weights: What the search made of the whole model's tensors, by their names in its ``state_dict``: cut these
            instead of its own. None if the search trains nothing. Not part of the JSON object.
        history: How the search went, for the report; empty if it trains nothing.
        frozen: (axis or block, reason) pairs: what the search found not to be cut exactly, and kept whole. Not part of
            the JSON object.
    """

    architecture: Architecture
    cost: Cost
    original: Cost
    budget: Budget
    strategy: str
    notes: dict[str, object] = field(default_factory=dict[str, object])
    weights: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)
    history: SearchHistory = SearchHistory()  # noqa: RUF009 -- frozen
    frozen: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", finite(self.notes))

    def __repr__(self) -> str:
        shown = [f"  axis {axis}: {len(channels)} channels kept" for axis, channels in self.architecture.kept]
        more = [f"  ... and {len(shown) - _MOST_SHOWN} more axes"] if len(shown) > _MOST_SHOWN else []
        return "\n".join((f"SearchResult({self._summary()})", *shown[:_MOST_SHOWN], *more))

    def _repr_html_(self) -> str:
        return html_table(f"SearchResult: {self._summary()}", self._table())

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` with one row per axis: its name and the number of channels that are kept.

        Raises:
            ImportError: If pandas is not installed.
        """
        return data_frame(self._table())

    def _table(self) -> dict[str, list[object]]:
        widths = self.architecture.widths
        return {"axis": list(widths), "kept": list(widths.values())}

    def _summary(self) -> str:
        costs = [
            f"{field} {format_cost(field, value)} of {format_cost(field, getattr(self.original, field))}"
            for field, value in self.cost.to_json().items()
        ]
        removed = len(self.architecture.removed_blocks)
        return "; ".join((str(self.budget), ", ".join(costs), *([f"{removed} blocks removed"] if removed else [])))

    def to_json(self) -> dict[str, object]:
        """A JSON object with every field but the weights and what was frozen."""
        return {
            "architecture": self.architecture.to_json(),
            "cost": self.cost.to_json(),
            "original": self.original.to_json(),
            "budget": str(self.budget),
            "strategy": self.strategy,
            "notes": self.notes,
            "history": self.history.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SearchResult":
        """Read what `to_json` gives; the weights are None.

        Raises:
            KeyError, TypeError, ValueError: If it is something else.
        """
        return cls(
            architecture=Architecture.from_json(data["architecture"]),
            cost=Cost.from_json(data["cost"]),
            original=Cost.from_json(data["original"]),
            budget=Budget.parse(data["budget"]),
            strategy=data["strategy"],
            notes=dict(data["notes"]),
            history=SearchHistory.from_json(data["history"]),
        )


class Strategy(ABC):
    """An algorithm that finds an architecture. Implementations are frozen dataclasses; fields are configuration."""

    @abstractmethod
    def find(self, context: SearchContext) -> Proposal:
        """Find an architecture within the budget: the same one for the same context, whatever ran before."""

    def search(self, context: SearchContext) -> SearchResult:
        """Find an architecture and check that it is one of the space and within the budget, see `search_architecture`.

        A model that is within the budget already is returned whole.
        """
        original = context.costs.original
        if context.budget.allows(original, original):
            proposal = Proposal(
                Architecture.of({axis.name: range(axis.size) for axis in context.inputs.graph.prunable})
            )
        else:
            _check_feasible(context, self)
            proposal = self.find(context)
            _check_space(context, self, proposal.architecture)
        return _result(context, self, proposal)

    @property
    def trains(self) -> bool:
        """Whether it trains, so that one search takes long; the same search again is resumed from its checkpoint."""
        return False

    def again(self, found: Architecture) -> "Strategy":
        """Return a faster strategy that searches near to an architecture that this one found, for similar bounds."""
        return self

    def least(self, context: SearchContext) -> Cost:
        """Return the cost of the smallest architecture that it can find: a smaller budget is refused."""
        return context.least


def data_frame(columns: Mapping[str, Sequence[object]]) -> Any:
    """Return a `pandas.DataFrame`.

    Raises:
        ImportError: If pandas is not installed.
    """
    try:
        pandas: Any = importlib.import_module("pandas")
    except ImportError as error:
        raise ImportError("to_pandas() needs pandas, which is not installed. Run: pip install pandas") from error
    return pandas.DataFrame(dict(columns))


def html_table(title: str, columns: Mapping[str, Sequence[object]]) -> str:
    """Return a table for notebooks, with its first fifty rows."""
    head = "".join(f"<th>{html_text(name)}</th>" for name in columns)
    rows = ["".join(f"<td>{html_text(str(cell))}</td>" for cell in row) for row in zip(*columns.values(), strict=True)]
    body = "".join(f"<tr>{row}</tr>" for row in rows[:_MOST_ROWS])
    more = f"<p>... and {len(rows) - _MOST_ROWS} more</p>" if len(rows) > _MOST_ROWS else ""
    return f"<p>{html_text(title)}</p><table><tr>{head}</tr>{body}</table>{more}"


def keep_best(context: SearchContext, widths: IntArray, scores: Mapping[str, FloatArray]) -> Architecture:
    """Return the architecture that keeps the channels with the highest scores, of equal ones the lower index.

    A branch keeps channels of its stream only.

    Args:
        context: Axes and residual streams.
        widths: (axes,) numbers of channels to keep.
        scores: Axis name to (axis size,).
    """
    width = dict(zip(context.costs.axes, context.streams.fitted(widths[None])[0], strict=True))
    best = {name: np.argsort(-scores[name], kind="stable") for name in context.costs.axes}
    kept = {name: order[: width[name]] for name, order in best.items()}
    for axis in context.inputs.graph.prunable:
        if axis.residual_axis in kept:
            inside = best[axis.name][np.isin(best[axis.name], kept[axis.residual_axis])]
            kept[axis.name] = inside[: width[axis.name]]
    return Architecture.of(kept)


@in_default_state
def search_architecture(
    model: nn.Module,
    graph: ChannelGraph,
    strategy: Strategy,
    *,
    budget: Budget | str,
    batches: Sequence[tuple[Any, Tensor]] = (),
    space: SearchSpace = SearchSpace(),  # noqa: B008 -- frozen
    seed: int = 0,
    data: TrainingData | None = None,
    run: RunSettings = _SILENT_RUN,
    progress: ProgressCallback | None = None,
    latency: FieldModel | None = None,
    score_cache: ScoreCache | None = None,
) -> SearchResult:
    """Find which channels to keep so that the model costs no more than the budget.

    The result is never over a limit. It is at most 1 % under the limit that binds, unless the allowed widths are too
    coarse for that: then no single step up, and no step down of one axis against a step up of another, comes closer.
    Where blocks were removed, all that is left may be whole and the budget emptier.
    A model that is within the budget already is returned whole.

    The architecture is also cut, and verified as `secateur.cut` does: if an axis cannot be cut exactly, it is frozen
    and the search begins again. So the cut model is within the budget too. For strategies that train, half of every
    axis is cut before the training; with a ``latency`` model, which knows one graph only, nothing is cut.

    Args:
        model: The traced model; it is not changed.
        graph: Its channel graph.
        strategy: The algorithm.
        budget: Upper bounds on the cost, or their text, such as "macs=50%".
        batches: (images, labels) pairs for strategies that look at data. Instead of images, also a tuple of positional
            inputs or a mapping of inputs by name. Labels of unlabeled data may be zeros, see `ScoringInputs`.
        space: The allowed widths.
        seed: For strategies that draw random numbers; the global random state is neither read nor changed.
        data: Training and validation images for strategies that train; never test images.
        run: Checkpoints, callbacks and device for strategies that train, which are resumed from a checkpoint that is
            there; the device is opened if there is none, and the execution has no effect.
        progress: Called with the finished fraction and a description.
        latency: Predicts the latency of any widths of the graph, such as ``fit_latency(...).model``. A budget that
            limits the latency needs it, or a strategy that measures: `WithinLatency`.
        score_cache: Shared by several searches of the same model, graph and batches, so that what belongs to the whole
            model is computed once; None means a new one.

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
    if graph.uncounted and "macs" in limits.fields:
        warnings.warn(f"`budget` limits the counted MACs only. {graph.uncounted_text}", stacklevel=3)
    cache = ScoreCache() if score_cache is None else score_cache
    frozen: tuple[tuple[str, str], ...] = ()
    if strategy.trains:
        # What cannot be cut exactly is found before the training, not after it.
        graph, frozen = _without_inexact(model, graph, _halved(graph))
    while True:
        inputs = ScoringInputs(model, graph, tuple(batches), seed)
        costs = cost_model(inputs, limits, latency)
        context = SearchContext(inputs, costs, limits, space, progress or _silent, data, run, cache)
        found = replace(strategy.search(context), frozen=frozen)
        # A latency is predicted for all widths of one graph, and a training is resumed on one graph.
        if latency is not None or strategy.trains:
            return found
        graph, more = _without_inexact(model, graph, found.architecture)
        if not more:
            return found
        frozen += more


def _halved(graph: ChannelGraph) -> Architecture:
    """Return an architecture that cuts every axis, if its divisor allows."""
    widths = {axis.name: axis.size // 2 // axis.divisor * axis.divisor or axis.size for axis in graph.prunable}
    return restrict_branches(graph, Architecture.of({name: range(width) for name, width in widths.items()}))


def _without_inexact(
    model: nn.Module, graph: ChannelGraph, architecture: Architecture
) -> tuple[ChannelGraph, tuple[tuple[str, str], ...]]:
    """Return the graph in which what cannot be cut exactly stays whole, and its (axis or block, reason) pairs."""
    if not architecture.removed_blocks and not any(len(c) < graph.by_name[name].size for name, c in architecture.kept):
        return graph, ()
    cut = cut_exactly(model, graph, architecture)
    return cut.graph, cut.verification.frozen


def cost_model(inputs: ScoringInputs, budget: Budget, latency: FieldModel | None = None) -> CostModel:
    """Return the cost of any architecture of a graph, with every field that the budget limits.

    Args:
        inputs: Model and graph.
        budget: The file size is computed only if it is limited.
        latency: Predicts the latency; None leaves it out.
    """
    more: list[FieldModel] = [FileSize.of(inputs.model, inputs.graph)] if FileSize.field in budget.fields else []
    return CostModel(inputs.graph, more if latency is None else [*more, latency])


def _silent(fraction: float, what: str) -> None:
    """Ignore the progress."""


def _result(context: SearchContext, strategy: Strategy, proposal: Proposal) -> SearchResult:
    architecture, notes = proposal.architecture, dict(proposal.notes)
    cost, original = context.costs.cost(architecture), context.costs.original
    if not context.budget.allows(cost, original):
        raise BudgetError(f"`architecture` must be within {context.budget}; got {cost} from {stable_repr(strategy)}.")
    notes["utilization"] = {
        name: getattr(cost, name) / limit if limit else 1.0 for name, limit in context.limits.items()
    }
    return SearchResult(
        architecture, cost, original, context.budget, stable_repr(strategy), notes, proposal.weights, proposal.history
    )


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


def _check_feasible(context: SearchContext, strategy: Strategy) -> None:
    """Refuse a budget that no architecture of the space is within, with the range that can be reached."""
    smallest, original = strategy.least(context), context.costs.original
    if context.budget.allows(smallest, original):
        return
    ranges = (
        (limit, getattr(smallest, limit.field), getattr(original, limit.field)) for limit in context.budget.of_cost
    )
    reach = ", ".join(_range(limit, least, most) for limit, least, most in ranges)
    space = context.space
    way_out = (
        f"Raise the budget or lower min_width (now {space.min_width}), divisor (now {space.divisor or 1}) or "
        f"min_kept_fraction (now {space.min_kept_fraction:g}); on the command line --min-width, --divisor, --min-kept."
        if context.levels
        else "No axis of this model may be slimmed; its graph gives the reasons."
    )
    raise BudgetError(f"`budget` must be within reach; got {context.budget}. Reachable: {reach}. {way_out}")


def _range(limit: Limit, least: float, most: float) -> str:
    low, high = format_cost(limit.field, least), format_cost(limit.field, most)
    return f"{limit.word} {low} ({100 * least / (most or 1):.1f} %) to {high}"


def _check_space(context: SearchContext, strategy: Strategy, architecture: Architecture) -> None:
    widths = context.costs.widths(architecture)
    for name, width, levels in zip(context.costs.axes, widths, context.levels, strict=True):
        if width not in levels:
            raise SurgeryError(
                f"`architecture` must keep allowed widths; {stable_repr(strategy)} keeps {width} channels of {name!r}, "
                f"{context.space} allows {len(levels)} widths from {levels[0]} to {levels[-1]}."
            )
