"""Who learns from whom, and what comes of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from secateur.architecture import Architecture
from secateur.data import ImageData
from secateur.distill import Objective, Term
from secateur.models import ModelSource
from secateur.report import RunReport
from secateur.train import Eager, Execution, Saving, Schedule, Trained, digest

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Hinting:
    """A stage of hints before everything else, see `secateur.train.distill_after_hints`.

    Attributes:
        hints: Losses of features.
        schedule: Of the stage.
    """

    hints: tuple[Term, ...]
    schedule: Schedule


@dataclass(frozen=True, eq=False)
class Pupil:
    """A student or teacher, and what is written of it.

    Attributes:
        model: Not changed.
        name: For the report; empty means its class.
        source: How it is built, so that the artifact can be loaded; None: loading needs ``factory=``.
        architecture: What was kept, if it is a cut model.
    """

    model: nn.Module
    name: str = ""
    source: ModelSource | None = None
    architecture: Architecture = Architecture()  # noqa: RUF009 - frozen

    @property
    def called(self) -> str:
        """Its name, or its class."""
        return self.name or type(self.model).__name__


@dataclass(frozen=True, eq=False)
class Distilled:
    """A distilled student and what was measured.

    Attributes:
        model: In eval mode, on the device of the student that was given.
        trained: The training.
        report: Teacher and student side by side.
        folder: The artifact, or None.
        files: Everything that was written.
    """

    model: nn.Module
    trained: Trained
    report: RunReport
    folder: Path | None = None
    files: tuple[Path, ...] = ()

    @property
    def failed(self) -> tuple[str, ...]:
        """What did not hold, in words; empty if everything did."""
        return tuple(f"{check.name}: {check.detail}" for check in self.report.checks if not check.passed)


@dataclass(frozen=True, eq=False)
class Lesson:
    """One run, see `distill_into`."""

    student: Pupil
    teacher: Pupil
    data: ImageData
    schedule: Schedule
    objective: Objective
    hinting: Hinting | None
    fabric: "Fabric"
    command: str
    saving: Saving = Saving()  # noqa: RUF009 - frozen
    execution: Execution = Eager()  # noqa: RUF009 - frozen

    def settings(self) -> dict[str, str]:
        """What makes two runs the same; the rest is in the checkpoints' own settings."""
        data = self.data
        return {
            "student": digest(self.student.model),
            "teacher": digest(self.teacher.model),
            "data": f"{data.name}: {len(data.train)} training images of {data.size}, {data.mean}, {data.std}",
            "augment": repr(data.augment),
            "hints": "none" if self.hinting is None else repr(self.hinting.schedule),
            "seed": str(self.schedule.seed),
        }

    @property
    def losses(self) -> str:
        """The objective in words."""
        found = [f"{self.objective.kd_weight:g} kd (T = {self.objective.temperature:g})"] * bool(
            self.objective.kd_weight
        )
        found += [f"{self.objective.label_weight:g} labels"] * bool(self.objective.label_weight)
        found += [f"{term.weight:g} {term.name}" for term in self.objective.terms]
        first = "" if self.hinting is None else f", after {self.hinting.schedule.epochs} epochs of hints"
        return f"distilled from {self.teacher.called}: {' + '.join(found)}{first}"
