"""The command that distils any teacher into any student."""

from secateur.cli import _options as options
from secateur.cli._boundary import command_line, threads, told
from secateur.cli._options import OptimiserName, PrecisionName
from secateur.cli._saying import show, silent, tell
from secateur.cli._stopping import goes_on
from secateur.errors import ArtifactError


@told
@goes_on
def distill(
    *,
    teacher: options.Teacher,
    student: options.Student,
    data: options.Data,
    out_folder: options.Out,
    teacher_weights: options.TeacherWeights = None,
    student_weights: options.StudentWeights = None,
    trust_source: options.TrustSource = False,
    limit: options.Limit = None,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    validation_fraction: options.ValidationFraction = 0.1,
    loss: options.Losses = None,
    hints: options.Hints = None,
    hint_epochs: options.HintEpochs = 0,
    remember: options.Remember = None,
    epochs: options.Epochs = 30,
    batch_size: options.BatchSize = 128,
    learning_rate: options.LearningRate = 0.05,
    warmup: options.Warmup = 0.05,
    optimizer: options.Optimiser = OptimiserName.SGD,
    weight_decay: options.WeightDecay = None,
    ema: options.Ema = None,
    accumulate: options.Accumulate = 1,
    clip_norm: options.ClipNorm = None,
    auto_augment: options.AutoAugment = None,
    erase: options.Erase = 0.0,
    mixup: options.Mixup = 0.0,
    cutmix: options.Cutmix = 0.0,
    label_smoothing: options.LabelSmoothing = 0.0,
    temperature: options.Temperature = 4.0,
    label_weight: options.LabelWeight = 0.1,
    precision: options.Precision = PrecisionName.AUTO,
    compiled: options.Compile = False,
    export: options.Export = "onnx",
    resume: options.Resume = False,
    restart: options.Restart = False,
    checkpoint_minutes: options.CheckpointMinutes = 10.0,
    checkpoint_steps: options.CheckpointSteps = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    thread_count: options.Threads = None,
    tensorboard: options.TensorBoard = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Teach any student by any teacher: train, verify, export, report."""
    from dataclasses import replace

    from secateur.cli import _choices
    from secateur.cli._inputs import Inputs
    from secateur.cli._losses import (
        OF_LOGITS,
        Pair,
        check_mixable,
        hints_of,
        inferred_taps,
        losses_of,
        objective_of,
        taps_of,
    )
    from secateur.pipeline import Hinting, Leftover, Pupil, check_output, distill_into
    from secateur.train import Schedule

    if resume and restart:
        raise ArtifactError("`--resume` goes on with an interrupted run and `--restart` removes it; give one of them.")
    losses, taps, formats = losses_of(loss), taps_of(hints), _choices.formats_of(export)
    varied = _choices.variation_of(auto_augment, erase, mixup, cutmix)
    if mixup or cutmix:
        check_mixable(losses)
    progress = _choices.progress_of(quiet, tensorboard)
    saving = _choices.saving_of(checkpoint_minutes, checkpoint_steps)
    schedule = Schedule(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_fraction=warmup,
        optimiser=_choices.optimiser_of(optimizer, weight_decay),
        ema_decay=ema,
        accumulate=accumulate,
        clip_norm=clip_norm,
        precision=_choices.precision_of(precision),
        seed=seed,
    )
    check_output(out_folder)
    known = Inputs(
        teacher,
        teacher_weights,
        data,
        image_size=image_size,
        trust_source=trust_source,
        seed=seed,
        limit=limit,
        mean=_choices.numbers_of(mean, "--mean"),
        std=_choices.numbers_of(std, "--std"),
        validation_fraction=validation_fraction,
    )
    learner = replace(known, model=student, weights=student_weights)
    images, taught = known.images, learner.opened_for(known.images)
    pair = Pair(taught.model, known.opened.model, known.example(2), len(images.train))
    if any(name not in OF_LOGITS for name in losses):
        taps = taps or inferred_taps(pair)
    objective = objective_of(
        losses, pair, taps, temperature=temperature, label_weight=label_weight, label_smoothing=label_smoothing
    )
    hinting = None
    if hint_epochs:
        hinting = Hinting(hints_of(losses, pair, taps), replace(schedule, epochs=hint_epochs))
    with threads(thread_count):
        result = distill_into(
            Pupil(taught.model, taught.name, taught.source, taught.architecture),
            teacher=Pupil(known.opened.model, known.opened.name, known.opened.source),
            data=varied(images),
            schedule=schedule,
            objective=objective,
            hinting=hinting,
            remember=remember,
            out=out_folder,
            export=formats,
            leftover=Leftover.RESUME if resume else Leftover.DISCARD if restart else Leftover.REFUSE,
            saving=saving,
            execution=_choices.execution_of(compiled),
            seed=seed,
            device=_choices.device_of(device),
            progress=progress,
            tell=silent if quiet else tell,
            command=command_line(),
        )
    show(result)
