"""What reports show beside the numbers: pairs of the same images, flipped images, sensitive layers."""

import base64
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import secateur
from secateur.architecture import Architecture
from secateur.cost import OnnxRuntime
from secateur.pipeline.evidence import layer_sensitivity, with_layer_seconds, with_pairs
from secateur.report import LayerCost, Measured, RunReport, Step
from secateur.tasks import Score
from secateur.tasks.classification import TOP1
from secateur.tasks.outcomes import Answers


@pytest.fixture(scope="module")
def data() -> Any:
    return secateur.load_data("digits", limit=100)


def step(data: Any, wrong: list[int]) -> Step:
    labels = torch.cat([labels for _, labels in data.test.batches(64, device=torch.device("cpu"), seed=None)])
    predicted = labels.clone()
    predicted[wrong] = (predicted[wrong] + 1) % 10
    value = 1 - len(wrong) / len(labels)
    return Step("s", Score(value, None, len(labels), TOP1), Answers(predicted, labels))


def test_lost_and_gained_images_are_shown_as_they_are_stored(data: Any):
    report = RunReport("net", Measured(2, 1), Measured(1, 1), steps=(step(data, [3]), step(data, [100, 300])))
    found = with_pairs(report, data)
    assert found.paired is not None
    assert (found.paired.lost, found.paired.gained) == (2, 1)
    assert sum(each.n for each in found.classes) == found.paired.n == len(data.test)
    images, labels = next(iter(data.test.batches(400, device=torch.device("cpu"), seed=None)))
    assert len(found.flips) == 3
    for flip, at in zip(found.flips, (100, 300, 3), strict=True):
        assert flip.label == data.classes[int(labels[at])]
        assert (flip.before == flip.label) != (flip.after == flip.label)
        pixels = torch.tensor(list(Image.open(io.BytesIO(base64.b64decode(flip.png))).getdata())) / 255
        stored = images[at] * data.std[0] + data.mean[0]
        assert torch.allclose(pixels, stored.flatten(), atol=0.003)


def test_without_answers_nothing_is_paired(data: Any):
    bare = replace(step(data, []), answers=None)
    report = RunReport("net", Measured(2, 1), Measured(1, 1), steps=(bare, bare))
    assert with_pairs(report, data) is report
    assert with_pairs(replace(report, steps=(bare,)), data).paired is None


def test_layers_that_do_nothing_are_not_sensitive():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    with torch.no_grad():
        net[2].weight[4:] = 0  # Half of the second layer's channels are constant, and nothing reads them.
        net[2].bias[4:] = 0
        net[6].weight[:, 4:] = 0
    images = torch.randn(8, 1, 8, 8)
    graph = secateur.trace(net, images[:2])
    first, second = (axis.name for axis in graph.prunable)
    kept = Architecture.of({first: range(4), second: range(4)})
    found = layer_sensitivity(net, graph, kept, images)
    assert [(name, part) for name, part, _ in found] == [(first, 0.5), (second, 0.5)]
    assert found[0][2] > 1e-3
    assert found[1][2] == pytest.approx(0, abs=1e-9)
    assert layer_sensitivity(net, graph, Architecture.of({first: range(8)}), images) == ()


def timed_net() -> tuple[nn.Module, torch.Tensor, RunReport]:
    torch.manual_seed(0)
    net, images = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)), torch.randn(2, 1, 8, 8)
    layers = (LayerCost("0", (9, 9)), LayerCost("1", (0, 0)))
    return net.eval(), images, RunReport("net", Measured(9, 1), Measured(9, 1), layers=layers)


def test_layers_get_their_times_and_those_without_macs_follow():
    net, images, report = timed_net()
    file = (net, OnnxRuntime().exported(net, (images,)))
    found = with_layer_seconds(report, OnnxRuntime(), (file, file), images)
    assert [(layer.name, layer.macs, layer.seconds is not None) for layer in found.layers] == [
        ("0", (9, 9), True), ("1", (0, 0), False), ("3", (0, 0), True)
    ]  # fmt: skip
    assert found.other_seconds is not None


def test_times_that_cannot_be_measured_never_end_a_run():
    net, images, report = timed_net()
    file = (net, b"no file of any kind")
    assert with_layer_seconds(report, OnnxRuntime(), (file, file), images) is report
