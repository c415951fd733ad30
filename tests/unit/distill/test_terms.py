import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from secateur.distill import (
    BatchOutputs,
    ContrastiveRepresentation,
    KnowledgeReview,
    MeanOverTaps,
    Objective,
    Term,
    VariationalInformation,
    dist_loss,
    dkd_loss,
    hint_loss,
    kd_loss,
    label_loss,
    make_adaptors,
    select_features,
    select_labeled_feature,
    select_labeled_logits,
    similarity_loss,
)
from secateur.errors import TrainingError


def net(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, stride=2), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(2 * width, 5),
    )  # fmt: skip


STUDENT, TEACHER = net(2), net(4).requires_grad_(requires_grad=False)
IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
TAPS = {"0": "0", "2": "2"}
ONLY_TERMS = partial(Objective, kd_weight=0.0, label_weight=0.0)


def run(objective: Objective) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    with objective.record(STUDENT, TEACHER) as recorder:
        teacher_logits, logits = TEACHER(IMAGES), STUDENT(IMAGES)
        total, parts = objective(logits, teacher_logits=teacher_logits, labels=LABELS, recorder=recorder)
    return total, dict(parts)


def captured(names: dict[str, str]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs of the named layers by running the sequence up to them."""
    return [STUDENT[: int(n) + 1](IMAGES) for n in names], [TEACHER[: int(n) + 1](IMAGES) for n in names.values()]


def test_any_combination_is_the_weighted_sum_of_its_losses() -> None:
    adaptors = make_adaptors(STUDENT, TEACHER, TAPS, IMAGES[:1])
    objective = Objective(
        kd_weight=0.5,
        label_weight=0.25,
        temperature=2.0,
        terms=(
            Term("dkd", partial(dkd_loss, beta=2.0), inputs=select_labeled_logits, weight=0.125),
            Term("dist", dist_loss, weight=2.0),
            Term("hint", MeanOverTaps(hint_loss, adaptors), inputs=select_features, weight=3.0, taps=TAPS),
            Term("sp", MeanOverTaps(similarity_loss), inputs=select_features, weight=7.0, taps={"2": "0"}),
            Term("mine", lambda seen: seen.student_logits.square().mean(), inputs=lambda seen: (seen,)),
        ),
    )
    total, parts = run(objective)
    zs, zt = STUDENT(IMAGES), TEACHER(IMAGES)
    students, teachers = captured(TAPS)
    hints = [hint_loss(a(s), t) for a, s, t in zip(adaptors.values(), students, teachers, strict=True)]
    expected = {
        "label": label_loss(zs, LABELS),
        "kd": kd_loss(zs, zt, temperature=2.0),
        "dkd": dkd_loss(zs, zt, LABELS, beta=2.0),
        "dist": dist_loss(zs, zt),
        "hint": (hints[0] + hints[1]) / 2,
        "sp": similarity_loss(students[1], teachers[0]),
        "mine": zs.square().mean(),
    }
    weights = {"label": 0.25, "kd": 0.5, "dkd": 0.125, "dist": 2.0, "hint": 3.0, "sp": 7.0, "mine": 1.0}
    assert list(parts) == list(expected)
    for name, part in parts.items():
        assert not part.requires_grad
        torch.testing.assert_close(part, expected[name].detach())
    torch.testing.assert_close(total, sum(weights[name] * loss for name, loss in expected.items()))


def test_modules_with_parameters_learn_with_the_student() -> None:
    pairs = make_adaptors(STUDENT, TEACHER, TAPS, IMAGES[:1])
    channels = (4, 8)
    vid = MeanOverTaps([VariationalInformation(a, c) for a, c in zip(pairs.values(), channels, strict=True)])
    objective = ONLY_TERMS(
        terms=(
            Term("vid", vid, inputs=select_features, taps=TAPS),
            Term(
                "crd",
                ContrastiveRepresentation(4, 8, size=12, negatives=3),
                inputs=select_labeled_feature,
                taps={"2": "2"},
            ),
            Term("review", KnowledgeReview((2, 4), (4, 8)), inputs=select_features, taps=TAPS),
            Term("dist", dist_loss),
        )
    )
    assert list(objective.learned) == ["vid", "crd", "review"]
    total, parts = run(objective)
    assert list(parts) == ["vid", "crd", "review", "dist"]
    total.backward()
    learned = dict(objective.learned.named_parameters())
    assert {name.split(".")[0] for name in learned} == {"vid", "crd", "review"}
    assert "vid.learned.0.alpha" in learned
    for name, parameter in learned.items():
        assert parameter.grad is not None, name
    # A copy is a run's own: what it learns does not reach the caller's modules.
    mine = copy.deepcopy(objective)
    with torch.no_grad():
        for parameter in mine.learned.parameters():
            parameter.add_(1.0)
    moved = run(mine)[1]
    assert moved["vid"] != parts["vid"]
    assert run(objective)[1]["vid"] == parts["vid"]
    STUDENT.zero_grad()


def test_mean_over_taps_takes_a_loss_for_each_tap_or_one_for_all() -> None:
    students, teachers = [torch.ones(2, 3), torch.zeros(2, 3)], [torch.zeros(2, 3)] * 2
    assert MeanOverTaps(hint_loss)(students, teachers).item() == 0.25
    assert MeanOverTaps([hint_loss, lambda s, t: (s - t).sum() + 5])(students, teachers).item() == 2.75
    with pytest.raises(TrainingError, match="must be one for each tap; got 2 and 0 for 1 taps"):
        MeanOverTaps([hint_loss, hint_loss])(students[:1], teachers[:1])
    with pytest.raises(TrainingError, match="must be one for each tap; got 1 and 1 for 2 taps"):
        MeanOverTaps(hint_loss, {"a": nn.Identity()})(students, teachers)
    with pytest.raises(TrainingError, match=r"got 1 and 0 for 0 taps\. Name the taps in the term"):
        MeanOverTaps(hint_loss)([], [])


def test_descriptions_distinguish_terms_and_contain_no_addresses() -> None:
    def description(**changed: object) -> str:
        settings = {
            "loss": partial(dkd_loss, beta=2.0),
            "inputs": select_labeled_logits,
            "weight": 0.5,
            "taps": TAPS,
            **changed,
        }
        return Term("a", **settings).description  # type: ignore[arg-type]

    same = description()
    assert same == description()
    assert "0x" not in same + description(
        loss=MeanOverTaps(hint_loss, make_adaptors(STUDENT, TEACHER, TAPS, IMAGES[:1]))
    )
    assert "beta=2.0" in same
    others = [
        description(loss=partial(dkd_loss, beta=3.0)),
        description(loss=MeanOverTaps(hint_loss)),
        description(loss=MeanOverTaps(similarity_loss)),
        description(inputs=select_features),
        description(weight=0.25),
        description(taps={"0": "2"}),
    ]
    assert len({same, *others}) == 7


def test_terms_need_a_teacher_and_their_inputs() -> None:
    objective = ONLY_TERMS(terms=(Term("dist", dist_loss),))
    assert objective.needs_teacher
    logits = torch.zeros(2, 3)
    with objective.record(STUDENT, TEACHER) as recorder:
        for missing in ("labels", "teacher_logits", "recorder"):
            given = {"labels": LABELS[:2], "teacher_logits": logits, "recorder": recorder} | {missing: None}
            with pytest.raises(TrainingError, match="must be given because the objective has terms; got None for one"):
                objective(logits, **given)


def test_features_of_an_earlier_batch_are_not_used_again() -> None:
    objective = ONLY_TERMS(terms=(Term("sp", MeanOverTaps(similarity_loss), inputs=select_features, taps={"0": "0"}),))
    with objective.record(STUDENT, TEACHER) as recorder:
        given = {"teacher_logits": TEACHER(IMAGES), "labels": LABELS, "recorder": recorder}
        objective(STUDENT(IMAGES), **given)
        TEACHER(IMAGES)
        with pytest.raises(TrainingError, match="`student` must run module '0'"):
            objective(torch.zeros(6, 5), **given)


def test_bad_terms_are_refused() -> None:
    for name in ("", "a.b", "total", "kd"):
        with pytest.raises(TrainingError, match=f"`name` must be a word without dots.*got '{name}'"):
            Term(name, dist_loss)
    with pytest.raises(TrainingError, match="`weight` must be finite and not negative; got nan"):
        Term("a", dist_loss, weight=math.nan)
    with pytest.raises(TrainingError, match=r"`weight` must be positive; got 0 for term 'a'\. Leave the term out"):
        Term("a", dist_loss, weight=0.0)
    with pytest.raises(TrainingError, match="`terms` must have different names; got a, a"):
        Objective(terms=(Term("a", dist_loss), Term("a", kd_loss)))
    seen = BatchOutputs(LABELS, torch.zeros(6, 5), torch.zeros(6, 5))
    with pytest.raises(TrainingError, match=r"`loss` must give a scalar; got \(6, 5\) from term 'a'\. Take the mean"):
        Term("a", lambda s, t: s - t)(seen)
