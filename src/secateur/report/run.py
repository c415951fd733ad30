"""The content of a report as plain frozen data, which the pipeline fills in; and Performance Efficiency."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import truediv

from secateur.search.base import html_table
from secateur.search.history import JudgedStage, SearchEpoch
from secateur.tasks.base import Metric, Score
from secateur.tasks.classification import TOP1
from secateur.tasks.outcomes import Answers, ClassChange, PairedTest


def _nothing() -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class Measured:
    """The measured numbers of one model.

    Attributes:
        macs: Multiply-accumulates for one input.
        params: Parameters.
        size_bytes: Size of its weights file, or None.
        score: Score on the test images, or None.
        nonzero: Parameters that are not zero; None means all of them.
    """

    macs: int
    params: int
    size_bytes: int | None = None
    score: Score | None = None
    nonzero: int | None = None

    @property
    def weights(self) -> int:
        """Parameters that are not zero."""
        return self.params if self.nonzero is None else self.nonzero


@dataclass(frozen=True)
class MeasuredLatency:
    """Time of one forward pass before and after, measured in turns.

    Attributes:
        runtime: Such as ``onnxruntime 1.31``.
        threads: Threads used.
        batch_size: Samples per pass.
        rounds: Pairs of measurements.
        before: First quartile, median, third quartile of the original, in seconds.
        after: First quartile, median, third quartile of the compressed model, in seconds.
        speedup: First quartile, median, third quartile of original time / compressed time, pair by pair.
        clock: The clock, such as ``processor time``.
    """

    runtime: str
    threads: int
    batch_size: int
    rounds: int
    before: tuple[float, float, float]
    after: tuple[float, float, float]
    speedup: tuple[float, float, float]
    clock: str


@dataclass(frozen=True)
class LayerWidth:
    """The number of channels of one axis before and after."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs before and after.

    Attributes:
        name: Qualified name of the module; "" is the model itself.
        macs: Multiply-accumulates for one input, before and after.
        seconds: Time of its operations in one pass, before and after; None if it was not measured.
    """

    name: str
    macs: tuple[int, int]
    seconds: tuple[float, float] | None = None


@dataclass(frozen=True)
class FrozenAxis:
    """An axis that was not cut, and why, as a sentence."""

    name: str
    channels: int
    reason: str


@dataclass(frozen=True)
class BlockFate:
    """A residual block: whether it was removed and, if it could not be, why, as a sentence."""

    name: str
    removed: bool
    kept_because: str = ""


@dataclass(frozen=True)
class TrainedEpoch:
    """One epoch of the recovery: the mean training loss and the validation score, if measured.

    Epoch 0 is the student before training, which has no loss.
    """

    epoch: int
    loss: float | None
    score: float | None = None


@dataclass(frozen=True)
class Step:
    """The score after one step: of the original, after the cut, after repairs, after distillation.

    Attributes:
        name: The step.
        score: The score on the test images.
        answers: Of a classifier its answers on them, to compare the steps image by image; else None.
    """

    name: str
    score: Score
    answers: Answers | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Check:
    """One comparison of two ways to compute the same outputs.

    Attributes:
        name: The comparison, such as ``Sliced model = masked original``.
        passed: Whether it held.
        max_abs: Largest absolute difference, or None if nothing was computed.
        max_rel: Largest absolute difference / the largest output.
        tolerance: The bound on ``max_rel``; 0 means bit for bit.
        detail: One more sentence, such as the batch sizes.
    """

    name: str
    passed: bool
    max_abs: float | None = None
    max_rel: float | None = None
    tolerance: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class ExportedFile:
    """An exported file for another runtime.

    Attributes:
        name: Its name, or that of the one to open if there are several.
        size_bytes: Size of all its files together.
        difference: Largest absolute difference from the model's outputs / the largest of them; None if the file
            computes with other numbers, so that only answers can be compared.
        accuracy: Accuracy of the file itself, or None.
        float_accuracy: Accuracy of the float model in the same runtime, on the same images.
        agreement: Fraction of images for which both predict the same class.
        latency: Latency of the float file (before) and of this one (after), or None.
    """

    name: str
    size_bytes: int
    difference: float | None = None
    accuracy: Score | None = None
    float_accuracy: Score | None = None
    agreement: float | None = None
    latency: MeasuredLatency | None = None


@dataclass(frozen=True)
class Picture:
    """A small picture: what it shows, and its content as a ``data:`` address."""

    name: str
    uri: str


@dataclass(frozen=True)
class ClassColor:
    """A class as pictures show it.

    Attributes:
        index: Of the class; -1 for pixels that do not count.
        name: For people.
        color: As CSS has it, such as ``#e6194b``.
    """

    index: int
    name: str
    color: str


@dataclass(frozen=True)
class PictureRow:
    """One test image as the labels, the original and the compressed model see it.

    Attributes:
        pictures: In this order.
        classes: Those that at least one of the pictures shows; none where pictures have no classes.
    """

    pictures: tuple[Picture, ...]
    classes: tuple[ClassColor, ...] = ()


@dataclass(frozen=True)
class FlippedImage:
    """A test image that just one of the two models gets right.

    Attributes:
        label: Its class.
        before: What the original says.
        after: What the compressed model says.
        png: The image as a PNG in base64.
    """

    label: str
    before: str
    after: str
    png: str


@dataclass(frozen=True)
class RunReport:
    """Everything on the page.

    Attributes:
        model: Name of the model.
        data: Name of the data.
        strategy: How the architecture was found.
        budget: What was asked for.
        choices: What was chosen about layers and axes, in words.
        before: The original.
        after: The compressed model.
        latency: Measured times; the first is the one in the headline.
        steps: Scores on the way.
        widths: Channels of every prunable axis, in order of execution.
        layers: What every layer costs, in order of execution.
        other_seconds: Time of what belongs to no layer, before and after; None if it was not measured.
        frozen: What was left whole, and why.
        blocks: The residual blocks of the model, in order of execution.
        search: A search that learns, epoch by epoch; empty for all others.
        stages: Stages of a stage-wise search; empty for all others.
        fairness: How often the channel trained least was trained by it, per time of the one trained most; or None.
        macs_limit: The budget's bound on the MACs / MACs of the original, or None.
        training: The recovery, epoch by epoch.
        original_validation_score: Of the original on the same validation images as ``training``; drawn
            as a line across the curve.
        pictures: A few test images with boxes, masks or images of both models.
        exports: Files for other runtimes.
        checks: What was verified.
        notes: Further sentences the reader must know.
        warnings: Those of the notes that cast doubt on the result; they come first on the page.
        paired: Original and compressed model on the same test images; None for other tasks.
        classes: What each class lost or gained.
        confusions: (class, taken for, images before, images after) of the confusions that changed most.
        flips: Some images that just one of both gets right.
        sensitivity: (layer, kept fraction, distance of the outputs) where that layer alone is cut as it was.
        input_size: Channels, height, width of an input; empty if it is no single image.
        loading: What `secateur.load` needs beside the folder; empty if nothing.
        compresses: Whether the run is to make the model smaller; if not, there is no Performance Efficiency.
        command: The exact command or call.
        seed: Its seed.
        versions: Package name to version.
        machine: The machine in words.
        date: ISO 8601.
    """

    model: str
    before: Measured
    after: Measured
    data: str = ""
    strategy: str = ""
    budget: str = ""
    choices: str = ""
    latency: tuple[MeasuredLatency, ...] = ()
    steps: tuple[Step, ...] = ()
    widths: tuple[LayerWidth, ...] = ()
    layers: tuple[LayerCost, ...] = ()
    other_seconds: tuple[float, float] | None = None
    frozen: tuple[FrozenAxis, ...] = ()
    blocks: tuple[BlockFate, ...] = ()
    search: tuple[SearchEpoch, ...] = ()
    stages: tuple[JudgedStage, ...] = ()
    fairness: float | None = None
    macs_limit: float | None = None
    training: tuple[TrainedEpoch, ...] = ()
    original_validation_score: float | None = None
    pictures: tuple[PictureRow, ...] = ()
    exports: tuple[ExportedFile, ...] = ()
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()
    compresses: bool = True
    loading: str = ""
    warnings: tuple[str, ...] = ()
    paired: PairedTest | None = None
    classes: tuple[ClassChange, ...] = ()
    confusions: tuple[tuple[str, str, int, int], ...] = ()
    flips: tuple[FlippedImage, ...] = ()
    sensitivity: tuple[tuple[str, float, float], ...] = ()
    input_size: tuple[int, ...] = ()
    command: str = ""
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=_nothing)
    machine: Mapping[str, str] = field(default_factory=_nothing)
    date: str = ""

    def _repr_html_(self) -> str:
        """The numbers before and after as a table, for notebooks. `write_report` writes the whole page."""
        both = (self.before, self.after)
        columns: dict[str, list[str]] = {
            "": ["original", "compressed"],
            "MACs": [f"{each.macs:,}" for each in both],
            "parameters": [f"{each.params:,}" for each in both],
        }
        if self.latency:
            first = self.latency[0]
            columns[f"ms, {first.runtime}"] = [f"{1000 * times[1]:.3f}" for times in (first.before, first.after)]
        if scored := next((each.score for each in both if each.score), None):
            columns[scored.metric.name] = [each.score.text if each.score else "" for each in both]
        return html_table(f"{self.model}, {self.budget}" if self.budget else self.model, columns)

    @property
    def failures(self) -> tuple[str, ...]:
        """The failed checks in words; empty if all passed."""
        return tuple(f"{check.name}: {check.detail}" for check in self.checks if not check.passed)

    @property
    def recovered(self) -> bool:
        """Whether the last step has a better score than one between it and the original."""
        keys = [step.score.metric.key(step.score.value) for step in self.steps]
        return len(keys) > 2 and keys[-1] > min(keys[1:-1])

    @property
    def metric(self) -> Metric:
        """What the scores are."""
        scores = (self.after.score, self.before.score, *(step.score for step in self.steps))
        return next((score.metric for score in scores if score is not None), TOP1)

    @property
    def efficiency(self) -> tuple[float, float] | None:
        """Performance Efficiency over non-zero parameters and over MACs; None if undefined."""
        before, after = self.before, self.after
        if not self.compresses or before.score is None or after.score is None or not before.score.metric.is_share:
            return None
        found = [
            performance_efficiency(
                accuracy=after.score.value,
                original_accuracy=before.score.value,
                size=size,
                original_size=original,
            )
            for size, original in ((after.weights, before.weights), (after.macs, before.macs))
        ]
        return (found[0], found[1]) if all(map(math.isfinite, found)) else None


def performance_efficiency(
    *,
    accuracy: float,
    original_accuracy: float,
    size: float,
    original_size: float,
    formula: Callable[[float, float], float] = truediv,
) -> float:
    """Compute the kept fraction of the accuracy divided by the kept fraction of the size.

    PE = (accuracy / original_accuracy) / (size / original_size): 1 for the original, 2 for half the size at the same
    accuracy. It rewards smaller sizes without bound: a useless network without parameters has the highest value. So
    it is shown beside the accuracy, never instead of it.

    Args:
        accuracy: Accuracy of the compressed model, a fraction.
        original_accuracy: Accuracy of the original on the same images.
        size: Size of the compressed model: non-zero parameters, or MACs for the second variant. Any unit.
        original_size: Size of the original, in the same unit.
        formula: Combines (kept accuracy, kept size), both as fractions; the quotient by default.

    Returns:
        Dimensionless; NaN if the original has neither accuracy nor size, or nothing is left of the size.

    References:
        The name is that of Malihi & Heidemann, Appl. Syst. Innov. 2024, 7(4), 56, whose formula could not be read.
        This definition is ours.
    """
    if not (original_accuracy > 0 and original_size > 0 and size > 0):
        return math.nan
    return formula(accuracy / original_accuracy, size / original_size)
