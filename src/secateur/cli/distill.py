"""The command that distills any teacher into any student."""

from secateur.cli import options
from secateur.cli.options import PrecisionName, expand_dataclasses
from secateur.cli.output import command_line, handle_errors_together, resumable, show
from secateur.cli.shared import ImageFlags, MachineFlags, TrainingFlags, WorkFlags


@handle_errors_together
@resumable
@expand_dataclasses
def distill(
    *,
    teacher: options.Teacher,
    student: options.Student,
    data: options.Data,
    out_folder: options.Out,
    teacher_weights: options.TeacherWeights = None,
    student_weights: options.StudentWeights = None,
    given: ImageFlags,
    loss: options.Losses = None,
    hints: options.Hints = None,
    hint_epochs: options.HintEpochs = 0,
    remember: options.Remember = None,
    epochs: options.Epochs = 30,
    batch_size: options.BatchSize = 128,
    learning_rate: options.LearningRate = 0.05,
    training: TrainingFlags,
    label_weight: options.LabelWeight = 0.1,
    precision: options.Precision = PrecisionName.AUTO,
    compiled: options.Compile = False,
    work: WorkFlags,
    machine: MachineFlags,
) -> None:
    """Teach any student by any teacher: train, verify, export, report."""
    from dataclasses import replace

    from secateur.cli import _words as _choices
    from secateur.cli._words import (
        OF_LOGITS,
        Pair,
        check_mixable,
        hints_of,
        inferred_taps,
        losses_of,
        objective_of,
        taps_of,
    )
    from secateur.pipeline.distill import HintStage, ModelSpec, distill_model
    from secateur.pipeline.workspace import check_output

    leftover = work.leftover
    losses, taps, formats = losses_of(loss), taps_of(hints), work.formats
    varied = training.variation
    if training.mixup or training.cutmix:
        check_mixable(losses)
    progress, saving = machine.progress, work.saving
    schedule = training.schedule(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, precision=precision, seed=work.seed
    )
    check_output(out_folder)
    known = given.inputs(teacher, teacher_weights, data, work.seed)
    learner = replace(known, model=student, weights=student_weights)
    images, taught = known.images, learner.opened_for(known.images)
    pair = Pair(taught.model, known.opened.model, known.example(2), len(images.train))
    if any(name not in OF_LOGITS for name in losses):
        taps = taps or inferred_taps(pair)
    objective = objective_of(
        losses,
        pair,
        taps,
        temperature=training.temperature,
        label_weight=label_weight,
        label_smoothing=training.label_smoothing,
    )
    hinting = None
    if hint_epochs:
        hinting = HintStage(hints_of(losses, pair, taps), replace(schedule, epochs=hint_epochs))
    with machine.processes(schedule) as fabric:
        result = distill_model(
            ModelSpec(taught.model, taught.name, taught.source, taught.architecture),
            teacher=ModelSpec(known.opened.model, known.opened.name, known.opened.source),
            data=varied(images),
            schedule=schedule,
            objective=objective,
            hinting=hinting,
            remember=remember,
            out=out_folder,
            export=formats,
            leftover=leftover,
            saving=saving,
            execution=_choices.execution_of(compiled),
            seed=work.seed,
            fabric=fabric,
            progress=progress,
            tell=machine.tell,
            command=command_line(),
        )
    if fabric.is_global_zero:
        show(result)
