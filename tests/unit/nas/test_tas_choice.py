"""The sampler against exact enumeration, and the bookkeeping of candidates."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from cuts import zoo_net
from hand_graphs import plain, residual

from secateur.cost import Budget, CostModel
from secateur.errors import BudgetError, TrainingError
from secateur.nas import TAS, AlphaOptimizer, CosineTemperature, Depths, LinearTemperature, Supernet, Widths, ZeroPad
from secateur.nas.tas_sampler import WidthCandidates, WidthDistribution, draw, draw_all, draw_two, gumbel
from secateur.search import ScoringInputs, SearchContext, SearchSpace
from secateur.search.space import Streams

DRAWS = 20_000


def problem(graph, budget: str = "macs=50%", space: SearchSpace = SearchSpace()) -> SearchContext:  # noqa: B008
    return SearchContext(
        ScoringInputs(None, graph), CostModel(graph), Budget.parse(budget), space, lambda _done, _what: None
    )


def hand_made(*rows: tuple[int, ...]) -> WidthCandidates:
    """Candidates of axes 0, 1, ... and of no chain."""
    longest = max(map(len, rows))
    none = np.zeros((0, 1), dtype=np.int64)
    return WidthCandidates(
        axes=np.arange(len(rows)),
        widths=np.array([[*row, *[row[-1]] * (longest - len(row))] for row in rows]),
        open_widths=np.array([[column < len(row) for column in range(longest)] for row in rows]),
        chains=np.zeros(0, dtype=np.int64),
        depths=none,
        open_depths=none.astype(np.bool_),
        streams=Streams(np.zeros((0, 2), dtype=np.int64), ()),
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair_frequencies(drawn: torch.Tensor, candidates: int) -> np.ndarray:
    """How often each pair was drawn, in the order of `itertools.combinations`."""
    counts = dict.fromkeys(itertools.combinations(range(candidates), 2), 0)
    for pair in drawn.tolist():
        counts[tuple(pair)] += 1
    return np.array(list(counts.values())) / len(drawn)


def without_replacement(p: np.ndarray) -> np.ndarray:
    """Probability of each unordered pair when two are drawn one after the other in proportion to p."""
    return np.array([p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j]) for i, j in _pairs(len(p))])


def _pairs(n: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(n), 2))


@pytest.mark.parametrize("temperature", [0.7, 3.0])
def test_pairs_are_drawn_as_often_as_exact_enumeration_says(temperature):
    """Given the Gumbel noise g, two candidates are drawn without replacement from softmax((log p + g) / tau).

    The expectation over g is taken over other noise than the draws'. Both frequencies have a standard error of at most
    sqrt(1/4 / 20,000) = 0.0035; 0.02 is more than four of the difference's.
    """
    p = np.array([0.1, 0.2, 0.3, 0.4])
    log_p = torch.from_numpy(np.log(p)).repeat(DRAWS, 1)
    drawn, weights = draw_two(log_p, temperature, generator())
    assert (drawn[:, 0] < drawn[:, 1]).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(DRAWS, dtype=torch.float64))
    noise = -np.log(-np.log(np.random.default_rng(5).random((DRAWS, 4))))
    z = (np.log(p) + noise) / temperature
    softmax = np.exp(z - z.max(axis=1, keepdims=True))
    softmax /= softmax.sum(axis=1, keepdims=True)
    want = np.mean([without_replacement(row) for row in softmax], axis=0)
    assert np.abs(pair_frequencies(drawn, 4) - want).max() < 0.02


def test_with_the_noise_at_hand_the_second_draw_follows_the_softmax(monkeypatch):
    """The first noise held fixed: the marginals are those of softmax(z) without replacement (chi-square, 5 of 6 free).

    The bound 20.5 is exceeded by chance once in a thousand draws of the seed.
    """
    z = np.array([0.3, -0.4, 1.0, 0.1])
    fixed = torch.tensor([0.2, -0.1, 0.4, 0.0], dtype=torch.float64)
    calls = iter([fixed.repeat(DRAWS, 1), gumbel(torch.Size([DRAWS, 4]), generator(3))])
    module = sys.modules[draw_two.__module__]  # secateur.search is also a function
    monkeypatch.setattr(module, "gumbel", lambda _shape, _generator: next(calls))
    tau = 0.5
    log_p = torch.from_numpy(z * tau) - fixed  # so that (log p + g) / tau is z
    drawn, weights = draw_two(log_p.repeat(DRAWS, 1), tau, generator())
    softmax = np.exp(z) / np.exp(z).sum()
    want = without_replacement(softmax) * DRAWS
    assert want.sum() == pytest.approx(DRAWS)
    got = pair_frequencies(drawn, 4) * DRAWS
    assert ((got - want) ** 2 / want).sum() < 20.5
    two = torch.from_numpy(z)[drawn]
    torch.testing.assert_close(weights, two.exp() / two.exp().sum(1, keepdim=True))


def test_the_same_generator_draws_the_same():
    log_p = torch.zeros(5, 8).log_softmax(1)
    first, second = (draw_two(log_p, 1.0, generator(4)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], draw_two(log_p, 1.0, generator(5))[0])
    assert torch.equal(draw_all(log_p, 1.0, generator(4)), draw_all(log_p, 1.0, generator(4)))


@pytest.mark.parametrize("temperature", [1e-3, 1e-2, 10.0])
@pytest.mark.parametrize("spread", [0.0, 30.0])
def test_nothing_overflows_at_any_temperature(temperature, spread):
    """Also with probabilities of 1e-13, in float32."""
    logits = (torch.linspace(-1, 1, 8) * spread).repeat(200, 1).requires_grad_()
    log_p = logits.log_softmax(1)
    drawn, weights = draw_two(log_p, temperature, generator())
    everything = draw_all(log_p, temperature, generator())
    (weights[:, 0].sum() + everything[:, 3].sum()).backward()
    assert (drawn[:, 0] != drawn[:, 1]).all()
    for tensor in (weights, everything, logits.grad):
        assert tensor.isfinite().all()
    torch.testing.assert_close(weights.sum(1), torch.ones(200))
    torch.testing.assert_close(everything.sum(1), torch.ones(200))


def test_cold_draws_take_the_two_most_likely():
    """At tau -> 0 the two highest log p + g: as often as drawing twice from p itself without replacement."""
    p = np.array([0.1, 0.2, 0.7])
    drawn, _ = draw_two(torch.from_numpy(np.log(p)).repeat(DRAWS, 1), 1e-6, generator(2))
    assert np.abs(pair_frequencies(drawn, 3) - without_replacement(p)).max() < 0.02


def test_of_two_candidates_both_are_drawn():
    drawn, weights = draw_two(torch.tensor([[0.2, 0.8]]).log().repeat(1000, 1), 0.1, generator())
    assert (drawn == torch.tensor([0, 1])).all()
    # P(weight of the second > 1/2) = P(log p_2 + g_2 > log p_1 + g_1) = p_2; 4 standard errors are 0.05
    assert float((weights[:, 1] > 0.5).double().mean()) == pytest.approx(0.8, abs=0.05)


def test_padding_is_never_drawn_and_has_no_weight():
    choice = WidthDistribution(hand_made((2, 4), (1, 2, 3, 4)))
    log_p = choice.log_widths
    assert log_p[0, 2:].tolist() == [-math.inf, -math.inf]
    for seed in range(200):
        drawn, weights = draw_two(log_p, 5.0, generator(seed))
        assert drawn[0].tolist() == [0, 1]
        assert weights.isfinite().all()
        assert draw_all(log_p, 5.0, generator(seed))[0, 2:].tolist() == [0, 0]
    weights.log().sum().backward()
    assert choice.widths.grad is not None
    assert choice.widths.grad.isfinite().all()
    assert choice.widths.grad[0, 2:].tolist() == [0, 0]


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_weights_have_the_right_gradient(temperature):
    """With the noise fixed: gradcheck of the weights by the logits."""
    logits = torch.randn(3, 5, dtype=torch.float64, generator=generator(7)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: draw_two(x.log_softmax(1), temperature, generator(8))[1], (logits,), eps=1e-7
    )
    assert torch.autograd.gradcheck(lambda x: draw_all(x.log_softmax(1), temperature, generator(8)), (logits,))


def test_noise_is_standard_gumbel():
    """Mean 0.5772 and variance pi^2 / 6; four standard errors of 100,000 draws."""
    noise = gumbel(torch.Size([100_000]), generator(1))
    assert float(noise.mean()) == pytest.approx(0.57722, abs=4 * 1.2825 / 316)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.03)
    assert noise.isfinite().all()


def test_entropy_is_one_before_and_zero_after():
    choice = WidthDistribution(hand_made((2, 4), (1, 2, 3, 4)))
    assert choice.entropy == pytest.approx(1)
    with torch.no_grad():
        choice.widths[:, 0] = 1e4
    assert choice.entropy == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        choice.widths.copy_(torch.tensor([[0.0, math.log(3), 0, 0], [0, 0, 0, 0]]))
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    assert choice.entropy == pytest.approx((quarter + 1) / 2)


def test_a_draw_runs_the_wider_and_blends_in_the_narrower():
    model, graph = plain()
    candidates = WidthCandidates.of(problem(graph), Widths((0.25, 0.5)), None, frozenset({"conv2"}))
    supernet, choice = Supernet(model, graph), WidthDistribution(candidates)
    assert candidates.widths.tolist() == [[3, 6, 12]]
    seen = set()
    for seed in range(40):
        drawn = draw(supernet, choice, 1.0, ZeroPad(), generator(seed))
        assert drawn.subnet.widths[0] == drawn.mixture.narrow[0] == 8
        assert drawn.mixture.weights[0].tolist() == [0, 1]
        indices, weights = draw_two(choice.log_widths, 1.0, generator(seed))
        assert [drawn.mixture.narrow[1], drawn.subnet.widths[1]] == candidates.widths[0][indices[0]].tolist()
        assert torch.equal(drawn.mixture.weights[1], weights[0])
        assert drawn.mixture.depths == ()
        seen.add((drawn.mixture.narrow[1], drawn.subnet.widths[1]))
    assert seen == {(3, 6), (3, 12), (6, 12)}


def test_candidates_are_the_nearest_allowed_widths_and_the_full_one():
    levels = np.array([4, 8, 12, 16])
    assert Widths((0.3, 0.5)).of(levels) == (4, 8, 16)
    assert Widths((0.9,)).of(levels) == (16,)
    assert Widths((1.0,)).of(levels) == (16,)
    assert Widths().of(np.arange(1, 11)) == (3, 4, 5, 6, 7, 8, 9, 10)


@pytest.mark.parametrize(
    ("depths", "blocks", "candidates"),
    [
        (Depths(), 1, (0, 1)),
        (Depths(), 4, (0, 1, 2, 3, 4)),
        (Depths(), 9, (1, 3, 5, 7, 9)),
        (Depths(), 8, (0, 2, 4, 6, 8)),
        (Depths(stride=3, short=1), 2, (2,)),
    ],
)
def test_candidate_depths(depths, blocks, candidates):
    assert depths.of(blocks) == candidates


@pytest.mark.parametrize("fractions", [(), (0.0, 0.5), (0.5, 1.1), (-0.1,)])
def test_fractions_out_of_range_are_refused(fractions):
    with pytest.raises(BudgetError, match=r"`kept_fractions` must lie above 0 and up to 1; got \("):
        Widths(fractions)


@pytest.mark.parametrize("fields", [{"stride": 0}, {"short": 0}])
def test_strides_out_of_range_are_refused(fields):
    with pytest.raises(BudgetError, match=r"`stride` and `short` must be at least 1; got \d and \d"):
        Depths(**fields)


def test_nothing_to_choose_between_is_refused():
    _, graph = plain()
    everything = frozenset(graph.sizes)
    message = r"`space` must leave some axis two widths, or some chain of blocks two depths; got none with a choice"
    for space, widths, seen in (
        (SearchSpace(min_width=100), Widths(), everything),
        (SearchSpace(), Widths((1.0,)), everything),
        (SearchSpace(), Widths(), frozenset[str]()),
    ):
        with pytest.raises(BudgetError, match=message):
            WidthCandidates.of(problem(graph, space=space), widths, None, seen)
    with pytest.raises(BudgetError, match=message):
        WidthCandidates.of(problem(residual()[1]), None, Depths(), everything)


def test_a_chain_of_a_single_depth_is_no_choice():
    """Two blocks of which three would go at a time."""
    graph = zoo_net("preact_residual")[2]
    message = r"`space` must leave some axis two widths, or some chain of blocks two depths; got none with a choice"
    with pytest.raises(BudgetError, match=message):
        WidthCandidates.of(problem(graph), None, Depths(stride=3, short=1), frozenset())
    both = WidthCandidates.of(problem(graph), Widths(), Depths(stride=3, short=1), frozenset(graph.sizes))
    assert both.chains.tolist() == []
    assert WidthCandidates.of(problem(graph), None, Depths(), frozenset()).depths.tolist() == [[0, 1, 2]]


def test_axes_with_a_single_candidate_have_no_row():
    _, graph = plain()  # 8 and 12 channels
    found = WidthCandidates.of(problem(graph, space=SearchSpace(min_width=10)), Widths(), None, frozenset(graph.sizes))
    assert found.axes.tolist() == [1]
    assert found.widths.tolist() == [[10, 11, 12]]
    assert found.chains.tolist() == []


@pytest.mark.parametrize(
    ("temperature", "at"),
    [
        (LinearTemperature(10, 0.1), [10, 5.05, 0.1]),
        (LinearTemperature(), [10, 5.05, 0.1]),
        (CosineTemperature(5, 0.1), [5, 2.55, 0.1]),
        (CosineTemperature(), [5, 2.55, 0.1]),
        (CosineTemperature(2, 1), [2, 1.5, 1]),
    ],
)
def test_temperatures(temperature, at):
    assert [temperature.at(x) for x in (0, 0.5, 1)] == pytest.approx(at)


def test_the_cosine_is_flat_at_both_ends():
    assert CosineTemperature(1, 0.5).at(0.25) == pytest.approx(0.75 + 0.25 * math.cos(math.pi / 4))


@pytest.mark.parametrize("kind", [LinearTemperature, CosineTemperature])
@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 0), (-1, 1), (math.nan, 1), (1, math.inf)])
def test_temperatures_out_of_range_are_refused(kind, first, last):
    with pytest.raises(TrainingError, match="`first` and `last` must be positive and finite; got"):
        kind(first, last)


@pytest.mark.parametrize("rate", [0, -1, math.nan, math.inf])
def test_learning_rates_out_of_range_are_refused(rate):
    with pytest.raises(TrainingError, match="`learning_rate` must be positive and finite; got"):
        AlphaOptimizer(rate)


@pytest.mark.parametrize("tolerance", [-0.01, 1.0, math.nan])
def test_tolerances_out_of_range_are_refused(tolerance):
    with pytest.raises(BudgetError, match=r"`tolerance` must lie in \[0, 1\); got"):
        TAS(tolerance=tolerance)


def test_a_search_of_nothing_is_refused():
    with pytest.raises(BudgetError, match="`widths` or `depths` must be given"):
        TAS(widths=None)
    assert TAS(tolerance=0).tolerance == 0
