"""The graph that a run works on: traced, untied if that is wanted, with the user's choices.

What the recovery begins with: the weights that the cut left, repaired, or none at all.

What a whole run gives back.

Everything one run of `compress` is asked to do, as frozen data."""

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from secateur.architecture import Architecture
from secateur.cost.budget import Budget, is_timed
from secateur.cost.measure import Cache
from secateur.cost.targets import OnnxRuntime, Target
from secateur.data.dataset import ImageData
from secateur.distill.objective import Objective
from secateur.errors import TrainingError
from secateur.export.formats import Format
from secateur.graph._ledger import Rule
from secateur.graph.graph import ChannelGraph
from secateur.graph.selection import Selection
from secateur.graph.trace import HeadUnit, trace
from secateur.graph.untie import untie
from secateur.models.source import ModelSource
from secateur.pipeline.workspace import OnExisting
from secateur.prune.cut import Cut, Repair, RepairResult, cut
from secateur.prune.repair import RecalibrateBatchNorm, Refit
from secateur.prune.verify import Verification
from secateur.prune.weight_pruning import WeightPruning
from secateur.report.run import RunReport
from secateur.search.base import SearchResult, Strategy, describe
from secateur.search.depth import RemoveBlocks
from secateur.search.knapsack import Knapsack
from secateur.search.space import SearchSpace
from secateur.train.callbacks import Progress
from secateur.train.checkpoint import CheckpointPolicy
from secateur.train.config import TrainConfig
from secateur.train.device import Eager, Execution, open_fabric, precision_of
from secateur.train.recipes import check_resettable, reset_weights_
from secateur.train.trainer import Trained

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Branches(Enum):
    """Which widths the branches of a residual stream may have."""

    TIED = "tied"
    """That of the stream: every branch keeps the channels that the stream keeps."""
    UNTIED = "untied"
    """Each its own: a narrower branch is added into its channels of the stream, see `secateur.graph.untie`."""


def trace_for_run(
    model: nn.Module,
    example: Tensor,
    *,
    choices: Selection,
    heads: HeadUnit,
    branches: Branches,
    rules: Mapping[str, Rule],
) -> ChannelGraph:
    """The channel graph of a model; see `compress` for the arguments."""
    graph = trace(model, example, heads=heads, rules=rules)
    return choices.apply(untie(model, graph) if branches is Branches.UNTIED else graph)


DEFAULT_REPAIRS: tuple[Repair, ...] = (Refit(), RecalibrateBatchNorm())
"""Refit what lost inputs to give what it gave before, then measure the batch norms anew."""


@dataclass(frozen=True, eq=False)
class CutInput:
    """What is to be cut.

    Attributes:
        original: The model as it was given.
        searched: The same with the weights that the search trained; the original itself if it trained none.
        graph: The channel graph of both.
        images: Calibration batches, normalized, on the models' device.
        seed: Of weights that are drawn.
    """

    original: nn.Module
    searched: nn.Module
    graph: ChannelGraph
    images: Sequence[Tensor]
    seed: int


class StudentInit(ABC):
    """How a student comes from the uncut model. Implementations are frozen dataclasses; fields are configuration."""

    @property
    @abstractmethod
    def done(self) -> str:
        """What was done to the student, as the name of a step."""

    @abstractmethod
    def check(self, model: nn.Module, schedule: TrainConfig) -> None:
        """Refuse a model or a recovery that it cannot be for, before any work.

        Raises:
            SecateurError: With the way out.
        """

    @abstractmethod
    def cut(self, uncut: CutInput, architecture: Architecture) -> Cut:
        """The student before any training, proved as long as its weights are those of the uncut model."""


@dataclass(frozen=True)
class KeepWeights(StudentInit):
    """The student keeps the weights of its channels, and is repaired.

    They are the weights that the search trained, if it trained any. The repairs compare with the model of these.

    Attributes:
        repairs: Repairs right after the cut, in order.
    """

    repairs: Sequence[Repair] = DEFAULT_REPAIRS

    @property
    def done(self) -> str:
        """See `Start.done`."""
        return "cut and repaired"

    def check(self, model: nn.Module, schedule: TrainConfig) -> None:
        """See `Start.check`: for any."""

    def cut(self, uncut: CutInput, architecture: Architecture) -> Cut:
        """See `Start.cut`."""
        return cut(uncut.searched, uncut.graph, architecture, calibration=uncut.images, repairs=tuple(self.repairs))


@dataclass(frozen=True)
class Reinitialize(StudentInit):
    """The student keeps its architecture alone: its weights are drawn anew, and all it knows comes from the recovery.

    The cut is made and proved with the original's weights. Then every module draws its own by its
    ``reset_parameters()`` (or torch's other spelling, ``_reset_parameters()``), as when it was made: what a module
    holds before the module itself, which may have other wishes for it. The same seed gives the same weights on every
    device.
    """

    @property
    def done(self) -> str:
        """See `Start.done`."""
        return "cut, weights drawn anew"

    def check(self, model: nn.Module, schedule: TrainConfig) -> None:
        """See `Start.check`.

        Raises:
            ModelError: If a module has parameters and no way to draw them.
            TrainingError: If there is no recovery.
        """
        if schedule.epochs == 0:
            raise TrainingError(
                "`schedule` must have epochs for a student from scratch, which knows nothing yet; got 0. Give it as "
                "many as the original had (--epochs), or let it inherit weights."
            )
        check_resettable(
            model, "start", "let the student inherit its weights (without --from-scratch; in Python: start=Inherit())."
        )

    def cut(self, uncut: CutInput, architecture: Architecture) -> Cut:
        """See `Start.cut`."""
        pruned = cut(uncut.original, uncut.graph, architecture)
        return dataclasses.replace(pruned, model=reset_weights_(pruned.model, uncut.seed))


@dataclass(frozen=True, eq=False)
class CutStudent:
    """A cut and repaired student, before any training.

    Attributes:
        original: The uncut model in eval mode, on the device of the run; ours, not the caller's.
        student: The cut and repaired one.
        graph: The graph it was cut by.
        found: What the search found.
        verification: Sliced against masked.
        repairs: What each repair did.
    """

    original: nn.Module
    student: nn.Module
    graph: ChannelGraph
    found: SearchResult
    verification: Verification
    repairs: tuple[RepairResult, ...]


@dataclass(frozen=True, eq=False)
class CompressResult:
    """A compressed model, how it came about and what was checked.

    Attributes:
        model: The compressed model in eval mode, on the device of the model that was given.
        graph: The channel graph of the original.
        found: What the search found: architecture, costs, budget.
        verification: The proof that the sliced model equals the masked original.
        trained: The recovery, or None if there were no epochs; its model is masked if single weights were pruned.
        report: Every number: before and after, accuracy on the way, widths, checks, latency, provenance.
        folder: The artifact, or None if none was asked for.
        files: Everything that was written.
    """

    model: nn.Module
    graph: ChannelGraph
    found: SearchResult
    verification: Verification
    trained: Trained | None
    report: RunReport
    folder: Path | None = None
    files: tuple[Path, ...] = ()

    @property
    def architecture(self) -> Architecture:
        """The kept channels of each axis."""
        return self.found.architecture

    @property
    def nonzero(self) -> int:
        """Parameters of the model that are not zero."""
        return self.report.after.weights

    @property
    def failed(self) -> tuple[str, ...]:
        """What did not hold, in words; empty if everything did."""
        return tuple(f"{check.name}: {check.detail}" for check in self.report.checks if not check.passed)


DEFAULT_STRATEGY: Strategy = Knapsack()
"""The strategy that lost least in benchmarks/heal.py."""

DEFAULT_SPACE = SearchSpace(min_kept_fraction=0.25)
"""Every axis keeps at least a quarter: no importance can tell how a layer that all but vanishes will be missed."""

DEFAULT_TRAIN_CONFIG = TrainConfig(epochs=1, learning_rate=0.01)
"""A short recovery. The rate is low on purpose: a high one wipes out what repairs restored."""

DEFAULT_OBJECTIVE = Objective(kd_weight=0.9, label_weight=0.1, feature_weight=10.0)
"""The teacher's probabilities, a little of the labels, and the teacher's features at the last layer of each size."""


NO_RULES: Mapping[str, Rule] = MappingProxyType({})
"""Only the built-in ones."""

DEFAULT_SELECTION = Selection()
"""Whatever can be cut may be cut."""


@dataclass(frozen=True, eq=False)
class Delivery:
    """What is written at the end.

    Attributes:
        folder: The artifact.
        formats: Exported files.
        source: How the original model is built, or None if only the caller knows.
        leftover: What to do with an interrupted run at the same place.
    """

    folder: Path
    formats: tuple[Format, ...]
    source: ModelSource | None
    leftover: OnExisting


@dataclass(frozen=True, eq=False)
class Plan:
    """One run. See `compress` for the fields."""

    model: nn.Module
    data: ImageData
    budget: Budget
    strategy: Strategy
    choices: Selection
    heads: HeadUnit
    branches: Branches
    rules: Mapping[str, Rule]
    space: SearchSpace
    schedule: TrainConfig
    objective: Objective
    start: StudentInit
    calibration: int
    seed: int
    fabric: "Fabric"
    name: str
    command: str
    delivery: Delivery | None
    progress: Progress
    tell: Callable[[str], None]
    pruning: WeightPruning | None = None
    target: Target = OnnxRuntime()  # noqa: RUF009 - frozen
    cache: Cache | None = None
    saving: CheckpointPolicy = CheckpointPolicy()  # noqa: RUF009 - frozen
    execution: Execution = Eager()  # noqa: RUF009 - frozen

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return self.fabric.device

    @property
    def alone(self) -> "Fabric":
        """Device and precision of this process alone: where a run has several, the first searches and all train."""
        if self.fabric.world_size == 1:
            return self.fabric
        return open_fabric(precision_of(self.fabric), device=self.fabric.device)

    @property
    def chosen(self) -> str:
        """What the user chose about layers and axes, in words; empty if nothing."""
        return "; ".join(filter(None, (str(self.choices), *map(str, self.space.rules))))

    def settings(self) -> dict[str, str]:
        """Everything that decides the cut student, as text by name: two runs with the same are the same."""
        data = self.data
        found = {
            "model": _digest(self.model),
            "data": f"{data.name}: {len(data.train)} training images of {data.size}, {data.mean}, {data.std}",
            "augment": repr(data.augment),
            "budget": str(self.budget),
            "strategy": describe(self.strategy),
            "choices": repr(self.choices),
            "heads": self.heads.value,
            "branches": self.branches.value,
            "rules": ", ".join(sorted(self.rules)) or "none",
            "space": repr(self.space),
            "start": describe(self.start),
            "calibration": str(self.calibration),
            "seed": str(self.seed),
        }
        if self.pruning is not None:
            found["pruning"] = repr(self.pruning)
        if is_timed(self.budget):
            found["target"] = self.target.key
        return found


def default_blocks(budget: Budget) -> float:
    """Which part of the residual blocks may go if nobody says so: any where time is limited, else none.

    Narrow layers take little less time than wide ones, and removed ones none; docs/log.md has the numbers.
    """
    return 1.0 if is_timed(budget) else 0.0


def default_strategy(budget: Budget) -> Strategy:
    """How an architecture is found if nobody says so."""
    blocks = default_blocks(budget)
    return RemoveBlocks(DEFAULT_STRATEGY, most=blocks) if blocks else DEFAULT_STRATEGY


def _digest(model: nn.Module) -> str:
    """Class and SHA-256 of the weights."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{type(model).__name__} {found.hexdigest()[:16]}"
