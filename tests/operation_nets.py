"""Every module of torch.nn, function of torch.nn.functional and operation of torchvision.ops, each in a small net.

The nets are a layer, the operation and a layer: ``first -> operation -> second``. ``tools/rules_table.py`` traces,
cuts, verifies and counts each, and writes the table in docs/rules.md. Names that are left out are in ``LEFT_OUT`` with
the reason; together they are all public names, which ``tests/integration/test_rules_page.py`` checks.
"""

# ruff: noqa: B008 - functions of PyTorch are looked up by name, as defaults of the lambdas that call them

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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

FUNCTIONS: dict[str, Case] = {
    **{
        name: Case(lambda name=name: getattr(F, name))
        for name in (
            "alpha_dropout", "celu", "elu", "feature_alpha_dropout", "gelu", "hardshrink",
            "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish", "normalize", "relu", "relu6",
            "rrelu", "selu", "sigmoid", "silu", "softplus", "softshrink", "softsign", "tanh", "tanhshrink",
        )
    },
    **{
        name: Case(lambda name=name: lambda x: getattr(F, name)(x * 1.0))
        for name in ("celu_", "elu_", "hardtanh_", "leaky_relu_", "relu_", "rrelu_", "selu_")
    },
    **{
        name: Case(lambda name=name: lambda x: getattr(F, name)(x, dim=3))
        for name in ("gumbel_softmax", "log_softmax", "softmax", "softmin")
    },
    **{
        f"dropout{d}": Case(lambda call=getattr(F, f"dropout{d}"): lambda x: call(x, training=False), int(d[:1] or 2))
        for d in ("", "1d", "2d", "3d")
    },
    "threshold": Case(lambda: lambda x: F.threshold(x, 0.1, 0.0)),
    "threshold_": Case(lambda: lambda x: F.threshold_(x * 1.0, 0.1, 0.0)),
    **{
        f"{name}{d}d": Case(lambda call=getattr(F, f"{name}{d}d"), more=more: lambda x: call(x, *more), d)
        for name, more in (
            ("adaptive_avg_pool", (3,)), ("adaptive_max_pool", (3,)), ("avg_pool", (2,)), ("max_pool", (2,)),
            ("lp_pool", (2, 2)),
        )
        for d in (1, 2, 3)
    },
    **{
        f"{name}{d}d_with_indices": Case(
            lambda call=getattr(F, f"{name}{d}d_with_indices"), size=size: lambda x: call(x, size)[0], d)
        for name, size in (("adaptive_max_pool", 3), ("max_pool", 2))
        for d in (1, 2, 3)
    },
    **{
        f"fractional_max_pool{d}d": Case(
            lambda call=getattr(F, f"fractional_max_pool{d}d"): lambda x: call(x, 2, output_size=3), d)
        for d in (2, 3)
    },
    **{
        f"fractional_max_pool{d}d_with_indices": Case(
            lambda call=getattr(F, f"fractional_max_pool{d}d_with_indices"): lambda x: call(x, 2, output_size=3)[0], d)
        for d in (2, 3)
    },
    **{
        f"max_unpool{d}d": Case(
            lambda pool=getattr(F, f"max_pool{d}d"), unpool=getattr(F, f"max_unpool{d}d"): lambda x: unpool(
                *pool(x, 2, return_indices=True), 2), d)
        for d in (1, 2, 3)
    },
    "affine_grid": Case(lambda: _warp),
    "grid_sample": Case(lambda: _warp),
    "batch_norm": Case(lambda: _With(lambda m, x: F.batch_norm(x, m.mean, m.var, m.scale), mean=_vector(),
                                     var=_vector(1.0), scale=_vector())),
    "instance_norm": Case(lambda: _With(lambda m, x: F.instance_norm(x, weight=m.scale), scale=_vector())),
    "group_norm": Case(lambda: _With(lambda m, x: F.group_norm(x, 3, m.scale), scale=_vector())),
    "layer_norm": Case(lambda: _With(lambda m, x: F.layer_norm(x, m.scale.shape, m.scale), scale=_vector()), 0),
    "rms_norm": Case(lambda: _With(lambda m, x: F.rms_norm(x, m.scale.shape, m.scale), scale=_vector()), 0),
    "local_response_norm": Case(lambda: lambda x: F.local_response_norm(x, 3)),
    "bilinear": Case(lambda: _With(lambda m, x: F.bilinear(x, m.other(x), m.table), other=nn.Linear(WIDTH, 7),
                                   table=_filled(WIDTH, WIDTH, 7)), None),
    "linear": Case(lambda: _With(lambda m, x: F.linear(x, m.table), table=_filled(WIDTH, WIDTH)), 0),
    **{
        f"conv{d}d": Case(lambda d=d: _With(lambda m, x: getattr(F, f"conv{d}d")(x, m.table),
                                            table=_filled(WIDTH, WIDTH, *(1,) * d)), d)
        for d in (1, 2, 3)
    },
    **{
        f"conv_transpose{d}d": Case(lambda d=d: _With(lambda m, x: getattr(F, f"conv_transpose{d}d")(x, m.table),
                                                      table=_filled(WIDTH, WIDTH, *(2,) * d)), d)
        for d in (1, 2, 3)
    },
    "conv_tbc": Case(lambda: _With(lambda m, x: F.conv_tbc(x.permute(2, 0, 1), m.table, m.bias).permute(1, 2, 0),
                                   table=_filled(3, WIDTH, WIDTH), bias=_vector()), 1),
    "channel_shuffle": Case(lambda: lambda x: F.channel_shuffle(x, 3)),
    "native_channel_shuffle": Case(lambda: lambda x: F.native_channel_shuffle(x, 3)),
    "cosine_similarity": Case(lambda: lambda x: x * F.cosine_similarity(x, x.flip(3)).unsqueeze(1)),
    "pairwise_distance": Case(lambda: lambda x: x * F.pairwise_distance(x, x.flip(1)).unsqueeze(2), 0),
    "pdist": Case(lambda: lambda x: x * F.pdist(x).sum(), None),
    "embedding": Case(lambda: _With(lambda m, x: F.embedding(x, m.table), table=_filled(20, WIDTH)), 0, ids=True),
    "embedding_bag": Case(lambda: _With(lambda m, x: F.embedding_bag(x, m.table), table=_filled(20, WIDTH)), None,
                          ids=True),
    "glu": Case(lambda: lambda x: F.glu(x, 1), 2, WIDTH // 2),
    "fold": Case(lambda: lambda x: F.fold(F.unfold(x, 2, stride=2), x.shape[2:], 2, stride=2)),
    "unfold": Case(lambda: lambda x: F.unfold(x, 3, padding=1).unflatten(2, x.shape[2:]), 2, 9 * WIDTH),
    "interpolate": Case(lambda: lambda x: F.interpolate(x, scale_factor=2.0)),
    "upsample": Case(lambda: lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear", antialias=True)),
    "upsample_bilinear": Case(lambda: lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear")),
    "upsample_nearest": Case(lambda: lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest-exact")),
    "multi_head_attention_forward": MODULES["MultiheadAttention"],
    "pad": Case(lambda: lambda x: F.pad(x, (1, 1, 1, 1))),
    "pixel_shuffle": Case(lambda: lambda x: F.pixel_shuffle(x, 2), 2, WIDTH // 4),
    "pixel_unshuffle": Case(lambda: lambda x: F.pixel_unshuffle(x, 2), 2, WIDTH * 4),
    "prelu": Case(lambda: _With(lambda m, x: F.prelu(x, m.scale), scale=_vector())),
    "scaled_dot_product_attention": Case(lambda: _With(
        lambda m, x: F.scaled_dot_product_attention(*m.layer(x).chunk(3, 2), scale=0.5),
        layer=nn.Linear(WIDTH, 3 * WIDTH)), 0),
}  # fmt: skip


def _warp(x: Tensor) -> Tensor:
    grid = F.affine_grid(torch.eye(2, 3)[None].expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, 0.9 * grid, align_corners=False)


def _vector(value: float = 0.5) -> nn.Parameter:
    return nn.Parameter(torch.linspace(value, 2.0, WIDTH))


def _filled(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


def _regions() -> Tensor:
    return torch.tensor([[0.0, 0.0, 0.0, 5.0, 5.0], [0.0, 2.0, 1.0, 7.0, 7.0]])


def _pool_regions(name: str) -> Callable[[], Operation]:
    return lambda: lambda x: getattr(torchvision.ops, name)(x[:1], _regions(), 2)


def _pyramid(parts: Any, x: Tensor) -> Tensor:
    found = parts.layer({"a": x, "b": parts.down(x)})
    return found["a"] + F.interpolate(found["b"], x.shape[2:])


class _Deformed(nn.Module):
    def __init__(self, **more: int) -> None:
        super().__init__()
        self.conv = torchvision.ops.DeformConv2d(WIDTH, WIDTH, 3, padding=1, **more)
        self.offset = nn.Conv2d(WIDTH, 18, 3, padding=1)
        self.mask = nn.Conv2d(WIDTH, 9, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.offset(x), self.mask(x).sigmoid())


OPS: dict[str, Case] = {
    "Conv2dNormActivation": Case(lambda: torchvision.ops.Conv2dNormActivation(WIDTH, WIDTH)),
    "Conv3dNormActivation": Case(lambda: torchvision.ops.Conv3dNormActivation(WIDTH, WIDTH), 3),
    "DeformConv2d": Case(_Deformed),
    "deform_conv2d": Case(_Deformed),
    "DropBlock2d": Case(lambda: torchvision.ops.DropBlock2d(0.1, 3)),
    "DropBlock3d": Case(lambda: torchvision.ops.DropBlock3d(0.1, 3), 3),
    "drop_block2d": Case(lambda: lambda x: torchvision.ops.drop_block2d(x, 0.1, 3, training=False)),
    "drop_block3d": Case(lambda: lambda x: torchvision.ops.drop_block3d(x, 0.1, 3, training=False), 3),
    "FeaturePyramidNetwork": Case(lambda: _With(_pyramid,
                                                layer=torchvision.ops.FeaturePyramidNetwork([WIDTH, 8], WIDTH),
                                                down=nn.Conv2d(WIDTH, 8, 3, stride=2))),
    "FrozenBatchNorm2d": Case(lambda: torchvision.ops.FrozenBatchNorm2d(WIDTH)),
    "MLP": Case(lambda: torchvision.ops.MLP(WIDTH, [16, WIDTH]), 0),
    "MultiScaleRoIAlign": Case(lambda: _With(lambda m, x: m.layer({"0": x[:1], "1": x[:1, :, ::2, ::2]},
                                                                  [_regions()[:, 1:]], [(8, 8)]),
                                             layer=torchvision.ops.MultiScaleRoIAlign(["0", "1"], 2, 2))),
    "Permute": Case(lambda: _With(lambda m, x: m.layer(x).permute(0, 3, 1, 2),
                                  layer=torchvision.ops.Permute([0, 2, 3, 1]))),
    "PSRoIAlign": Case(lambda: _With(lambda m, x: m.layer(x[:1], _regions()),
                                     layer=torchvision.ops.PSRoIAlign(2, 1.0, 2)), 2, WIDTH // 4),
    "PSRoIPool": Case(lambda: _With(lambda m, x: m.layer(x[:1], _regions()), layer=torchvision.ops.PSRoIPool(2, 1.0)),
                      2, WIDTH // 4),
    "RoIAlign": Case(lambda: _With(lambda m, x: m.layer(x[:1], _regions()), layer=torchvision.ops.RoIAlign(2, 1.0, 2))),
    "RoIPool": Case(lambda: _With(lambda m, x: m.layer(x[:1], _regions()), layer=torchvision.ops.RoIPool(2, 1.0))),
    "ps_roi_align": Case(_pool_regions("ps_roi_align"), 2, WIDTH // 4),
    "ps_roi_pool": Case(_pool_regions("ps_roi_pool"), 2, WIDTH // 4),
    "roi_align": Case(_pool_regions("roi_align")),
    "roi_pool": Case(_pool_regions("roi_pool")),
    "SqueezeExcitation": Case(lambda: torchvision.ops.SqueezeExcitation(WIDTH, 4)),
    "StochasticDepth": Case(lambda: torchvision.ops.StochasticDepth(0.1, "row")),
    "stochastic_depth": Case(lambda: lambda x: torchvision.ops.stochastic_depth(x, 0.1, "row", training=False)),
}  # fmt: skip


LOSS = "a loss: computed from outputs, by the training and not by the model"
CONTAINER = "holds other modules or parameters, and computes nothing itself"
BASE = "a base class"
WRAPPER = "a wrapper: trace the module inside"
BOXES = "works on boxes or masks, which have no channels"
TOOL = "a function for the authors of PyTorch, which computes nothing"
OUTPUT = "an output layer: its result is the model's output or a loss"

LEFT_OUT: Mapping[str, Mapping[str, str]] = {
    "torch.nn": {
        **dict.fromkeys(
            (
                "BCELoss",
                "BCEWithLogitsLoss",
                "CTCLoss",
                "CosineEmbeddingLoss",
                "CrossEntropyLoss",
                "GaussianNLLLoss",
                "HingeEmbeddingLoss",
                "HuberLoss",
                "KLDivLoss",
                "L1Loss",
                "LinearCrossEntropyLoss",
                "MSELoss",
                "MarginRankingLoss",
                "MultiLabelMarginLoss",
                "MultiLabelSoftMarginLoss",
                "MultiMarginLoss",
                "NLLLoss",
                "NLLLoss2d",
                "PoissonNLLLoss",
                "SmoothL1Loss",
                "SoftMarginLoss",
                "TripletMarginLoss",
                "TripletMarginWithDistanceLoss",
            ),
            LOSS,
        ),
        "AdaptiveLogSoftmaxWithLoss": OUTPUT,
        **dict.fromkeys(
            ("Container", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "Sequential"), CONTAINER
        ),
        **dict.fromkeys(("Module", "RNNBase", "RNNCellBase"), BASE),
        "DataParallel": WRAPPER,
    },
    "torch.nn.functional": {
        **dict.fromkeys(
            (
                "binary_cross_entropy",
                "binary_cross_entropy_with_logits",
                "cosine_embedding_loss",
                "cross_entropy",
                "ctc_loss",
                "gaussian_nll_loss",
                "hinge_embedding_loss",
                "huber_loss",
                "kl_div",
                "l1_loss",
                "linear_cross_entropy",
                "margin_ranking_loss",
                "mse_loss",
                "multi_margin_loss",
                "multilabel_margin_loss",
                "multilabel_soft_margin_loss",
                "nll_loss",
                "poisson_nll_loss",
                "smooth_l1_loss",
                "soft_margin_loss",
                "triplet_margin_loss",
                "triplet_margin_with_distance_loss",
            ),
            LOSS,
        ),
        **dict.fromkeys(
            (
                "assert_int_or_pair",
                "boolean_dispatch",
                "handle_torch_function",
                "has_torch_function",
                "has_torch_function_unary",
                "has_torch_function_variadic",
            ),
            TOOL,
        ),
        **dict.fromkeys(("grouped_mm", "scaled_grouped_mm", "scaled_mm"), "runs on some GPUs only"),
        "one_hot": "makes integers from integers",
    },
    "torchvision.ops": {
        **dict.fromkeys(
            (
                "batched_nms",
                "box_area",
                "box_convert",
                "box_iou",
                "clip_boxes_to_image",
                "complete_box_iou",
                "distance_box_iou",
                "generalized_box_iou",
                "masks_to_boxes",
                "nms",
                "remove_small_boxes",
            ),
            BOXES,
        ),
        **dict.fromkeys(
            ("complete_box_iou_loss", "distance_box_iou_loss", "generalized_box_iou_loss", "sigmoid_focal_loss"), LOSS
        ),
    },
}
"""Names without a net, with the reason, by library."""

CASES: Mapping[str, Mapping[str, Case]] = {
    "torch.nn": MODULES,
    "torch.nn.functional": FUNCTIONS,
    "torchvision.ops": OPS,
}
"""Nets by library and name."""


def public_names(library: str) -> set[str]:
    """Every module of torch.nn, and every function or module of the other libraries."""
    if library == "torch.nn":
        return {name for name, kind in vars(nn).items() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    if library == "torchvision.ops":
        return set(torchvision.ops.__all__)
    return {
        name
        for name, function in vars(F).items()
        if callable(function)
        and not name.startswith("_")
        and not isinstance(function, type)
        and getattr(function, "__module__", "") != "typing"
    }
