"""A recovery by a training loop of the user's own: what it is given, and what it must give back."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import safetensors.torch
import torch
from torch import Tensor, nn

from secateur._batches import call_model, float_tensors, move, take
from secateur._files import write_atomic
from secateur._runtime import copy_model, run_isolated
from secateur.errors import SecateurError, TrainingError
from secateur.models.weights import diverged_tensors
from secateur.tasks.base import Score, Task
from secateur.tasks.imitation import Imitation
from secateur.train.checkpoint import tensors_of, write_tensors_
from secateur.train.device import copy_to_device, seeded
from secateur.train.evaluate import evaluate

_LOGGER = logging.getLogger("secateur")
_RESULT = "recovered.safetensors"
_COMPARED = 4
"""Inputs on which the model that came back is compared with its weights in the student."""
_CLOSE = 1e-5
"""Relative to the largest output: the same operations, perhaps on another device."""


@dataclass(frozen=True, eq=False)
class RecoverContext:
    """What a training loop of one's own may want to know of the run.

    Attributes:
        task: What outputs and targets mean; ``task.loss(outputs, targets)`` and ``task.imitation(student, teacher)``
            are losses.
        device: Where student and teacher are.
        seed: Seed of the run.
        folder: A folder that exists, for checkpoints of the loop: it is kept until the run is finished, so that an
            interrupted loop can go on from there; None if the run writes nothing.
        score: Returns how good a model is on the validation split, by the metric of the task.
    """

    task: Task
    device: torch.device
    seed: int
    folder: Path | None
    score: Callable[[nn.Module], Score]


@runtime_checkable
class Recover(Protocol):
    """A training loop of the user's own between cut and export."""

    def __call__(self, student: nn.Module, teacher: nn.Module, data: Any, context: RecoverContext, /) -> nn.Module:
        """Train the student and return it.

        Args:
            student: The model to train, in train mode with gradients on; a copy, so that a loop that fails harms
                nothing. It may be trained in place.
            teacher: The original in eval mode, without gradients; a copy too.
            data: The splits of the run: ``data.train.batches(size, seed=..., epoch=...)`` gives (inputs, targets).
                A loop may as well read data of its own.
            context: Task, device, seed, and a folder for checkpoints.

        Returns:
            The trained student: the same architecture with other weights, not what a trainer has wrapped around it.
        """
        ...


def recover_with(
    loop: Recover,
    student: nn.Module,
    *,
    teacher: nn.Module,
    data: Any,
    task: Task,
    device: torch.device,
    seed: int,
    folder: Path | None,
    example: Any,
) -> nn.Module:
    """Let a user's loop train a copy of a student, and return the student with the weights that came back.

    With a folder, what came back is stored there, so that a run that is interrupted afterwards need not train again.

    Args:
        loop: The user's function.
        student: Not changed.
        teacher: Not changed.
        data: Passed on.
        task: For the context.
        device: Where both models are put.
        seed: For the context. It also seeds torch's generators for the loop.
        folder: For checkpoints of the loop and its result, or None.
        example: Inputs on which the returned model is checked.

    Returns:
        A copy of the student in eval mode on its own device, with other weights.

    Raises:
        TrainingError: If the loop raises, or returns another architecture or weights that are not finite.
    """
    name = getattr(loop, "__qualname__", type(loop).__name__)
    if (left := _result_of(folder, student)) is not None:
        _LOGGER.info(f"Continuing the interrupted run: the student that {name} returned is taken as it was.")
        return left
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    original = copy_to_device(teacher, device).eval()
    compared = original if isinstance(task, Imitation) else None

    def score(model: nn.Module) -> Score:
        return evaluate(model, data.validation, task=task, original=compared, device=device)

    context = RecoverContext(task, device, seed, folder, score)
    given = copy_model(student).to(device).train().requires_grad_()
    # The caller may be in inference mode or without gradients, where modules cannot be trained.
    with torch.inference_mode(mode=False), torch.enable_grad(), seeded(device, seed):
        try:
            # A copy of its own, because `score` may compare with the original, whatever the loop does to its teacher.
            returned: object = loop(given, copy_model(original).requires_grad_(requires_grad=False), data, context)
        except SecateurError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise TrainingError(
                f"`recover` must train the student and return it; {name} stopped with {type(error).__name__}: "
                f"{reason}. Correct it, and go on with the cut student by RunConfig(on_existing=OnExisting.RESUME)."
            ) from error
    trained = _checked(returned, given, student, example, name)
    if folder is not None:
        tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors_of(trained).items()}
        write_atomic(folder / _RESULT, safetensors.torch.save(tensors))
    return trained


def _result_of(folder: Path | None, student: nn.Module) -> nn.Module | None:
    """Return the student with the weights that the loop of an interrupted run returned; None if there are none."""
    if folder is None or not (folder / _RESULT).is_file():
        return None
    tensors = safetensors.torch.load((folder / _RESULT).read_bytes())
    # What was left by a run that cut differently does not fit, and the loop trains again.
    if {key: t.shape for key, t in tensors.items()} != {key: t.shape for key, t in tensors_of(student).items()}:
        return None
    trained = copy_model(student).eval()
    write_tensors_(trained, tensors)
    return trained


def _checked(returned: object, given: nn.Module, student: nn.Module, example: Any, name: str) -> nn.Module:
    """Return the student with the tensors that came back, after checking that they are all that has changed."""
    if returned is None and not _same_tensors(given, student):
        returned = given  # Trained in place, by a loop that returns nothing.
    if not isinstance(returned, nn.Module):
        raise TrainingError(
            f"`recover` must return the trained student; {name} returned {type(returned).__name__}. End it with "
            "`return student`."
        )
    shapes, wanted = ({k: tuple(t.shape) for k, t in tensors_of(m).items()} for m in (returned, student))
    if shapes != wanted:
        other = sorted(key for key in {*shapes, *wanted} if shapes.get(key) != wanted.get(key))
        raise TrainingError(
            f"`recover` must return the architecture that it was given; {name} returned a "
            f"{type(returned).__name__} with other tensors: {', '.join(other[:3])}{', ...' if len(other) > 3 else ''}. "
            "Return the student itself, without what a trainer has wrapped around it."
        )
    broken = diverged_tensors(student, tensors_of(returned))
    if broken:
        raise TrainingError(
            f"`recover` must return finite weights; {name} returned NaN or infinity in {len(broken)} tensor(s): "
            f"{', '.join(broken[:3])}. Lower its learning rate, or return the best epoch instead of the last."
        )
    trained = copy_model(student).eval()
    write_tensors_(trained, tensors_of(returned))
    if not _same_outputs(trained, returned, example):
        raise TrainingError(
            f"`recover` must return the architecture that it was given; with the same weights, the model that {name} "
            "returned computes something else. Change nothing but weights."
        )
    return trained


def _same_tensors(one: nn.Module, other: nn.Module) -> bool:
    first, second = tensors_of(one), tensors_of(other)
    return first.keys() == second.keys() and all(torch.equal(t.cpu(), second[key].cpu()) for key, t in first.items())


def _same_outputs(one: nn.Module, other: nn.Module, example: Any) -> bool:
    inputs = move(take(example, slice(_COMPARED)), torch.device("cpu"))
    found: list[list[Tensor]] = []
    for model in (one, other):
        # On the CPU in float32, wherever and in whatever precision the loop has left the model.
        runner = copy_model(model).cpu().float().eval()
        with run_isolated(runner), torch.no_grad():
            found.append(float_tensors(call_model(runner, inputs)))
    pairs = list(zip(found[0], found[1], strict=False))
    return len(found[0]) == len(found[1]) and all(
        a.shape == b.shape and (not a.numel() or bool((a - b).abs().max() <= _CLOSE * a.abs().max().clamp_min(1e-30)))
        for a, b in pairs
    )
