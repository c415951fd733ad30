"""Labels and outputs that are no classes: refused with what to do instead, never trained on in silence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import LABELS_ONLY, Blobs, fit_small, small_config, small_net
from torch import Tensor, nn

from secateur.distill import BatchOutputs, Objective, Term, kd_loss, select_labeled_logits
from secateur.errors import SecateurError, TrainingError
from secateur.tasks.classification import check_targets, count_correct
from secateur.train import evaluate


class Labeled(Blobs):
    """Images with labels of any kind."""

    def __init__(self, labels: Tensor) -> None:
        super().__init__(len(labels))
        self.labels = labels


def _multi_hot(n: int, classes: int) -> Tensor:
    found = torch.zeros(n, classes)
    found[:, :2] = 1.0
    return found


ODD: dict[str, Tensor] = {
    "real numbers": torch.linspace(0, 1, 16),
    "one column of real numbers": torch.rand(16, 1),
    "one column of classes": torch.arange(16)[:, None] % 3,
    "multi-hot": _multi_hot(16, 3),
    "multi-hot, as many classes as images": _multi_hot(16, 16),
    "multi-hot integers": _multi_hot(16, 3).long(),
    "no label at all": torch.zeros(16, 3),
    "negative probabilities": torch.tensor([[1.5, -0.5, 0.0]]).repeat(16, 1),
    "not a number": torch.full((16, 3), torch.nan),
    "bool": torch.arange(16) % 2 == 0,
    "masks": torch.zeros(16, 8, 8, dtype=torch.long),
    "negative": torch.arange(16) % 3 - 1,
    "ignored": torch.full((16,), -100),
    "too many classes": torch.arange(16),
}


def _net(labels: Tensor) -> nn.Module:
    classes = labels.shape[1] if labels.ndim == 2 and labels.shape[1] > 1 else 3
    return small_net(classes=classes)


@pytest.mark.parametrize("kind", ODD)
def test_a_model_is_not_evaluated_on_what_is_no_class(kind: str) -> None:
    with pytest.raises(TrainingError, match="`labels` must"):
        evaluate(_net(ODD[kind]), Labeled(ODD[kind]))


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("objective", [LABELS_ONLY, Objective(), Objective(kd_weight=1.0, label_weight=0.0)])
def test_a_model_is_not_trained_on_what_is_no_class(kind: str, objective: Objective) -> None:
    labels, teacher = ODD[kind], _net(ODD[kind]) if objective.needs_teacher else None
    if not objective.label_weight and labels.ndim == 1 and not labels.is_floating_point():
        pytest.skip("a teacher's probabilities need no labels, whatever number stands for none")
    with pytest.raises(TrainingError, match="`labels` must"):
        fit_small(_net(labels), Labeled(labels), train=small_config(1), objective=objective, teacher=teacher)


@pytest.mark.parametrize("place", [0, 8, 15])
def test_one_wrong_label_anywhere_is_found(place: int) -> None:
    labels = torch.arange(16) % 3
    labels[place] = 7
    source, config = Labeled(labels), small_config(1, batch_size=4)
    with pytest.raises(TrainingError, match=r"`labels` must lie in 0\.\.\.2, the model's classes; got 0\.\.\.7"):
        evaluate(small_net(), source, batch_size=4)
    with pytest.raises(TrainingError, match=r"`labels` must lie in 0\.\.\.2"):
        fit_small(small_net(), source, train=config, objective=LABELS_ONLY)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integers_of_any_size_are_classes(dtype: torch.dtype) -> None:
    labels = torch.arange(16) % 3
    wanted, source = evaluate(small_net(), Labeled(labels)), Labeled(labels.to(dtype))
    assert evaluate(small_net(), source) == wanted
    one, other = (
        fit_small(small_net(), each, train=small_config(1), objective=LABELS_ONLY).history[-1].train_loss
        for each in (Labeled(labels), source)
    )
    assert one == other


@given(st.integers(2, 6), st.integers(1, 5), st.floats(0.0, 1.0), st.sampled_from([torch.float32, torch.float16]))
def test_probabilities_are_trained_on(classes: int, images: int, share: float, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(classes)
    mixed = share * torch.eye(classes)[torch.randint(classes, (images,), generator=draw)]
    check_targets((mixed + (1 - share) / classes).to(dtype), classes)


def test_the_message_names_the_loss_to_give() -> None:
    with pytest.raises(
        SecateurError, match=r"float32 \(16, 3\), whose rows sum to 2\.\.\.2\. For other targets"
    ) as caught:
        fit_small(small_net(), Labeled(ODD["multi-hot"]), train=small_config(1), objective=LABELS_ONLY)
    assert "task=MultiLabel(), Regression() or one of your own" in str(caught.value)
    with pytest.raises(SecateurError, match=r"one column\. For other targets"):
        evaluate(small_net(classes=1), Labeled(torch.rand(16, 1)))
    with pytest.raises(SecateurError, match=r"call \.squeeze\(1\)"):
        evaluate(small_net(), Labeled(torch.zeros(16, 1, dtype=torch.long)))


def _bce(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    del teacher
    return nn.functional.binary_cross_entropy_with_logits(logits, labels)


def _squared(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    del teacher
    return (logits - labels).square().mean()


@pytest.mark.parametrize(("labels", "loss"), [(_multi_hot(32, 3), _bce), (torch.rand(32, 1), _squared)])
def test_a_loss_of_ones_own_trains_on_any_labels(labels: Tensor, loss: Callable[..., Tensor]) -> None:
    """The advice of the messages works."""
    term = Term("own", loss, inputs=select_labeled_logits)
    settings: dict[str, Any] = {
        "train": small_config(6, learning_rate=0.2),
        "objective": Objective(kd_weight=0.0, label_weight=0.0, terms=(term,)),
        "teacher": small_net(seed=3, classes=labels.shape[1]),
    }
    student = small_net(classes=labels.shape[1])
    history = fit_small(student, Labeled(labels), **settings).history
    assert history[-1].train_loss < history[0].train_loss
    with pytest.raises(TrainingError, match="give the task that they are for"):
        fit_small(student, Labeled(labels), validation=Labeled(labels), **settings)


class TwoHeads(nn.Module):
    """A detector's outputs: classes and boxes at every place."""

    def __init__(self, kind: Callable[..., object] = lambda *heads: heads) -> None:
        super().__init__()
        self.kind = kind
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.stem, self.box, self.cls = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> object:
        x = self.stem(x).relu()
        return self.kind(self.cls(x), self.box(x))


KINDS: dict[str, Callable[..., object]] = {
    "tuple": lambda *heads: heads,
    "list": lambda *heads: list(heads),
    "dict": lambda *heads: dict(enumerate(heads)),
    "Tensor": lambda *heads: heads[0],
}


@pytest.mark.parametrize("objective", [LABELS_ONLY, Objective(), Objective(kd_weight=1.0, label_weight=0.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_several_outputs_is_refused_by_losses_of_logits(kind: str, objective: Objective) -> None:
    model = TwoHeads(KINDS[kind])
    got = r"\(16, 2, 6, 6\)" if kind == "Tensor" else kind
    match = rf"`model` must return logits of the shape .* got {got}\. Wrap the model .* give the task that they are for"
    with pytest.raises(TrainingError, match=match):
        fit_small(model, Blobs(16), train=small_config(1), objective=objective, teacher=model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_of_several_outputs_is_named(kind: str) -> None:
    with pytest.raises(TrainingError, match="`teacher` must return logits of the shape"):
        fit_small(small_net(), Blobs(16), train=small_config(1), objective=Objective(), teacher=TwoHeads(KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_several_outputs_is_refused_by_evaluate(kind: str) -> None:
    with pytest.raises(TrainingError, match="`model` must return logits"):
        evaluate(TwoHeads(KINDS[kind]), Blobs(4))


def _both_heads(batch: BatchOutputs) -> tuple[Any, ...]:
    return batch.student_logits, batch.teacher_logits


def _heads_apart(student: Any, teacher: Any) -> Tensor:
    return torch.stack([(s - t).square().mean() for s, t in zip(student, teacher, strict=True)]).sum()


def test_a_loss_of_ones_own_is_given_all_outputs() -> None:
    term = Term("heads", _heads_apart, inputs=_both_heads)
    student = TwoHeads()
    nn.init.zeros_(student.box.weight)
    found = fit_small(
        student,
        Blobs(32),
        train=small_config(4, learning_rate=0.1),
        objective=Objective(kd_weight=0.0, label_weight=0.0, terms=(term,)),
        teacher=TwoHeads(),
    )
    assert found.history[-1].train_loss < found.history[0].train_loss


def test_a_loss_of_logits_among_terms_is_not_given_several_outputs() -> None:
    term = Term("own", lambda s, t: kd_loss(s, t, temperature=4.0))
    with pytest.raises(TrainingError, match=r"must both have the shape \(batch, classes\); got tuple and tuple"):
        fit_small(
            TwoHeads(),
            Blobs(16),
            train=small_config(1),
            objective=Objective(kd_weight=0.0, label_weight=0.0, terms=(term,)),
            teacher=TwoHeads(),
        )


def test_the_teachers_right_answers_are_counted_for_classes_only() -> None:
    logits = torch.eye(3)
    assert int(count_correct(logits, torch.tensor([0, 1, 0]))) == 2
    assert int(count_correct(logits, torch.eye(3))) == 3
    assert count_correct(logits, torch.rand(3, 1)) is None
    assert count_correct(logits, torch.rand(3)) is None
    assert count_correct(logits, torch.zeros(3, 3, dtype=torch.long)) is None
