"""Longer trainings made of several calls of `fit`: hints first, chains of students, and born-again networks."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from secateur._runtime import copy_model
from secateur.distill.objective import Objective, Term
from secateur.distill.taps import AlignedFeatures
from secateur.errors import ModelError, TrainingError
from secateur.tasks.base import Task
from secateur.tasks.classification import Classification
from secateur.train.config import RunSettings, TrainConfig, TrainingData
from secateur.train.device import seeded
from secateur.train.fit import Trained, fit, train_with_teacher


def distill_after_hints(
    student: nn.Module,
    *,
    teacher: nn.Module,
    data: TrainingData,
    hints: tuple[Term, ...],
    hint_train: TrainConfig,
    train: TrainConfig,
    objective: Objective = Objective(),  # noqa: B008 - frozen
    alignment: AlignedFeatures | None = None,
    task: Task = Classification(),  # noqa: B008 - frozen
    run: RunSettings = RunSettings(),  # noqa: B008 - frozen
) -> Trained:
    """Learn the teacher's hints, then everything: `fit` with the hints alone, then `train_with_teacher` from there.

    In the first stage only what comes before the tapped modules gets gradients, and adaptors are trained beside it;
    the rest of the student keeps its parameters (norms behind the taps see new inputs, and their running statistics
    follow). The first stage ends with its last epoch, not its best, because the outputs do not matter yet.

    Args:
        student: See `train_with_teacher`.
        teacher: See `train_with_teacher`.
        data: See `train_with_teacher`.
        hints: Losses of features, such as
            ``Term("hint", MeanOverTaps(hint_loss, adaptors), inputs=select_features, taps=...)``.
        hint_train: Config of the first stage.
        train: Config of the second stage.
        objective: Objective of the second stage.
        alignment: See `train_with_teacher`.
        task: What outputs and targets mean.
        run: See `fit`. The checkpoints of the stages lie in the folders ``hints`` and ``student`` of its folder.

    Returns:
        The result of the second stage.

    Raises:
        TrainingError: See `fit`.

    References:
        Romero et al. (FitNets), arXiv:1412.6550, Section 2.2 and Algorithm 1.
    """
    # Without weights for labels and logits, nothing behind the hints gets a gradient.
    guided = fit(
        student,
        data.train,
        train=hint_train,
        objective=Objective(kd_weight=0.0, label_weight=0.0, terms=hints),
        teacher=teacher,
        augment=data.augment,
        task=task,
        run=_in_subfolder(run, "hints"),
    )
    return train_with_teacher(
        guided.model,
        teacher=teacher,
        data=data,
        train=train,
        objective=objective,
        alignment=alignment,
        task=task,
        run=_in_subfolder(run, "student"),
    )


def distill_chain(
    students: Sequence[nn.Module],
    *,
    teacher: nn.Module,
    data: TrainingData,
    train: TrainConfig,
    objective: Objective = Objective(),  # noqa: B008 - frozen
    run: RunSettings = RunSettings(),  # noqa: B008 - frozen
) -> tuple[Trained, ...]:
    """Distill each student from the one before it, the first one from the teacher.

    Assistants of sizes between teacher and student help where the gap is too wide for one step.

    Args:
        students: Assistants from large to small, the student last; not changed.
        teacher: See `train_with_teacher`.
        data: See `train_with_teacher`.
        train: Config of every training.
        objective: Objective of every training: losses of logits, or with taps that all of the students have.
        run: See `fit`. The checkpoints lie in the folders ``student-0``, ``student-1``, ... of its folder.

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
                train=train,
                objective=objective,
                run=_in_subfolder(run, f"student-{place}"),
            )
        )
    return tuple(found)


def born_again(
    teacher: nn.Module,
    *,
    data: TrainingData,
    train: TrainConfig,
    generations: int = 1,
    objective: Objective = Objective(),  # noqa: B008 - frozen
    run: RunSettings = RunSettings(),  # noqa: B008 - frozen
) -> tuple[Trained, ...]:
    """Distill a network of the teacher's own architecture from new weights, and from that one the next.

    The mean of the generations' logits is `secateur.distill.Ensemble`.

    Args:
        teacher: Trained; every module with parameters must be able to reset them.
        data: See `train_with_teacher`.
        train: Config of every generation; generation k uses ``seed + k`` for weights and images, k from 1.
        generations: >= 1.
        objective: Objective of every generation.
        run: See `fit`. The checkpoints lie in the folders ``generation-1``, ``generation-2``, ... of its folder.

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
        # With the same seed the generations would differ by their teachers alone.
        seed = train.seed + generation
        newborn = reset_weights_(copy_model(teacher).requires_grad_(), seed)
        found.append(
            train_with_teacher(
                newborn,
                teacher=found[-1].model if found else teacher,
                data=data,
                train=replace(train, seed=seed),
                objective=objective,
                run=_in_subfolder(run, f"generation-{generation}"),
            )
        )
    return tuple(found)


def _in_subfolder(run: RunSettings, name: str) -> RunSettings:
    return run if run.folder is None else replace(run, folder=run.folder / name)


def check_resettable(model: nn.Module, name: str, way_out: str) -> None:
    """Refuse a model some of whose parameters cannot be reset.

    Args:
        model: The model to reset.
        name: The argument that asks for it, for the message.
        way_out: What else to do, a sentence for the message.

    Raises:
        ModelError: If a module has parameters of its own and no ``reset_parameters()``.
    """
    for path, module in model.named_modules():
        own = ", ".join(parameter for parameter, _ in module.named_parameters(recurse=False))
        if own and _reset_method(module) is None:
            raise ModelError(
                f"`{name}` must be able to reset all weights; {path or 'the model'} ({type(module).__name__}) has "
                f"parameters of its own ({own}) and no reset_parameters(). Give it this method, or {way_out}"
            )


def reset_weights_(model: nn.Module, seed: int) -> nn.Module:
    """Give a model new random weights, each module by its ``reset_parameters()``, and return it.

    torch's other spelling, ``_reset_parameters()``, counts too. Submodules are reset before their module, which may
    reset them again. The same seed gives the same weights on every device; the caller's random state stays.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    model.to("cpu")  # Where a seed gives the same numbers on every machine.
    with seeded(torch.device("cpu"), seed), torch.no_grad():
        for module in reversed(list(model.modules())):
            reset = _reset_method(module)
            if reset is not None:
                reset()
    return model.to(device)


def _reset_method(module: nn.Module) -> Callable[[], object] | None:
    for name in ("reset_parameters", "_reset_parameters"):
        reset = getattr(module, name, None)
        if callable(reset):
            return cast(Callable[[], object], reset)
    return None
