"""Training in stages: up to the hints first, then the whole student."""

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from secateur.distill import AlignedFeatures, Objective, Term
from secateur.train._batches import TrainingData
from secateur.train._execution import Eager, Execution
from secateur.train._fit import distill, fit
from secateur.train._progress import Progress, TerminalProgress
from secateur.train._record import Trained
from secateur.train._saving import Saving
from secateur.train._schedule import Schedule

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def distill_after_hints(
    student: nn.Module,
    *,
    teacher: nn.Module,
    data: TrainingData,
    hints: tuple[Term, ...],
    hint_schedule: Schedule,
    schedule: Schedule,
    objective: Objective = Objective(),  # noqa: B008 - frozen
    alignment: AlignedFeatures | None = None,
    checkpoint: Path | None = None,
    saving: Saving = Saving(),  # noqa: B008 - frozen
    execution: Execution = Eager(),  # noqa: B008 - frozen
    progress: Progress = TerminalProgress(),  # noqa: B008 - frozen
    fabric: "Fabric | None" = None,
) -> Trained:
    """Learn the teacher's hints, then everything: `fit` with the hints alone, then `distill` from there.

    In the first stage only what comes before the tapped modules gets gradients, and adaptors are learned beside it;
    the rest of the student keeps its parameters (norms behind the taps see new inputs, and their running statistics
    follow). There is no best epoch in it, because the student's outputs do not matter yet: the last is taken.

    Args:
        student: See `distill`.
        teacher: See `distill`.
        data: See `distill`.
        hints: Losses of features, such as ``Term("hint", PerTap(hint_loss, adaptors), of=features, taps=...)``.
        hint_schedule: Of the first stage.
        schedule: Of the second.
        objective: Of the second.
        alignment: See `distill`.
        checkpoint: Folder for both stages' checkpoints, ``hints`` and ``student`` in it; a run that finds them goes on.
        saving: See `fit`.
        execution: See `fit`.
        progress: See `fit`.
        fabric: See `fit`.

    Returns:
        The second stage's result.

    Raises:
        TrainingError: See `fit`.

    References:
        Romero et al. (FitNets), arXiv:1412.6550, Section 2.2 and Algorithm 1.
    """
    guided = fit(
        student,
        data.train,
        schedule=hint_schedule,
        objective=Objective(kd_weight=0.0, label_weight=0.0, terms=hints),
        teacher=teacher,
        augment=data.augment,
        checkpoint=None if checkpoint is None else checkpoint / "hints",
        saving=saving,
        execution=execution,
        progress=progress,
        fabric=fabric,
    )
    return distill(
        guided.model,
        teacher=teacher,
        data=data,
        schedule=schedule,
        objective=objective,
        alignment=alignment,
        checkpoint=None if checkpoint is None else checkpoint / "student",
        saving=saving,
        execution=execution,
        progress=progress,
        fabric=fabric,
    )
