"""The networks of `secateur.models`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur import graph, models
from secateur.cost import count_macs
from secateur.data import load_data
from secateur.errors import ModelError
from secateur.models import CifarResNet, PaddedShortcut, ProjectionShortcut, load_model, read_weights


@pytest.mark.parametrize(
    ("factory", "parameters"),
    [  # published by akamaster/pytorch_resnet_cifar10: 0.27, 0.46, 0.66, 0.85 and 1.7 million
        (models.cifar_resnet20, 269_722),
        (models.cifar_resnet32, 464_154),
        (models.cifar_resnet44, 658_586),
        (models.cifar_resnet56, 853_018),
        (models.cifar_resnet110, 1_727_962),
    ],
)
def test_parameter_counts_are_the_published_ones(factory: Callable[[], nn.Module], parameters: int):
    assert sum(p.numel() for p in factory().parameters()) == parameters


def test_arguments_change_the_first_and_last_layer_only():
    model = models.cifar_resnet20(num_classes=7, in_channels=1)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    plain, changed = models.cifar_resnet20().state_dict(), model.state_dict()
    assert {name for name in plain if plain[name].shape != changed[name].shape} == {
        "conv1.weight",
        "linear.weight",
        "linear.bias",
    }


def test_digits_resnet_is_small():
    model = models.digits_resnet()
    assert sum(p.numel() for p in model.parameters()) == 75_002
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_the_shortcut_subsamples_and_pads():
    x = torch.arange(2.0 * 3 * 5 * 4).view(2, 3, 5, 4)
    y = PaddedShortcut(stride=2, low=1, high=2)(x)
    assert y.shape == (2, 6, 3, 2)
    assert torch.equal(y[:, 1:4], x[:, :, [0, 2, 4]][..., [0, 2]])
    assert not y[:, [0, 4, 5]].any()
    assert repr(PaddedShortcut(2, 1, 2)) == "PaddedShortcut(stride=2, low=1, high=2)"


def test_blocks_that_keep_the_shape_have_an_identity():
    model = models.cifar_resnet20()
    shortcuts = [name for name, module in model.named_modules() if isinstance(module, PaddedShortcut)]
    assert shortcuts == ["layer2.0.shortcut", "layer3.0.shortcut"]
    assert isinstance(model.layer1[0].shortcut, nn.Identity)


def test_odd_widths_are_padded_with_one_more_at_the_end():
    model = CifarResNet(1, widths=(4, 7, 7))
    assert (model.layer2[0].shortcut.low, model.layer2[0].shortcut.high) == (1, 2)
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize(("blocks", "macs"), [(3, 40.81), (5, 69.12), (9, 125.75), (18, 253.15)])
def test_costs_with_projections_equal_the_published_ones(blocks: int, macs: float):
    """The base networks of arXiv:1905.09717, in million."""
    model = CifarResNet(blocks, shortcut=ProjectionShortcut)
    assert round(count_macs(model, torch.zeros(1, 3, 32, 32)) / 1e6, 2) == macs
    kinds = [name for name, module in model.named_modules() if isinstance(module, ProjectionShortcut)]
    assert kinds == ["layer2.0.shortcut", "layer3.0.shortcut"]


@pytest.mark.parametrize(
    "settings", [{"blocks": 0}, {"blocks": 1, "num_classes": 0}, {"blocks": 1, "widths": (1, 0, 1)}]
)
def test_bad_sizes_are_refused(settings: dict[str, int]):
    with pytest.raises(ModelError, match="`blocks`, `widths`, `num_classes` and `in_channels` must be positive"):
        CifarResNet(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "shape"), [(models.cifar_resnet20(), (1, 3, 32, 32)), (models.digits_resnet(), (1, 1, 8, 8))]
)
def test_all_inner_axes_are_prunable(model: nn.Module, shape: tuple[int, ...]):
    traced = graph.trace(model.eval(), torch.zeros(shape))
    frozen = {axis.name for axis in traced.axes if axis.frozen_because is not None}
    assert frozen <= {"linear", "conv1/input"}
    edited = {(edit.module, edit.attribute) for edit in traced.edits}
    assert {("layer2.0.shortcut", "low"), ("layer2.0.shortcut", "high")} <= edited
    assert traced.stages == ("layer1", "layer2", "layer3")


@pytest.mark.shared
@pytest.mark.parametrize("depth", [20, 56])
def test_published_weights_fit_by_name(weights_folder: Path, depth: int):
    path = weights_folder / f"cifar10_resnet{depth}.safetensors"
    model, _ = load_model(f"cifar_resnet{depth}", weights=path)
    state = model.state_dict()
    for name, tensor in read_weights(path).items():
        assert torch.equal(state.pop(name), tensor)
    assert all(name.endswith("num_batches_tracked") for name in state)


@pytest.mark.shared
def test_the_pretrained_resnet20_is_as_accurate_as_published(cifar10_folder: Path, weights_folder: Path):
    """923 of the first 1,000 test images; of all 10,000 it is 91.73 %, as the weights' README says."""
    model, _ = load_model("cifar_resnet20", weights=weights_folder / "cifar10_resnet20.safetensors")
    test = load_data(cifar10_folder, limit=100).test.subset(torch.arange(1000))
    with torch.inference_mode():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in test.batches(250))
    assert abs(right - 923) <= 1  # one image may lie on the edge between two classes on another processor
