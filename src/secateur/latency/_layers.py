"""Single layers of any width, to be timed alone."""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class ConvolutionShape:
    """A convolution with bias at given widths.

    Attributes:
        out: Output channels.
        read: Input channels of one group.
        groups: Number of groups; read * groups input channels.
        size: Of the input, without batch and channels.
        kernel: Of the window, as many numbers as ``size``.
        stride: The same.
        padding: The same.
        dilation: The same.
    """

    out: int
    read: int
    groups: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def module(self) -> nn.Module:
        """The layer, with weights drawn at random from a generator of its own."""
        kind = _CONVOLUTIONS[len(self.kernel) - 1]
        layer = kind(
            self.read * self.groups,
            self.out,
            self.kernel,  # pyright: ignore[reportArgumentType]
            self.stride,  # pyright: ignore[reportArgumentType]
            self.padding,  # pyright: ignore[reportArgumentType]
            self.dilation,  # pyright: ignore[reportArgumentType]
            self.groups,
            device="meta",
        )
        return _drawn(layer)

    def example(self, batch: int) -> Tensor:
        """An input."""
        return _noise(batch, self.read * self.groups, *self.size)


@dataclass(frozen=True)
class LinearShape:
    """A linear layer with bias at given widths.

    Attributes:
        out: Output features.
        read: Input features.
        rows: Vectors it is applied to for one sample, such as tokens.
    """

    out: int
    read: int
    rows: int

    def module(self) -> nn.Module:
        """The layer, with weights drawn at random from a generator of its own."""
        return _drawn(nn.Linear(self.read, self.out, device="meta"))

    def example(self, batch: int) -> Tensor:
        """An input: with one row for each sample (batch, read), else (batch, rows, read)."""
        return _noise(batch, self.read) if self.rows == 1 else _noise(batch, self.rows, self.read)


LayerShape = ConvolutionShape | LinearShape


def shape_of(layer: nn.Module, macs: float) -> LayerShape | None:
    """The shape of a layer of a traced model at its full widths.

    Args:
        layer: Any module.
        macs: Multiply-accumulates of its one operation for one sample; they tell how often its weights are used.

    Returns:
        None if it is neither a convolution nor a linear layer. The input of a convolution is taken to be square, and as
        large as the outputs say, which is what padding and stride leave of the real one.
    """
    weight = cast(Tensor | None, getattr(layer, "weight", None))
    if weight is None or not weight.numel():
        return None
    uses = max(1, round(macs / weight.numel()))
    if isinstance(layer, nn.Linear):
        return LinearShape(layer.out_features, layer.in_features, uses)
    if not isinstance(layer, _CONVOLUTIONS):
        return None
    kernel, stride, dilation = (_numbers(getattr(layer, name)) for name in ("kernel_size", "stride", "dilation"))
    # timm's convolutions pad by themselves and say so with zeros; torch's may say it with a word.
    padding = tuple(0 for _ in kernel) if isinstance(layer.padding, str) else _numbers(layer.padding)
    side = max(1, round(uses ** (1 / len(kernel))))
    size = tuple(
        max((side - 1) * s + d * (k - 1) + 1 - 2 * p, 1)
        for k, s, p, d in zip(kernel, stride, padding, dilation, strict=True)
    )
    return ConvolutionShape(
        layer.out_channels,
        layer.in_channels // layer.groups,
        layer.groups,
        size,
        kernel,
        stride,
        padding,
        dilation,
    )


def macs_of(shape: LayerShape) -> float:
    """Multiply-accumulates for one sample."""
    if isinstance(shape, LinearShape):
        return float(shape.out * shape.read * shape.rows)
    parts = zip(shape.size, shape.kernel, shape.stride, shape.padding, shape.dilation, strict=True)
    places = math.prod((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in parts)
    return float(shape.out * shape.read * math.prod(shape.kernel) * places)


def _numbers(value: object) -> tuple[int, ...]:
    return tuple(int(each) for each in cast(tuple[int, ...], value))


def _drawn(layer: nn.Module) -> nn.Module:
    layer = layer.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            # Small numbers, none of them denormal, which would be slow.
            parameter.uniform_(-0.1, 0.1, generator=generator)
    return layer


def _noise(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) + 0.5
