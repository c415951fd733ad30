"""The command that distills any teacher into any student, and the losses that its flags name."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from cyclopts import Group, Parameter

from secateur.cli import options
from secateur.cli.options import DistillTrainFlags, ImageFlags, RunFlags, flag, whole_number
from secateur.cli.output import command_line, handle_errors_together, logged, resumable
from secateur.cli.tasks import NamedTask
from secateur.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secateur.distill.objective import Objective, Term
    from secateur.distill.taps import Taps

LossName = Literal["kd", "dkd", "dist", "standardized", "hint", "attention", "vid", "rkd", "sp", "pkt", "crd", "review"]
LOSSES = Group("Losses", sort_key=2)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class LossFlags:
    """What a student learns from its teacher."""

    loss: Annotated[
        tuple[str, ...],
        flag(f"{', '.join(get_args(LossName))}, python:...; repeatable, default kd.", LOSSES, value="NAME[=WEIGHT]"),
    ] = ()
    hints: Annotated[
        tuple[str, ...],
        flag(
            "Modules whose outputs are compared; the last of each resolution by default. Repeatable.",
            LOSSES,
            value="STUDENT=TEACHER",
        ),
    ] = ()
    hint_epochs: Annotated[int, whole_number("Epochs of feature losses alone, before the others.", LOSSES, least=0)] = 0
    teacher_cache: Annotated[
        Path | None,
        flag("Store the teacher's logits; later runs with the same seed read them.", LOSSES, value="FOLDER"),
    ] = None


@handle_errors_together
@resumable
def distill_command(
    *,
    teacher: Annotated[str, flag("Trained model, named as for --model of the other commands.", options.MODEL_AND_DATA)],
    student: Annotated[str, flag("Model to train; new weights if none are given.", options.MODEL_AND_DATA)],
    data: options.Data,
    out_folder: options.Out,
    teacher_weights: Annotated[
        Path | None, flag("A .safetensors file, or a torch file without code.", options.MODEL_AND_DATA)
    ] = None,
    student_weights: Annotated[
        Path | None, flag("Weights that the student begins with.", options.MODEL_AND_DATA)
    ] = None,
    images: ImageFlags = ImageFlags(),
    losses: LossFlags = LossFlags(),
    train: DistillTrainFlags = DistillTrainFlags(),
    run: RunFlags = RunFlags(),
    debug: options.Debug = False,
) -> None:
    """Distill a teacher into a student: train, verify, export, report.

    Example: secateur distill --teacher cifar_resnet56 --teacher-weights resnet56.safetensors
    --student cifar_resnet20 --data cifar10 --out student
    """
    from secateur._runtime import is_main_process
    from secateur.cli.messages import Checks
    from secateur.cli.parsing import Inputs, formats
    from secateur.cli.tables import show
    from secateur.distill.published import published_label_weight
    from secateur.pipeline.distill import HintStage, ModelSpec, distill_model
    from secateur.pipeline.workspace import check_output, check_unfinished

    # Whatever can be refused without loading anything is, and all of it at once.
    checks = Checks()
    known = Inputs(teacher, teacher_weights, data, images, run.seed, ("--teacher", "--teacher-weights"))
    known.check(checks)
    other = Inputs(student, student_weights, None, images, run.seed, ("--student", "--student-weights"))
    other.check(checks)
    run_config, exported = checks.add(run.to_config), checks.add(lambda: formats(run.export))
    checks.add(lambda: check_output(out_folder))
    if is_main_process():  # The others of several begin when the first one may have made its folder already.
        checks.add(lambda: check_unfinished(out_folder, run_config().on_existing))
    named, hinted = checks.add(lambda: parse_losses(losses.loss)), checks.add(lambda: parse_taps(losses.hints))
    own_losses = checks.add(
        lambda: {spec: own_loss(spec, images.trust_source) for spec in named() if spec.startswith("python:")}
    )
    checks.add(train.check_augment)
    if train.mixup or train.cutmix:
        checks.add(lambda: check_mixable(named()))
    checks.add(lambda: train.check_task(known.named))
    checks.add(lambda: check_losses_for(known.named, named(), losses.teacher_cache))
    configured = checks.add(lambda: train.to_train(run.seed, checks.value_or(lambda: known.named.batch_size, 1)))
    checks.settle()
    weights, taps, own, train_config = named(), hinted(), own_losses(), configured()
    with logged(quiet=run.quiet, as_json=run.as_json):  # A large set takes seconds, and says so.
        learner = other.load_for(known.images)
    pair = Pair(learner.model, known.loaded.model, known.example(2), len(known.images.train), own)
    if any(pair.needs_taps(name) for name in weights):
        taps = taps or inferred_taps(pair)
    objective = to_objective(
        weights,
        pair,
        taps,
        temperature=train.temperature,
        label_weight=published_label_weight(weights) if train.label_weight is None else train.label_weight,
        label_smoothing=train.label_smoothing,
    )
    hint_stage = None
    if losses.hint_epochs:
        hint_stage = HintStage(hint_terms(weights, pair, taps), replace(train_config, epochs=losses.hint_epochs))
    with run.fabric(train_config) as fabric, logged(quiet=run.quiet, as_json=run.as_json):
        result = distill_model(
            ModelSpec(learner.model, learner.name, learner.source, learner.architecture),
            teacher=ModelSpec(known.loaded.model, known.loaded.name, known.loaded.source),
            data=train.augment(known.images),
            task=known.named.task,
            train=train_config,
            objective=objective,
            hint_stage=hint_stage,
            teacher_cache=losses.teacher_cache,
            execution=train.execution,
            out=out_folder,
            export=exported(),
            run=replace(run_config(), fabric=fabric, command=command_line()),
        )
    if fabric.is_global_zero:
        show(result, quiet=run.quiet, as_json=run.as_json)


LOGIT_LOSSES = ("kd", "dkd", "dist", "standardized")
"""Losses that need no features."""

CLASS_LOSSES = ("dkd", "crd")
"""Losses that need one class for each image."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A student and its teacher, and what both are shown.

    Attributes:
        student: The model that learns.
        teacher: The model that is learned from.
        example: A few normalized images on the CPU.
        images: Number of training images.
        own: Losses of the user, by the ``python:`` words that name them.
    """

    student: "nn.Module"
    teacher: "nn.Module"
    example: "Tensor"
    images: int
    own: "Mapping[str, Term]" = field(default_factory=dict[str, "Term"])

    def needs_taps(self, name: str) -> bool:
        """Return whether a loss compares features at modules that it does not name itself."""
        from secateur.distill.objective import select_features, select_labeled_feature, select_pooled_features

        term = self.own.get(name)
        if term is None:
            return name not in LOGIT_LOSSES
        return term.inputs in (select_features, select_labeled_feature, select_pooled_features) and not term.taps


def parse_losses(words: Sequence[str]) -> dict[str, float]:
    """Read weights by loss from words such as "kd" and "hint=10"; kd alone if there are none, published weights else.

    Raises:
        TrainingError: If a loss is unknown, given twice, or its weight is no positive number.
    """
    from secateur.distill.published import PUBLISHED

    found: dict[str, float] = {}
    for word in words or ("kd",):
        name, equals, number = word.partition("=")
        if name not in PUBLISHED and not name.startswith("python:"):
            raise TrainingError(
                f"`--loss` must be one of {', '.join(PUBLISHED)} or python:PACKAGE.MODULE:NAME; got {name!r}."
            )
        try:
            weight = float(number) if equals else PUBLISHED[name].weight if name in PUBLISHED else 1.0
        except ValueError:
            weight = math.nan
        if not (math.isfinite(weight) and weight > 0):
            raise TrainingError(f"`--loss` must have a positive weight, such as {name}=0.5; got {word!r}.")
        if name in found:
            raise TrainingError(f"`--loss` must name each loss once; got {name!r} again.")
        found[name] = weight
    return found


def own_loss(spec: str, trust_source: bool) -> "Term":
    """Return the term that ``python:PACKAGE.MODULE:NAME`` makes, see `made_by`."""
    from secateur.cli.words import made_by
    from secateur.distill.objective import Term

    return made_by(spec, Term, "--loss", trust_source)


def check_mixable(losses: Mapping[str, float]) -> None:
    """Refuse losses that have no use for the labels of mixed images."""
    for loss in losses:
        if loss in CLASS_LOSSES:
            raise TrainingError(
                f"`--loss` must go without --mixup and --cutmix for {loss}, which needs one class for each image; got "
                "both. Leave one of them out."
            )


def check_losses_for(task: NamedTask, losses: Mapping[str, float], cache: Path | None) -> None:
    """Refuse losses that are for the logits of classifiers alone, for another task.

    Raises:
        TrainingError: If one is named.
    """
    if task.classifies:
        return
    wrong = [name for name in losses if name in ("standardized", "dist", *CLASS_LOSSES)]
    if wrong:
        raise TrainingError(
            f"`--loss` must be for any outputs with --task {task.name}; got {wrong[0]}, which compares classes. Say "
            "--loss kd, which compares outputs as the task does."
        )
    if cache is not None:
        raise TrainingError(f"`--teacher-cache` must go with --task classification; got {task.name}. Leave it out.")


def parse_taps(words: Sequence[str]) -> dict[str, str]:
    """Read pairs of modules from "STUDENT=TEACHER" words.

    Raises:
        TrainingError: If a word is not of this form.
    """
    found: dict[str, str] = {}
    for word in words:
        name, equals, other = word.partition("=")
        if not (name and equals and other):
            raise TrainingError(
                f"`--hints` must pair a module of the student with one of the teacher, such as layer2=layer2; got "
                f"{word!r}. `secateur inspect --tree` shows their names."
            )
        found[name] = other
    return found


def inferred_taps(pair: Pair) -> dict[str, str]:
    """Pair the last modules at each resolution; raise a `SecateurError` if a network has none."""
    from secateur.distill.taps import paired_stages
    from secateur.graph.trace import trace

    return paired_stages(trace(pair.student, pair.example[:2]), trace(pair.teacher, pair.example[:2]))


def to_objective(
    losses: Mapping[str, float],
    pair: Pair,
    taps: "Taps",
    *,
    temperature: float,
    label_weight: float,
    label_smoothing: float,
) -> "Objective":
    """Build one objective from losses by name; ``taps`` are where losses of features listen."""
    from secateur.distill.objective import Objective

    terms = [term for name, weight in losses.items() if name != "kd" for term in _terms(name, weight, pair, taps)]
    return Objective(losses.get("kd", 0.0), label_weight, 0.0, temperature, label_smoothing, tuple(terms))


def hint_terms(losses: Mapping[str, float], pair: Pair, taps: "Taps") -> "tuple[Term, ...]":
    """Return the losses of features alone, for a stage before everything else; refuse if there are none."""
    chosen = [name for name in losses if pair.needs_taps(name) or (name in pair.own and pair.own[name].taps)]
    found = [term for name in chosen for term in _terms(name, losses[name], pair, taps)]
    if not found:
        raise TrainingError(
            "`--hint-epochs` must go with a loss of features; got none. Say --loss hint, or leave it out."
        )
    return tuple(found)


def _terms(name: str, weight: float, pair: Pair, taps: "Taps") -> "list[Term]":
    from secateur.distill import feature_losses as features
    from secateur.distill import logit_losses as logits
    from secateur.distill.learned_losses import ContrastiveRepresentation, KnowledgeReview
    from secateur.distill.objective import (
        MeanOverTaps,
        Term,
        select_features,
        select_labeled_feature,
        select_labeled_logits,
        select_logits,
        select_pooled_features,
    )
    from secateur.distill.published import PUBLISHED

    warmup = PUBLISHED[name].warmup_fraction if name in PUBLISHED else 0.0

    def of_features(loss: "Callable[..., Tensor]", *, times: int = 1) -> Term:
        return Term(name, loss, select_features, times * weight, taps, warmup)

    def of_last(loss: "Callable[..., Tensor]", *, named: str = name, times: int = 1) -> Term:
        return Term(named, MeanOverTaps(loss), select_pooled_features, times * weight, last)

    def own() -> Term:
        term = pair.own[name]
        return replace(term, weight=weight * term.weight, taps=taps if pair.needs_taps(name) else term.taps)

    def crd() -> Term:
        (student, *_), (teacher, *_) = _channels(pair, last)
        bank = min(pair.images, 16384)
        loss = ContrastiveRepresentation(student, teacher, size=bank, negatives=max(1, min(4096, bank // 2)))
        return Term(name, loss, select_labeled_feature, weight, last)

    last = dict(list(taps.items())[-1:])
    # The reference code sums attention and VID over the taps, and compares the last feature, pooled, in RKD and PKT.
    made: dict[str, Callable[[], list[Term]]] = {
        "dkd": lambda: [Term(name, logits.dkd_loss, select_labeled_logits, weight, warmup_fraction=warmup)],
        "dist": lambda: [Term(name, logits.dist_loss, select_logits, weight)],
        "standardized": lambda: [Term(name, logits.standardized_kd_loss, select_logits, weight)],
        "hint": lambda: [of_features(MeanOverTaps(features.hint_loss, _adaptors(pair, taps)))],
        "attention": lambda: [of_features(MeanOverTaps(features.attention_loss), times=len(taps))],
        "vid": lambda: [of_features(MeanOverTaps(_vid(pair, taps)), times=len(taps))],
        "sp": lambda: [Term(name, MeanOverTaps(features.similarity_loss), select_features, weight, last)],
        "rkd": lambda: [
            of_last(features.rkd_distance_loss, named="rkd_distance"),
            of_last(features.rkd_angle_loss, named="rkd_angle", times=2),
        ],
        "pkt": lambda: [of_last(features.pkt_loss)],
        "crd": lambda: [crd()],
        "review": lambda: [of_features(KnowledgeReview(*_channels(pair, taps)))],
    }
    return [own()] if name in pair.own else made[name]()


def _adaptors(pair: Pair, taps: "Taps") -> "dict[str, nn.Module]":
    from secateur.distill.taps import make_adaptors

    return dict(make_adaptors(pair.student, pair.teacher, taps, pair.example[:1]).items())


def _vid(pair: Pair, taps: "Taps") -> "list[Callable[[Tensor, Tensor], Tensor]]":
    from secateur.distill.learned_losses import VariationalInformation

    _, channels = _channels(pair, taps)
    return [
        VariationalInformation(adaptor, count)
        for adaptor, count in zip(_adaptors(pair, taps).values(), channels, strict=True)
    ]


def _channels(pair: Pair, taps: "Taps") -> tuple[list[int], list[int]]:
    """Return the channels at the taps, of the student and of the teacher."""
    from secateur.distill.feature_losses import channel_dim
    from secateur.distill.taps import compute_features

    students, teachers = compute_features(pair.student, pair.teacher, taps, pair.example[:1])
    return [each.shape[channel_dim(each)] for each in students], [each.shape[channel_dim(each)] for each in teachers]
