"""Students that become teachers: born-again networks, and assistants between a big teacher and a small student."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from secateur.distill import Objective
from secateur.errors import TrainingError
from secateur.train._batches import TrainingData
from secateur.train._fit import distill
from secateur.train._progress import Progress, TerminalProgress
from secateur.train._record import Trained
from secateur.train._redraw import check_redrawable, redraw_
from secateur.train._schedule import Schedule

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def distill_chain(
    students: Sequence[nn.Module],
    *,
    teacher: nn.Module,
    data: TrainingData,
    schedule: Schedule,
    objective: Objective = Objective(),  # noqa: B008 - frozen
    checkpoint: Path | None = None,
    progress: Progress = TerminalProgress(),  # noqa: B008 - frozen
    fabric: "Fabric | None" = None,
) -> tuple[Trained, ...]:
    """Distil each student from the one before it, the first one from the teacher.

    Assistants of sizes between teacher and student help where the gap is too wide for one step.

    Args:
        students: Assistants from large to small, the student last; not changed.
        teacher: See `distill`.
        data: See `distill`.
        schedule: Of every step.
        objective: Of every step; losses of logits, or with taps that all of them have.
        checkpoint: Folder for all checkpoints, ``student-0`` and so on in it; a run that finds them goes on.
        progress: See `fit`.
        fabric: See `fit`.

    Returns:
        A result for each student, in order.

    Raises:
        TrainingError: If there are no students, or as `fit`.

    References:
        Mirzadeh et al., arXiv:1902.03393 (teacher assistants).
    """
    if not students:
        raise TrainingError("`students` must name at least one; got none. The last one is the student.")
    found: list[Trained] = []
    for place, student in enumerate(students):
        found.append(
            distill(
                student,
                teacher=found[-1].model if found else teacher,
                data=data,
                schedule=schedule,
                objective=objective,
                checkpoint=None if checkpoint is None else checkpoint / f"student-{place}",
                progress=progress,
                fabric=fabric,
            )
        )
    return tuple(found)


def born_again(
    teacher: nn.Module,
    *,
    data: TrainingData,
    schedule: Schedule,
    generations: int = 1,
    objective: Objective = Objective(),  # noqa: B008 - frozen
    checkpoint: Path | None = None,
    progress: Progress = TerminalProgress(),  # noqa: B008 - frozen
    fabric: "Fabric | None" = None,
) -> tuple[Trained, ...]:
    """Teach a network of the teacher's own kind, from new weights, and that one the next.

    The mean of the generations' logits is `secateur.distill.Ensemble`.

    Args:
        teacher: Trained; every module with parameters must be able to draw them anew.
        data: See `distill`.
        schedule: Of every generation; generation k draws weights and images with ``seed + k``, k from 1.
        generations: >= 1.
        objective: Of every generation.
        checkpoint: See `distill_chain`.
        progress: See `fit`.
        fabric: See `fit`.

    Returns:
        A result for each generation, in order.

    Raises:
        TrainingError: If ``generations`` is below 1, or as `fit`.
        ModelError: If a module has parameters and no ``reset_parameters()``.

    References:
        Furlanello et al., arXiv:1805.04770, Section 3 (born-again networks).
    """
    if generations < 1:
        raise TrainingError(f"`generations` must be at least 1; got {generations}. 1 to 3 is usual.")
    check_redrawable(teacher, "teacher", "distil a student that you have made yourself.")
    found: list[Trained] = []
    for generation in range(1, generations + 1):
        seed = schedule.seed + generation
        newborn = redraw_(copy.deepcopy(teacher).requires_grad_(), seed)
        found.append(
            distill(
                newborn,
                teacher=found[-1].model if found else teacher,
                data=data,
                schedule=replace(schedule, seed=seed),
                objective=objective,
                checkpoint=None if checkpoint is None else checkpoint / f"generation-{generation}",
                progress=progress,
                fabric=fabric,
            )
        )
    return tuple(found)
