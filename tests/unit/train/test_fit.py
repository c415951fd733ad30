import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import LABELS_ONLY, Blobs, fit_small, same, small_config, small_net, state
from torch import nn
from torch.nn import functional as F

from secateur.data import Augment, MemorySplit, Normalization
from secateur.distill import AlignedFeatures, Objective, Tap
from secateur.train import (
    SGD,
    AdamW,
    Batches,
    EpochRecord,
    Precision,
    RunSettings,
    Silent,
    Trained,
    average_decay,
    evaluate,
    train_with_teacher,
)


def run(student: nn.Module, source: Batches, **settings: Any) -> Trained:
    defaults: dict[str, Any] = {"train": small_config(), "objective": LABELS_ONLY, "callbacks": Silent()}
    return fit_small(student, source, **(defaults | settings))


def hand_written(student: nn.Module, source: Blobs, optimizer: torch.optim.Optimizer, rates: list[list[float]]) -> None:
    """Plain PyTorch: labels only, float32."""
    student.train()
    for epoch, epoch_rates in enumerate(rates):
        batches = source.batches(16, device=torch.device("cpu"), seed=0, epoch=epoch, drop_last=True)
        for rate, (images, labels) in zip(epoch_rates, batches, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            F.cross_entropy(student(images.contiguous(memory_format=torch.channels_last)), labels).backward()
            optimizer.step()


@pytest.mark.parametrize("optimizer", [SGD(), SGD(vector_weight_decay=5e-4), AdamW()])
def test_training_is_bit_for_bit_a_hand_written_loop(optimizer: SGD | AdamW) -> None:
    student, source = small_net(), Blobs(40)
    schedule = small_config(2, optimizer=optimizer, learning_rate=0.1, warmup_fraction=0.5)
    trained = run(student, source, train=schedule)
    expected = small_net().to(memory_format=torch.channels_last)
    matrices = [p for p in expected.parameters() if p.ndim > 1]
    vectors = [p for p in expected.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": optimizer.weight_decay},
        {"params": vectors, "weight_decay": optimizer.vector_weight_decay},
    ]
    if isinstance(optimizer, SGD):
        torch_optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    else:
        torch_optimizer = torch.optim.AdamW(groups, lr=0.1)
    # 40 images make 2 whole batches; 4 steps, of which 2 warm up, then 1 and 1/2 of the peak.
    hand_written(expected, source, torch_optimizer, [[0.05, 0.1], [0.1, 0.05]])
    assert same(state(trained.model), state(expected))


def test_distillation_step_is_bit_for_bit_a_hand_written_one() -> None:
    student, teacher, source = small_net(1, width=4), small_net(2), Blobs(16)
    alignment = AlignedFeatures((Tap("1", 1, 8, (0, 2, 3, 7)),))
    objective = Objective(kd_weight=0.5, label_weight=0.25, feature_weight=2.0, label_smoothing=0.1)
    schedule = small_config(1, learning_rate=0.1, warmup_fraction=0.0)
    trained = run(student, source, train=schedule, objective=objective, teacher=teacher, alignment=alignment)

    expected = small_net(1, width=4).to(memory_format=torch.channels_last).train()
    teacher.eval()
    images, labels = next(source.batches(16, device=torch.device("cpu"), seed=0))
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        target = teacher[1](teacher[0](images))[:, [0, 2, 3, 7]]
        wanted = F.log_softmax(teacher(images) / 4, dim=1)
    feature = expected[1](expected[0](images))
    logits = expected[2:](feature)
    label = F.cross_entropy(logits, labels, label_smoothing=0.1)
    kd = 16 * F.kl_div(F.log_softmax(logits / 4, dim=1), wanted, reduction="batchmean", log_target=True)
    aligned = F.mse_loss(feature, target) / (target.var(correction=0) + 1e-6)
    total = 0.25 * label + 0.5 * kd + 2.0 * aligned
    total.backward()
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in expected.parameters() if p.ndim > 1], "weight_decay": 5e-4},
            {"params": [p for p in expected.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=0.1, momentum=0.9, nesterov=True,
    )  # fmt: skip
    optimizer.step()
    # The teacher is a channels-last copy in the engine and the terms are summed in another order: the last bits differ.
    for name, tensor in state(trained.model).items():
        torch.testing.assert_close(tensor, state(expected)[name], rtol=1e-5, atol=1e-7)
    record = trained.history[-1]
    assert record.parts == pytest.approx({"label": label.item(), "kd": kd.item(), "feature": aligned.item()}, rel=1e-5)
    assert record.train_loss == pytest.approx(total.item(), rel=1e-5)


def test_training_learns_the_problem() -> None:
    source, validation = Blobs(256), Blobs(128, seed=1)
    before = evaluate(small_net(), validation)
    trained = run(small_net(), source, train=small_config(5, learning_rate=0.1), validation=validation)
    losses = [record.train_loss for record in trained.history[1:]]
    assert None not in losses
    assert losses[-1] < losses[0] / 2
    assert trained.best_score is not None
    assert trained.best_score > 0.9 > before.value


def test_distillation_brings_the_student_to_the_teacher() -> None:
    source, validation = Blobs(256), Blobs(128, seed=1)
    teacher = run(small_net(), source, train=small_config(5, learning_rate=0.1)).model
    objective = Objective(kd_weight=1.0, label_weight=0.0)

    class Data:
        train = source
        validation = Blobs(128, seed=1)
        augment = 0.25

    schedule = small_config(5, learning_rate=0.1)
    result = train_with_teacher(
        small_net(9),
        teacher=teacher,
        data=Data,
        train=schedule,
        objective=objective,
        run=RunSettings(callbacks=Silent()),
    )
    assert result.history[-1].parts["kd"] < result.history[1].parts["kd"] / 2
    assert evaluate(result.model, validation).value > 0.9
    assert source.calls[-1]["augment"] == 0.25


def test_nothing_that_was_given_changes() -> None:
    student, teacher, source = small_net(1).train(), small_net(2).train(), Blobs(40)
    teacher[0].weight.requires_grad_(requires_grad=False)
    before = state(student), state(teacher)
    strides = student[0].weight.stride()
    np.random.seed(3)
    random.seed(3)
    torch.manual_seed(3)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with torch.no_grad():
        alignment = AlignedFeatures((Tap("1", 1, 8, tuple(range(8))),))
        objective = Objective(feature_weight=1.0)
        trained = run(student, source, objective=objective, teacher=teacher, alignment=alignment, validation=Blobs(8))
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    assert same(state(student), before[0])
    assert same(state(teacher), before[1])
    assert student[0].weight.stride() == strides
    for model in (student, teacher):
        assert all(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_hooks for module in model.modules())
    assert [p.requires_grad for p in teacher.parameters()] == [False, True, True, True, True]
    assert trained.model[0].weight.stride() == strides
    assert not any(module._forward_hooks for module in trained.model.modules())
    assert not any(module.training for module in trained.model.modules())
    assert all(parameter.requires_grad for parameter in trained.model.parameters())


def test_frozen_parameters_of_the_student_stay() -> None:
    student = small_net()
    student[0].weight.requires_grad_(requires_grad=False)
    trained = run(student, Blobs(40))
    assert torch.equal(trained.model[0].weight, student[0].weight)
    assert not trained.model[0].weight.requires_grad
    assert not torch.equal(trained.model[6].weight, student[6].weight)


def test_runs_are_deterministic_for_a_seed_with_dropout() -> None:
    def trained(seed: int, disturbance: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(disturbance)
        return state(run(small_net(dropout=0.5), Blobs(40), train=small_config(seed=seed)).model)

    assert same(trained(1, disturbance=10), trained(1, disturbance=11))
    assert not same(trained(1, disturbance=10), trained(2, disturbance=10))


def test_dropout_differs_between_epochs() -> None:
    class OneOrder(Blobs):
        def batches(self, batch_size: int, **settings: Any):
            return super().batches(batch_size, **(settings | {"seed": None}))

    seen: list[torch.Tensor] = []
    student = small_net(dropout=0.5)
    student[5].register_forward_hook(lambda module, args, out: seen.append(out == 0))
    run(student, OneOrder(16), train=small_config(2))
    assert len(seen) == 2
    assert not torch.equal(seen[0], seen[1])


def test_the_source_is_read_as_the_protocol_says() -> None:
    source, validation = Blobs(40), Blobs(24, seed=1)
    run(small_net(), source, train=small_config(2, seed=7), augment=0.5, validation=validation)
    expected = [{"seed": 7, "epoch": epoch, "augment": 0.5, "drop_last": True, "start": 0} for epoch in (0, 1)]
    assert source.calls == expected
    assert validation.calls == [{"seed": None, "epoch": 0, "augment": None, "drop_last": False, "start": 0}] * 3


def test_a_source_smaller_than_a_batch_is_one_step() -> None:
    trained = run(small_net(), Blobs(5), train=small_config(1))
    assert trained.history[0].train_loss is not None


def test_the_best_epoch_on_validation_is_returned() -> None:
    # At this learning rate accuracy jumps about, so that the last epoch is not the best one.
    source, validation = Blobs(64), Blobs(64, seed=1)
    schedule = small_config(6, learning_rate=3.0, warmup_fraction=1.0)
    trained = run(small_net(), source, train=schedule, validation=validation)
    results = [(r.validation_score, -(r.validation_loss or 0.0)) for r in trained.history]
    assert [r.epoch for r in trained.history] == list(range(7))
    assert trained.best_epoch == max(range(7), key=lambda epoch: results[epoch])
    assert trained.best_epoch != 6
    measured = evaluate(trained.model, validation)
    assert measured.value == trained.best_score == results[trained.best_epoch][0]
    assert measured.loss == pytest.approx(trained.history[trained.best_epoch].validation_loss, rel=1e-6)


def test_a_student_that_training_only_harms_is_returned_as_it_came() -> None:
    source, validation = Blobs(128), Blobs(128, seed=1)
    good = run(small_net(), source, train=small_config(5, learning_rate=0.1)).model

    class Wrong(Blobs):
        def batches(self, batch_size: int, **settings: Any):
            for images, labels in super().batches(batch_size, **settings):
                yield images, (labels + 1) % 3

    trained = run(good, Wrong(128), train=small_config(2, learning_rate=0.1), validation=validation)
    assert trained.best_epoch == 0
    assert same(state(trained.model), state(good))
    assert trained.model is not good


def test_without_validation_the_last_epoch_is_returned_and_said() -> None:
    trained = run(small_net(), Blobs(40), train=small_config(3))
    assert (trained.best_epoch, trained.best_score) == (3, None)
    assert [record.epoch for record in trained.history] == [1, 2, 3]
    assert all(r.validation_score is None and r.validation_loss is None for r in trained.history)


def test_no_epochs_return_the_student_evaluated() -> None:
    student, validation = small_net().train(), Blobs(24)
    trained = run(student, Blobs(0), train=small_config(0), validation=validation)
    accuracy = evaluate(student, validation)
    assert same(state(trained.model), state(student))
    assert trained.best_score == accuracy.value
    assert not trained.model.training
    [record] = trained.history
    assert record.validation_loss == pytest.approx(accuracy.loss, rel=1e-6)
    assert (record.epoch, record.train_loss, record.parts, record.seconds) == (0, None, {}, 0.0)


def test_no_epochs_and_no_validation_return_the_student() -> None:
    trained = run(small_net(), Blobs(16), train=small_config(0))
    assert same(state(trained.model), state(small_net()))
    assert (trained.history, trained.best_epoch, trained.best_score) == ((), 0, None)


def test_history_holds_rates_times_and_round_trips() -> None:
    schedule = small_config(2, learning_rate=0.1, warmup_fraction=0.5)
    trained = run(small_net(), Blobs(40), train=schedule, validation=Blobs(8))
    assert [record.learning_rate for record in trained.history] == [None, 0.1, pytest.approx(0.05)]
    for record in trained.history:
        assert EpochRecord.from_json(record.to_json()) == record
    for record in trained.history[1:]:
        assert record.images_per_s == pytest.approx(32 / record.seconds)


def test_the_average_of_the_weights_is_validated_and_returned() -> None:
    source = Blobs(32)
    schedule = small_config(1, ema_decay=0.6, learning_rate=0.1, warmup_fraction=0.0)
    trained = run(small_net(), source, train=schedule, validation=Blobs(8))
    # The average by hand: three recorded states of the same two steps without an average.
    states = [state(small_net())]
    for steps in (1, 2):
        model = small_net().to(memory_format=torch.channels_last)
        optimizer = SGD().build(model, 0.1)
        model.train()
        batches = list(source.batches(16, device=torch.device("cpu"), seed=0))[:steps]
        for rate, (images, labels) in zip((0.1, 0.05), batches, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels).backward()
            optimizer.step()
        states.append(state(model))
    first, second = average_decay(0.6, 0), average_decay(0.6, 1)
    assert (first, second) == (1 / 10, 2 / 11)
    average = states[0]
    for decay, new in ((first, states[1]), (second, states[2])):
        average = {k: decay * average[k] + (1 - decay) * new[k] if k[-7:] != "tracked" else new[k] for k in new}
    assert trained.best_epoch == 1
    for name, tensor in state(trained.model).items():
        torch.testing.assert_close(tensor, average[name], rtol=1e-5, atol=1e-6)


def test_average_decay_rises_to_its_limit() -> None:
    assert [average_decay(0.99, n) for n in (0, 10, 10_000)] == [0.1, 11 / 20, 0.99]


def test_weights_shared_by_two_modules_stay_shared() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = small_net()
            self.head = nn.Linear(3, 3)
            self.again = self.head

        def forward(self, x):
            return self.again(self.head(self.stem(x)))

    trained = run(Tied(), Blobs(40), train=small_config(1, ema_decay=0.5), validation=Blobs(8))
    assert trained.model.head.weight is trained.model.again.weight


def test_bfloat16_is_used_when_asked_for_and_the_weights_stay_float32() -> None:
    seen: list[torch.dtype] = []
    student, teacher = small_net(1), small_net(2)
    for model in (student, teacher):
        model[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    schedule = small_config(1, precision=Precision.BF16_MIXED)
    trained = run(student, Blobs(16), train=schedule, objective=Objective(), teacher=teacher)
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert trained.precision is Precision.BF16_MIXED
    assert trained.model[0].weight.dtype is torch.float32
    assert trained.device == "cpu"


def test_the_step_sees_channels_last_images_and_weights() -> None:
    seen: list[bool] = []

    def look(module: Any, args: Any) -> None:
        seen.extend(t.is_contiguous(memory_format=torch.channels_last) for t in (args[0], module.weight))

    student = small_net()
    student[0].register_forward_pre_hook(look)
    run(student, Blobs(32), train=small_config(1))
    assert seen == [True] * 4


def test_images_need_not_be_images() -> None:
    class Rows(Blobs):
        def batches(self, batch_size: int, **settings: Any):
            for images, labels in super().batches(batch_size, **settings):
                yield images.flatten(1), labels

    trained = run(nn.Sequential(nn.Linear(192, 3)), Rows(40))
    assert trained.history[-1].train_loss is not None
    assert math.isfinite(trained.history[-1].train_loss)


def test_labels_are_not_looked_at_without_weight() -> None:
    class Unlabeled(Blobs):
        def batches(self, batch_size: int, **settings: Any):
            for images, labels in super().batches(batch_size, **settings):
                yield images, torch.full_like(labels, -1)

    objective = Objective(kd_weight=1.0, label_weight=0.0)
    trained = run(small_net(1), Unlabeled(40), objective=objective, teacher=small_net(2))
    assert list(trained.history[-1].parts) == ["kd"]


def test_an_error_in_the_data_leaves_no_trace() -> None:
    class Broken(Blobs):
        def batches(self, batch_size: int, **settings: Any):
            yield from super().batches(batch_size, **settings)
            torch.rand(3)
            raise OSError("disk")

    before = torch.get_rng_state()
    with pytest.raises(OSError, match="disk"):
        run(small_net(dropout=0.5), Broken(40))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_splits_of_the_data_room_satisfy_the_protocol() -> None:
    blobs = Blobs(48)
    images = (40 * blobs.images + 128).clamp(0, 255).to(torch.uint8)
    split = MemorySplit(images, blobs.labels, Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))
    trained = run(small_net(), split, augment=Augment(padding=1), validation=split)
    assert trained.best_score == evaluate(trained.model, split).value
