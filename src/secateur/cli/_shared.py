"""The flags that `compress` and `distill` share, in groups, and what they are turned into."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.cli import _options as options
from secateur.cli._boundary import threads
from secateur.cli._options import OptimiserName, PrecisionName
from secateur.cli._saying import silent, tell
from secateur.cli._together import processes_of
from secateur.errors import ArtifactError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from secateur.cli._choices import Variation
    from secateur.cli._inputs import Inputs
    from secateur.pipeline import Format, Leftover
    from secateur.train import Progress, Saving, Schedule


@dataclass(frozen=True, kw_only=True)
class ImageFlags:
    """Which images, and whose code may run."""

    trust_source: options.TrustSource = False
    limit: options.Limit = None
    image_size: options.ImageSize = None
    mean: options.Mean = None
    std: options.Std = None
    validation_fraction: options.ValidationFraction = 0.1

    def inputs(self, model: str, weights: Path | None, data: str, seed: int) -> "Inputs":
        """A model with its images, loaded when they are asked for.

        Raises:
            DataError: If mean or standard deviation are no numbers.
        """
        from secateur.cli import _choices
        from secateur.cli._inputs import Inputs

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
    optimizer: options.Optimiser = OptimiserName.SGD
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
    ) -> "Schedule":
        """The course of the training.

        Raises:
            TrainingError: If a number is out of range.
        """
        from secateur.cli import _choices
        from secateur.train import Schedule

        return Schedule(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_fraction=self.warmup,
            optimiser=_choices.optimiser_of(self.optimizer, self.weight_decay),
            ema_decay=self.ema,
            accumulate=self.accumulate,
            clip_norm=self.clip_norm,
            precision=_choices.precision_of(precision),
            seed=seed,
        )

    @property
    def variation(self) -> "Variation":
        """What is done to training images beyond what is usual for them.

        Raises:
            DataError: See `secateur.cli._choices.variation_of`.
        """
        from secateur.cli import _choices

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
    def leftover(self) -> "Leftover":
        """What to do with an interrupted run.

        Raises:
            ArtifactError: If two things are asked for.
        """
        from secateur.pipeline import Leftover

        if self.resume and self.restart:
            raise ArtifactError(
                "`--resume` goes on with an interrupted run and `--restart` removes it; give one of them."
            )
        return Leftover.RESUME if self.resume else Leftover.DISCARD if self.restart else Leftover.REFUSE

    @property
    def formats(self) -> "tuple[Format, ...]":
        """Files for other runtimes.

        Raises:
            ExportError: See `secateur.cli._choices.formats_of`.
        """
        from secateur.cli import _choices

        return _choices.formats_of(self.export)

    @property
    def saving(self) -> "Saving":
        """When checkpoints are written within epochs.

        Raises:
            TrainingError: If the time is not positive.
        """
        from secateur.cli import _choices

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
    def processes(self, schedule: "Schedule") -> "Generator[Fabric]":
        """This process with its device and threads, and those that torchrun has started with it.

        Raises:
            TrainingError: If this machine has no such device, or the processes cannot work together.
        """
        from secateur.cli import _choices

        device = _choices.device_of(self.device)
        with threads(self.thread_count), processes_of(device, schedule.precision) as fabric:
            yield fabric

    @property
    def progress(self) -> "Progress":
        """How searches and trainings are shown.

        Raises:
            TrainingError: If the folder or the package for TensorBoard is missing.
        """
        from secateur.cli import _choices

        return _choices.progress_of(self.quiet, self.tensorboard)

    @property
    def tell(self) -> Callable[[str], None]:
        """What receives one sentence per step."""
        return silent if self.quiet else tell
