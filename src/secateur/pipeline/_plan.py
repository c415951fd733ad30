"""Everything one run of `compress` is asked to do, as frozen data."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import nn

from secateur.cost import Budget
from secateur.data import ImageData
from secateur.distill import Objective
from secateur.graph import Choices, HeadUnit
from secateur.graph.rules import Rule
from secateur.latency import Cache, OnnxRuntime, Target
from secateur.models import ModelSource
from secateur.pipeline._formats import Format
from secateur.pipeline._start import Start
from secateur.cost._budget import is_timed
from secateur.pipeline._traced import Branches
from secateur.pipeline._work import Leftover
from secateur.search import Knapsack, SearchSpace, Shallower, Strategy, describe
from secateur.sparsity import WeightPruning
from secateur.train import Eager, Execution, Progress, Saving, Schedule, open_fabric, precision_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric

STRATEGY: Strategy = Knapsack()
"""The strategy that lost least in benchmarks/heal.py."""

SPACE = SearchSpace(min_kept_fraction=0.25)
"""Every axis keeps at least a quarter: no importance can tell how a layer that all but vanishes will be missed."""

GENTLE = Schedule(epochs=1, learning_rate=0.01)
"""A short recovery. The rate is low on purpose: a high one wipes out what healing restored."""

ALIGNED = Objective(kd_weight=0.9, label_weight=0.1, feature_weight=10.0)
"""The teacher's probabilities, a little of the labels, and the teacher's features at the last layer of each size."""


NO_RULES: Mapping[str, Rule] = MappingProxyType({})
"""Only the built-in ones."""

EVERYTHING = Choices()
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
    leftover: Leftover


@dataclass(frozen=True, eq=False)
class Plan:
    """One run. See `compress` for the fields."""

    model: nn.Module
    data: ImageData
    budget: Budget
    strategy: Strategy
    choices: Choices
    heads: HeadUnit
    branches: Branches
    rules: Mapping[str, Rule]
    space: SearchSpace
    schedule: Schedule
    objective: Objective
    start: Start
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
    saving: Saving = Saving()  # noqa: RUF009 - frozen
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


def usual_blocks(budget: Budget) -> float:
    """Which part of the residual blocks may go if nobody says so: any where time is limited, else none.

    Narrow layers take little less time than wide ones, and removed ones none; docs/log.md has the numbers.
    """
    return 1.0 if is_timed(budget) else 0.0


def usual_strategy(budget: Budget) -> Strategy:
    """How an architecture is found if nobody says so."""
    blocks = usual_blocks(budget)
    return Shallower(STRATEGY, most=blocks) if blocks else STRATEGY


def _digest(model: nn.Module) -> str:
    """Class and SHA-256 of the weights."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{type(model).__name__} {found.hexdigest()[:16]}"
