"""Aligned features: a cut student's channels beside the teacher's channels they came from.

The student is a cut of the teacher, so the graph says which teacher channel each student channel is. No adaptor has
to be learned: the student's feature is compared with the kept channels of the teacher's.
"""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from secateur.architecture import Architecture
from secateur.distill._losses import VARIANCE_FLOOR, feature_loss
from secateur.distill._taps import listen
from secateur.errors import TrainingError
from secateur.graph import ChannelGraph


@dataclass(frozen=True)
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
    """Where the features of a cut student and of its original are compared.

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
            modules: Where to compare; None means the graph's ``stages``, the last output at each resolution.

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
    def watch(self, student: nn.Module, teacher: nn.Module) -> Generator["FeatureWatch"]:
        """Listen to both models while the context is open; nothing is left on them afterwards.

        Use: run the teacher, run the student, call `FeatureWatch.loss`, once per batch.

        Args:
            student: The cut model.
            teacher: The original.

        Raises:
            TrainingError: If a tapped module is missing in one of them.
        """
        watch = FeatureWatch(self)
        with ExitStack() as handles:
            for owner, model, seen in (("student", student, watch.student), ("teacher", teacher, watch.teacher)):
                for tap in self.taps:
                    handles.callback(listen(model, tap.module, seen, owner).remove)
            yield watch


class FeatureWatch:
    """The tapped outputs of the latest forward passes; made by `AlignedFeatures.watch`."""

    def __init__(self, alignment: AlignedFeatures) -> None:
        self.alignment = alignment
        self.student: dict[str, Tensor] = {}
        self.teacher: dict[str, Tensor] = {}
        self._kept: dict[tuple[str, torch.device], Tensor] = {}

    def loss(self) -> Tensor:
        """The features' loss of the batch both models have just seen; forgets the features.

        Returns:
            A scalar, dimensionless, float32 or better; gradients flow into the student only.

        Raises:
            TrainingError: If one of the models has not run, or the student has other channels than the alignment.
        """
        losses = [self._loss_at(tap) for tap in self.alignment.taps]
        self.student.clear()
        self.teacher.clear()
        return torch.stack(losses).mean()

    def _loss_at(self, tap: Tap) -> Tensor:
        student, teacher = self.student.get(tap.module), self.teacher.get(tap.module)
        if student is None or teacher is None:
            missing = "student" if student is None else "teacher"
            raise TrainingError(
                f"`{missing}` must run module {tap.module!r} before the features are compared; it did not. "
                "Run both models on the batch, and tap modules that always run."
            )
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
