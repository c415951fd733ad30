"""The verb: search an architecture within a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from secateur.architecture import Architecture
from secateur.cost import Budget, Cost, CostModel, FileSize, Limit, Modelled, format_cost
from secateur.errors import BudgetError, SurgeryError
from secateur.graph import ChannelGraph
from secateur.importance import Evidence
from secateur.search._describe import describe
from secateur.search._problem import Problem, Progress, Proposal, Strategy
from secateur.search._remembered import Remembered
from secateur.search._space import SearchSpace
from secateur.train import Progress as Watch
from secateur.train import Saving, Silent, TrainingData

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        architecture: Kept channels of every prunable axis, and removed blocks.
        cost: Its cost.
        original: Cost of the whole model.
        budget: The bounds it keeps to.
        strategy: The strategy and its configuration, as text.
        notes: What the strategy learnt, as plain data; always ``utilisation``: cost / limit by limited field.
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


def search(
    model: nn.Module,
    graph: ChannelGraph,
    strategy: Strategy,
    *,
    budget: Budget | str,
    batches: Sequence[tuple[Tensor, Tensor]] = (),
    space: SearchSpace = SearchSpace(),  # noqa: B008 -- frozen
    seed: int = 0,
    progress: Progress | None = None,
    data: TrainingData | None = None,
    checkpoint: Path | None = None,
    saving: Saving = Saving(),  # noqa: B008 -- frozen
    watch: Watch = Silent(),  # noqa: B008 -- frozen
    fabric: "Fabric | None" = None,
    latency: Modelled | None = None,
    remembered: Remembered | None = None,
) -> Found:
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
        data: Training and validation images for strategies that train; never test images.
        checkpoint: Folder for the checkpoints of strategies that train, which go on from one that is there.
        saving: When they write checkpoints, beside those at the ends of epochs.
        watch: Shows the training of strategies that train.
        fabric: Device and precision of strategies that train; None opens one, see `secateur.train.open_fabric`.
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
    evidence = Evidence(model, graph, tuple(batches), seed)
    costs = CostModel(graph, _more(model, graph, limits, latency))
    known = Remembered() if remembered is None else remembered
    problem = Problem(
        evidence, costs, limits, space, progress or _silent, data, checkpoint, watch, fabric, known, saving
    )
    if limits.allows(problem.costs.original, problem.costs.original):
        whole = Architecture.of({axis.name: range(axis.size) for axis in graph.prunable})
        return _found(problem, strategy, Proposal(whole))
    _check_feasible(problem, strategy)
    proposal = strategy.find(problem)
    _check_space(problem, strategy, proposal.architecture)
    return _found(problem, strategy, proposal)


def _more(model: nn.Module, graph: ChannelGraph, budget: Budget, latency: Modelled | None) -> list[Modelled]:
    """What computes the limited fields that a cost model does not have by itself."""
    more: list[Modelled] = [FileSize.of(model, graph)] if FileSize.field in budget.fields else []
    return more if latency is None else [*more, latency]


def _silent(fraction: float, what: str) -> None:
    """Report no progress."""


def _found(problem: Problem, strategy: Strategy, proposal: Proposal) -> Found:
    architecture, notes = proposal.architecture, dict(proposal.notes)
    cost, original = problem.costs.cost(architecture), problem.costs.original
    if not problem.budget.allows(cost, original):
        raise BudgetError(f"`architecture` must be within {problem.budget}; got {cost} from {describe(strategy)}.")
    notes["utilisation"] = {
        name: getattr(cost, name) / limit if limit else 1.0 for name, limit in problem.limits.items()
    }
    return Found(architecture, cost, original, problem.budget, describe(strategy), notes, proposal.weights)


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


def _check_feasible(problem: Problem, strategy: Strategy) -> None:
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


def _check_space(problem: Problem, strategy: Strategy, architecture: Architecture) -> None:
    widths = problem.costs.widths(architecture)
    for name, width, levels in zip(problem.costs.axes, widths, problem.levels, strict=True):
        if width not in levels:
            raise SurgeryError(
                f"`architecture` must keep allowed widths; {describe(strategy)} keeps {width} channels of {name!r}, "
                f"{problem.space} allows {len(levels)} widths from {levels[0]} to {levels[-1]}."
            )
