"""The command that runs studies."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import _options as options
from secateur.cli._boundary import command_line, threads, told
from secateur.cli._options import PrecisionName
from secateur.cli._saying import silent, tell
from secateur.cli._stopping import goes_on

_RUN, _STUDY = "Run", "Study"


class StudyName(StrEnum):
    """Studies by name; see `secateur.pipeline.Study`."""

    PRUNING_X_DISTILLATION = "pruning-x-distillation"


class FamilyName(StrEnum):
    """Families of the study by name; see `secateur.pipeline.FAMILIES`."""

    RESNET = "resnet"
    DENSENET = "densenet"
    EFFICIENTNET = "efficientnet"
    MOBILENET = "mobilenet"


StudyOption = Annotated[
    StudyName, typer.Option("--study", help="What is compared.", rich_help_panel=_STUDY, show_default=False)
]
StudyOut = Annotated[
    Path,
    typer.Option(
        "--out",
        help="Folder of the study. The same command goes on with an interrupted one.",
        rich_help_panel=_RUN,
        show_default=False,
    ),
]
StudyResume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on with an interrupted study, which happens without it too.", rich_help_panel=_RUN
    ),
]
Families = Annotated[
    list[FamilyName] | None,
    typer.Option("--family", help="Networks; all if left out. Repeatable.", rich_help_panel=_STUDY),
]
Seeds = Annotated[int, typer.Option(help="How many students of each kind.", min=1, rich_help_panel=_STUDY)]
WeightsKept = Annotated[
    str, typer.Option(help="Parts of the weights that stay, such as 0.5,0.3,0.1.", rich_help_panel=_STUDY)
]
MacsKept = Annotated[
    str, typer.Option(help="Parts of the MACs that stay when channels are cut.", rich_help_panel=_STUDY)
]
TeacherEpochs = Annotated[int, typer.Option(help="Training of the teachers.", min=0, rich_help_panel=_STUDY)]
StudentEpochs = Annotated[int, typer.Option(help="Of the students before pruning.", min=0, rich_help_panel=_STUDY)]
RecoveryEpochs = Annotated[int, typer.Option(help="After pruning.", min=0, rich_help_panel=_STUDY)]
RecoveryImages = Annotated[
    int, typer.Option(help="Training images of a recovery epoch; 0 for all.", min=0, rich_help_panel=_STUDY)
]
TestImages = Annotated[
    int, typer.Option(help="First test images that count; 0 for all.", min=0, rich_help_panel=_STUDY)
]


@told
@goes_on
def compare(
    *,
    study: StudyOption,
    data: options.Data,
    out_folder: StudyOut,
    limit: options.Limit = None,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    validation_fraction: options.ValidationFraction = 0.1,
    family: Families = None,
    seeds: Seeds = 2,
    weights_kept: WeightsKept = "0.5,0.3,0.1",
    macs_kept: MacsKept = "0.7,0.5",
    teacher_epochs: TeacherEpochs = 4,
    student_epochs: StudentEpochs = 3,
    recovery_epochs: RecoveryEpochs = 1,
    recovery_images: RecoveryImages = 2048,
    test_images: TestImages = 2000,
    batch_size: options.BatchSize = 64,
    learning_rate: options.LearningRate = 0.1,
    precision: options.Precision = PrecisionName.AUTO,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    thread_count: options.Threads = None,
    resume: StudyResume = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Run a study: which kind of pruning suits distillation? Goes on with an interrupted one by itself."""
    from dataclasses import replace

    from secateur.cli import _choices
    from secateur.cli._tables import print_page, print_written
    from secateur.data import load_data
    from secateur.pipeline import FAMILIES, Study, run_study

    del resume  # A study goes on by itself.
    assert study is StudyName.PRUNING_X_DISTILLATION  # the only one so far
    usual, wanted = Study(), set(family or FamilyName)
    each = {"batch_size": batch_size, "precision": _choices.precision_of(precision)}
    plan = Study(
        families=tuple(one for one in FAMILIES if one.name in wanted),
        seeds=tuple(range(seed, seed + seeds)),
        weights_kept=_choices.numbers_of(weights_kept or None, "--weights-kept") or (),
        macs_kept=_choices.numbers_of(macs_kept or None, "--macs-kept") or (),
        teaching=replace(usual.teaching, epochs=teacher_epochs, learning_rate=learning_rate, **each),
        learning=replace(usual.learning, epochs=student_epochs, learning_rate=learning_rate, **each),
        recovery=replace(usual.recovery, epochs=recovery_epochs, learning_rate=learning_rate / 5, **each),
        recovery_images=recovery_images or None,
        test_images=test_images or None,
    )
    images = load_data(
        data,
        limit=limit,
        validation_fraction=validation_fraction,
        seed=seed,
        image_size=image_size,
        mean=_choices.numbers_of(mean, "--mean"),
        std=_choices.numbers_of(std, "--std"),
    )
    with threads(thread_count):
        result = run_study(
            plan,
            images,
            out=out_folder,
            device=_choices.device_of(device),
            tell=silent if quiet else tell,
            command=command_line(),
        )
    print_page(result.content)
    print_written([result.table, result.page])
