from typing import Any

import pytest
import torch
from small_runs import LABELS_ONLY, Blobs, accepts, fit_small, small_config, small_net
from torch import nn

from secateur.distill import AlignedFeatures, Objective, Tap
from secateur.errors import TrainingError
from secateur.train import Silent, Trained

ALIGNMENT = AlignedFeatures((Tap("1", 1, 8, tuple(range(8))),))


def run(student: nn.Module, source: Blobs, **settings: Any) -> Trained:
    defaults: dict[str, Any] = {"train": small_config(1), "objective": LABELS_ONLY, "callbacks": Silent()}
    return fit_small(student, source, **(defaults | settings))


class Spoilt(Blobs):
    """One image is not a number, in the given step of every epoch."""

    def __init__(self, n: int, step: int) -> None:
        super().__init__(n)
        self.step = step

    def batches(self, batch_size: int, **settings: Any):
        for step, (images, labels) in enumerate(super().batches(batch_size, **settings), 1):
            if step == self.step:
                images[0, 0, 0, 0] = float("nan")
            yield images, labels


@pytest.mark.parametrize("step", [1, 19, 20, 21, 23])
def test_a_loss_that_is_not_finite_is_found_at_its_step(step: int) -> None:
    pattern = (
        rf"the loss \(total nan, label nan\) must stay finite; that failed at epoch 1, step {step} "
        r"\(learning rate .*Lower the learning rate or warm up longer"
    )
    with pytest.raises(TrainingError, match=pattern):
        run(small_net(), Spoilt(23 * 4, step), train=small_config(1, batch_size=4))


def test_weights_that_are_not_finite_after_the_last_step_are_found() -> None:
    class Overflows(nn.Linear):
        """A loss of finite value whose gradient is infinite."""

        def forward(self, x):
            return super().forward(x) + torch.sqrt(self.weight * 0).sum()

    model = nn.Sequential(nn.Flatten(), Overflows(192, 3))
    with pytest.raises(TrainingError, match="the weights must stay finite; that failed at the end of epoch 1"):
        run(model, Blobs(16))


def test_a_student_that_is_broken_before_training_is_found() -> None:
    model = small_net()
    model[1].running_var.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"the validation loss \(nan\) must stay finite; that failed at epoch 0"):
        run(model, Blobs(16), validation=Blobs(8))


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(TrainingError, match="`source` must hold at least one image; got none"):
        run(small_net(), Blobs(0))


def test_an_empty_validation_split_is_refused() -> None:
    with pytest.raises(TrainingError, match="`split` must hold at least one image; got none"):
        run(small_net(), Blobs(16), validation=Blobs(0))


def test_a_source_that_gives_fewer_batches_than_its_length_says_is_refused() -> None:
    class Short(Blobs):
        def __len__(self) -> int:
            return 3 * super().__len__()

        def batches(self, batch_size: int, **settings: Any):
            yield self.images[:batch_size], self.labels[:batch_size]

    source = Short(16)
    assert accepts(source) == 48
    with pytest.raises(TrainingError, match=r"`source` must give 3 batches of 16 images per epoch; got 1 \(epoch 1\)"):
        run(small_net(), source)


def test_a_student_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(TrainingError, match="must have trainable parameters; got 5, none of which requires a gradient"):
        run(small_net().requires_grad_(requires_grad=False), Blobs(16))


def test_a_student_in_half_precision_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"must have float32 weights; got torch\.bfloat16 \(0\.weight\)"):
        run(small_net().bfloat16(), Blobs(16))


def test_an_objective_with_a_teacher_needs_one() -> None:
    with pytest.raises(TrainingError, match=r"`teacher` must be given for Objective\(kd_weight=0\.9.*got None"):
        run(small_net(), Blobs(16), objective=Objective())


def test_feature_weight_needs_an_alignment() -> None:
    with pytest.raises(TrainingError, match=r"`alignment` must be given because feature_weight is 1\.0; got None"):
        run(small_net(), Blobs(16), objective=Objective(feature_weight=1.0), teacher=small_net())


def test_settings_without_effect_warn() -> None:
    with pytest.warns(UserWarning, match="`teacher` has no effect: kd_weight and feature_weight are 0"):
        run(small_net(), Blobs(16), teacher=small_net())
    with pytest.warns(UserWarning, match="`alignment` has no effect: feature_weight is 0"):
        run(small_net(), Blobs(16), objective=Objective(), teacher=small_net(), alignment=ALIGNMENT)


def test_a_teacher_with_other_classes_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"got \(16, 3\) and \(16, 4\)\. Use a teacher with the student's classes"):
        run(small_net(), Blobs(16), objective=Objective(), teacher=small_net(classes=4))


def test_labels_without_a_class_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"`labels` must lie in 0\.\.\.1, the model's classes; got 0\.\.\.2"):
        run(small_net(classes=2), Blobs(16))


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (nn.Conv2d(3, 3, 1), r"\(16, 3, 8, 8\)"),
        (nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (1, -1)), nn.Linear(16 * 192, 3)), r"\(1, 3\)"),
        (nn.LSTM(8, 3), "tuple"),
    ],
)
def test_a_model_that_gives_no_logits_is_refused(model: nn.Module, got: str) -> None:
    class Images(Blobs):
        def batches(self, batch_size: int, **settings: Any):
            for images, labels in super().batches(batch_size, **settings):
                yield images[:, 0] if isinstance(model, nn.LSTM) else images, labels

    with pytest.raises(TrainingError, match=rf"`model` must return logits .*here \(16, classes\); got {got}\. Wrap"):
        run(model, Images(16))
