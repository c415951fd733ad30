"""Every cut that is wrong is seen, whatever hides it, and costs only what is wrong.

The mistakes are rules: `wrong::roll` moves channels, but is traced as an operation that treats every channel alike.
"""

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from cuts import random_architecture
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.architecture import Architecture
from secateur.cost import count_macs
from secateur.errors import BudgetError, SurgeryError, TraceError
from secateur.graph import trace
from secateur.graph.rules import pointwise
from secateur.prune import Cut, culprits, cut
from secateur.prune.masked_reference import WrittenParameterError, ZeroWeightsMode
from secateur.search import Uniform, search_architecture


@torch.library.custom_op("wrong::roll", mutates_args=())
def roll(x: Tensor) -> Tensor:
    return x.roll(1, 1)


@torch.library.custom_op("wrong::single", mutates_args=())
def single_precision(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        raise ValueError("made for float32 only")
    return torch.sin(x * 3000.0)


RULES = {"wrong::roll": pointwise, "wrong::single": pointwise}
IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Body(nn.Module):
    """Two convolutions, and two heads that read the same features."""

    def __init__(self, give: Callable[["Body", Tensor], object]):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.cls, self.box = nn.Linear(16, 10), nn.Linear(16, 4)
        self.give = give

    def features(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()).relu().mean((2, 3))

    def forward(self, x: Tensor) -> object:
        return self.give(self, self.features(x))


@dataclass
class Packed:
    boxes: Tensor
    inside: object


class Free:
    def __init__(self, **held):
        self.__dict__.update(held)


def scores(m: Body, h: Tensor) -> Tensor:
    return m.cls(roll(h)).softmax(1)


def boxes(m: Body, h: Tensor) -> Tensor:
    return m.box(h).sigmoid() * 4000


HIDING = {
    "another output": lambda m, h: (boxes(m, h), scores(m, h)),
    "columns": lambda m, h: torch.cat([boxes(m, h), scores(m, h)], 1),
    "rows of columns": lambda m, h: torch.cat([boxes(m, h), scores(m, h)], 1)[:, None] * torch.ones(1, 50, 1),
    "constant": lambda m, h: 1000 + 1e-3 * scores(m, h),
    "weak": lambda m, h: boxes(m, h) + 1e-6 * scores(m, h)[:, :4],
    "dict": lambda m, h: {"boxes": boxes(m, h), "more": [{"scores": scores(m, h)}]},
    "dataclass": lambda m, h: Packed(boxes(m, h), Packed(boxes(m, h), scores(m, h))),
    "object": lambda m, h: (boxes(m, h), Free(held=Free(scores=scores(m, h)))),
    "integers": lambda m, h: (boxes(m, h), (scores(m, h) * 1e6).long()),
    "truth values": lambda m, h: (boxes(m, h), m.cls(roll(h)) > torch.linspace(-1, 1, 50)[:, None]),
    "numbers": lambda m, h: (boxes(m, h), float(scores(m, h)[0, 0])),
    "silent head": lambda m, h: boxes(m, h) + 0 * m.cls(roll(h))[:, :4],
}


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def halved(model: nn.Module, example: Tensor | tuple[Tensor, ...] = IMAGE) -> Cut:
    graph = trace(model, example, rules=RULES)
    return cut(model, graph, Architecture.of({a.name: range(0, a.size, 2) for a in graph.prunable}))


@pytest.mark.filterwarnings("ignore:The cut model is larger")
@pytest.mark.parametrize(
    "give", [v for k, v in HIDING.items() if k != "silent head"], ids=[k for k in HIDING if k != "silent head"]
)
def test_a_wrong_channel_is_seen_wherever_it_comes_out(give):
    made = halved(seeded(lambda: Body(give)))
    assert [name for name, _ in made.verification.frozen] == ["b"]
    assert made.model.a.out_channels == 8


@pytest.mark.parametrize("give", HIDING.values(), ids=HIDING)
def test_the_same_outputs_without_the_mistake_are_right(give, monkeypatch):
    monkeypatch.setitem(globals(), "roll", lambda x: x)
    made = halved(seeded(lambda: Body(give)))
    assert made.verification.frozen == ()
    assert made.verification.max_rel <= made.verification.tolerance


@pytest.mark.filterwarnings("ignore:The cut model is larger")
def test_a_wrong_channel_is_seen_inside_of_branches_that_start_at_zero():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 3, 1), nn.BatchNorm2d(3)
            nn.init.zeros_(self.norm.weight)

        def forward(self, x):
            return x[..., 1:-1, 1:-1] + self.norm(self.b(roll(self.a(x))))

    made = halved(seeded(Branch))
    assert [name for name, _ in made.verification.frozen] == ["a"]
    assert "features differ although the outputs are equal" in made.verification.frozen[0][1]


@pytest.mark.filterwarnings("ignore:The cut model is larger")
@pytest.mark.parametrize("norm", [True, False])
def test_a_mistake_in_training_mode_is_seen(norm):
    class Trained(Body):
        def __init__(self):
            super().__init__(lambda m, h: m.cls(roll(h) if m.training else h))
            self.norm = nn.BatchNorm2d(16) if norm else nn.Identity()

        def features(self, x):
            return self.norm(self.b(self.a(x).relu())).relu().mean((2, 3))

    made = halved(seeded(Trained))
    assert [name for name, _ in made.verification.frozen] == ["b"]
    assert "in training mode" in made.verification.frozen[0][1]
    assert made.verification.in_training


@pytest.mark.filterwarnings("ignore:The cut model is larger")
@pytest.mark.parametrize("wrong", [True, False])
def test_writes_to_a_view_of_an_activation_do_not_hide_a_mistake_in_training_mode(wrong: bool):
    """Only views of weights matter to a masked run; every `view` has a list among its arguments."""

    class Writing(Body):
        def __init__(self):
            super().__init__(lambda m, h: m.cls(roll(h) if wrong and m.training else h))

        def features(self, x):
            feature = self.b(self.a(x).relu())
            flat = feature.view(feature.size(0), feature.size(1), -1)
            flat.mul_(2)
            return feature.relu().mean((2, 3))

    made = halved(seeded(Writing))
    assert [name for name, _ in made.verification.frozen] == (["b"] if wrong else [])
    assert made.verification.in_training


@pytest.mark.filterwarnings("ignore:The cut model is larger")
@pytest.mark.parametrize("wrong", [True, False])
def test_tokens_may_have_another_number_in_training_mode(wrong: bool):
    """The mean of a norm runs over kept channels, on images with other numbers of tokens than the traced one too."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 5)
            self.places = nn.Parameter(torch.randn(1, 400, 16))

        def forward(self, x):
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            tokens = tokens + self.places[:, : tokens.size(1)]
            tokens = tokens * (tokens.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
            pooled = tokens.mean(1)
            return self.head(roll(pooled) if wrong and self.training else pooled)

    made = halved(seeded(Tokens), torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0)))
    assert [name for name, _ in made.verification.frozen] == (["embed"] if wrong else [])
    assert made.verification.in_training
    assert wrong or made.verification.second_shape not in {(), (1, 3, 160, 160)}


def test_a_freed_product_is_not_taken_for_what_lies_there_next():
    weight = nn.Parameter(torch.randn(64, 64))
    factors = {id(weight): (torch.ones(64), torch.ones(64, 1))}
    with ZeroWeightsMode(factors, None), torch.no_grad():
        held = weight.t()
        with pytest.raises(WrittenParameterError):
            held.add_(1)
        del held
        for _ in range(200):
            # Each allocation gets the memory, and the number, of a freed one.
            weight.t()
            torch.empty(64, 64).add_(1)


def test_what_was_compared_is_told():
    class Labeled(Body):
        def forward(self, x, labels=None):
            if self.training:
                return F.cross_entropy(self.cls(self.features(x)), labels)
            return self.cls(self.features(x))

    large = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    plain = halved(seeded(lambda: Body(lambda m, h: m.cls(h))), large).verification
    assert (plain.shape, plain.second_shape, plain.in_training) == ((1, 3, 96, 96), (1, 3, 32, 32), True)
    assert plain.summary == "in float32, inputs 1 x 3 x 96 x 96 and 1 x 3 x 32 x 32, not run by the example: box"
    labeled = halved(seeded(lambda: Labeled(lambda m, h: m.cls(h)))).verification
    assert (labeled.shape, labeled.second_shape, labeled.in_training) == ((1, 3, 32, 32), (1, 3, 64, 64), False)
    assert "evaluation mode only" in labeled.summary


@torch.library.custom_op("wrong::by_size", mutates_args=())
def by_size(x: Tensor, size: int) -> Tensor:
    return x.roll(size // 32 - 1, 1)


@pytest.mark.filterwarnings("ignore:The cut model is larger")
def test_a_mistake_on_another_size_is_seen():
    class Sized(Body):
        def forward(self, x):
            return self.cls(by_size(self.features(x), x.shape[2]))

    model = seeded(lambda: Sized(lambda m, h: h))
    graph = trace(model, IMAGE, rules={"wrong::by_size": pointwise})
    made = cut(model, graph, Architecture.of({a.name: range(0, a.size, 2) for a in graph.prunable}))
    assert [name for name, _ in made.verification.frozen] == ["b"]


def test_ties_and_what_is_found_by_them_are_no_mistakes():
    """The largest of equal numbers is that whose rounding errors are largest."""

    class Twins(Body):
        def __init__(self):
            super().__init__(self.tied)
            with torch.no_grad():
                self.cls.weight[5:] = self.cls.weight[:5]
                self.cls.bias[5:] = self.cls.bias[:5]

        @staticmethod
        def tied(m, h):
            # The same sums in two orders.
            first, second = F.linear(h, m.cls.weight), F.linear(h.flip(1), m.cls.weight.flip(1))
            best = torch.stack([first, second]).argmax(0)
            return first, best, best.bool()

    for seed in range(4):
        assert halved(seeded(Twins, seed)).verification.frozen == ()


@pytest.mark.parametrize("value", [iter([1]), (i for i in [1])])
def test_outputs_that_cannot_be_compared_are_refused(value):
    with pytest.raises(TraceError, match="which cannot be compared"):
        trace(seeded(lambda: Body(lambda m, h: (m.cls(h), value))), IMAGE)


class Ramp(nn.Module):
    """Sensitive to rounding, with tensors of another precision than float64."""

    def __init__(self, ramp: Callable[[Tensor], Tensor], act: Callable[[Tensor], Tensor], mistake: bool):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 96, 3, padding=1), nn.Conv2d(96, 2, 3, padding=1)
        self.ramp, self.act, self.mistake = ramp, act, mistake
        self.table = [torch.linspace(0, 1, 12)[:, None]]

    def forward(self, x):
        h = self.a(x).relu()
        y = self.act(self.b(roll(h) if self.mistake else h))
        return y @ (self.ramp(x) + 0 * self.table[0])


@pytest.mark.filterwarnings("ignore:The cut model is larger")
@pytest.mark.parametrize("mistake", [False, True])
@pytest.mark.parametrize(
    "act", [lambda y: torch.sin(y * 3000.0), single_precision, lambda y: torch.sin(y.float() * 1e4)]
)
@pytest.mark.parametrize(
    "ramp",
    [
        lambda x: torch.linspace(0, 1, x.shape[-1], dtype=torch.float32)[:, None],
        lambda x: torch.arange(12.0)[:, None].to(torch.float32),
        lambda x: torch.zeros(12, 1, dtype=torch.float32).copy_(torch.linspace(0, 1, 12)[:, None]),
        lambda x: torch.linspace(0, 1, x.shape[-1])[:, None].type_as(x),
    ],
)
def test_float32_inside_of_the_model_neither_breaks_nor_fools_the_check_in_float64(ramp, act, mistake):
    made = halved(seeded(lambda: Ramp(ramp, act, mistake)), torch.randn(1, 3, 12, 12))
    assert [name for name, _ in made.verification.frozen] == (["a"] if mistake else [])


class Sensitive(Body):
    """Rounding changes every output, in training mode or in both, though by far less than a mistake does."""

    def __init__(self, mistake: bool, always: bool):
        super().__init__(self.wave)
        self.mistake, self.always = mistake, always

    @staticmethod
    def wave(m, h):
        y = m.cls(roll(h) if m.mistake else h)
        return torch.sin(y * 1e8) if m.training or m.always else y


@pytest.mark.filterwarnings("ignore:The cut model is larger")
@pytest.mark.parametrize("mistake", [False, True])
@pytest.mark.parametrize("always", [False, True])
def test_outputs_that_rounding_changes_everywhere_neither_refuse_a_cut_nor_hide_a_mistake(mistake: bool, always: bool):
    made = halved(seeded(lambda: Sensitive(mistake, always)))
    assert bool(made.verification.frozen) == mistake
    assert "output shapes differ" not in str(made.verification.frozen)


class Noisy(Body):
    def __init__(self, noise: Callable[[Tensor], Tensor], mistake: bool = False):
        super().__init__(lambda m, h: m.cls(noise(roll(h) if mistake else h)))


NOISES = {
    "dropout": lambda h: F.dropout(h, 0.3, training=True),
    "alpha dropout": lambda h: F.alpha_dropout(h, 0.3, training=True),
    "randn_like": lambda h: h + torch.randn_like(h),
    "rand": lambda h: h * torch.rand(h.shape),
    "bernoulli": lambda h: h * torch.bernoulli(torch.full_like(h, 0.5)),
    "normal_": lambda h: h + torch.empty_like(h).normal_(1.0, 0.5),
    "python": lambda h: h * random.random(),
    "numpy": lambda h: h * float(np.random.rand()),
}


@pytest.mark.filterwarnings("ignore:The cut model is larger")
@pytest.mark.parametrize("mistake", [False, True])
@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_forwards_that_are_random_are_compared_under_one_seed(noise, mistake):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    made = halved(seeded(lambda: Noisy(noise, mistake)))
    assert {name for name, _ in made.verification.frozen} == ({"b"} if mistake else set())
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1], states[2]) == (random.getstate(), np.random.get_state()[1].tolist())


COUNTER, COUNTS = itertools.count(), {"runs": 0}


def counted() -> int:
    COUNTS["runs"] += 1
    return COUNTS["runs"]


@pytest.mark.parametrize(
    "number",
    [time.time, time.perf_counter, lambda: np.random.default_rng().random(), lambda: next(COUNTER), counted],
)
def test_forwards_that_never_repeat_themselves_are_refused_when_traced(number):
    with pytest.raises(TraceError, match="must return the same for the same input and the same random seed"):
        trace(seeded(lambda: Noisy(lambda h: h * float(number() % 10))), IMAGE)


def test_a_forward_that_hides_what_it_does_is_refused_by_the_cut():
    class Hidden(Body):
        runs: ClassVar[list[int]] = [0]

        def forward(self, x):
            getattr(self, "ru" + "ns")[0] += 1
            return self.cls(self.features(x)) * self.runs[0]

    model = seeded(lambda: Hidden(lambda m, h: h))
    graph = trace(model, IMAGE)
    with pytest.raises((TraceError, SurgeryError), match="must return the same for the same input"):
        cut(model, graph, Architecture.of({"a": [0, 1]}))


class Many(nn.Module):
    """Many axes in the forward pass of the root, so that no module tells which one is wrong."""

    def __init__(self, wrong: Callable[[int, Tensor], Tensor], count: int = 16):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(12, 12 if i else 3) / 3) for i in range(count)])
        self.head = nn.Linear(12, 4)
        self.wrong = wrong

    def forward(self, x):
        for i, weight in enumerate(self.weights):
            x = self.wrong(i, F.linear(x, weight).tanh())
        return self.head(x)


@pytest.fixture
def comparisons(monkeypatch):
    made = []
    compare = culprits.compare_outputs
    monkeypatch.setattr(culprits, "compare_outputs", lambda *given: made.append(given) or compare(*given))
    return made


@pytest.mark.filterwarnings("ignore:The cut model is larger")
@pytest.mark.parametrize("guilty", [(0,), (7,), (15,), (2, 3), (1, 8, 14)])
def test_only_the_axes_that_are_wrong_stay_whole(guilty, comparisons):
    def wrong(i: int, x: Tensor) -> Tensor:
        return roll(x) if i in guilty else x

    made = halved(seeded(lambda: Many(wrong)), torch.randn(1, 3))
    frozen = [made.graph.by_name[name] for name, _ in made.verification.frozen]
    assert {axis.sites[0].tensor for axis in frozen} == {f"weights.{i}" for i in guilty}
    # The first one, log2(16) and the rest together for each, and the result.
    assert len(comparisons) <= 3 + 6 * len(guilty)


@pytest.mark.filterwarnings("ignore:The cut model is larger")
def test_of_axes_that_are_wrong_only_together_one_stays_whole():
    class Product(nn.Module):
        """Wrong only if both are cut: the number of pairs is not that of a whole axis any more."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(3, 8)
            self.heads = nn.ModuleList([nn.Linear(8, 4) for _ in range(3)])

        def forward(self, x):
            ones = [layer(x).tanh() for layer in (self.a, self.b, self.c)]
            both = 1.0 if 8 in (ones[0].data.storage().size(), ones[1].data.storage().size()) else 2.0
            return sum(head(one) for head, one in zip(self.heads, ones, strict=True)) * both

    model = seeded(Product)
    graph = trace(model, torch.randn(1, 3))
    names = [name for name in ("a", "b", "c") if name in graph.sizes]
    assert names == ["a", "b", "c"]
    made = cut(model, graph, Architecture.of({name: [0, 1, 2] for name in names}))
    assert len(made.verification.frozen) == 1
    assert made.verification.frozen[0][0] in {"a", "b"}


@pytest.mark.filterwarnings("ignore:The cut model is larger")
def test_one_bad_place_in_a_stream_costs_the_stream_and_its_branch_only():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.inner = nn.ModuleList([nn.Conv2d(8, 12, 1) for _ in range(4)])
            self.outer = nn.ModuleList([nn.Conv2d(12, 8, 1) for _ in range(4)])
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            x = self.stem(x)
            for number, (inner, outer) in enumerate(zip(self.inner, self.outer, strict=True)):
                inside = inner(x).relu()
                x = x + outer(roll(inside) if number == 2 else inside)
            return self.head(x.mean((2, 3)))

    made = halved(seeded(Residual))
    assert [name for name, _ in made.verification.frozen] == ["inner.2"]


@pytest.mark.parametrize("seed", range(3))
def test_search_and_cut_in_two_steps_end_within_the_budget_or_raise(seed):
    model = seeded(lambda: Body(lambda m, h: m.cls(roll(h))), seed)
    graph = trace(model, IMAGE, rules=RULES)
    limit = 0.6 * count_macs(model, IMAGE)
    found = search_architecture(model, graph, Uniform(), budget="macs=60%")
    assert [name for name, _ in found.frozen] == ["b"]
    made = cut(model, graph, found.architecture)
    assert made.verification.frozen == ()
    assert count_macs(made.model, IMAGE) <= limit
    with pytest.raises(BudgetError, match="must be within reach"):
        search_architecture(model, graph, Uniform(), budget="macs=1%")


def test_a_cut_that_is_larger_than_asked_warns():
    model = seeded(lambda: Body(lambda m, h: m.cls(roll(h))))
    graph = trace(model, IMAGE, rules=RULES)
    with pytest.warns(
        UserWarning, match=r"The cut model is larger than the architecture: b must stay whole \(cutting b"
    ):
        cut(model, graph, Architecture.of({"b": [0, 1]}))


class TwoWays(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.left, self.right = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(8, 6)
        self.other, self.head = nn.Linear(6, 10), nn.Linear(10, 3)
        self.dead = nn.Linear(10, 7)

    def forward(self, x):
        x = F.relu(self.body(x))
        x = self.left(x) if x.sum() > -1 else self.right(x)
        return self.head(self.other(x).relu())


def test_branches_that_were_not_run_are_named_and_not_broken():
    model, x = seeded(TwoWays), torch.randn(1, 4)
    graph = trace(model, x)
    assert [axis.name for axis in graph.prunable] == ["other"]
    assert "right, which the example does not run, may read or add them" in str(graph.by_name["body"].frozen_because)
    made = cut(model, graph, Architecture.of({"other": [1, 2]}))
    assert made.verification.not_run == ("right", "dead")
    assert "not run: right, dead" in repr(made.verification)
    with pytest.raises(SurgeryError, match=r"which must stay whole: right, which the example does not run"):
        cut(model, graph, Architecture.of({"body": [1, 2]}))
    # The other way still runs.
    assert made.model.right(torch.randn(1, 8)).shape == (1, 6)


def test_asked_for_channels_beside_a_branch_that_was_not_run_are_cut():
    model, x = seeded(TwoWays), torch.randn(1, 4)
    graph = trace(model, x, allow_not_run=True)
    made = cut(model, graph, random_architecture(graph, 1))
    assert {"body", "left"} <= set(graph.sizes)
    assert made.verification.not_run == ("right", "dead")


def test_a_check_that_finds_nothing_to_blame_says_so():
    model = seeded(lambda: Body(lambda m, h: m.cls(h)))
    graph = trace(model, IMAGE)
    wrong = replace(graph, axes=tuple(replace(a, sites=a.sites[:1]) for a in graph.axes))
    with pytest.warns(UserWarning, match="larger than the architecture"):
        made = cut(model, wrong, Architecture.of({"a": [0], "b": [1]}))
    assert {name for name, _ in made.verification.frozen} == {"a", "b"}
