"""A model and its images, from the words of the command line.

From the flags that say how an architecture is found to a strategy.

The flags that `compress` and `distill` share, in groups, and what they are turned into.

The processes of a command: one, or as many as torchrun has started."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur._runtime import processes
from secateur.cli import options
from secateur.cli._words import importance_of
from secateur.cli.options import (
    CombinationName,
    ImportanceName,
    OptimiserName,
    PrecisionName,
    SearchedName,
    StrategyName,
)
from secateur.cli.output import silent, tell, threads
from secateur.data.dataset import ImageData, calibration
from secateur.data.load import load_data
from secateur.errors import ArtifactError, ChoiceError, DataError
from secateur.export.artifact import is_artifact
from secateur.pipeline.load import LoadedModel, default_size, load_any

if TYPE_CHECKING:
    import torch
    from lightning_fabric import Fabric

    from secateur.cli._words import Variation
    from secateur.export.formats import Format
    from secateur.nas.common import Depths, Widths
    from secateur.nas.swp import SWP
    from secateur.nas.tas import TAS
    from secateur.pipeline.workspace import OnExisting
    from secateur.search.base import Strategy
    from secateur.train.callbacks import Progress
    from secateur.train.checkpoint import CheckpointPolicy
    from secateur.train.config import TrainConfig
    from secateur.train.device import Precision


@dataclass(frozen=True)
class Inputs:
    """What ``--model``, ``--weights``, ``--data`` and the flags about images say; loaded when first used.

    An artifact knows how its images are to be normalized and sized, so it is opened before the data; another model is
    built with the data's classes and channels, so it is opened after.
    """

    model: str
    weights: Path | None
    data: str | None
    image_size: int | None = None
    trust_source: bool = False
    seed: int = 0
    limit: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    validation_fraction: float = 0.1

    @cached_property
    def images(self) -> ImageData:
        """The image set."""
        assert self.data is not None
        size, mean, std = self.image_size, self.mean, self.std
        if is_artifact(self.model) and self.opened.manifest is not None:
            recipe = self.opened.manifest.recipe
            mean, std = mean or recipe.mean or None, std or recipe.std or None
            _, height, width = recipe.input_shape
            size = size or (height if height == width else None)
        return load_data(
            self.data,
            limit=self.limit,
            validation_fraction=self.validation_fraction,
            seed=self.seed,
            image_size=size,
            mean=mean,
            std=std,
        )

    @cached_property
    def opened(self) -> LoadedModel:
        """The model."""
        return self.opened_for(self.images if self.data is not None and not is_artifact(self.model) else None)

    def opened_for(self, images: ImageData | None) -> LoadedModel:
        """The model for an image set: with its classes and channels, unless it is an artifact."""
        sized = None if is_artifact(self.model) else images
        return load_any(
            self.model,
            weights=self.weights,
            num_classes=None if sized is None else len(sized.classes),
            in_channels=None if sized is None else sized.size[0],
            trust_source=self.trust_source,
            seed=self.seed,
        )

    def example(self, n: int) -> Tensor:
        """A few images: real ones if there is data, else noise of the size that the model was made for."""
        if self.data is not None:
            return calibration(self.images.train, n, seed=self.seed)[0][0]
        channels, height, width = default_size(self.opened)
        if self.image_size is not None:
            height = width = self.image_size
        if min(channels, height, width) < 1:
            raise DataError(f"`--image-size` must be positive; got {height} x {width}. Say --image-size 224.")
        return torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(self.seed))


_FLAGS: Mapping[str, tuple[str, frozenset[StrategyName]]] = {
    "epochs": ("--search-epochs", frozenset({StrategyName.TAS, StrategyName.SWP})),
    "over": ("--search-over", frozenset({StrategyName.TAS, StrategyName.SWP})),
    "learning_rate": ("--search-learning-rate", frozenset({StrategyName.TAS, StrategyName.SWP})),
    "candidates": ("--search-candidates", frozenset({StrategyName.SWP})),
    "combination": ("--combine", frozenset({StrategyName.SWP})),
    "cuts": ("--stage-end", frozenset({StrategyName.SWP})),
    "ray": ("--ray", frozenset({StrategyName.SWP})),
}
"""The flag of each field of `Searching`, and the strategies that it has an effect on."""


@dataclass(frozen=True)
class Searching:
    """What the flags say about a search that learns; None where they say nothing.

    Attributes:
        epochs: Of the search.
        over: What is searched.
        learning_rate: Of the weights.
        candidates: Judged in every stage.
        combination: How one of every stage is chosen.
        cuts: Modules that end a stage.
        ray: Where candidates are judged, as `secateur.workers.OnRay` has it.
    """

    epochs: int | None = None
    over: SearchedName | None = None
    learning_rate: float | None = None
    candidates: int | None = None
    combination: CombinationName | None = None
    cuts: tuple[str, ...] | None = None
    ray: str | None = None

    def check(self, name: StrategyName) -> None:
        """Refuse flags without an effect.

        Raises:
            ChoiceError: With the strategies that they have one on.
        """
        for part in fields(self):
            flag, strategies = _FLAGS[part.name]
            if getattr(self, part.name) is not None and name not in strategies:
                raise ChoiceError(
                    f"`{flag}` must go with --strategy {' or '.join(sorted(strategies))}; got {name.value}. "
                    "Leave it out, or say another strategy."
                )


def strategy_of(
    name: StrategyName,
    importance: ImportanceName | None,
    removed_blocks: float | None = None,
    searching: Searching = Searching(),
    usual_blocks: float = 0.0,
) -> Strategy:
    """The strategy of a name, with an importance or with its usual one.

    Args:
        name: Of the strategy for widths.
        importance: Which channels stay; None for its usual one.
        removed_blocks: Largest fraction of the residual blocks that may go, 0 for none; None for the usual one.
        searching: For a search that learns.
        usual_blocks: Of a strategy that does not search depths itself.

    Raises:
        ChoiceError: If a flag has no effect on this strategy.
    """
    from secateur.nas.swp import SWP
    from secateur.nas.tas import TAS
    from secateur.search.depth import RemoveBlocks

    searching.check(name)
    learning = {StrategyName.TAS: TAS, StrategyName.SWP: SWP}
    if name not in learning:
        widths, blocks = _widths_of(name, importance), usual_blocks if removed_blocks is None else removed_blocks
        return RemoveBlocks(widths, most=blocks) if blocks else widths
    if removed_blocks:
        raise ChoiceError(
            f"`--remove-blocks` must be left out with --strategy {name.value}, which searches depths itself; got "
            f"{removed_blocks:g}. Say --search-over depths, or both."
        )
    found = _tas_of(searching) if name is StrategyName.TAS else _swp_of(searching)
    return found if importance is None else replace(found, importance=importance_of(importance))


def _tas_of(searching: Searching) -> TAS:
    from secateur.nas.tas import TAS

    widths, depths = _over(searching)
    return TAS(widths=widths, depths=depths, schedule=_schedule(searching, TAS().schedule))


def _swp_of(searching: Searching) -> SWP:
    from secateur.nas.swp import SWP
    from secateur.nas.swp_evolution import Evolution
    from secateur.nas.swp_knapsack import ExactKnapsack
    from secateur.workers import InProcess, OnRay

    usual, (widths, depths) = SWP(), _over(searching)
    return SWP(
        widths=widths,
        depths=depths,
        cuts=searching.cuts,
        schedule=_schedule(searching, usual.schedule),
        candidates=usual.candidates if searching.candidates is None else searching.candidates,
        combination=Evolution() if searching.combination is CombinationName.EVOLUTION else ExactKnapsack(),
        workers=InProcess() if searching.ray is None else OnRay(searching.ray),
    )


def _over(searching: Searching) -> tuple[Widths | None, Depths | None]:
    from secateur.nas.common import Depths, Widths

    return (
        None if searching.over is SearchedName.DEPTHS else Widths(),
        Depths() if searching.over in (SearchedName.DEPTHS, SearchedName.BOTH) else None,
    )


def _schedule(searching: Searching, usual: TrainConfig) -> TrainConfig:
    given = {"epochs": searching.epochs, "learning_rate": searching.learning_rate}
    return replace(usual, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def _widths_of(name: StrategyName, importance: ImportanceName | None) -> Strategy:
    from secateur.search.knapsack import Knapsack
    from secateur.search.pca import Activations, PCASlimming
    from secateur.search.ranking import GlobalImportance, Uniform

    usual: Knapsack | PCASlimming | GlobalImportance | Uniform = {
        StrategyName.KNAPSACK: Knapsack(),
        StrategyName.PCA: PCASlimming(),
        StrategyName.PCA_ACTIVATIONS: PCASlimming(source=Activations()),
        StrategyName.GLOBAL: GlobalImportance(),
        StrategyName.UNIFORM: Uniform(),
    }[name]  # TAS and SWP are no strategies for widths alone.
    return usual if importance is None else replace(usual, importance=importance_of(importance))


@dataclass(frozen=True, kw_only=True)
class ImageFlags:
    """Which images, and whose code may run."""

    trust_source: options.TrustSource = False
    limit: options.Limit = None
    image_size: options.ImageSize = None
    mean: options.Mean = None
    std: options.Std = None
    validation_fraction: options.ValidationFraction = 0.1

    def inputs(self, model: str, weights: Path | None, data: str, seed: int) -> Inputs:
        """A model with its images, loaded when they are asked for.

        Raises:
            DataError: If mean or standard deviation are no numbers.
        """
        from secateur.cli import _words as _choices

        return Inputs(
            model,
            weights,
            data,
            image_size=self.image_size,
            trust_source=self.trust_source,
            seed=seed,
            limit=self.limit,
            mean=_choices.numbers_of(self.mean, "--mean"),
            std=_choices.numbers_of(self.std, "--std"),
            validation_fraction=self.validation_fraction,
        )


@dataclass(frozen=True, kw_only=True)
class TrainingFlags:
    """How a student learns, beside the losses."""

    warmup: options.Warmup = 0.05
    optimizer: options.Optimizer = OptimiserName.SGD
    weight_decay: options.WeightDecay = None
    ema: options.Ema = None
    accumulate: options.Accumulate = 1
    clip_norm: options.ClipNorm = None
    auto_augment: options.AutoAugment = None
    erase: options.Erase = 0.0
    mixup: options.Mixup = 0.0
    cutmix: options.Cutmix = 0.0
    label_smoothing: options.LabelSmoothing = 0.0
    temperature: options.Temperature = 4.0

    def schedule(
        self, *, epochs: int, batch_size: int, learning_rate: float, precision: PrecisionName, seed: int
    ) -> TrainConfig:
        """The course of the training.

        Raises:
            TrainingError: If a number is out of range.
        """
        from secateur.cli import _words as _choices
        from secateur.train.config import TrainConfig

        return TrainConfig(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_fraction=self.warmup,
            optimizer=_choices.optimizer_of(self.optimizer, self.weight_decay),
            ema_decay=self.ema,
            accumulate=self.accumulate,
            clip_norm=self.clip_norm,
            precision=_choices.precision_of(precision),
            seed=seed,
        )

    @property
    def variation(self) -> Variation:
        """What is done to training images beyond what is usual for them.

        Raises:
            DataError: See `secateur.cli._choices.variation_of`.
        """
        from secateur.cli import _words as _choices

        return _choices.variation_of(self.auto_augment, self.erase, self.mixup, self.cutmix)


@dataclass(frozen=True, kw_only=True)
class WorkFlags:
    """What is written, and what becomes of an interrupted run."""

    export: options.Export = "onnx"
    resume: options.Resume = False
    restart: options.Restart = False
    checkpoint_minutes: options.CheckpointMinutes = 10.0
    checkpoint_steps: options.CheckpointSteps = None
    seed: options.Seed = 0

    @property
    def leftover(self) -> OnExisting:
        """What to do with an interrupted run.

        Raises:
            ArtifactError: If two things are asked for.
        """
        from secateur.pipeline.workspace import OnExisting

        if self.resume and self.restart:
            raise ArtifactError(
                "`--resume` goes on with an interrupted run and `--restart` removes it; give one of them."
            )
        return OnExisting.RESUME if self.resume else OnExisting.DISCARD if self.restart else OnExisting.REFUSE

    @property
    def formats(self) -> tuple[Format, ...]:
        """Files for other runtimes.

        Raises:
            ExportError: See `secateur.cli._choices.formats_of`.
        """
        from secateur.cli import _words as _choices

        return _choices.formats_of(self.export)

    @property
    def saving(self) -> CheckpointPolicy:
        """When checkpoints are written within epochs.

        Raises:
            TrainingError: If the time is not positive.
        """
        from secateur.cli import _words as _choices

        return _choices.saving_of(self.checkpoint_minutes, self.checkpoint_steps)


@dataclass(frozen=True, kw_only=True)
class MachineFlags:
    """Where it runs, and what it says meanwhile."""

    device: options.Device = "auto"
    thread_count: options.Threads = None
    tensorboard: options.TensorBoard = None
    quiet: options.Quiet = False
    debug: options.Debug = False

    @contextmanager
    def processes(self, schedule: TrainConfig) -> Generator[Fabric]:
        """This process with its device and threads, and those that torchrun has started with it.

        Raises:
            TrainingError: If this machine has no such device, or the processes cannot work together.
        """
        from secateur.cli import _words as _choices

        device = _choices.device_of(self.device)
        with threads(self.thread_count), processes_of(device, schedule.precision) as fabric:
            yield fabric

    @property
    def progress(self) -> Progress:
        """How searches and trainings are shown.

        Raises:
            TrainingError: If the folder or the package for TensorBoard is missing.
        """
        from secateur.cli import _words as _choices

        return _choices.progress_of(self.quiet, self.tensorboard)

    @property
    def tell(self) -> Callable[[str], None]:
        """What receives one sentence per step."""
        return silent if self.quiet else tell


@contextmanager
def processes_of(device: torch.device | None, precision: Precision | None) -> Generator[Fabric]:
    """The Fabric of this process and of those that were started with it.

    Args:
        device: None for the accelerator if there is one.
        precision: None for the best that the device has.

    Raises:
        TrainingError: If the processes cannot work together.
    """
    from secateur.train.device import open_fabric
    from secateur.train.distributed import open_group

    if processes() == 1:
        yield open_fabric(precision, device=device)
        return
    import torch

    yield open_group(precision, device=device)
    # Not after an error: the others would be waited for, who wait for this one.
    torch.distributed.destroy_process_group()
