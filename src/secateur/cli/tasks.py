"""What ``--task`` names: the task, the layouts of its data, and how images become inputs where no flag says it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from secateur.cli.words import channels_of, image_size, made_by, numbers, resizing_of
from secateur.errors import DataError, TrainingError

if TYPE_CHECKING:
    from secateur.cli.options import ReadingFlags
    from secateur.data.layouts import FolderLayout, Seen
    from secateur.data.preprocessing import Preprocessing
    from secateur.tasks.base import Task

TASKS = "classification, multilabel, segmentation, detection, regression, image-to-image, imitation"
"""Names of the tasks, for messages."""
CLASSIFICATION, IMITATION, DETECTION = "classification", "imitation", "detection"
_LIKE = f"{IMITATION}:"
_BATCH_SIZE = 16


@dataclass(frozen=True)
class NamedTask:
    """A task and what its data are.

    Attributes:
        name: As ``--task`` has it.
        task: The task.
        layouts: How a folder of its data can be arranged; empty for classification, which `load_data` reads.
        lists: Whether batches are lists of images of any size.
        labeled: Whether there are targets.
        normalized: Whether images are normalized as for classifiers where neither the model nor a flag says it.
        whole: Whether resizing keeps all of an image, because targets lie in it.
    """

    name: str
    task: "Task"
    layouts: "tuple[FolderLayout, ...]" = ()
    lists: bool = False
    labeled: bool = True
    normalized: bool = True
    whole: bool = True

    @property
    def classifies(self) -> bool:
        """Whether images have one class each."""
        return self.name == CLASSIFICATION

    @property
    def batch_size(self) -> int:
        """Images per step where no flag says it."""
        return 128 if self.classifies else _BATCH_SIZE


def named_task(text: str, *, void: int | None = None, trust_source: bool = False) -> NamedTask:
    """Return what ``--task`` names.

    Args:
        text: One of `TASKS`, ``imitation:`` and one of them, or ``python:PACKAGE.MODULE:NAME``.
        void: Value of pixels that do not count in segmentation; None means 255.
        trust_source: Whether code of the user may run.

    Raises:
        TrainingError: If there is no such task, or a flag has no effect on it.
        ModelError: If code is not trusted, or does not give a task.
    """
    from secateur import tasks
    from secateur.data import layouts
    from secateur.data.preprocessing import MASK_BORDER

    makers: dict[str, Callable[[], NamedTask]] = {
        CLASSIFICATION: lambda: NamedTask(text, tasks.Classification(), whole=False),
        "multilabel": lambda: NamedTask(text, tasks.MultiLabel(), (layouts.TABLE,), whole=False),
        "segmentation": lambda: NamedTask(
            text, tasks.Segmentation(void=MASK_BORDER if void is None else void), (layouts.MASKS,)
        ),
        DETECTION: lambda: NamedTask(text, tasks.Detection(), layouts.BOXES, lists=True, normalized=False),
        "regression": lambda: NamedTask(text, tasks.Regression(), (layouts.TABLE,)),
        "image-to-image": lambda: NamedTask(text, tasks.ImageToImage(), (layouts.PAIRS,), normalized=False),
        IMITATION: lambda: NamedTask(text, tasks.Imitation(), layouts.LAYOUTS, labeled=False, whole=False),
    }
    if void is not None and text not in ("segmentation", f"{_LIKE}segmentation"):
        raise TrainingError(f"`--void` must go with --task segmentation; got {text}. Leave it out.")
    if text.startswith("python:"):
        own = made_by(text, tasks.Task, "--task", trust_source)
        return NamedTask(text, own, layouts.LAYOUTS)
    if text.startswith(_LIKE) and text.removeprefix(_LIKE) in set(makers) - {IMITATION}:
        like = named_task(text.removeprefix(_LIKE), void=void)
        return replace(like, name=text, task=tasks.Imitation(like.task), layouts=layouts.LAYOUTS, labeled=False)
    if text not in makers:
        raise TrainingError(
            f"`--task` must be one of {TASKS}, imitation:TASK or python:PACKAGE.MODULE:NAME; got {text[:200]!r}."
        )
    return makers[text]()


def rule_of_run(
    named: NamedTask, flags: "ReadingFlags", own: "Preprocessing | None", stored: "Preprocessing | None", seen: "Seen"
) -> "Preprocessing":
    """Choose how images become inputs: as the flags say, as the artifact says, as the model says, as the data say.

    Args:
        named: The task.
        flags: What the user said.
        own: The rule that the model was made with, if it says one.
        stored: The rule of the artifact that is used, if it is one.
        seen: What the images are like.

    Raises:
        DataError: If nothing says the size and the images differ.
    """
    from secateur.data.preprocessing import Preprocessing, ResizeMode, Resizing
    from secateur.data.transforms import Normalization

    asked, bgr = channels_of(flags.channels)
    channels = asked or (seen.channels if stored is None else stored.channels)
    mean, std = numbers(flags.mean, "--mean"), numbers(flags.std, "--std")
    usual = Normalization.default(channels) if named.normalized else Normalization((0.0,) * channels, (1.0,) * channels)
    for rule in (own, stored):
        if rule is not None and len(rule.mean) == len(rule.std) == channels and (named.normalized or rule is stored):
            usual = Normalization(rule.mean, rule.std)
    chosen = usual.override(mean, std)
    size = image_size(flags.image_size)
    if size is None and stored is not None:
        size = stored.size
    elif size is None and not named.lists:
        size = seen.size or (None if own is None else own.size)
        if size is None:
            raise DataError(
                "`--image-size` must be given for images of different sizes; got none. Say --image-size 240x320, or "
                "another height and width."
            )
    base = Resizing(ResizeMode.SQUASH, 1.0) if named.whole or own is None else own.resizing
    resizing = resizing_of(flags.resize, base if stored is None else stored.resizing) or base
    return Preprocessing(
        size,
        resizing.mode,
        resizing.crop_fraction,
        resizing.interpolation,
        chosen.mean,
        chosen.std,
        channels,
        bgr or (stored is not None and stored.bgr),
    )
