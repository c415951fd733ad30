"""What a strategy is given, and what it gives back."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from secateur.architecture import Architecture
from secateur.cost import Budget, Cost, CostModel
from secateur.importance import Evidence, Importance, checked_scores
from secateur.search._remembered import FloatArray, Remembered
from secateur.search._space import IntArray, SearchSpace
from secateur.search._streams import Streams
from secateur.train import Progress as Watch
from secateur.train import Saving, Silent, TrainingData

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Progress = Callable[[float, str], None]
"""Called with the finished fraction (0 to 1) and what is being done."""
_TINY = 1e-300
"""Stands for a limit of zero, half of nothing, which is met by nothing."""


@dataclass(frozen=True, eq=False)
class Problem:
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

    evidence: Evidence
    costs: CostModel
    budget: Budget
    space: SearchSpace
    progress: Progress
    training: TrainingData | None = None
    checkpoint: Path | None = None
    watch: Watch = field(default_factory=Silent)
    fabric: "Fabric | None" = None
    remembered: Remembered = field(default_factory=Remembered)
    saving: Saving = Saving()  # noqa: RUF009 -- frozen

    @cached_property
    def levels(self) -> tuple[IntArray, ...]:
        """Allowed widths per prunable axis, ascending; the last is the full size."""
        return self.space.levels(self.evidence.graph)

    @cached_property
    def limits(self) -> Mapping[str, float]:
        """Upper bounds by field of `Cost`, in its units."""
        return self.budget.limits(self.costs.original)

    def utilisation(self, widths: IntArray, blocks: IntArray | None = None) -> FloatArray:
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
        notes: What it learnt on the way, as plain data (JSON), for the report.
        weights: The whole model's tensors as it has trained them, by name; None if it trains nothing.
    """

    architecture: Architecture
    notes: Mapping[str, object] = field(default_factory=dict[str, object])
    weights: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)


class Strategy(ABC):
    """An algorithm that finds an architecture. Implementations are frozen dataclasses; fields are configuration."""

    @abstractmethod
    def find(self, problem: Problem) -> Proposal:
        """Find an architecture within the budget: the same one for the same problem, whatever ran before."""

    @property
    def trains(self) -> bool:
        """Whether it trains: then one search takes long, and the same one again goes on from its checkpoint."""
        return False

    def again(self, found: Architecture) -> "Strategy":
        """What searches near to an architecture that it found, for slightly other costs or bounds; quicker than it."""
        return self

    def least(self, problem: Problem) -> Cost:
        """Cost of the smallest architecture that it could find: a budget below it is refused."""
        return problem.least


def keep_best(problem: Problem, widths: IntArray, scores: Mapping[str, FloatArray]) -> Architecture:
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
