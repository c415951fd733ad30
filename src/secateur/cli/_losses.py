"""From the words of the command line to the losses of a distillation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from secateur.cli._options import LossName
from secateur.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secateur.distill import Objective, Taps, Term

USUAL = {
    LossName.KD: 0.9,
    LossName.DKD: 1.0,
    LossName.DIST: 1.0,
    LossName.STANDARDISED: 0.9,
    LossName.HINT: 1.0,
    LossName.ATTENTION: 500.0,
    LossName.VID: 1.0,
    LossName.RKD: 25.0,
    LossName.SP: 100.0,
    LossName.PKT: 100.0,
    LossName.CRD: 0.8,
    LossName.REVIEW: 1.0,
}
"""Weights where none is given: those of the papers as far as their scaling is ours (docs/distillation.md)."""

OF_LOGITS = (LossName.KD, LossName.DKD, LossName.DIST, LossName.STANDARDISED)

OF_CLASSES = (LossName.DKD, LossName.CRD)
"""They need one class for each image."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A student and its teacher, and what both are shown.

    Attributes:
        student: Learns.
        teacher: Is learned from.
        example: A few normalised images on the CPU.
        images: Number of training images.
    """

    student: nn.Module
    teacher: nn.Module
    example: Tensor
    images: int


def losses_of(words: Sequence[str] | None) -> dict[LossName, float]:
    """Weights by loss from "kd", "hint=10"; kd alone if nothing is said.

    Raises:
        TrainingError: If a loss is unknown, twice, or its weight no number.
    """
    found: dict[LossName, float] = {}
    for word in words or (LossName.KD.value,):
        name, equals, number = word.partition("=")
        if name not in set(LossName):
            raise TrainingError(f"`--loss` must be one of {', '.join(LossName)}; got {name!r}.")
        loss = LossName(name)
        try:
            weight = float(number) if equals else USUAL[loss]
        except ValueError:
            weight = math.nan
        if not (math.isfinite(weight) and weight > 0):
            raise TrainingError(f"`--loss` must have a positive weight, such as {name}=0.5; got {word!r}.")
        if loss in found:
            raise TrainingError(f"`--loss` must name each loss once; got {name!r} again.")
        found[loss] = weight
    return found


def check_mixable(losses: Mapping[LossName, float]) -> None:
    """Refuse losses that have no use for the labels of mixed images.

    Raises:
        TrainingError: If there is one.
    """
    for loss in losses:
        if loss in OF_CLASSES:
            raise TrainingError(
                f"`--loss` must go without --mixup and --cutmix for {loss}, which needs one class for each image; got "
                "both. Leave one of them out."
            )


def taps_of(words: Sequence[str] | None) -> dict[str, str]:
    """Pairs of modules from "STUDENT=TEACHER" words.

    Raises:
        TrainingError: If a word is not of this form.
    """
    found: dict[str, str] = {}
    for word in words or ():
        name, equals, other = word.partition("=")
        if not (name and equals and other):
            raise TrainingError(
                f"`--hints` must pair a module of the student with one of the teacher, such as layer2=layer2; got "
                f"{word!r}. `secateur inspect --tree` shows their names."
            )
        found[name] = other
    return found


def inferred_taps(pair: Pair) -> dict[str, str]:
    """The last modules at each resolution, side by side.

    Raises:
        TraceError: If a network cannot be traced.
        TrainingError: If a network has no such modules.
    """
    from secateur.distill import paired_stages
    from secateur.graph import trace

    return paired_stages(trace(pair.student, pair.example[:2]), trace(pair.teacher, pair.example[:2]))


def objective_of(
    losses: Mapping[LossName, float],
    pair: Pair,
    taps: Taps,
    *,
    temperature: float,
    label_weight: float,
    label_smoothing: float,
) -> Objective:
    """The losses as one objective.

    Args:
        losses: Of `losses_of`.
        pair: Student and teacher.
        taps: Where losses of features listen; not used without such.
        temperature: Of kd.
        label_weight: Of the labels.
        label_smoothing: Of the labels.
    """
    from secateur.distill import Objective

    terms = [
        term for name, weight in losses.items() if name is not LossName.KD for term in _terms(name, weight, pair, taps)
    ]
    kd_weight = losses.get(LossName.KD, 0.0)
    return Objective(kd_weight, label_weight, 0.0, temperature, label_smoothing, tuple(terms))


def hints_of(losses: Mapping[LossName, float], pair: Pair, taps: Taps) -> tuple[Term, ...]:
    """The losses of features alone, for a stage before everything else.

    Raises:
        TrainingError: If there are none.
    """
    found = [term for name, w in losses.items() if name not in OF_LOGITS for term in _terms(name, w, pair, taps)]
    if not found:
        raise TrainingError(
            "`--hint-epochs` must go with a loss of features; got none. Say --loss hint, or leave it out."
        )
    return tuple(found)


def _terms(name: LossName, weight: float, pair: Pair, taps: Taps) -> list[Term]:
    from secateur.distill import (
        ContrastiveRepresentation,
        KnowledgeReview,
        PerTap,
        Term,
        attention_loss,
        dist_loss,
        dkd_loss,
        features,
        hint_loss,
        labelled_feature,
        labelled_logits,
        logits,
        pkt_loss,
        rkd_angle_loss,
        rkd_distance_loss,
        similarity_loss,
        standardised_kd_loss,
    )

    def of_features(loss: Callable[..., Tensor]) -> Term:
        return Term(name.value, loss, features, weight, taps)

    def crd() -> Term:
        (student, *_), (teacher, *_) = _channels(pair, last)
        bank = min(pair.images, 16384)
        loss = ContrastiveRepresentation(student, teacher, size=bank, negatives=max(1, min(4096, bank // 2)))
        return Term(name.value, loss, labelled_feature, weight, last)

    last = dict(list(taps.items())[-1:])
    made: dict[LossName, Callable[[], list[Term]]] = {
        LossName.DKD: lambda: [Term(name.value, dkd_loss, labelled_logits, weight)],
        LossName.DIST: lambda: [Term(name.value, dist_loss, logits, weight)],
        LossName.STANDARDISED: lambda: [Term(name.value, standardised_kd_loss, logits, weight)],
        LossName.HINT: lambda: [of_features(PerTap(hint_loss, _adaptors(pair, taps)))],
        LossName.ATTENTION: lambda: [of_features(PerTap(attention_loss))],
        LossName.VID: lambda: [of_features(PerTap(_vid(pair, taps)))],
        LossName.SP: lambda: [of_features(PerTap(similarity_loss))],
        LossName.RKD: lambda: [
            Term("rkd_distance", PerTap(rkd_distance_loss), features, weight, last),
            Term("rkd_angle", PerTap(rkd_angle_loss), features, 2 * weight, last),
        ],
        LossName.PKT: lambda: [Term(name.value, PerTap(pkt_loss), features, weight, last)],
        LossName.CRD: lambda: [crd()],
        LossName.REVIEW: lambda: [of_features(KnowledgeReview(*_channels(pair, taps)))],
    }
    return made[name]()


def _adaptors(pair: Pair, taps: Taps) -> dict[str, nn.Module]:
    from secateur.distill import adaptors_of

    return dict(adaptors_of(pair.student, pair.teacher, taps, pair.example[:1]).items())


def _vid(pair: Pair, taps: Taps) -> list[Callable[[Tensor, Tensor], Tensor]]:
    from secateur.distill import VariationalInformation

    _, channels = _channels(pair, taps)
    return [
        VariationalInformation(adaptor, count)
        for adaptor, count in zip(_adaptors(pair, taps).values(), channels, strict=True)
    ]


def _channels(pair: Pair, taps: Taps) -> tuple[list[int], list[int]]:
    """Channels at the taps, of the student and of the teacher."""
    from secateur.distill import tapped

    students, teachers = tapped(pair.student, pair.teacher, taps, pair.example[:1])
    return [_count(feature) for feature in students], [_count(feature) for feature in teachers]


def _count(feature: Tensor) -> int:
    """Tokens (batch, tokens, channels) have their channels last, all else second."""
    return feature.shape[2] if feature.ndim == 3 else feature.shape[1]
