"""A demonstration on the digits of scikit-learn: train a small network, then compress it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from secateur._kinds import checked
from secateur.data.dataset import ImageData
from secateur.data.load import load_data
from secateur.distill.objective import Objective
from secateur.export.formats import Format
from secateur.models.source import ModelSource, load_model
from secateur.pipeline.compress import compress
from secateur.pipeline.config import LOGGER, CompressResult, RecoveryConfig, RunConfig
from secateur.pipeline.workspace import OnExisting, check_output
from secateur.search.base import Strategy
from secateur.train.callbacks import Callbacks, LoopCallbacks
from secateur.train.config import RunSettings, TrainConfig
from secateur.train.fit import Trained, fit


@dataclass(frozen=True)
class Demo:
    """Settings of the demonstration.

    Attributes:
        budget: Of the compressed network.
        strategy: How its architecture is found; None compares several, see `secateur.Fastest`.
        teaching: Training of the original, from nothing, on the labels.
        recovery: Distillation of the cut network.
        label_smoothing: Of the original's training.
    """

    budget: str = "macs=30%"
    strategy: Strategy | None = None
    teaching: TrainConfig = TrainConfig(epochs=30, batch_size=64, learning_rate=0.05)  # noqa: RUF009
    recovery: TrainConfig = TrainConfig(epochs=20, batch_size=64, learning_rate=0.02)  # noqa: RUF009
    label_smoothing: float = 0.05


@checked
def demo(
    out: Path | str,
    *,
    settings: Demo = Demo(),
    export: str | Sequence[Format | str] = (Format.ONNX,),
    run: RunConfig = RunConfig(),  # noqa: B008 - frozen
) -> CompressResult:
    """Train a small residual network on handwritten digits, compress it, verify, export and report.

    Args:
        out: Folder for the artifact; an older artifact there, finished or not, is replaced.
        settings: See `Demo`.
        export: Files for other runtimes.
        run: Seed, callbacks and command; the other fields have no effect.

    Raises:
        ArtifactError: If the folder holds something else.
        DataError: If scikit-learn is not installed.
    """
    check_output(Path(out))
    data = load_data("digits", seed=run.seed)
    fresh, source = load_model("digits_resnet_wide", seed=run.seed)
    epochs = settings.teaching.epochs
    LOGGER.info(f"Training {source.name} on {len(data.train)} digits of {data.name}, {epochs} epochs.")
    taught = _teach(fresh, data, settings, run.seed, _Renamed("teach", run.callbacks))
    LOGGER.info(f"Trained. Now compressing it to {settings.budget}.")
    return compress(
        taught.model,
        data,
        settings.budget,
        strategy=settings.strategy,
        recovery=RecoveryConfig(train=settings.recovery),
        out=out,
        export=export,
        source=ModelSource.from_json(source.to_json()),
        run=RunConfig(
            seed=run.seed,
            callbacks=run.callbacks,
            on_existing=OnExisting.OVERWRITE,
            name=source.name,
            command=run.command,
        ),
    )


@dataclass(frozen=True)
class _Renamed:
    """Callbacks that see a loop by another name: two trainings in one log would overwrite each other."""

    loop: str
    inner: Callbacks

    def start(self, loop: str, *, epochs: int, steps: int, done: int) -> AbstractContextManager[LoopCallbacks]:
        del loop
        return self.inner.start(self.loop, epochs=epochs, steps=steps, done=done)


def _teach(fresh: nn.Module, data: ImageData, settings: Demo, seed: int, callbacks: Callbacks) -> Trained:
    return fit(
        fresh,
        data.train,
        train=replace(settings.teaching, seed=seed),
        objective=Objective.of_labels(label_smoothing=settings.label_smoothing),
        augment=data.augment,
        validation=data.validation,
        run=RunSettings(callbacks=callbacks),
    )
