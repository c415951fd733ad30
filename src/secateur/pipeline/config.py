"""The graph that a run works on: traced, untied if that is wanted, with the user's choices.

What the recovery begins with: the weights that the cut left, repaired, or none at all.

What a whole run gives back.

Everything one run of `compress` is asked to do, as frozen data."""

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur._batches import take
from secateur._kinds import settings
from secateur.architecture import Architecture
from secateur.cost.budget import Budget, format_cost, limits_latency
from secateur.cost.measure import LatencyCache
from secateur.cost.runtimes import OnnxRuntime, Target
from secateur.data.dataset import ImageData
from secateur.data.loaders import OwnData
from secateur.distill.match_features import MatchFeatures
from secateur.distill.objective import Objective
from secateur.errors import TrainingError
from secateur.export.formats import Format
from secateur.export.onnx_config import OnnxConfig
from secateur.graph._ledger import Rule
from secateur.graph.graph import ChannelGraph
from secateur.graph.selection import Selection
from secateur.graph.trace import HeadUnit, trace
from secateur.graph.untie import untie
from secateur.models.source import ModelSource
from secateur.pipeline.workspace import OnExisting
from secateur.prune.cut import Cut, Repair, RepairResult, cut
from secateur.prune.described_widths import DescribedWidths
from secateur.prune.repair import RecalibrateBatchNorm, Refit
from secateur.prune.verify import Verification
from secateur.prune.weight_pruning import WeightPruning
from secateur.report.run import MeasuredLatency, RunReport
from secateur.search.base import SearchResult, Strategy, data_frame, html_table, stable_repr
from secateur.search.candidates import Fastest
from secateur.search.depth import RemoveBlocks
from secateur.search.latency import WithinLatency
from secateur.search.ranking import Knapsack
from secateur.search.space import SearchSpace
from secateur.tasks.base import Task
from secateur.train.callbacks import Callbacks, TerminalProgress
from secateur.train.checkpoint import CheckpointPolicy, model_sha256
from secateur.train.config import TrainConfig
from secateur.train.device import Eager, Execution
from secateur.train.fit import Trained
from secateur.train.own_loop import Recover
from secateur.train.recipes import check_resettable, reset_weights_

if TYPE_CHECKING:
    from lightning_fabric import Fabric


LOGGER = logging.getLogger("secateur")
"""Receives one sentence for every step of a run, at level INFO."""

DEFAULT_REPAIRS: tuple[Repair, ...] = (Refit(), RecalibrateBatchNorm())
"""Refit what lost inputs to give what it gave before, then measure the batch norms anew."""

_MORE_IMAGES, _MORE_VALUES = 3072, 2**25
"""Further images for repairs that learn, and the numbers that these may have together."""


class Branches(Enum):
    """Which widths the branches of a residual stream may have."""

    TIED = "tied"
    """The width of the stream: every branch keeps the channels that the stream keeps."""
    UNTIED = "untied"
    """A width of its own: a narrower branch is added to its channels of the stream, see `secateur.graph.untie`."""


@dataclass(frozen=True, eq=False)
class CutInput:
    """A model that is to be cut.

    Attributes:
        original: The model as it was given.
        searched: The model with the weights that the search trained; the original itself if it trained none.
        graph: The channel graph of both.
        images: Calibration batches, normalized, on the models' device.
        seed: Random seed of new weights.
        draw_more: Returns batches of up to so many further training images, which neither scored nor judge.
    """

    original: nn.Module
    searched: nn.Module
    graph: ChannelGraph
    images: Sequence[Tensor]
    seed: int
    draw_more: Callable[[int], Sequence[Any]] = lambda _count: ()


class StudentInit(ABC):
    """How a cut model gets its first weights. Implementations are frozen dataclasses; fields are configuration."""

    @property
    @abstractmethod
    def done(self) -> str:
        """What was done to the student, as the name of a step."""

    @abstractmethod
    def check(self, model: nn.Module, train: TrainConfig) -> None:
        """Refuse a model or a recovery that it does not work with, before any computing.

        Raises:
            SecateurError: With the way out.
        """

    @abstractmethod
    def cut(self, uncut: CutInput, architecture: Architecture) -> Cut:
        """Return the student before any training; the cut is verified with the weights of the uncut model."""

    def settled(self, *, trains: bool) -> "StudentInit":
        """Return this with everything decided that depends on whether training follows."""
        del trains
        return self


@settings
class KeepWeights(StudentInit):
    """The student keeps the weights of its channels, and is repaired.

    If the search trained weights, it keeps those, and the repairs compare with the whole model that has them.

    Attributes:
        repairs: Repairs right after the cut, in order. None means `DEFAULT_REPAIRS`, and `MatchFeatures` after them if
            no training follows, which would do the same with more images.
    """

    repairs: Sequence[Repair] | None = None

    @property
    def done(self) -> str:
        """See `StudentInit.done`."""
        return "cut and repaired"

    def check(self, model: nn.Module, train: TrainConfig) -> None:
        """See `StudentInit.check`; every model is accepted."""

    def cut(self, uncut: CutInput, architecture: Architecture) -> Cut:
        """See `StudentInit.cut`."""
        given = DEFAULT_REPAIRS if self.repairs is None else tuple(self.repairs)
        repairs = [self._with_more_images(repair, uncut) for repair in given]
        return cut(uncut.searched, uncut.graph, architecture, calibration=uncut.images, repairs=repairs)

    def _with_more_images(self, repair: Repair, uncut: CutInput) -> Repair:
        """A repair that learns gets images of its own, up to 134 MB of them; those in closed form need few."""
        if not isinstance(repair, MatchFeatures) or repair.more:
            return repair
        leaves = [leaf for leaf in tree_leaves(take(uncut.images[0], slice(1))) if isinstance(leaf, Tensor)]
        values = sum(leaf.numel() for leaf in leaves)
        return replace(repair, more=tuple(uncut.draw_more(min(_MORE_IMAGES, _MORE_VALUES // max(values, 1)))))

    def settled(self, *, trains: bool) -> "KeepWeights":
        """See `StudentInit.settled`: with the repairs that are meant."""
        if self.repairs is not None:
            return self
        return KeepWeights(DEFAULT_REPAIRS if trains else (*DEFAULT_REPAIRS, MatchFeatures()))


@settings
class Reinitialize(StudentInit):
    """The student keeps the architecture only: its weights are initialized again and trained from there.

    The cut is made and verified with the original's weights. Then every module calls its ``reset_parameters()`` (or
    torch's other spelling, ``_reset_parameters()``): submodules before the module that holds them, which may initialize
    them in its own way. The same seed gives the same weights on every device.
    """

    @property
    def done(self) -> str:
        """See `StudentInit.done`."""
        return "cut, weights drawn anew"

    def check(self, model: nn.Module, train: TrainConfig) -> None:
        """See `StudentInit.check`.

        Raises:
            ModelError: If a module has parameters and no method to reset them.
            TrainingError: If there is no recovery.
        """
        if train.epochs == 0:
            raise TrainingError(
                "`train` must have epochs for a student from scratch, which knows nothing yet; got 0. Give it as "
                "many as the original had (--epochs), or let it keep its weights."
            )
        check_resettable(
            model, "init", "let the student keep its weights (without --from-scratch; in Python: init=KeepWeights())."
        )

    def cut(self, uncut: CutInput, architecture: Architecture) -> Cut:
        """See `StudentInit.cut`."""
        pruned = cut(uncut.original, uncut.graph, architecture)
        return dataclasses.replace(pruned, model=reset_weights_(pruned.model, uncut.seed))


@dataclass(frozen=True, eq=False)
class CutStudent:
    """A cut and repaired student, before any training.

    Attributes:
        original: The uncut model in eval mode, on the device of the run; a copy of the caller's.
        student: The cut and repaired one.
        graph: The graph it was cut by.
        search: The result of the search.
        verification: The comparison of sliced and masked model.
        repairs: What each repair did.
        described: What became of numbers that describe widths and are not read by the forward pass.
    """

    original: nn.Module
    student: nn.Module
    graph: ChannelGraph
    search: SearchResult
    verification: Verification
    repairs: tuple[RepairResult, ...]
    described: DescribedWidths = field(default_factory=DescribedWidths)


@dataclass(frozen=True, eq=False, repr=False)
class CompressResult:
    """A compressed model, how it came about and what was checked.

    Attributes:
        model: The compressed model in eval mode, on the device of the model that was given.
        graph: The channel graph of the original.
        search: The result of the search: architecture, costs, budget.
        verification: The proof that the sliced model equals the masked original.
        trained: The recovery, or None if there were no epochs; its model is masked if single weights were pruned.
        report: Every number: before and after, accuracy on the way, widths, checks, latency, provenance.
        folder: The artifact, or None if none was asked for.
        files: All files that were written.
        described: Numbers of the model that describe widths and that its forward pass does not read, such as
            ``num_features``: which ones follow the cut, and which are stale.
    """

    model: nn.Module
    graph: ChannelGraph
    search: SearchResult
    verification: Verification
    trained: Trained | None
    report: RunReport
    folder: Path | None = None
    files: tuple[Path, ...] = ()
    described: DescribedWidths = field(default_factory=DescribedWidths)

    def __repr__(self) -> str:
        head = repr(self.search).splitlines()[0].replace("SearchResult", "CompressResult")
        axes = [f"  axis {each.name}: {each.after} of {each.before} channels kept" for each in self.report.widths]
        return "\n".join((head, *_measured(self), *axes[:10], *(["  ..."] * (len(axes) > 10))))

    def _repr_html_(self) -> str:
        title, *lines = repr(self).splitlines()
        return html_table("; ".join((title, *map(str.strip, lines[:2]))), self._table())

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` with one row per axis: its name, and its channels before and after.

        Raises:
            ImportError: If pandas is not installed.
        """
        return data_frame(self._table())

    def _table(self) -> dict[str, list[object]]:
        widths = self.report.widths
        return {
            "axis": [width.name for width in widths],
            "before": [width.before for width in widths],
            "after": [width.after for width in widths],
        }

    @property
    def architecture(self) -> Architecture:
        """The kept channels of each axis."""
        return self.search.architecture

    @property
    def latency(self) -> tuple[MeasuredLatency, ...]:
        """Times of original and compressed model, measured in turns; those on the target of the run come first."""
        return self.report.latency

    @property
    def nonzero(self) -> int:
        """Parameters of the model that are not zero."""
        return self.report.after.weights

    @property
    def failed(self) -> tuple[str, ...]:
        """The failed checks in words; empty if all passed."""
        return self.report.failures


DEFAULT_STRATEGY: Strategy = Fastest()
"""Of the networks of several strategies and divisors the fastest that is near the best; docs/decisions.md says why."""

DEFAULT_SPACE = SearchSpace()
"""Every axis keeps at least a quarter, and the divisor is found by measuring."""

DEFAULT_TRAIN_CONFIG = TrainConfig(epochs=1, learning_rate=0.01)
"""A short recovery. The learning rate is low on purpose: a high one wipes out what the repairs restored."""

_RESTARTS = 2
"""How often a recovery that diverges begins again, each time with a tenth of the learning rate."""


def safe_config(train: TrainConfig, seed: int) -> TrainConfig:
    """Return the config of a training within a run: with the run's seed, and never ended by divergence."""
    return dataclasses.replace(train, seed=seed, restarts=train.restarts or _RESTARTS)


DEFAULT_OBJECTIVE = Objective(kd_weight=0.9, label_weight=0.1, feature_weight=10.0)
"""The teacher's probabilities, the labels with a small weight, and the teacher's last features at each resolution."""


@dataclass(frozen=True, eq=False)
class TrainResult:
    """A network that was trained or distilled, and what was measured.

    Attributes:
        model: In eval mode, on the device of the model that was given.
        trained: The training; None if it was a loop of the user's own.
        report: The network before and after, or teacher and student, side by side.
        folder: The artifact, or None.
        files: All files that were written.
    """

    model: nn.Module
    trained: Trained | None
    report: RunReport
    folder: Path | None = None
    files: tuple[Path, ...] = ()

    def __repr__(self) -> str:
        return "\n".join((f"TrainResult({self.report.model}; {self.report.strategy})", *_measured(self)))

    @property
    def failed(self) -> tuple[str, ...]:
        """The failed checks in words; empty if all passed."""
        return self.report.failures


def _measured(result: "CompressResult | TrainResult") -> list[str]:
    """Accuracy, latency, checks and folder of a run, one line each."""
    report = result.report
    lines = [
        f"test {report.metric.words}: {' -> '.join(f'{step.name} {step.score.text}' for step in report.steps)}",
        *(
            f"latency: {format_cost('latency_s', each.before[1])} -> {format_cost('latency_s', each.after[1])} in "
            f"{each.runtime} ({each.speedup[1]:.2f} times the speed)"
            for each in report.latency[:1]
        ),
        *(
            ["training did not help: no epoch was better than the network before it, which is kept"]
            if result.trained is not None and result.trained.best_epoch == 0
            else []
        ),
        f"{sum(check.passed for check in report.checks)} of {len(report.checks)} checks passed",
        *(f"FAILED: {failure}" for failure in result.failed),
        *([] if result.folder is None else [f"written to {result.folder}"]),
    ]
    return [f"  {line}" for line in lines]


@settings
class CutConfig:
    """What may be cut from a model, and how the cut model is made.

    Attributes:
        selection: Which layers may be cut, by name patterns.
        heads: Whether attention loses whole heads or dimensions of every head, see `secateur.trace`.
        branches: Whether the branches of a residual stream may be narrower than the stream.
        rules: What operations unknown to Secateur do to channels, see `secateur.trace`.
        allow_not_run: Whether channels may go that a part of the model may read which one image does not run.
        space: The allowed widths, in general and for single axes.
        init: The weights that the cut model begins with: `KeepWeights` (those of its channels, repaired) or
            `Reinitialize`, which needs as many epochs and as high a learning rate as the original had.
        weight_pruning: How single weights are chosen if the budget bounds ``nonzero``; None means `WeightPruning()`.
        flush_denormals: Whether denormal numbers among the weights become 0 before anything else, see
            `secateur.cost.count_denormals`. Outputs change by next to nothing, which is measured.
        calibration_images: Number of training images for scores and repairs; fewer if the data has fewer. 1024 are
            enough for layers of a few hundred channels, as every image gives one sample per position.
    """

    selection: Selection = Selection()
    heads: HeadUnit = HeadUnit.DIMENSION
    branches: Branches = Branches.TIED
    rules: Mapping[str, Rule] = field(default_factory=dict[str, Rule])
    allow_not_run: bool = False
    space: SearchSpace = DEFAULT_SPACE
    init: StudentInit = KeepWeights()
    weight_pruning: WeightPruning | None = None
    flush_denormals: bool = False
    calibration_images: int = 1024

    def trace(self, model: nn.Module, example: Any) -> ChannelGraph:
        """Return the channel graph of a model, in which only the selected layers may be cut."""
        graph = trace(model, example, heads=self.heads, rules=self.rules, allow_not_run=self.allow_not_run)
        return self.selection.apply(untie(model, graph) if self.branches is Branches.UNTIED else graph)

    def __str__(self) -> str:
        """What was selected about layers and axes, in words; empty if nothing was."""
        return "; ".join(filter(None, (str(self.selection), *map(str, self.space.rules))))


@settings
class RecoveryConfig:
    """How a cut model regains accuracy by distillation from the original.

    Attributes:
        train: Epochs, batch size, learning rate, optimizer; ``epochs=0`` repairs without training. `RunConfig.seed`
            replaces its seed.
        objective: The losses.
        execution: How both models are run, see `secateur.train.fit`; searches always run eagerly.
        recover: A training loop of your own that takes the place of all this, see `secateur.train.Recover`; None
            distills as the other fields say.
    """

    train: TrainConfig = DEFAULT_TRAIN_CONFIG
    objective: Objective = DEFAULT_OBJECTIVE
    execution: Execution = Eager()
    recover: Recover | None = None

    @property
    def trains(self) -> bool:
        """Whether the cut model is trained, by this or by a loop of your own."""
        return self.train.epochs > 0 or self.recover is not None


@settings
class RunConfig:
    """Where and how a run is computed, shown and recorded; nothing here changes what is computed, except the seed.

    Attributes:
        seed: Seed of everything random: initial weights, order and augmentation of images, dropout, searches.
        device: Where to compute; None means the accelerator if there is one.
        fabric: Used instead of ``device`` to run on several processes, see `secateur.train.open_group`. All processes
            call with the same arguments. The first one searches, cuts, writes to ``out`` and logs; all train.
        checkpoints: When searches and trainings write checkpoints, beside those at the ends of epochs; only with
            ``out``.
        callbacks: Shows searches that train and trainings.
        on_existing: What to do with an unfinished run beside ``out``.
        latency_cache: Stored measurements of latency; None means those of this machine in the user's cache folder.
        name: Name of the model in the report; empty means the name of its class.
        command: The exact command or call, for the report and secateur.json.
        times: Whether times are measured for the report; a bound on the latency is checked in any case.
        onnx: How the ONNX file among the exports is written: its opset, free height and width, float16, its outputs.
    """

    seed: int = 0
    device: torch.device | None = None
    fabric: "Fabric | None" = None
    checkpoints: CheckpointPolicy = CheckpointPolicy()
    callbacks: Callbacks = TerminalProgress()
    on_existing: OnExisting = OnExisting.ERROR
    latency_cache: LatencyCache | None = None
    name: str = ""
    command: str = ""
    times: bool = True
    onnx: OnnxConfig = OnnxConfig()


@dataclass(frozen=True, eq=False)
class Output:
    """What is written at the end of a run.

    Attributes:
        folder: The artifact.
        formats: Files for other runtimes.
        source: How the original model is built, or None if only the caller can build it.
        factory: What the artifact calls the caller's model then.
    """

    folder: Path
    formats: tuple[Format, ...]
    source: ModelSource | None
    factory: str

    @property
    def loading(self) -> str:
        """What `secateur.load` needs beside the folder; empty if nothing."""
        if self.source is None:
            return "factory=build"
        return "trust_source=True" if self.source.kind == "python" else ""


def describe_data(data: ImageData | OwnData) -> str:
    """Return what makes two data sets the same to a run, as text."""
    return f"{data.name}: {len(data.train)} training images of {data.size}, {data.mean}, {data.std}"


class LoggedRun:
    """A run that may have several processes, of which the first one logs."""

    fabric: "Fabric"

    def log(self, message: str) -> None:
        """Log one sentence, in the first of several processes."""
        if self.fabric.is_global_zero:
            LOGGER.info(message)


@dataclass(frozen=True, eq=False)
class Plan(LoggedRun):
    """One run of `compress`, checked and complete; see there for the fields."""

    model: nn.Module
    data: ImageData | OwnData
    task: Task
    budget: Budget
    strategy: Strategy
    cut: CutConfig
    recovery: RecoveryConfig
    target: Target
    output: Output | None
    run: RunConfig
    fabric: "Fabric"

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return self.fabric.device

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.run.name or type(self.model).__name__

    def settings(self) -> dict[str, str]:
        """Everything that decides the cut student, as text by name: two runs with the same settings are the same."""
        data, cut = self.data, self.cut
        found = {
            "model": f"{type(self.model).__name__} {model_sha256(self.model)[:16]}",
            "data": describe_data(data),
            "augment": repr(data.augment),
            "task": repr(self.task),
            "budget": str(self.budget),
            "strategy": stable_repr(self._strategy_anywhere),
            "selection": repr(cut.selection),
            "heads": cut.heads.value,
            "branches": cut.branches.value,
            "rules": ", ".join(sorted(cut.rules)) or "none",
            "space": repr(cut.space),
            "init": stable_repr(cut.init),
            "calibration_images": str(cut.calibration_images),
            "seed": str(self.run.seed),
        }
        if cut.allow_not_run:
            found["allow_not_run"] = "True"
        if cut.flush_denormals:
            found["flush_denormals"] = "yes"
        if cut.weight_pruning is not None:
            found["weight_pruning"] = repr(cut.weight_pruning)
        if limits_latency(self.budget):
            found["target"] = self.target.key
        elif isinstance(self.strategy, Fastest):
            # Without its version, which is not known where it is missing.
            found["target"] = f"{type(self.target).__name__}, threads {self.target.threads}, batch {self.target.batch}"
        return found

    @property
    def _strategy_anywhere(self) -> Strategy:
        """The strategy without the target, which is a setting of its own."""
        strategy = self.strategy
        return dataclasses.replace(strategy, target=OnnxRuntime()) if isinstance(strategy, Fastest) else strategy


def default_blocks(budget: Budget) -> float:
    """Return the fraction of the residual blocks that may be removed by default: all under a latency bound, else none.

    Narrow layers take little less time than wide ones, and removed layers take none; docs/log.md has the numbers.
    """
    return 1.0 if limits_latency(budget) else 0.0


def default_strategy(budget: Budget) -> Strategy:
    """Return the default strategy for a budget."""
    blocks = default_blocks(budget)
    return RemoveBlocks(Knapsack(), max_fraction=blocks) if blocks else DEFAULT_STRATEGY


def strategy_of_run(named: Strategy | None, budget: Budget, space: SearchSpace, target: Target) -> Strategy:
    """Return the strategy of a run: whatever the user left open is found by measuring.

    Args:
        named: The user's strategy. With an open divisor, the divisors are compared; None means the default.
        budget: A bound on latency is met by measuring anyway, see `WithinLatency`.
        space: The user's space.
        target: What is measured on.
    """
    strategy = default_strategy(budget) if named is None else named
    if isinstance(strategy, Fastest):
        return dataclasses.replace(strategy, target=target)
    # Training a supernet for every divisor would take days.
    fixed = space.divisor is not None or strategy.trains or isinstance(strategy, WithinLatency)
    return strategy if fixed or limits_latency(budget) else Fastest((strategy,), target, fewer_blocks=())
