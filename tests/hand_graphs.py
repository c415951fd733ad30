"""Small nets with channel graphs that were written by hand, as the expected results of tracing."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from secateur.graph import Activation, ChannelAxis, ChannelGraph, Extent, Operation, Role, Site


def rows(size: int, multiplicity: int = 1, start: int = 0) -> np.ndarray:
    """Index of channels that own ``multiplicity`` consecutive positions each."""
    return start + np.arange(size * multiplicity, dtype=np.int64).reshape(size, multiplicity)


@dataclass
class Draft:
    """Collects the parts of a graph; convolutions and linears are given by the extents on both of their sides."""

    model: nn.Module
    example: torch.Tensor
    axes: list[ChannelAxis] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    tensors: dict[str, tuple[Extent, ...]] = field(default_factory=dict)
    activations: dict[str, Activation] = field(default_factory=dict)

    def axis(self, name: str, size: int, *sites: tuple[str, int, Role], divisor: int = 1, **index) -> None:
        where = tuple(
            Site(tensor, dim, index.get(f"{tensor.replace('.', '_')}_{dim}", rows(size)), role)
            for tensor, dim, role in sites
        )
        self.axes.append(ChannelAxis(name, size, where, divisor))

    def layer(self, module: str, out: Extent, into: Extent, positions: int = 1, depthwise: bool = False) -> None:
        """A convolution or linear: its operation and its tensors. ``positions`` are output positions."""
        weight = self.model.get_submodule(module).weight
        kernel = int(np.prod(weight.shape[2:]))
        extents = (out,) if depthwise else (out, into)
        self.operations.append(Operation(module, "convolution", float(kernel * positions), extents))
        second = Extent(1) if depthwise else into
        self.tensors[f"{module}.weight"] = (out, second, *(Extent(k) for k in weight.shape[2:]))
        if self.model.get_submodule(module).bias is not None:
            self.tensors[f"{module}.bias"] = (out,)

    def norm(self, module: str, extent: Extent) -> None:
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.tensors[f"{module}.{name}"] = (extent,)
        self.tensors[f"{module}.num_batches_tracked"] = ()

    def output(self, module: str, shape: tuple[int, ...], axis: int) -> None:
        """All channels (dim 1) of a module's output belong to one axis, in order."""
        channels = np.arange(shape[1], dtype=np.int64)
        self.activations[module] = Activation(module, shape, 1, np.full(shape[1], axis), channels)

    def graph(self) -> ChannelGraph:
        names = tuple(name for name in self.tensors if name in dict(self.model.named_parameters()))
        return ChannelGraph(
            tuple(self.axes), tuple(self.operations), self.tensors, names, (), self.activations, (),
            example=(self.example,),
        )  # fmt: skip


def of(*names: str, multiplicity: int = 1) -> Extent:
    return Extent(0, tuple((name, multiplicity) for name in sorted(names)))


def norm_sites(module: str) -> list[tuple[str, int, Role]]:
    return [(f"{module}.{name}", 0, Role.VECTOR) for name in ("weight", "bias", "running_mean", "running_var")]


class Plain(nn.Module):
    def __init__(self, first: int = 8, second: int = 12):
        super().__init__()
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.fc = nn.Linear(second, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def plain(first: int = 8, second: int = 12) -> tuple[nn.Module, ChannelGraph]:
    d = Draft(randomized(Plain(first, second)), torch.zeros(1, 3, 8, 8))
    d.axis("conv1", first, ("conv1.weight", 0, Role.OUTPUT), *norm_sites("bn1"), ("conv2.weight", 1, Role.INPUT))
    d.axis("conv2", second, ("conv2.weight", 0, Role.OUTPUT), *norm_sites("bn2"), ("fc.weight", 1, Role.INPUT))
    d.layer("conv1", of("conv1"), Extent(3), 64)
    d.layer("conv2", of("conv2"), of("conv1"), 16)
    d.layer("fc", Extent(10), of("conv2"))
    d.norm("bn1", of("conv1"))
    d.norm("bn2", of("conv2"))
    for module, size, axis, side in (("conv1", first, 0, 8), ("bn1", first, 0, 8), ("conv2", second, 1, 4)):
        d.output(module, (1, size, side, side), axis)
    d.output("bn2", (1, second, 4, 4), 1)
    return d.model, d.graph()


class Residual(nn.Module):
    def __init__(self, stream: int = 8, inner: int = 6):
        super().__init__()
        self.stem = nn.Conv2d(3, stream, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(stream)
        self.conv1 = nn.Conv2d(stream, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, stream, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(stream)
        self.fc = nn.Linear(stream, 5)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        y = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn2(self.conv2(y)))
        return self.fc(x.mean((2, 3)))


def residual(stream: int = 8, inner: int = 6) -> tuple[nn.Module, ChannelGraph]:
    d = Draft(randomized(Residual(stream, inner)), torch.zeros(1, 3, 8, 8))
    d.axis(
        "stem", stream, ("stem.weight", 0, Role.OUTPUT), *norm_sites("bn"), ("conv1.weight", 1, Role.INPUT),
        ("conv2.weight", 0, Role.OUTPUT), *norm_sites("bn2"), ("fc.weight", 1, Role.INPUT),
    )  # fmt: skip
    d.axis("conv1", inner, ("conv1.weight", 0, Role.OUTPUT), *norm_sites("bn1"), ("conv2.weight", 1, Role.INPUT))
    d.layer("stem", of("stem"), Extent(3), 64)
    d.layer("conv1", of("conv1"), of("stem"), 64)
    d.layer("conv2", of("stem"), of("conv1"), 64)
    d.layer("fc", Extent(5), of("stem"))
    for module, name in (("bn", "stem"), ("bn1", "conv1"), ("bn2", "stem")):
        d.norm(module, of(name))
    for module, size, axis in (("stem", stream, 0), ("bn", stream, 0), ("conv1", inner, 1), ("bn1", inner, 1)):
        d.output(module, (1, size, 8, 8), axis)
    d.output("conv2", (1, stream, 8, 8), 0)
    d.output("bn2", (1, stream, 8, 8), 0)
    return d.model, d.graph()


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.fc = nn.Linear(6 * 16, 7)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def flat() -> tuple[nn.Module, ChannelGraph]:
    """One channel owns 16 inputs of the linear layer."""
    d = Draft(randomized(Flat()), torch.zeros(1, 1, 4, 4))
    sites = (("conv.weight", 0, Role.OUTPUT), ("conv.bias", 0, Role.OUTPUT), ("fc.weight", 1, Role.INPUT))
    d.axis("conv", 6, *sites, fc_weight_1=rows(6, 16))
    d.layer("conv", of("conv"), Extent(1), 16)
    d.layer("fc", Extent(7), of("conv", multiplicity=16))
    d.output("conv", (1, 6, 4, 4), 0)
    return d.model, d.graph()


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(3, 5, 1)
        self.c = nn.Conv2d(9, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.c(torch.cat([self.a(x), self.b(x)], 1))).mean((2, 3)))


def concat() -> tuple[nn.Module, ChannelGraph]:
    """One input extent made of two axes."""
    d = Draft(randomized(Concat()), torch.zeros(1, 3, 6, 6))
    for name, size in (("a", 4), ("b", 5)):
        sites = ((f"{name}.weight", 0, Role.OUTPUT), (f"{name}.bias", 0, Role.OUTPUT), ("c.weight", 1, Role.INPUT))
        d.axis(name, size, *sites, c_weight_1=rows(size, start=0 if name == "a" else 4))
        d.layer(name, of(name), Extent(3), 36)
    d.axis("c", 6, ("c.weight", 0, Role.OUTPUT), ("c.bias", 0, Role.OUTPUT), ("fc.weight", 1, Role.INPUT))
    d.layer("c", of("c"), of("a", "b"), 36)
    d.layer("fc", Extent(4), of("c"))
    for module, size, axis in (("a", 4, 0), ("b", 5, 1), ("c", 6, 2)):
        d.output(module, (1, size, 6, 6), axis)
    return d.model, d.graph()


class Depthwise(nn.Module):
    def __init__(self, width: int = 12):
        super().__init__()
        self.expand = nn.Conv2d(3, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.project = nn.Conv2d(width, 4, 1, bias=False)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.bn1(self.expand(x)))
        x = torch.relu(self.bn2(self.depthwise(x)))
        return self.fc(torch.relu(self.project(x)).mean((2, 3)))


def depthwise(width: int = 12) -> tuple[nn.Module, ChannelGraph]:
    d = Draft(randomized(Depthwise(width)), torch.zeros(1, 3, 6, 6))
    d.axis(
        "expand", width, ("expand.weight", 0, Role.OUTPUT), *norm_sites("bn1"), ("depthwise.weight", 0, Role.VECTOR),
        *norm_sites("bn2"), ("project.weight", 1, Role.INPUT),
    )  # fmt: skip
    d.axis("project", 4, ("project.weight", 0, Role.OUTPUT), ("fc.weight", 1, Role.INPUT))
    d.layer("expand", of("expand"), Extent(3), 36)
    d.layer("depthwise", of("expand"), Extent(1), 36, depthwise=True)
    d.layer("project", of("project"), of("expand"), 36)
    d.layer("fc", Extent(3), of("project"))
    d.norm("bn1", of("expand"))
    d.norm("bn2", of("expand"))
    for module, size, axis in (("expand", width, 0), ("bn1", width, 0), ("depthwise", width, 0), ("bn2", width, 0)):
        d.output(module, (1, size, 6, 6), axis)
    d.output("project", (1, 4, 6, 6), 1)
    return d.model, d.graph()


class Embedding(nn.Module):
    """The only producers of the axis are a parameter that is added and a norm: no convolution, no linear."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 4, 6))
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc((x.mean() + self.position).relu().mean(1)).expand(len(x), 5)


def embedding() -> tuple[nn.Module, ChannelGraph]:
    d = Draft(randomized(Embedding()), torch.zeros(1, 3, 2, 2))
    d.axis("position", 6, ("position", 2, Role.VECTOR), ("fc.weight", 1, Role.INPUT))
    d.tensors["position"] = (Extent(1), Extent(4), of("position"))
    d.layer("fc", Extent(5), of("position"))
    return d.model, d.graph()


HAND_GRAPHS = {
    "plain": plain,
    "residual": residual,
    "flat": flat,
    "concat": concat,
    "depthwise": depthwise,
    "embedding": embedding,
}


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in evaluation mode with all parameters and running statistics drawn anew (positive variances)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(noise.abs() + 0.1 if name.endswith("running_var") else noise)
    return model.eval()
