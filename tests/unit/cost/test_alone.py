"""Single layers: their shapes are read off a traced model, and what is timed is the layer that was meant."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from secateur.cost import ConvolutionShape, LinearShape, OnnxRuntime, TorchEager, count_macs
from secateur.cost import timing as _alone
from secateur.cost import timing as _layers

CONVOLUTIONS = [
    nn.Conv2d(3, 8, 3, padding=1),
    nn.Conv2d(8, 4, (1, 3), stride=(1, 2), padding=(0, 1)),
    nn.Conv2d(8, 8, 3, groups=8, padding=2, dilation=2),
    nn.Conv2d(8, 12, 5, groups=4, stride=2, padding=2, bias=False),
    nn.Conv1d(4, 6, 3),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS)
def test_shape_of_a_convolution_has_its_macs(layer: nn.Module) -> None:
    example = torch.randn(1, layer.in_channels, *[17] * len(layer.kernel_size))
    shape = _layers.shape_of(layer, count_macs(layer, example))
    assert isinstance(shape, ConvolutionShape)
    again = shape.module()
    assert {n: p.shape for n, p in again.named_parameters() if n == "weight"} == {"weight": layer.weight.shape}
    assert _layers.macs_of(shape) == count_macs(again, shape.example(1))
    if layer.stride[0] == layer.stride[-1] and layer.kernel_size[0] == layer.kernel_size[-1]:
        assert again(shape.example(1)).shape == layer(example).shape


def test_shape_of_a_linear_layer_counts_its_rows() -> None:
    layer = nn.Linear(6, 5)
    assert _layers.shape_of(layer, 6 * 5 * 7) == LinearShape(5, 6, 7)
    assert _layers.macs_of(LinearShape(5, 6, 7)) == 210
    assert LinearShape(5, 6, 7).example(2).shape == (2, 7, 6)
    assert LinearShape(5, 6, 1).example(2).shape == (2, 6)


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 4, 2)])
def test_other_modules_have_no_shape(layer: nn.Module) -> None:
    assert _layers.shape_of(layer, 100) is None


@pytest.mark.parametrize(
    "shape",
    [
        ConvolutionShape(4, 3, 1, (9, 9), (3, 3), (2, 2), (1, 1), (1, 1)),
        ConvolutionShape(8, 1, 8, (6, 7), (3, 3), (1, 1), (2, 2), (2, 2)),
        LinearShape(5, 6, 1),
        LinearShape(5, 6, 7),
    ],
)
def test_onnx_layer_computes_what_the_module_does(shape: _layers.LayerShape) -> None:
    session = onnxruntime.InferenceSession(_alone.onnx_of(shape, 2), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": shape.example(2).numpy()})[0]
    with torch.no_grad():
        wanted = shape.module()(shape.example(2)).numpy()
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_drawing_weights_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    LinearShape(5, 6, 7).module()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("target", [OnnxRuntime(), TorchEager()])
def test_a_layer_alone_takes_time(target: OnnxRuntime | TorchEager) -> None:
    shape = ConvolutionShape(8, 8, 1, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1))
    assert 0 < target.layer_seconds(shape) < 1


def test_typical_leaves_out_what_other_programs_added() -> None:
    assert _alone.typical([5.0]) == 5
    assert _alone.typical([3.0, 100.0, 2.0, 200.0, 4.0]) == 3.5  # 2 | 3 4 | 100 200


def test_a_profile_counts_the_layer_and_not_what_surrounds_it() -> None:
    def event(name: str, operator: str, microseconds: float) -> dict[str, object]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds, "args": {"op_name": operator}}

    runs = [[event("reorder", "ReorderInput", 50), event("layer", "Conv", took)] for took in (900, 900, 900, 7, 7, 8)]
    other = {"cat": "Session", "name": "model_run", "dur": 1000, "args": {}}
    events = [other, *(each for run in runs for each in run)]
    assert _alone.profiled(events) == pytest.approx(7e-6)
