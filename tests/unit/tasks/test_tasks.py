"""Losses and metrics of the tasks equal their written definitions, and wrong outputs and targets are refused."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import TrainingError
from secateur.tasks import (
    Classification,
    Detection,
    DetectorOutputs,
    ImageToImage,
    Imitation,
    MeanMeter,
    Metric,
    MultiLabel,
    Regression,
    Segmentation,
    Task,
    normalized_difference,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def score_of(task: Task, *batches: tuple[object, object]):
    meter = task.meter()
    for outputs, targets in batches:
        meter.update(outputs, targets)
    return meter.compute()


def test_classification_counts_and_its_loss_is_the_mean_of_all_images() -> None:
    logits, labels = noise(10, 4), torch.arange(10) % 4
    found = score_of(Classification(), (logits[:7], labels[:7]), (logits[7:], labels[7:]))
    assert found.value == float((logits.argmax(1) == labels).double().mean())
    assert found.loss == pytest.approx(float(F.cross_entropy(logits.double(), labels)), rel=1e-6)
    assert (found.n, found.metric.name) == (10, "top-1 accuracy")
    assert str(found) == f"top-1 accuracy {100 * found.value:.2f} % (n = 10)"


@pytest.mark.parametrize(
    ("task", "outputs", "targets"),
    [
        (Classification(), noise(10, 4), torch.arange(10) % 4),
        (Regression(), noise(10, 3), noise(10, 3, seed=1)),
        (ImageToImage(), noise(10, 3, 12, 12), noise(10, 3, 12, 12, seed=1)),
    ],
)
def test_sums_of_two_meters_are_those_of_one(task: Task, outputs: Tensor, targets: Tensor) -> None:
    one, two = task.meter(), task.meter()
    one.update(outputs[:4], targets[:4])
    two.update(outputs[4:], targets[4:])
    sums = [meter.sums() for meter in (one, two)]
    assert sums[0] is not None
    assert sums[1] is not None
    both = task.meter()
    both.set_sums(sums[0] + sums[1])
    whole = score_of(task, (outputs, targets))
    assert both.compute().value == pytest.approx(whole.value, rel=1e-6)
    assert both.compute().loss == pytest.approx(whole.loss, rel=1e-6)
    assert both.compute().n == whole.n == 10


def test_multi_label_precision_is_the_area_of_its_definition() -> None:
    from sklearn.metrics import average_precision_score

    logits, targets = noise(40, 3), (noise(40, 4, seed=1)[:, :3] > 0.3).long()
    targets[:, 2] = 0  # A class that no image has counts for nothing.
    found = score_of(MultiLabel(), (logits[:25], targets[:25]), (logits[25:], targets[25:]))
    wanted = np.mean([average_precision_score(targets[:, c], logits[:, c]) for c in (0, 1)])
    assert found.value == pytest.approx(wanted, rel=1e-5)
    assert MultiLabel().loss(logits, targets) == F.binary_cross_entropy_with_logits(logits, targets.float())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_imitation_of_several_labels_is_the_divergence_of_bernoullis(temperature: float) -> None:
    ours, theirs = noise(6, 5), noise(6, 5, seed=1)
    p, q = (ours.double() / temperature).sigmoid(), (theirs.double() / temperature).sigmoid()
    wanted = (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).mean() * temperature**2
    assert float(MultiLabel(temperature).imitation(ours, theirs)) == pytest.approx(float(wanted), rel=1e-4)
    assert float(MultiLabel(temperature).imitation(theirs, theirs)) == pytest.approx(0, abs=1e-6)


def test_overlap_leaves_void_out_and_counts_classes_alike() -> None:
    logits, labels = noise(2, 3, 6, 6), torch.arange(72).reshape(2, 6, 6) % 4
    found = score_of(Segmentation(void=3), ({"out": logits}, labels))
    predicted, counts = logits.argmax(1), labels != 3
    overlaps = []
    for c in range(3):
        ours, theirs = (predicted == c) & counts, (labels == c) & counts
        overlaps.append(float((ours & theirs).sum() / (ours | theirs).sum()))
    assert found.value == pytest.approx(np.mean(overlaps), rel=1e-6)
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, labels, ignore_index=3)), rel=1e-6)


def test_logits_of_half_the_size_are_resized_and_images_of_void_alone_cost_nothing() -> None:
    logits, labels = noise(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.long)
    resized = F.interpolate(logits, size=(8, 8), mode="bilinear")
    assert float(Segmentation().loss(logits, labels)) == pytest.approx(float(F.cross_entropy(resized, labels)))
    assert float(Segmentation(void=0).loss(logits, labels)) == 0


def test_imitation_of_pixels_is_the_mean_divergence() -> None:
    ours, theirs = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    p, q = ours.double().log_softmax(1), theirs.double().log_softmax(1)
    wanted = (q.exp() * (q - p)).sum(1).mean()
    assert float(Segmentation().imitation({"out": ours}, {"out": theirs})) == pytest.approx(float(wanted), rel=1e-5)


def test_regression_reports_the_root_or_the_absolute_error() -> None:
    outputs, targets = noise(9, 1), noise(9, seed=1)
    error = (outputs[:, 0] - targets).double()
    squared = score_of(Regression(), (outputs[:5], targets[:5]), (outputs[5:], targets[5:]))
    assert squared.value == pytest.approx(float(error.square().mean().sqrt()), rel=1e-6)
    assert squared.loss == pytest.approx(float(error.square().mean()), rel=1e-6)
    absolute = score_of(Regression(absolute=True), (outputs, targets))
    assert absolute.value == pytest.approx(float(error.abs().mean()), rel=1e-6)
    assert not absolute.metric.higher_is_better


def test_image_quality_is_the_mean_over_the_images() -> None:
    outputs, targets = noise(4, 3, 16, 16).sigmoid(), noise(4, 3, 16, 16, seed=1).sigmoid()
    errors = (outputs - targets).double().square().flatten(1).mean(1)
    wanted = float((-10 * errors.log10()).mean())
    assert score_of(ImageToImage(), (outputs[:1], targets[:1]), (outputs[1:], targets[1:])).value == pytest.approx(
        wanted, rel=1e-5
    )
    same = score_of(ImageToImage(structural=True), (targets[:1], targets[:1]), (targets[1:], targets[1:]))
    assert same.value == pytest.approx(1, abs=1e-6)


def test_distance_from_the_original_is_a_mean_over_outputs_in_their_own_units() -> None:
    wanted = (noise(9, 4), 1e4 * noise(9, 2, seed=1) + 5e6)
    found = (wanted[0] + 0.1 * noise(9, 4, seed=2), wanted[1] + 1e3 * noise(9, 2, seed=3))
    meter_value = score_of(
        Imitation(), *(([f[part] for f in found], [w[part] for w in wanted]) for part in (slice(5), slice(5, 9)))
    ).value
    parts = [
        float((f.double() - w.double()).square().sum() / (w.double() - w.double().mean(0)).square().sum())
        for f, w in zip(found, wanted, strict=True)
    ]
    assert meter_value == pytest.approx(np.mean(parts), rel=1e-6)


def test_difference_does_not_depend_on_units_and_survives_constant_outputs() -> None:
    teacher = noise(8, 3)
    student = teacher + 0.1 * noise(8, 3, seed=1)
    plain = float(normalized_difference((student,), (teacher,)))
    assert float(normalized_difference((1e4 * student,), (1e4 * teacher,))) == pytest.approx(plain, rel=1e-4)
    assert math.isfinite(float(normalized_difference(torch.ones(4, 2) + 1e-3, torch.ones(4, 2))))
    assert float(normalized_difference(torch.zeros(4, 2), torch.zeros(4, 2))) == 0


class Detector(nn.Module):
    """The interface of torchvision's detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 4)

    def forward(self, images, targets=None):
        raw = self.head(torch.stack([image.mean((1, 2))[:2] for image in images]))
        if self.training:
            return {"one": raw.square().mean(), "two": 2 * raw.abs().mean()}
        box = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
        return [{"boxes": box, "labels": torch.tensor([1]), "scores": torch.tensor([0.9])} for _ in images]


IMAGES = [noise(3, 8, 8), noise(3, 8, 8, seed=1)]
FOUND = {"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]), "labels": torch.tensor([1])}
MISSED = {"boxes": torch.tensor([[5.0, 5.0, 8.0, 8.0]]), "labels": torch.tensor([1])}


def test_a_detector_gives_its_own_losses_and_its_heads_are_compared() -> None:
    task, model = Detection(), Detector().train()
    outputs = task.train_forward(model, model, IMAGES, [FOUND, MISSED])
    assert isinstance(outputs, DetectorOutputs)
    assert task.loss(outputs, None) == sum(outputs.result.values())
    other = Detector().eval()
    teacher = task.train_forward(other, other, IMAGES, None)
    assert float(task.imitation(outputs, outputs).detach()) == 0
    assert float(task.imitation(outputs, teacher).detach()) > 0
    assert not model._forward_hooks
    assert not model.head._forward_hooks


def test_precision_of_boxes() -> None:
    outputs = Detector().eval()(IMAGES)
    assert score_of(Detection(), (outputs, [FOUND, FOUND])).value == pytest.approx(1)
    assert score_of(Detection(), (outputs, [FOUND, MISSED])).value == pytest.approx(0.5, abs=0.01)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    assert score_of(Detection(), (outputs, [nothing, nothing])).value == 0


@pytest.mark.parametrize(
    ("task", "outputs", "targets", "match"),
    [
        (MultiLabel(), noise(4, 3), torch.zeros(4), r"shape of the logits, \(4, 3\)"),
        (MultiLabel(), noise(4, 3), torch.full((4, 3), 2), "must be 0 or 1"),
        (
            Segmentation(),
            noise(2, 3, 4, 4),
            torch.full((2, 4, 4), 255),
            r"0...2, the model's classes; got 255...255.*void",
        ),
        (Segmentation(), noise(2, 3), torch.zeros(2), r"logits \(batch, classes, height, width\)"),
        (Regression(), noise(4, 3), noise(4, 2), r"of the shape \(4, 2\); got \(4, 3\)"),
        (ImageToImage(), noise(4, 3), noise(4, 3), "must return images"),
        (Imitation(), noise(4, 3), noise(4, 2), "tensors of the original's shapes"),
        (Regression(), "text", noise(4, 2), "must return a floating-point tensor; got str"),
        (Detection(), noise(4, 3), [FOUND], "mapping with `boxes` for every image; got Tensor"),
        (Detection(), [], [{"boxes": noise(2, 4)}], "a mapping with `boxes` and `labels`; got dict for image 0"),
        (
            Detection(),
            [],
            [FOUND, {"boxes": torch.tensor([[4.0, 4, 1, 1]]), "labels": torch.ones(1)}],
            "x1 < x2 and y1 < y2; image 1",
        ),
        (Detection(), [], [{"boxes": noise(2, 5), "labels": torch.ones(2)}], r"shape \(n, 4\).*\(0, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(task: Task, outputs: object, targets: object, match: str) -> None:
    with pytest.raises(TrainingError, match=match):
        task.check(outputs, targets)


def test_a_model_without_losses_or_heads_is_refused() -> None:
    with pytest.raises(TrainingError, match="a mapping of losses in train mode; got list"):
        Detection().loss(Detector().eval()(IMAGES), None)
    with pytest.raises(TrainingError, match=r"no module is named head or rpn\.head"):
        Detection().head_names(nn.Linear(1, 1))
    with pytest.raises(TrainingError, match="must name modules of the model; got nothing_such"):
        Detection(heads=("nothing_such",)).head_names(Detector())


def test_a_task_of_ones_own_needs_a_loss_a_meter_and_a_metric() -> None:
    @dataclass(frozen=True)
    class Counting(Task):
        metric = Metric("mean error of the count", unit="", higher_is_better=False)

        def loss(self, outputs, targets):
            return F.smooth_l1_loss(outputs.squeeze(1), targets.float())

        def meter(self):
            return MeanMeter(self, lambda outputs, targets: (outputs.squeeze(1) - targets).abs())

    outputs, targets = noise(6, 1), torch.arange(6)
    found = score_of(Counting(), (outputs, targets))
    assert found.value == pytest.approx(float((outputs[:, 0] - targets).abs().mean()), rel=1e-6)
    assert str(found) == f"mean error of the count {found.value:.4g} (n = 6)"


def test_metrics_know_which_way_is_better() -> None:
    assert Metric("a").key(0.9) > Metric("a").key(0.8)
    error = Metric("b", "", higher_is_better=False)
    assert error.key(0.1) > error.key(0.2)
    assert error.key(math.nan) == Metric("a").key(math.nan) == -math.inf
    assert (Metric("a").text(0.5), Metric("c", "dB").text(31.204), error.text(0.03125)) == (
        "50.00 %",
        "31.20 dB",
        "0.03125",
    )
