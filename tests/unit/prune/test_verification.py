"""The input on which a cut is verified: a crop detects a wrong cut as reliably as the whole example."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import ZOO

from secateur.architecture import Architecture
from secateur.graph import ChannelGraph, trace
from secateur.prune import Verification, apply_architecture, cut
from secateur.prune.verify import Mismatch, compare_outputs


def image(*sides: int) -> Tensor:
    return torch.randn(1, 3, *sides, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 80, 3, 2, 1), nn.Conv2d(80, 40, 3, 2, 1), nn.Linear(40, 5)

    def before(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body(torch.relu(self.stem(self.before(x)))))
        return self.head(x.mean((2, 3)))


class Fixed(Net):
    def before(self, x):
        assert x.shape[2:] == (64, 64), "made for 64 pixels"
        return x


class Resizing(Net):
    """Makes another call on images of another size than it was made for."""

    def before(self, x):
        return x if x.size(2) == 64 else F.interpolate(x, (64, 64))


class Leaving(Net):
    """Is done earlier on images of another size than it was made for."""

    def forward(self, x):
        if x.size(2) == 64:
            return super().forward(x)
        return torch.relu(self.body(torch.relu(self.stem(x))))


class Flat(Net):
    """Knows how many pixels there are by the width of its head."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(40 * 16 * 16, 5)

    def forward(self, x):
        return self.head(torch.relu(self.body(torch.relu(self.stem(x)))).flatten(1))


class OnlyLarge(Net):
    """Gives numbers that are no numbers on small images, by the very same calls."""

    def before(self, x):
        return x / (float(x.size(2)) - 32.0)


def half(graph: ChannelGraph) -> Architecture:
    return Architecture.of({axis.name: range(0, axis.size, 2) for axis in graph.prunable})


@pytest.mark.parametrize(
    ("net", "sides", "verified"),
    [
        (Net, (64, 64), (32, 32)),
        (Net, (224, 300), (96, 128)),
        (Net, (32, 64), (32, 64)),
        (Net, (40, 40), (40, 40)),
        (Fixed, (64, 64), (64, 64)),
        (Resizing, (64, 64), (64, 64)),
        (Leaving, (64, 64), (64, 64)),
        (Flat, (64, 64), (64, 64)),
        (OnlyLarge, (64, 64), (64, 64)),
    ],
)
def test_the_middle_is_enough_where_the_model_makes_the_same_calls_on_it(net, sides, verified):
    torch.manual_seed(0)
    model = net().eval()
    graph = trace(model, image(*sides))
    done = cut(model, graph, half(graph))
    assert done.verification.frozen == ()
    assert done.verification.shape == (1, 3, *verified)


def test_a_second_input_that_is_no_image_stays_whole():
    class Conditioned(Net):
        def forward(self, x, scale):
            return super().forward(x) * scale

    torch.manual_seed(0)
    model = Conditioned().eval()
    graph = trace(model, (image(64, 64), torch.tensor([[2.0]])))
    assert cut(model, graph, half(graph)).verification.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("tensor", ["stem.weight", "stem.bias", "body.weight", "body.bias", "head.weight"])
@pytest.mark.parametrize("sides", [(64, 64), (32, 32)])
def test_one_channel_in_a_wrong_place_is_seen(tensor, sides):
    torch.manual_seed(0)
    model = Net().eval()
    graph = trace(model, image(*sides))
    small = apply_architecture(model, graph, half(graph)).eval()
    with torch.no_grad():
        values = small.get_parameter(tensor)
        values.copy_(values.roll(1, dims=1 if tensor == "head.weight" else 0))
    assert isinstance(compare_outputs(model, small, graph, half(graph)), Mismatch)


def test_an_output_that_shows_nothing_on_the_middle_is_looked_at_as_a_whole():
    torch.manual_seed(0)
    model = Net().eval()
    nn.init.zeros_(model.head.weight)
    graph = trace(model, image(64, 64))
    done = cut(model, graph, half(graph))
    assert done.verification.max_abs == 0
    assert done.verification.shape == (1, 3, 64, 64)


def test_the_text_of_a_cut_is_short():
    model, example = ZOO["residual"]()
    graph = trace(model, example)
    made = cut(model, graph, Architecture.of({axis.name: range(1) for axis in graph.prunable}))
    before, after = (sum(p.numel() for p in one.parameters()) for one in (model, made.model))
    head, architecture, verification = repr(made).splitlines()
    assert head == f"Cut({type(model).__name__}, {before} -> {after} parameters)"
    assert architecture.strip() == repr(made.architecture).splitlines()[0]
    assert verification.strip() == repr(made.verification)
    many = Verification(1e-7, 2e-7, 1e-5, "float32", tuple((f"axis{n}", "a reason") for n in range(50)))
    assert repr(many) == (
        "Verification(max_rel=2.0e-07 <= 1e-05, float32, frozen: axis0, axis1, axis2, axis3, axis4, ...)"
    )
