"""Training on mixed images: the loss is the written one, and what needs one class for each image says so."""

import copy
import warnings
from functools import partial

import pytest
import torch
from small_runs import fit_small, small_config, small_net
from torch import Tensor, nn

from secateur.data import Augment, MemorySplit, Normalization
from secateur.distill import Objective, Term, dkd_loss, select_labeled_logits
from secateur.errors import TrainingError
from secateur.train import SGD, Silent, Trained

MIXED = Augment(padding=1, mixup=0.4, cutmix=1.0)


def source(classes: int = 3, n: int = 48) -> MemorySplit:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    noise = torch.randint(0, 60, (n, 3, 8, 8), generator=generator)
    return MemorySplit((noise + 60 * labels[:, None, None, None]).to(torch.uint8), labels, Normalization.default(3))


def run(student: nn.Module, objective: Objective, epochs: int = 1, **settings: object) -> Trained:
    schedule = small_config(epochs, learning_rate=1e-9, optimizer=SGD(momentum=0.0, nesterov=False))
    return fit_small(
        student,
        settings.pop("source", source()),  # type: ignore[arg-type]
        train=schedule,
        objective=objective,
        augment=MIXED,
        callbacks=Silent(),
        **settings,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_cross_entropy_with_probabilities(smoothing: float) -> None:
    """All but untrained (the rate is 1e-9), so that every step's loss is that of the same net."""
    net = small_net()
    trained = run(net, Objective.of_labels(label_smoothing=smoothing))
    reference, losses = copy.deepcopy(net).train(), list[float]()
    for images, labels in source().batches(16, seed=0, epoch=0, augment=MIXED, drop_last=True):
        logits = reference(images).double()
        target = (1 - smoothing) * labels.double() + smoothing / 3
        losses.append(-(target * logits.log_softmax(1)).sum(1).mean().item())
    assert trained.history[-1].train_loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_loss_that_needs_classes_refuses_mixed_labels() -> None:
    objective = Objective(terms=(Term("dkd", partial(dkd_loss, beta=2.0), inputs=select_labeled_logits),))
    with pytest.raises(TrainingError, match=r"leave mixup and cutmix out: this loss needs one class for each image"):
        run(small_net(), objective, teacher=small_net(seed=1))


def test_labels_of_more_classes_than_the_model_has_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"`labels` of mixed images must be probabilities of the model's 3 classes"):
        run(small_net(), Objective.of_labels(), source=source(classes=5, n=50))


class Knowing(nn.Module):
    """Reads the class off the brightness of an image."""

    def __init__(self, wrong: int = 0) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, images: Tensor) -> Tensor:
        usual = Normalization.default(3)
        mean, std = (torch.tensor(values)[:, None, None] for values in (usual.mean, usual.std))
        brightness = 255 * (images * std + mean).mean((1, 2, 3))
        middle = torch.tensor([25.0, 70.0, 120.0]).roll(self.wrong)  # the padding darkens
        return -((brightness[:, None] - middle) ** 2) / 100


def test_a_teacher_is_judged_by_the_likeliest_class() -> None:
    objective = Objective(kd_weight=1.0, label_weight=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(small_net(), objective, teacher=Knowing())
    with pytest.warns(UserWarning, match="no better than chance"):
        run(small_net(), objective, teacher=Knowing(wrong=1))
