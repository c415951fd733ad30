"""Relatives of ImageNet's families for images of 32 x 32: timm's own classes with fewer strides, layers and channels.

timm has no such variants: its networks divide the sides by 32, which leaves one pixel. Here they are divided by eight
at most. The stems keep the stride of two that they have in the papers; DenseNet's has no pooling.
"""

from functools import partial
from typing import Any, cast

from torch import nn

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
    """DenseNet-BC-40 of growth rate 12 (Huang et al., arXiv:1608.06993), with a stem of stride 2: 176 k parameters."""
    return _densenet(6, num_classes, in_channels)


def cifar_densenet52(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """The same with eight layers in each of the three blocks."""
    return _densenet(8, num_classes, in_channels)


def cifar_efficientnet(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Seven blocks with squeeze-and-excitation: 156 k parameters."""
    return _efficientnet(_EFFICIENTNET, "silu", 1.0, num_classes, in_channels)


def cifar_efficientnet_150(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """The same, half as wide again."""
    return _efficientnet(_EFFICIENTNET, "silu", 1.5, num_classes, in_channels)


def cifar_mobilenetv2(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Seven inverted residual blocks: 135 k parameters."""
    return _efficientnet(_MOBILENETV2, "relu6", 1.0, num_classes, in_channels)


def cifar_mobilenetv2_150(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """The same, half as wide again."""
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
