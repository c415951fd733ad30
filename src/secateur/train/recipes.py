"""Weights drawn anew, by the modules that hold them.

Training in stages: up to the hints first, then the whole student.

Students that become teachers: born-again networks, and assistants between a big teacher and a small student."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from secateur.distill.objective import Objective, Term
from secateur.distill.taps import AlignedFeatures
from secateur.errors import ModelError, TrainingError
from secateur.train.callbacks import Progress, TerminalProgress
from secateur.train.checkpoint import CheckpointPolicy
from secateur.train.config import TrainConfig, TrainingData
from secateur.train.device import Eager, Execution, seeded
from secateur.train.fit import fit, train_with_teacher
from secateur.train.trainer import Trained

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def check_resettable(model: nn.Module, name: str, way_out: str) -> None:
    """Refuse a model some of whose parameters nobody can draw.

    Args:
        model: To be drawn anew.
        name: What was given that asks for it, for the message.
        way_out: What else to do, a sentence for the message.

    Raises:
        ModelError: If a module has parameters of its own and no ``reset_parameters()``.
    """
    for path, module in model.named_modules():
        own = ", ".join(parameter for parameter, _ in module.named_parameters(recurse=False))
        if own and _drawing_of(module) is None:
            raise ModelError(
                f"`{name}` must be able to draw all weights anew; {path or 'the model'} ({type(module).__name__}) has "
                f"parameters of its own ({own}) and no reset_parameters(). Give it this method, or {way_out}"
            )


def reset_weights_(model: nn.Module, seed: int) -> nn.Module:
    """Draw all weights of a model anew, each module by its ``reset_parameters()``; returns the model.

    torch's other spelling, ``_reset_parameters()``, counts too. What a module holds is drawn before the module, which
    may draw it again. The same seed gives the same weights on every device; the caller's random state stays.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    model.to("cpu")  # Where a seed means the same on every machine.
    with seeded(torch.device("cpu"), seed), torch.no_grad():
        for module in reversed(list(model.modules())):
            draw = _drawing_of(module)
            if draw is not None:
                draw()
    return model.to(device)


def _drawing_of(module: nn.Module) -> Callable[[], object] | None:
    for name in ("reset_parameters", "_reset_parameters"):
        draw = getattr(module, name, None)
        if callable(draw):
            return cast(Callable[[], object], draw)
    return None


def distill_after_hints(
    student: nn.Module,
    *,
    teacher: nn.Module,
    data: TrainingData,
    hints: tuple[Term, ...],
    hint_schedule: TrainConfig,
    schedule: TrainConfig,
    objective: Objective = Objective(),  # noqa: B008 - frozen
    alignment: AlignedFeatures | None = None,
    checkpoint: Path | None = None,
    saving: CheckpointPolicy = CheckpointPolicy(),  # noqa: B008 - frozen
    execution: Execution = Eager(),  # noqa: B008 - frozen
    progress: Progress = TerminalProgress(),  # noqa: B008 - frozen
    fabric: "Fabric | None" = None,
) -> Trained:
    """Learn the teacher's hints, then everything: `fit` with the hints alone, then `train_with_teacher` from there.

    In the first stage only what comes before the tapped modules gets gradients, and adaptors are learned beside it;
    the rest of the student keeps its parameters (norms behind the taps see new inputs, and their running statistics
    follow). There is no best epoch in it, because the student's outputs do not matter yet: the last is taken.

    Args:
        student: See `train_with_teacher`.
        teacher: See `train_with_teacher`.
        data: See `train_with_teacher`.
        hints: Losses of features, such as ``Term("hint", PerTap(hint_loss, adaptors), of=features, taps=...)``.
        hint_schedule: Of the first stage.
        schedule: Of the second.
        objective: Of the second.
        alignment: See `train_with_teacher`.
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
    return train_with_teacher(
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


def distill_chain(
    students: Sequence[nn.Module],
    *,
    teacher: nn.Module,
    data: TrainingData,
    schedule: TrainConfig,
    objective: Objective = Objective(),  # noqa: B008 - frozen
    checkpoint: Path | None = None,
    progress: Progress = TerminalProgress(),  # noqa: B008 - frozen
    fabric: "Fabric | None" = None,
) -> tuple[Trained, ...]:
    """Distill each student from the one before it, the first one from the teacher.

    Assistants of sizes between teacher and student help where the gap is too wide for one step.

    Args:
        students: Assistants from large to small, the student last; not changed.
        teacher: See `train_with_teacher`.
        data: See `train_with_teacher`.
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
            train_with_teacher(
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
    schedule: TrainConfig,
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
        data: See `train_with_teacher`.
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
    check_resettable(teacher, "teacher", "distill a student that you have made yourself.")
    found: list[Trained] = []
    for generation in range(1, generations + 1):
        seed = schedule.seed + generation
        newborn = reset_weights_(copy.deepcopy(teacher).requires_grad_(), seed)
        found.append(
            train_with_teacher(
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
