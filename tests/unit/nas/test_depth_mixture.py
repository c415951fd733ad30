"""Several depths in one pass, compared with networks that really have these depths."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cuts import apart, zoo_net
from torch import Tensor, nn

from secateur.graph import ChannelGraph, StandIn, trace
from secateur.nas import Mixture, Subnet, Supernet, ZeroPad


class Whole(nn.Module):
    """A residual block as a module that returns the stream."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, 5, 3, padding=1), nn.Conv2d(5, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


class Pair(Whole):
    """A residual block that returns a tuple, as blocks of transformers do."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class Stage(nn.Module):
    """A stem, blocks of one kind or of several, and a head. Branches alone are added here."""

    def __init__(self, *kinds: type[nn.Module]):
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3, padding=1)
        self.blocks = nn.ModuleList(kind(7) for kind in kinds)
        self.whole = [issubclass(kind, Whole) for kind in kinds]
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x)[-1].mean((2, 3)))

    def stages(self, x: Tensor) -> list[Tensor]:
        """The stream after every number of blocks."""
        found = [self.stem(x)]
        for number in range(len(self.blocks)):
            found.append(self.after(number, found[-1]))
        return found

    def after(self, number: int, x: Tensor) -> Tensor:
        """The stream after a block that is given x."""
        out = self.blocks[number](x)
        if isinstance(out, tuple):
            return out[0]
        return out if self.whole[number] else x + out


class Branch(nn.Module):
    """A branch alone."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, 6, 3, padding=1), nn.Conv2d(6, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


def stage(*kinds: type[nn.Module]) -> tuple[Stage, Tensor, ChannelGraph]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model, x = Stage(*kinds).double().eval(), torch.randn(2, 3, 6, 6).double()
    graph = trace(model, x[:1])
    assert [len(chain) for chain in graph.chains] == [len(kinds)]
    return model, x, graph


def shares(blocks: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(blocks + 1)))


def mixture(graph: ChannelGraph, *depths: Tensor) -> Mixture:
    """A mixture of depths only."""
    widths = tuple(graph.sizes.values())
    return Mixture(widths, torch.tensor([[0.0, 1.0]]).double().repeat(len(widths), 1), depths)


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_stage_ends_with_the_weighted_sum_of_its_streams(blocks):
    """Eq. (5): out = sum_d q_d x_d, x_d the stage output of the net that is really d blocks deep."""
    model, x, graph = stage(*[Whole] * blocks)
    supernet, q = Supernet(model, graph), shares(blocks)
    names = [block.name for block in graph.chains[0]]
    with torch.no_grad():
        outputs = [supernet.extract(supernet.subnet({}, names[depth:])).stages(x)[-1] for depth in range(blocks + 1)]
        want = model.head(sum(share * out for share, out in zip(q, outputs, strict=True)).mean((2, 3)))
        assert apart([want], [supernet(supernet.full, x, mixture=mixture(graph, q))]) <= 1e-12


@pytest.mark.parametrize("kind", [Branch, Pair])
def test_branches_alone_are_scaled_by_the_depths_that_have_them(kind):
    """x_d = x_{d-1} + P(depth >= d) * f_d(x_{d-1}), f_d also a part of a module that returns more than the stream."""
    model, x, graph = stage(kind, kind, kind)
    q = shares(3)
    with torch.no_grad():
        stream = model.stem(x)
        for number in range(3):
            stream = stream + q[number + 1 :].sum() * (model.after(number, stream) - stream)
        got = Supernet(model, graph)(Supernet(model, graph).full, x, mixture=mixture(graph, q))
        assert apart([model.head(stream.mean((2, 3)))], [got]) <= 1e-12


@pytest.mark.parametrize("kinds", [(Whole, Branch, Whole), (Branch, Whole, Branch), (Whole, Branch, Pair)])
def test_chains_of_both_kinds_are_scaled_throughout(kinds):
    """Where one block of a chain is a branch alone, the others are scaled in the same way, not left as they are."""
    model, x, graph = stage(*kinds)
    stand_ins = {r.stand_in for block in graph.chains[0] for r in block.replacements}
    assert stand_ins == {StandIn.PASS_THROUGH, StandIn.SILENCE}
    q = shares(3)
    with torch.no_grad():
        stream = model.stem(x)
        for number in range(3):
            stream = stream + q[number + 1 :].sum() * (model.after(number, stream) - stream)
        got = Supernet(model, graph)(Supernet(model, graph).full, x, mixture=mixture(graph, q))
        assert apart([model.head(stream.mean((2, 3)))], [got]) <= 1e-12


KINDS = [(Whole,) * 3, (Pair,) * 3, (Branch,) * 3, (Whole, Branch, Pair)]


@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "-".join(kind.__name__ for kind in kinds))
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_all_weight_on_one_depth_is_the_net_of_that_depth(kinds, depth):
    model, x, graph = stage(*kinds)
    supernet = Supernet(model, graph)
    one_hot = torch.zeros(4, dtype=torch.float64)
    one_hot[depth] = 1
    with torch.no_grad():
        got = supernet(supernet.full, x, mixture=mixture(graph, one_hot))
        short = supernet.subnet({}, [block.name for block in graph.chains[0][depth:]])
        assert apart([supernet(short, x)], [got]) <= 1e-12
        assert apart([supernet.extract(short)(x)], [got]) <= 1e-12


@pytest.mark.parametrize(
    "name", ["residual", "preact_residual", "inverted_residual_se", "layer_scale", "nested", "branching", "attention"]
)
def test_one_hot_depths_in_the_zoo(name):
    """With half of all widths: every chain at every depth."""
    model, x, graph = zoo_net(name)
    model, x = copy.deepcopy(model).double(), x.double()
    graph = replace(graph, example=tuple(tensor.double() for tensor in graph.example))
    supernet = Supernet(model, graph)
    widths = tuple(max(1, axis.size // 2 // axis.divisor) * axis.divisor for axis in graph.prunable)
    for number, chain in enumerate(graph.chains):
        for depth in range(len(chain) + 1):
            depths = [torch.eye(len(each) + 1).double()[-1] for each in graph.chains]
            depths[number] = torch.eye(len(chain) + 1).double()[depth]
            removed = tuple(sorted(block.name for block in chain[depth:]))
            nothing = replace(mixture(graph, *depths), narrow=widths)
            with torch.no_grad():
                got, want = supernet(Subnet(widths), x, mixture=nothing), supernet(Subnet(widths, removed), x)
            assert apart([want], [got]) <= 1e-12


def test_widths_and_depths_are_mixed_together():
    """Widths are mixed where channels are produced, then the depths are summed."""
    model, x, graph = stage(Whole, Whole)
    q, weights = shares(2), torch.from_numpy(np.random.default_rng(1).dirichlet((1, 1), 3))
    sizes = list(graph.sizes)
    assert len(sizes) == 3
    narrow = tuple(max(1, size - 3) for size in graph.sizes.values())

    def blend(z: Tensor, axis: int) -> Tensor:
        faded = torch.cat([z[:, : narrow[axis]], torch.zeros_like(z[:, narrow[axis] :])], 1)
        return weights[axis, 1] * z + weights[axis, 0] * faded

    with torch.no_grad():
        stream = sizes.index("stem")
        streams = [blend(model.stem(x), stream)]
        for number, block in enumerate(model.blocks):
            inner = F.relu(blend(block.first(streams[-1]), sizes.index(f"blocks.{number}.first")))
            streams.append(streams[-1] + blend(block.second(inner), stream))
        want = model.head(sum(share * out for share, out in zip(q, streams, strict=True)).mean((2, 3)))
        supernet = Supernet(model, graph)
        got = supernet(supernet.full, x, mixture=Mixture(narrow, weights, (q,), ZeroPad()))
    assert apart([want], [got]) <= 1e-12


@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "-".join(kind.__name__ for kind in kinds))
def test_gradients_of_the_depths(kinds):
    model, x, graph = stage(*kinds)
    supernet = Supernet(model, graph)
    run = lambda q: supernet(supernet.full, x[:1], mixture=mixture(graph, q.softmax(0))).tanh()  # noqa: E731
    assert torch.autograd.gradcheck(run, (shares(3).requires_grad_(),))


def test_no_depths_leave_the_chains_alone():
    model, x, graph = stage(Whole, Whole)
    supernet = Supernet(model, graph)
    with torch.no_grad():
        assert torch.equal(supernet(supernet.full, x, mixture=mixture(graph)), model(x))


class Inside(nn.Module):
    """A residual block whose branch holds residual blocks."""

    def __init__(self, width: int = 7):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.inner = nn.Sequential(Whole(width), Whole(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.leave(self.inner(self.enter(x)))


def test_chains_in_removed_blocks_are_left_alone():
    """Their modules are gone, so nothing can be mixed there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Conv2d(3, 7, 1), Inside(), nn.Flatten(), nn.Linear(7 * 16, 4)).double().eval()
        x = torch.randn(2, 3, 4, 4).double()
    graph = trace(model, x[:1])
    assert sorted([block.name for block in chain] for chain in graph.chains) == [["1"], ["1.inner.0", "1.inner.1"]]
    supernet, depths = Supernet(model, graph), [shares(len(chain)) for chain in graph.chains]
    outer = next(number for number, chain in enumerate(graph.chains) if chain[0].name == "1")
    with torch.no_grad():
        short = supernet.subnet({}, ["1"])
        assert apart([supernet(short, x)], [supernet(short, x, mixture=mixture(graph, *depths))]) <= 1e-12
        stream = model[0](x)
        q, inner = depths[outer], depths[1 - outer]
        first = model[1].enter(stream)
        second = model[1].inner[0](first)
        third = model[1].inner[1](second)
        mixed = model[1].leave(inner[0] * first + inner[1] * second + inner[2] * third)
        want = model[3](model[2](q[0] * stream + q[1] * (stream + mixed)))
        assert apart([want], [supernet(supernet.full, x, mixture=mixture(graph, *depths))]) <= 1e-12
