"""Which features of student and teacher are compared, and how they are recorded and brought to one shape.

`Taps` name pairs of modules, `record_taps` records their outputs, and `make_adaptors` makes layers for features of
different shapes. A student that is a cut of its teacher needs no adaptor: the graph says which teacher channel each
student channel is, and `AlignedFeatures` compares the student's feature with those channels of the teacher's.
"""

import difflib
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from secateur._kinds import settings
from secateur._runtime import evaluating, run_isolated, seeded_initialization
from secateur.architecture import Architecture
from secateur.distill.feature_losses import channel_dim
from secateur.distill.logit_losses import VARIANCE_FLOOR, feature_loss
from secateur.errors import TrainingError
from secateur.graph.graph import ChannelGraph

Taps = Mapping[str, str]
"""Module names of the student, each with the module of the teacher that it is compared with; the order counts."""

Features = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""The student's outputs at some taps, and the teacher's, in the order of the taps."""

_SUGGESTED = 4


def record_output(model: nn.Module, name: str, seen: dict[str, Tensor], owner: str) -> RemovableHandle:
    """Record the first tensor of a module's output at every forward pass, until the hook is removed.

    Args:
        model: Student or teacher.
        name: The name of the module.
        seen: The dictionary that gets the tensor, under the name of the module.
        owner: "student" or "teacher", for messages.

    Raises:
        TrainingError: If there is no such module; it suggests similar names.
    """
    modules = dict(model.named_modules())
    if name not in modules:
        near = difflib.get_close_matches(name, [n for n in modules if n], n=_SUGGESTED)
        meant = f" Did you mean {', '.join(near)}?" if near else ""
        raise TrainingError(
            f"`{owner}` must have the tapped module {name!r}; it has none.{meant} "
            "A student whose block was removed cannot be compared there: name other `modules`."
        )

    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        # The tracer takes the same tensor for the module's activation in the graph.
        first = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
        if first is not None:
            seen[name] = first

    return modules[name].register_forward_hook(record)


class TapRecorder:
    """The outputs of tapped modules in the latest forward passes of both models; made by `record_taps`."""

    def __init__(self) -> None:
        self.student: dict[str, Tensor] = {}
        self.teacher: dict[str, Tensor] = {}

    def features(self, taps: Taps) -> Features:
        """Return the recorded outputs of both models at some of the taps.

        Raises:
            TrainingError: If a tapped module has not run since `clear`.
        """
        return (
            tuple(_recorded(self.student, name, "student") for name in taps),
            tuple(_recorded(self.teacher, name, "teacher") for name in taps.values()),
        )

    def clear(self) -> None:
        """Drop the outputs, so that those of an earlier batch are never taken for those of the next."""
        self.student.clear()
        self.teacher.clear()


def _recorded(seen: Mapping[str, Tensor], name: str, owner: str) -> Tensor:
    if name not in seen:
        raise TrainingError(
            f"`{owner}` must run module {name!r} before the features are compared; it did not. "
            "Run both models on the batch, and tap modules that always run."
        )
    return seen[name]


@contextmanager
def record_taps(student: nn.Module, teacher: nn.Module, *taps: Taps) -> Generator[TapRecorder]:
    """Record the outputs of tapped modules while the context is open; nothing is left on the models afterward.

    Args:
        student: The model that learns.
        teacher: The model it learns from.
        taps: Any number of mappings, which may name the same modules.

    Raises:
        TrainingError: If a model lacks a tapped module; it suggests similar names.
    """
    recorder = TapRecorder()
    with ExitStack() as handles:
        for name in dict.fromkeys(name for some in taps for name in some):
            handles.callback(record_output(student, name, recorder.student, "student").remove)
        for name in dict.fromkeys(name for some in taps for name in some.values()):
            handles.callback(record_output(teacher, name, recorder.teacher, "teacher").remove)
        yield recorder


def compute_features(student: nn.Module, teacher: nn.Module, taps: Taps, example: Tensor) -> Features:
    """Run both models once in evaluation mode and without gradients, and return their features.

    Modes, buffers and random state of both are restored or left as they were.

    Args:
        student: The model that learns.
        teacher: The model it learns from; may lie on another device.
        taps: See `Taps`.
        example: An input that both take, on any device.

    Raises:
        TrainingError: If there are no taps, or a model lacks a tapped module or does not run it.
    """
    if not taps:
        raise TrainingError('`taps` must name at least one pair of modules; got none. Such as {"layer2": "layer2"}.')
    with record_taps(student, teacher, taps) as recorder, torch.no_grad():
        for model in (student, teacher):
            with run_isolated(model), evaluating(model):
                device = next((p.device for p in model.parameters()), example.device)
                model(example.to(device))
        return recorder.features(taps)


class Resize(nn.Module):
    """Brings maps (batch, channels, height, width) to another resolution; it has no parameters.

    Adaptive average pooling if neither side grows, else bilinear interpolation (``align_corners=False``).

    Attributes:
        size: (height, width) of the result.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, feature: Tensor) -> Tensor:
        """Return the map in the other resolution."""
        if self.size[0] <= feature.shape[2] and self.size[1] <= feature.shape[3]:
            return F.adaptive_avg_pool2d(feature, self.size)
        return F.interpolate(feature, self.size, mode="bilinear", align_corners=False)

    def extra_repr(self) -> str:
        """The size."""
        return f"size={self.size}"


def make_adaptors(
    student: nn.Module, teacher: nn.Module, taps: Taps, example: Tensor, *, seed: int = 0
) -> nn.ModuleDict:
    """Make the layers that bring the student's features to the shapes of the teacher's, found by one forward pass.

    Where the shapes are equal that is `torch.nn.Identity`. Otherwise it is

    - maps (batch, channels, height, width): a 1x1 convolution where the channels differ, and `Resize` where the
      resolution differs, in the order that computes the convolution at the lower resolution;
    - vectors (batch, channels) and tokens (batch, tokens, channels): a linear layer.

    Maps with channels last, (batch, height, width, channels), cannot be told from others: write their adaptors by hand.

    Args:
        student: The model that learns.
        teacher: The model it learns from.
        taps: Module names of the student, each with the teacher's.
        example: An input that both take; one image is enough.
        seed: Seed of the initial weights, which follow torch's defaults.

    Returns:
        An adaptor for each pair, in order, under the student's module name with "/" for ".", because names in a
        ModuleDict have no dots. On the CPU, float32, in training mode.

    Raises:
        TrainingError: If a module is missing, or no adaptor can join the shapes.
    """
    features = compute_features(student, teacher, taps, example)
    with seeded_initialization(seed):
        return nn.ModuleDict(
            {
                name.replace(".", "/"): _adaptor(name, of_student, of_teacher)
                for name, of_student, of_teacher in zip(taps, *features, strict=True)
            }
        )


def _adaptor(name: str, student: Tensor, teacher: Tensor) -> nn.Module:
    here, there = tuple(student.shape), tuple(teacher.shape)
    if here == there:
        return nn.Identity()
    joinable = len(here) == len(there) and len(here) in {2, 3, 4} and here[0] == there[0]
    if not joinable or (len(here) == 3 and here[1] != there[1]):
        raise TrainingError(
            f"`taps` must pair features that an adaptor can join; got {here} and {there} at {name!r}. Pair two maps, "
            "two vectors, or tokens of one number; or give an adaptor of your own."
        )
    dim = channel_dim(student)
    if len(here) != 4:
        return nn.Linear(here[dim], there[dim])
    layers: list[nn.Module] = [nn.Conv2d(here[1], there[1], 1)] if here[1] != there[1] else []
    if here[2:] != there[2:]:
        smaller = there[2] * there[3] < here[2] * here[3]
        layers.insert(0 if smaller else len(layers), Resize((there[2], there[3])))
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def paired_stages(student: ChannelGraph, teacher: ChannelGraph) -> dict[str, str]:
    """Pair the last modules at each resolution of the student with the teacher's at the same resolution.

    If no resolution is common, the last stages are paired, as many as both have.

    Args:
        student: Traced with images of one size.
        teacher: Traced with images of the same size.

    Returns:
        Taps: module names of the student, each with the teacher's, in order of execution.

    Raises:
        TrainingError: If a network has no stage.
    """
    here, there = _resolutions(student), _resolutions(teacher)
    if not here or not there:
        raise TrainingError(
            f"`{'teacher' if here else 'student'}` must have modules with traced channels to compare; got none. "
            "Name the pairs of modules yourself."
        )
    by_size = {size: name for name, size in there.items()}
    common = {name: by_size[size] for name, size in here.items() if size in by_size}
    if common:
        return common
    count = min(len(here), len(there))
    return dict(zip(list(here)[-count:], list(there)[-count:], strict=True))


def _resolutions(graph: ChannelGraph) -> dict[str, tuple[int, ...]]:
    """Height and width of the maps that end the stages, by module."""
    found: dict[str, tuple[int, ...]] = {}
    for name in graph.stages:
        activation = graph.activations[name]
        size = tuple(n for dim, n in enumerate(activation.shape) if dim not in (0, activation.dim))
        if len(size) == 2:
            found[name] = size
    return found


@settings
class Tap:
    """One module whose output is compared in teacher and student.

    Attributes:
        module: Qualified module name, the same in both.
        dim: The dimension that carries channels.
        channels: Number of channels of the teacher's output.
        kept: The teacher's channel beside each of the student's channels, strictly increasing.
    """

    module: str
    dim: int
    channels: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class AlignedFeatures:
    """The modules where the features of a cut student are compared with the kept channels of its original.

    The loss is the mean over the taps of `feature_loss(student, teacher[kept])`, that is
    mean((s - t_kept)^2) / Var(t_kept).

    Attributes:
        taps: The modules, in order of execution.
        variance_floor: See `feature_loss`.
    """

    taps: tuple[Tap, ...]
    variance_floor: float = VARIANCE_FLOOR

    def __post_init__(self) -> None:
        if not self.taps:
            raise TrainingError(
                "`taps` must name at least one module; got none. Name modules of the graph's `activations`, "
                "or train without aligned features (feature_weight=0)."
            )
        if not self.variance_floor > 0:
            raise TrainingError(f"`variance_floor` must be positive; got {self.variance_floor}. 1e-6 is usual.")

    @classmethod
    def of(
        cls, graph: ChannelGraph, architecture: Architecture, *, modules: Sequence[str] | None = None
    ) -> "AlignedFeatures":
        """Read the alignment from the teacher's graph.

        Args:
            graph: The graph of the teacher (the uncut model).
            architecture: What the student keeps of it.
            modules: The modules to compare; None means the graph's ``stages``, the last output at each resolution.

        Raises:
            TrainingError: If a module has no channels in the graph, or none is named.
        """
        names = graph.stages if modules is None else tuple(modules)
        taps: list[Tap] = []
        for name in names:
            if name not in graph.activations:
                raise TrainingError(
                    f"`modules` must name modules with traced channels; got {name!r}. "
                    f"Some that have: {', '.join(list(graph.activations)[:5]) or 'none'}."
                )
            activation = graph.activations[name]
            kept = tuple(int(p) for p in np.asarray(graph.kept_positions(name, architecture.by_name)))
            taps.append(Tap(name, activation.dim, activation.shape[activation.dim], kept))
        return cls(tuple(taps))

    @contextmanager
    def record(self, student: nn.Module, teacher: nn.Module) -> Generator["AlignedFeatureRecorder"]:
        """Record the features of both models while the context is open; nothing is left on them afterward.

        Use: run both models on a batch, then call `AlignedFeatureRecorder.loss`.

        Args:
            student: The cut model.
            teacher: The original.

        Raises:
            TrainingError: If a tapped module is missing in one of them.
        """
        with record_taps(student, teacher, {tap.module: tap.module for tap in self.taps}) as recorder:
            yield AlignedFeatureRecorder(self, recorder)


class AlignedFeatureRecorder:
    """Compares the recorded features of a cut student and of its original; made by `AlignedFeatures.record`."""

    def __init__(self, alignment: AlignedFeatures, recorder: TapRecorder) -> None:
        self.alignment = alignment
        self._recorder = recorder
        self._kept: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def teacher_features(self) -> dict[str, Tensor]:
        """What the teacher has given for the batch, by module; set it to use what it gave for this batch before."""
        return dict(self._recorder.teacher)

    @teacher_features.setter
    def teacher_features(self, features: Mapping[str, Tensor]) -> None:
        self._recorder.teacher.clear()
        self._recorder.teacher.update(features)

    def loss(self) -> Tensor:
        """Return the loss of the batch that both models have just run on, and clear the features.

        Returns:
            A scalar, dimensionless, float32 or better; gradients flow into the student only.

        Raises:
            TrainingError: If one of the models has not run, or the student has other channels than the alignment.
        """
        taps = self.alignment.taps
        features = self._recorder.features({tap.module: tap.module for tap in taps})
        losses = [self._loss_at(tap, student, teacher) for tap, student, teacher in zip(taps, *features, strict=True)]
        self._recorder.clear()
        return torch.stack(losses).mean()

    def _loss_at(self, tap: Tap, student: Tensor, teacher: Tensor) -> Tensor:
        if (student.shape[tap.dim], teacher.shape[tap.dim]) != (len(tap.kept), tap.channels):
            raise TrainingError(
                f"`student` and `teacher` must have {len(tap.kept)} and {tap.channels} channels at {tap.module!r}; "
                f"got {student.shape[tap.dim]} and {teacher.shape[tap.dim]}. "
                "Use the graph and the architecture the student was cut with."
            )
        if len(tap.kept) < tap.channels:
            teacher = teacher.index_select(tap.dim, self._positions(tap, teacher.device))
        return feature_loss(student, teacher, variance_floor=self.alignment.variance_floor)

    def _positions(self, tap: Tap, device: torch.device) -> Tensor:
        key = (tap.module, device)
        if key not in self._kept:
            self._kept[key] = torch.tensor(tap.kept, device=device)
        return self._kept[key]
