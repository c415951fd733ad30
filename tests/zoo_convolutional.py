"""The zoo's convolutional nets. See zoo.py."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Head(nn.Module):
    """Global average pooling and a linear classifier with five classes."""

    def __init__(self, inputs: int):
        super().__init__()
        self.fc = nn.Linear(inputs, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class Plain(nn.Sequential):
    """A chain of convolutions with batch norm."""

    def __init__(self):
        super().__init__(conv_bn(3, 12), conv_bn(12, 16, stride=2), conv_bn(16, 10), Head(10))


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, inner: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Residual(nn.Sequential):
    """Post-activation residual blocks, one with a projection shortcut."""

    def __init__(self):
        super().__init__(
            conv_bn(3, 8), ResidualBlock(8, 8, 12), ResidualBlock(8, 14, 10, 2), ResidualBlock(14, 14, 9), Head(14)
        )


class PreActBlock(nn.Module):
    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.relu(self.norm2(out)))


class PreActResidual(nn.Sequential):
    """Pre-activation residual blocks: several norms read the same trunk."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 10, 3, padding=1, bias=False),
            PreActBlock(10, 6),
            PreActBlock(10, 12),
            nn.BatchNorm2d(10),
            nn.ReLU(),
            Head(10),
        )


class PadShortcut(nn.Module):
    """Option A: subsample and pad with zero channels; the two amounts are plain int attributes."""

    def __init__(self, low: int, high: int):
        super().__init__()
        self.low = low
        self.high = high

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.low, self.high))


class OptionABlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        extra = outputs - inputs
        self.shortcut = PadShortcut(extra // 2, extra - extra // 2) if stride > 1 else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class OptionAResidual(nn.Sequential):
    """The CIFAR ResNet's parameter-free shortcut: some trunk channels exist only after the padding."""

    def __init__(self):
        super().__init__(
            conv_bn(3, 6), OptionABlock(6, 6), OptionABlock(6, 12, 2), OptionABlock(12, 12), OptionABlock(12, 20, 2)
        )
        self.append(Head(20))


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class Dense(nn.Sequential):
    """DenseNet: every layer concatenates its output to its input."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            DenseLayer(8, 5),
            DenseLayer(13, 5),
            DenseLayer(18, 4),
            nn.BatchNorm2d(22),
            nn.ReLU(),
            nn.Conv2d(22, 10, 1, bias=False),
            nn.AvgPool2d(2),
            Head(10),
        )


class Split(nn.Module):
    """Two unequal parts of one convolution's output go different ways; the sizes are a tuple attribute."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 14)
        self.sizes = (8, 6)
        self.left = conv_bn(8, 7)
        self.right = conv_bn(6, 9)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.split(self.stem(x), self.sizes, dim=1)
        return self.head(torch.cat([self.left(left), self.right(right)], 1))


class Gated(nn.Module):
    """Chunk in halves that are multiplied: channel i must go with channel i + half."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 9)
        self.expand = nn.Conv2d(9, 24, 1)
        self.project = nn.Conv2d(12, 9, 1)
        self.head = Head(9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate, value = self.expand(x).chunk(2, dim=1)
        return self.head(x + self.project(torch.sigmoid(gate) * value))


class SliceHalves(nn.Module):
    """Halves taken by slices of a python int computed from the shape, one half left as it is (CSP)."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.body = conv_bn(8, 8)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        half = x.shape[1] // 2
        return self.head(torch.cat([self.body(x[:, :half]), x[:, half:]], 1))


class FewGroups(nn.Sequential):
    """ResNeXt-like: a convolution with 3 groups of 4 channels."""

    def __init__(self):
        super().__init__(conv_bn(3, 10), conv_bn(10, 12, 1), conv_bn(12, 12, groups=3), conv_bn(12, 10, 1), Head(10))


class ManyGroups(nn.Sequential):
    """Eight groups of 2 channels in, 3 out, strided."""

    def __init__(self):
        super().__init__(conv_bn(3, 16), conv_bn(16, 24, stride=2, groups=8), conv_bn(24, 9, 1), Head(9))


class DepthwiseSeparable(nn.Sequential):
    """MobileNetV1: a depthwise convolution ties its input and output, and ``groups`` follows the width."""

    def __init__(self):
        super().__init__(
            conv_bn(3, 10), conv_bn(10, 10, groups=10), conv_bn(10, 14, 1), conv_bn(14, 14, stride=2, groups=14)
        )
        self.append(conv_bn(14, 11, 1))
        self.append(Head(11))


class DepthMultiplier(nn.Sequential):
    """A depthwise convolution with two outputs for each input channel."""

    def __init__(self):
        super().__init__(conv_bn(3, 7), conv_bn(7, 14, groups=7), conv_bn(14, 9, 1), Head(9))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, reduced: int):
        super().__init__()
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.adaptive_avg_pool2d(x, 1)
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(scale))))


class InvertedResidualBlock(nn.Module):
    def __init__(self, channels: int, expanded: int, reduced: int):
        super().__init__()
        self.expand = nn.Sequential(
            nn.Conv2d(channels, expanded, 1, bias=False), nn.BatchNorm2d(expanded), nn.Hardswish()
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(expanded, expanded, 3, padding=1, groups=expanded, bias=False),
            nn.BatchNorm2d(expanded),
            nn.Hardswish(),
        )
        self.excite = SqueezeExcite(expanded, reduced)
        self.project = nn.Sequential(nn.Conv2d(expanded, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.excite(self.depthwise(self.expand(x))))


class InvertedResidual(nn.Sequential):
    """MobileNetV3 and EfficientNet: inverted residuals with squeeze-excite."""

    def __init__(self):
        super().__init__(conv_bn(3, 8), InvertedResidualBlock(8, 16, 5), InvertedResidualBlock(8, 20, 6), Head(8))


class FlattenLinear(nn.Sequential):
    """VGG: a flatten gives each channel several inputs of the linear layer."""

    def __init__(self):
        super().__init__(
            conv_bn(3, 9), nn.MaxPool2d(2), conv_bn(9, 12), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12 * 4, 18)
        )
        self.append(nn.ReLU())
        self.append(nn.Dropout(0.5))
        self.append(nn.Linear(18, 5))


class ViewLinear(nn.Module):
    """A flatten by ``view`` with sizes computed from ``x.shape``."""

    def __init__(self):
        super().__init__()
        self.conv = conv_bn(3, 11, stride=2)
        self.fc = nn.Linear(11 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        b, c, h, w = x.shape
        return self.fc(x.view(b, c * h * w))


class SharedWeights(nn.Module):
    """One convolution called twice, so its input and output are the same channels; each call has its own norm."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 10)
        self.shared = nn.Conv2d(10, 10, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(10), nn.BatchNorm2d(10)])
        self.head = Head(10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm in self.norms:
            x = F.relu(norm(self.shared(x)))
        return self.head(x)


class TiedParameter(nn.Module):
    """Two modules that hold the very same weight tensor."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.second.weight = self.first.weight
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


class ShuffleV1(nn.Module):
    """ShuffleNet V1: grouped convolutions with a channel shuffle by view and transpose."""

    def __init__(self):
        super().__init__()
        self.groups = 3
        self.stem = conv_bn(3, 12)
        self.first = conv_bn(12, 12, 1, groups=self.groups)
        self.second = conv_bn(12, 18, 1, groups=self.groups)
        self.head = Head(18)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        b, c, h, w = x.shape
        x = x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.head(self.second(x))


class ShuffleV2Unit(nn.Module):
    def __init__(self, channels: int, inner: int):
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv_bn(half, inner, 1),
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            conv_bn(inner, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        out = torch.cat((left, self.branch(right)), 1)
        b, c, h, w = out.size()
        return out.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)


class ShuffleV2(nn.Sequential):
    """ShuffleNet V2: chunk, one branch, concatenate, shuffle, twice."""

    def __init__(self):
        super().__init__(conv_bn(3, 12), ShuffleV2Unit(12, 6), ShuffleV2Unit(12, 8), conv_bn(12, 10, 1), Head(10))


class PixelShuffle(nn.Sequential):
    """Sub-pixel convolution: four channels become one of twice the resolution."""

    def __init__(self):
        super().__init__(conv_bn(3, 24), nn.PixelShuffle(2), conv_bn(6, 8, stride=2), Head(8))


class UnusedLayer(nn.Module):
    """A layer and a norm that the forward pass never calls."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 9)
        self.auxiliary = nn.Conv2d(9, 4, 3)
        self.spare = nn.BatchNorm2d(9)
        self.body = conv_bn(9, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


class Transposed(nn.Sequential):
    """Transposed convolutions, plain and grouped: their weight's dims are input, output / groups."""

    def __init__(self):
        super().__init__(
            conv_bn(3, 8, stride=2),
            nn.ConvTranspose2d(8, 12, 2, stride=2),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.ConvTranspose2d(12, 12, 3, padding=1, groups=12),
            nn.ReLU(),
            Head(12),
        )


class Inception(nn.Module):
    """Branches with their own widths, max and average pooling, concatenated."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 10)
        self.one = conv_bn(10, 5, 1)
        self.three = nn.Sequential(conv_bn(10, 6, 1), conv_bn(6, 7))
        self.pooled = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv_bn(10, 4, 1))
        self.peak = nn.MaxPool2d(3, 1, 1)
        self.mix = conv_bn(26, 8, 1)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.mix(torch.cat([self.one(x), self.three(x), self.pooled(x), self.peak(x)], 1)))


class DropoutNet(nn.Sequential):
    """Dropout of positions and of whole channels."""

    def __init__(self):
        super().__init__(conv_bn(3, 12), nn.Dropout2d(0.2), conv_bn(12, 9), nn.Dropout(0.3), Head(9))


class NormWithoutAffine(nn.Sequential):
    """Batch norm that has running statistics but no weight and bias."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10, affine=False), nn.ReLU(), nn.Conv2d(10, 8, 3), Head(8)
        )


class BiasOnly(nn.Sequential):
    """Convolutions with bias and no norm at all."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 9, 3, padding=1), nn.ReLU(), nn.Conv2d(9, 13, 3, stride=2), nn.LeakyReLU(0.1), Head(13)
        )


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of an image (ConvNeXt's)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerScaleBlock(nn.Module):
    def __init__(self, channels: int, expanded: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.BatchNorm2d(channels)
        self.fc1 = nn.Linear(channels, expanded)
        self.fc2 = nn.Linear(expanded, channels)
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.depthwise(x)).permute(0, 2, 3, 1)
        out = self.fc2(F.gelu(self.fc1(out))).permute(0, 3, 1, 2)
        return x + self.gamma.view(1, -1, 1, 1) * out


class LayerScale(nn.Sequential):
    """ConvNeXt-like block: channels-last linear layers and a per-channel gamma on the branch."""

    def __init__(self):
        super().__init__(conv_bn(3, 9), LayerScaleBlock(9, 15), LayerScaleBlock(9, 12), Head(9))


class LayerNormNet(nn.Sequential):
    """Layer norm over the channels: its mean depends on every channel, so removing one changes the others."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 10, 3, padding=1), LayerNorm2d(10), nn.Conv2d(10, 12, 3), nn.GELU(), Head(12))


class Activations(nn.Sequential):
    """Hardswish, SiLU, ReLU6 and a PReLU with one slope per channel."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.Hardswish(),
            nn.Conv2d(8, 12, 1),
            nn.SiLU(inplace=True),
            nn.Conv2d(12, 10, 3, padding=1),
            nn.PReLU(10),
            nn.Conv2d(10, 9, 1),
            nn.ReLU6(),
            Head(9),
        )


class MultiBranchAdd(nn.Module):
    """Three branches of one input are summed, in place and by a loop, with a constant in between."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 9)
        self.branches = nn.ModuleList([conv_bn(9, 11, 1), conv_bn(9, 11), conv_bn(9, 11, 5)])
        self.head = Head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        total = 0.5 * self.branches[0](x) + 1.0
        for branch in list(self.branches)[1:]:
            total += branch(x)
        return self.head(total)


class Nested(nn.Module):
    """Sequentials in sequentials in a dict, called by name."""

    def __init__(self):
        super().__init__()
        inner = nn.Sequential(nn.Sequential(conv_bn(8, 10), nn.Sequential(conv_bn(10, 12))), conv_bn(12, 8))
        self.parts = nn.ModuleDict({"stem": conv_bn(3, 8), "body": nn.Sequential(inner), "head": Head(8)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.parts["stem"](x)
        return self.parts["head"](x + self.parts["body"](x))


class Functional(nn.Module):
    """Parameters held by the parent itself and used by functional calls."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(10, 3, 3, 3))
        self.bias = nn.Parameter(torch.empty(10))
        self.mix = nn.Parameter(torch.empty(10, 8))
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.weight, self.bias, padding=1))
        x = torch.einsum("bchw,cd->bdhw", x, self.mix)
        return self.head(F.relu(x))


class Branching(nn.Module):
    """Python control flow on an attribute and a residual scaled by a python float."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.body = conv_bn(8, 8)
        self.use_body = True
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.use_body:
            x = x + 0.7 * self.body(x)
        return self.head(x)


class FrozenOutput(nn.Module):
    """Feature maps are the output: the last convolution's channels are the user's and must stay."""

    def __init__(self):
        super().__init__()
        self.first = conv_bn(3, 10)
        self.last = nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


class Mlp(nn.Sequential):
    """Linear layers with one-dimensional batch norm."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(192, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 14), nn.GELU())
        self.append(nn.Linear(14, 5))
