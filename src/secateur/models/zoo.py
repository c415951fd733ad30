"""Small models for images of 32 x 32 pixels: the residual networks of He et al., and relatives of ImageNet's families.

The residual networks have parameter-free shortcuts (option A) or projections (option B). The relatives are timm's own
classes with fewer strides, layers and channels: timm's networks divide the sides by 32, which leaves one pixel, and
these divide them by eight at most. The stems keep the stride of two of the papers; DenseNet's stem has no pooling.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import ModelError

_WIDTHS = (16, 32, 64)

Shortcut = Callable[[int, int, int], nn.Module]
"""Makes the shortcut of a block that changes the shape from input channels, output channels and stride."""


class PaddedShortcut(nn.Module):
    """Option A: take every ``stride``-th pixel and add zero channels before and after; it has no parameters.

    Attributes:
        stride: Stride of rows and columns.
        low: Number of zero channels before the first channel.
        high: Number of zero channels after the last channel.
    """

    def __init__(self, stride: int, low: int, high: int) -> None:
        super().__init__()
        self.stride = stride
        self.low = low
        self.high = high

    @classmethod
    def between(cls, in_channels: int, channels: int, stride: int) -> "PaddedShortcut":
        """Make a shortcut with half of the new channels before the old ones, and half after."""
        low = (channels - in_channels) // 2
        return cls(stride, low, channels - in_channels - low)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, c, h, w) to (n, low + c + high, ceil(h / stride), ceil(w / stride))."""
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.low, self.high))

    def extra_repr(self) -> str:
        """Return the settings, for ``print(model)``."""
        return f"stride={self.stride}, low={self.low}, high={self.high}"


class ProjectionShortcut(nn.Sequential):
    """Option B: a 1 x 1 convolution with a stride, and batch norm.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Stride of rows and columns.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels))


class BasicBlock(nn.Module):
    """A residual block: relu(x' + bn(conv(relu(bn(conv(x)))))) with 3 x 3 convolutions; x' is the shortcut of x."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, shortcut: Shortcut = PaddedShortcut.between
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in_channels, h, w) to (n, channels, h / stride, w / stride)."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """A ResNet for CIFAR: a 3 x 3 stem, three stages of basic blocks, global mean and a linear layer.

    The second and third stage halve the resolution.

    Parameter names are those of akamaster/pytorch_resnet_cifar10, so its weights fit.

    Args:
        blocks: Blocks per stage, n; the depth is 6 n + 2.
        widths: Channels of each stage.
        num_classes: Number of classes.
        in_channels: Channels of the images.
        shortcut: Makes the shortcut of the first block of the second and third stage: `PaddedShortcut.between` (option
            A) or `ProjectionShortcut` (option B).

    References:
        He et al., arXiv:1512.03385, Section 4.2.
    """

    def __init__(
        self,
        blocks: int,
        *,
        widths: tuple[int, int, int] = _WIDTHS,
        num_classes: int = 10,
        in_channels: int = 3,
        shortcut: Shortcut = PaddedShortcut.between,
    ) -> None:
        super().__init__()
        if min(blocks, num_classes, in_channels, *widths) < 1:
            raise ModelError(
                f"`blocks`, `widths`, `num_classes` and `in_channels` must be positive; got {blocks}, {widths}, "
                f"{num_classes} and {in_channels}."
            )
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[0], blocks, 1, shortcut)
        self.layer2 = _stage(widths[0], widths[1], blocks, 2, shortcut)
        self.layer3 = _stage(widths[1], widths[2], blocks, 2, shortcut)
        self.linear = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in_channels, h, w) to (n, num_classes) logits."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def _stage(in_channels: int, channels: int, blocks: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def cifar_resnet20(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-20: 269,722 parameters with ten classes."""
    return CifarResNet(3, num_classes=num_classes, in_channels=in_channels)


def cifar_resnet32(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-32: 464,154 parameters with ten classes."""
    return CifarResNet(5, num_classes=num_classes, in_channels=in_channels)


def cifar_resnet44(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-44: 658,586 parameters with ten classes."""
    return CifarResNet(7, num_classes=num_classes, in_channels=in_channels)


def cifar_resnet56(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-56: 853,018 parameters with ten classes."""
    return CifarResNet(9, num_classes=num_classes, in_channels=in_channels)


def cifar_resnet110(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-110: 1,727,962 parameters with ten classes."""
    return CifarResNet(18, num_classes=num_classes, in_channels=in_channels)


def digits_resnet(num_classes: int = 10, in_channels: int = 1) -> CifarResNet:
    """ResNet-8 (one block per stage) for 8 x 8 gray digits, which trains in seconds on a CPU."""
    return CifarResNet(1, num_classes=num_classes, in_channels=in_channels)


def digits_resnet_wide(num_classes: int = 10, in_channels: int = 1) -> CifarResNet:
    """`digits_resnet` with 32, 64 and 128 channels: wide enough that fewer of them are faster."""
    return CifarResNet(1, widths=(32, 64, 128), num_classes=num_classes, in_channels=in_channels)


_EFFICIENTNET = (
    "ds_r1_k3_s1_e1_c16_se0.25",
    "ir_r2_k3_s1_e4_c24_se0.25",
    "ir_r2_k3_s2_e4_c40_se0.25",
    "ir_r2_k3_s2_e4_c80_se0.25",
)
"""The beginning of EfficientNet-B0 (Tan & Le, arXiv:1905.11946, Table 1) with an expansion of 4 instead of 6."""

_MOBILENETV2 = ("ds_r1_k3_s1_c16", "ir_r2_k3_s1_e6_c24", "ir_r2_k3_s2_e6_c32", "ir_r2_k3_s2_e6_c64")
"""The beginning of MobileNetV2 (Sandler et al., arXiv:1801.04381, Table 2), its stages of two blocks each."""

_STEM, _FEATURES, _GROWTH = 16, 256, 12


def cifar_densenet40(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """DenseNet-BC-40 with growth rate 12 (Huang et al., arXiv:1608.06993) and a stem of stride 2: 176 k parameters."""
    return _densenet(6, num_classes, in_channels)


def cifar_densenet52(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """DenseNet-BC-52: `cifar_densenet40` with eight layers instead of six in each of the three blocks."""
    return _densenet(8, num_classes, in_channels)


def cifar_efficientnet(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """The first stages of EfficientNet-B0, seven blocks with squeeze-and-excitation: 156 k parameters."""
    return _efficientnet(_EFFICIENTNET, "silu", 1.0, num_classes, in_channels)


def cifar_efficientnet_150(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """`cifar_efficientnet` with 1.5 times the channels."""
    return _efficientnet(_EFFICIENTNET, "silu", 1.5, num_classes, in_channels)


def cifar_mobilenetv2(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """The first stages of MobileNetV2, seven inverted residual blocks: 135 k parameters."""
    return _efficientnet(_MOBILENETV2, "relu6", 1.0, num_classes, in_channels)


def cifar_mobilenetv2_150(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """`cifar_mobilenetv2` with 1.5 times the channels."""
    return _efficientnet(_MOBILENETV2, "relu6", 1.5, num_classes, in_channels)


def _densenet(layers: int, num_classes: int, in_channels: int) -> nn.Module:
    from timm.models.densenet import DenseNet

    model = DenseNet(_GROWTH, (layers,) * 3, num_classes=num_classes, in_chans=in_channels)
    features = cast("Any", model.features)
    features.conv0 = nn.Conv2d(in_channels, 2 * _GROWTH, 3, stride=2, padding=1, bias=False)
    nn.init.kaiming_normal_(features.conv0.weight)
    features.pool0 = nn.Identity()
    return model


def _efficientnet(
    stages: tuple[str, ...], activation: str, width: float, num_classes: int, in_channels: int
) -> nn.Module:
    from timm.models._efficientnet_builder import decode_arch_def, round_channels
    from timm.models.efficientnet import EfficientNet

    return EfficientNet(
        decode_arch_def([[stage] for stage in stages]),
        num_classes=num_classes,
        in_chans=in_channels,
        num_features=round_channels(_FEATURES, width),
        stem_size=_STEM,
        act_layer=activation,
        round_chs_fn=partial(round_channels, multiplier=width),
    )
