"""Every module of torch.nn, function of torch.nn.functional and operation of torchvision.ops, each in a small net.

The nets are a layer, the operation and a layer: ``first -> operation -> second``. ``tools/rules_table.py`` traces,
cuts, verifies and counts each, and writes the table in docs/rules.md. Names that are left out are in ``LEFT_OUT`` with
the reason; together they are all public names, which ``tests/integration/test_rules_page.py`` checks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

WIDTH = 12
"""Channels that the first layer produces."""

Operation = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """An operation and the net around it.

    Attributes:
        build: Makes the operation: a module, or a function of the first layer's output.
        dims: Dimensions of space: 0 for tokens (batch, tokens, channels), None for features (batch, channels).
        arriving: Channels that the operation returns.
        ids: Whether the operation itself is the first layer, and reads integers.
    """

    build: Callable[[], Operation]
    dims: int | None = 2
    arriving: int = WIDTH
    ids: bool = False


class Between(nn.Module):
    """first -> operation -> second; without a first layer if the operation reads integers."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
        if not case.ids:
            self.first = conv[case.dims](3, WIDTH, 3, padding=1) if case.dims else nn.Linear(3, WIDTH)
        self.operation = case.build()
        self.second = conv[case.dims](case.arriving, 5, 1) if case.dims else nn.Linear(case.arriving, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.operation(x if not hasattr(self, "first") else self.first(x)))


SHAPES: Mapping[int | None, tuple[int, ...]] = {None: (3,), 0: (6, 3), 1: (3, 8), 2: (3, 8, 8), 3: (3, 6, 6, 6)}


def example_of(case: Case) -> Tensor:
    """Two inputs, the same at every call."""
    draw = torch.Generator().manual_seed(0)
    if case.ids:
        return torch.randint(0, 20, (2, 6), generator=draw)
    return torch.randn(2, *SHAPES[case.dims], generator=draw)


def _modules(*modules: nn.Module, **named: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(named)


class _With(nn.Module):
    """A function of the input and of some layers."""

    def __init__(self, compute: Callable[[Any, Tensor], Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


def _same(dims: int | None, **builders: Callable[[], Operation]) -> dict[str, Case]:
    return {name: Case(build, dims) for name, build in builders.items()}


def _elementwise(*names: str) -> dict[str, Case]:
    return {name: Case(getattr(nn, name)) for name in names}


def _by_dims(name: str, *arguments: Any, dims: tuple[int, ...] = (1, 2, 3), **named: Any) -> dict[str, Case]:
    kinds = {d: getattr(nn, f"{name}{d}d") for d in dims}
    return {f"{name}{d}d": Case(lambda kind=kind: kind(*arguments, **named), d) for d, kind in kinds.items()}


def _unpool(dims: int) -> Callable[[], Operation]:
    pool, unpool = getattr(nn, f"MaxPool{dims}d"), getattr(nn, f"MaxUnpool{dims}d")
    return lambda: _With(lambda m, x: m.unpool(*m.pool(x)), pool=pool(2, return_indices=True), unpool=unpool(2))


def _lazy(kind: type[nn.Module], *arguments: Any, shape: tuple[int, ...], **named: Any) -> Callable[[], Operation]:
    def build() -> nn.Module:
        layer = kind(*arguments, **named)
        layer(torch.zeros(2, WIDTH, *shape))
        return layer.eval()

    return build


def _gate(kind: type[nn.Module]) -> Callable[[], Operation]:
    """A recurrent layer over the tokens; its first result is the sequence."""
    return lambda: _With(lambda m, x: m.layer(x)[0], layer=kind(WIDTH, 10, batch_first=True))


MODULES: dict[str, Case] = {
    **_elementwise(
        "AlphaDropout", "CELU", "Dropout", "ELU", "FeatureAlphaDropout", "GELU", "Hardshrink", "Hardsigmoid",
        "Hardswish", "Hardtanh", "Identity", "LeakyReLU", "LogSigmoid", "Mish", "PReLU", "RReLU", "ReLU", "ReLU6",
        "SELU", "SiLU", "Sigmoid", "Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink", "Softmax2d",
        "UpsamplingBilinear2d",
    ),
    **_same(2, Threshold=lambda: nn.Threshold(0.1, 0.0), Softmax=lambda: nn.Softmax(1), Softmin=lambda: nn.Softmin(1)),
    **_same(2, LogSoftmax=lambda: nn.LogSoftmax(1), GroupNorm=lambda: nn.GroupNorm(3, WIDTH)),
    **_same(2, UpsamplingBilinear2d=lambda: nn.UpsamplingBilinear2d(scale_factor=2)),
    **_same(2, UpsamplingNearest2d=lambda: nn.UpsamplingNearest2d(scale_factor=2)),
    **_same(2, Upsample=lambda: nn.Upsample(scale_factor=2.0, mode="bicubic")),
    **_same(2, LocalResponseNorm=lambda: nn.LocalResponseNorm(3), CrossMapLRN2d=lambda: nn.CrossMapLRN2d(3)),
    **_same(2, ChannelShuffle=lambda: nn.ChannelShuffle(3), SyncBatchNorm=lambda: nn.SyncBatchNorm(WIDTH)),
    **_by_dims("AdaptiveAvgPool", 3),
    **_by_dims("AdaptiveMaxPool", 3),
    **_by_dims("AvgPool", 2),
    **_by_dims("MaxPool", 2),
    **_by_dims("LPPool", 2, 2),
    **_by_dims("FractionalMaxPool", 2, output_size=3, dims=(2, 3)),
    **{f"MaxUnpool{dims}d": Case(_unpool(dims), dims) for dims in (1, 2, 3)},
    **_by_dims("BatchNorm", WIDTH),
    **_by_dims("InstanceNorm", WIDTH, affine=True, track_running_stats=True),
    **_by_dims("Dropout"),
    **_by_dims("CircularPad", 1),
    **_by_dims("ConstantPad", 1, 0.5),
    **_by_dims("ReflectionPad", 1),
    **_by_dims("ReplicationPad", 1),
    **_by_dims("ZeroPad", 1),
    **_by_dims("Conv", WIDTH, WIDTH, 3),
    **_by_dims("ConvTranspose", WIDTH, WIDTH, 3),
    **{
        f"LazyBatchNorm{d}d": Case(_lazy(getattr(nn, f"LazyBatchNorm{d}d"), shape=(4,) * d), d) for d in (1, 2, 3)
    },
    **{
        f"LazyInstanceNorm{d}d": Case(_lazy(getattr(nn, f"LazyInstanceNorm{d}d"), affine=True, shape=(4,) * d), d)
        for d in (1, 2, 3)
    },
    **{
        f"Lazy{kind}{d}d": Case(_lazy(getattr(nn, f"Lazy{kind}{d}d"), WIDTH, 3, shape=(4,) * d), d)
        for kind in ("Conv", "ConvTranspose")
        for d in (1, 2, 3)
    },
    "LazyLinear": Case(_lazy(nn.LazyLinear, WIDTH, shape=()), None),
    "Linear": Case(lambda: nn.Linear(WIDTH, WIDTH), None),
    "Bilinear": Case(lambda: _With(lambda m, x: m.layer(x, m.other(x)), layer=nn.Bilinear(WIDTH, 7, WIDTH),
                                   other=nn.Linear(WIDTH, 7)), None),
    "LayerNorm": Case(lambda: nn.LayerNorm(WIDTH), 0),
    "RMSNorm": Case(lambda: nn.RMSNorm(WIDTH), 0),
    "GLU": Case(lambda: nn.GLU(1), 2, WIDTH // 2),
    "PixelShuffle": Case(lambda: nn.PixelShuffle(2), 2, WIDTH // 4),
    "PixelUnshuffle": Case(lambda: nn.PixelUnshuffle(2), 2, WIDTH * 4),
    "Flatten": Case(lambda: _With(lambda m, x: m.layer(x), layer=nn.Flatten()), 0, 6 * WIDTH),
    "Unflatten": Case(lambda: _With(lambda m, x: m.layer(x).flatten(1, 2), layer=nn.Unflatten(1, (3, 4)))),
    "Unfold": Case(lambda: _With(lambda m, x: m.layer(x).unflatten(2, (8, 8)), layer=nn.Unfold(3, padding=1)), 2,
                   9 * WIDTH),
    "Fold": Case(lambda: _With(lambda m, x: m.layer(F.unfold(x, 2, stride=2)), layer=nn.Fold((8, 8), 2, stride=2))),
    "CosineSimilarity": Case(lambda: _With(lambda m, x: x * m.layer(x, x.flip(3)).unsqueeze(1),
                                           layer=nn.CosineSimilarity(1))),
    "PairwiseDistance": Case(lambda: _With(lambda m, x: x * m.layer(x, x.flip(1)).unsqueeze(2),
                                           layer=nn.PairwiseDistance()), 0),
    "Embedding": Case(lambda: nn.Embedding(20, WIDTH), 0, ids=True),
    "EmbeddingBag": Case(lambda: nn.EmbeddingBag(20, WIDTH), None, ids=True),
    "MultiheadAttention": Case(lambda: _With(lambda m, x: m.layer(x, x, x)[0],
                                             layer=nn.MultiheadAttention(WIDTH, 3, batch_first=True)), 0),
    "TransformerEncoderLayer": Case(lambda: nn.TransformerEncoderLayer(WIDTH, 3, 16, batch_first=True), 0),
    "TransformerDecoderLayer": Case(lambda: _With(lambda m, x: m.layer(x, x.flip(1)), layer=nn.TransformerDecoderLayer(
        WIDTH, 3, 16, batch_first=True)), 0),
    "TransformerEncoder": Case(lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, 3, 16, batch_first=True), 2), 0),
    "TransformerDecoder": Case(lambda: _With(lambda m, x: m.layer(x, x.flip(1)), layer=nn.TransformerDecoder(
        nn.TransformerDecoderLayer(WIDTH, 3, 16, batch_first=True), 2)), 0),
    "Transformer": Case(lambda: _With(lambda m, x: m.layer(x, x.flip(1)), layer=nn.Transformer(
        WIDTH, 3, 1, 1, 16, batch_first=True)), 0),
    "LSTM": Case(_gate(nn.LSTM), 0, 10),
    "GRU": Case(_gate(nn.GRU), 0, 10),
    "RNN": Case(_gate(nn.RNN), 0, 10),
    "LSTMCell": Case(lambda: _With(lambda m, x: m.layer(x)[0], layer=nn.LSTMCell(WIDTH, 10)), None, 10),
    "GRUCell": Case(lambda: nn.GRUCell(WIDTH, 10), None, 10),
    "RNNCell": Case(lambda: nn.RNNCell(WIDTH, 10), None, 10),
}  # fmt: skip
