import itertools

import numpy as np
import pytest
from hand_graphs import HAND_GRAPHS, concat, plain, residual, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.cost import Budget, CostModel
from secateur.errors import BudgetError, SelectionError
from secateur.graph import ChannelAxis, Role, Site
from secateur.search import AxisRule, ScoringInputs, SearchContext, SearchSpace, widen_to_budget


def free(**fields) -> SearchSpace:
    """A space in which an axis may keep any part of its channels."""
    return SearchSpace(**{"min_kept_fraction": 0.0, **fields})


def axis(size: int, divisor: int = 1) -> ChannelAxis:
    return ChannelAxis("a", size, (), divisor)


def problem(graph, budget: str, space: SearchSpace = free()) -> SearchContext:  # noqa: B008
    return SearchContext(
        ScoringInputs(None, graph), CostModel(graph), Budget.parse(budget), space, lambda _done, _what: None
    )


@pytest.mark.parametrize(
    ("space", "size", "divisor", "widths"),
    [
        (free(), 4, 1, [1, 2, 3, 4]),
        (free(min_width=3), 4, 1, [3, 4]),
        (free(min_width=9), 4, 1, [4]),
        (free(divisor=4), 14, 1, [4, 8, 12, 14]),
        (free(divisor=4), 12, 6, [12]),
        (free(divisor=4), 36, 6, [12, 24, 36]),
        (free(divisor=8, min_width=9), 32, 1, [16, 24, 32]),
        (free(divisor=8), 5, 1, [5]),
        (free(min_kept_fraction=0.7), 10, 1, [7, 8, 9, 10]),
        (free(min_kept_fraction=1.0), 10, 1, [10]),
    ],
)
def test_allowed_widths(space, size, divisor, widths):
    assert space.widths(axis(size, divisor)).tolist() == widths


def test_a_quarter_stays_by_default_and_the_divisor_is_open():
    assert SearchSpace() == SearchSpace(min_width=1, divisor=None, min_kept_fraction=0.25)
    assert SearchSpace().widths(axis(8)).tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert SearchSpace(divisor=1).widths(axis(8)).tolist() == SearchSpace().widths(axis(8)).tolist()


def test_divisor_counts_the_positions_that_every_channel_owns():
    def heads(*positions: int) -> ChannelAxis:
        sites = tuple(Site("w", 0, rows(6, k), Role.OUTPUT) for k in positions)
        return ChannelAxis("heads", 6, sites)

    # 64 positions a head: any number of heads is a multiple of 8; 4 positions: an even number; 3 or 1: eight.
    assert free(divisor=8).widths(heads(192, 64)).tolist() == [1, 2, 3, 4, 5, 6]
    assert free(divisor=8).widths(heads(12, 4)).tolist() == [2, 4, 6]
    assert free(divisor=8).widths(heads(9, 3)).tolist() == [6]
    assert free(divisor=4).widths(heads(49, 1)).tolist() == [4, 6]
    # The divisor of a rule is of the axis itself.
    assert ruled(AxisRule("heads", divisor=2), divisor=8).widths(heads(192, 64)).tolist() == [2, 4, 6]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_width": 0}, "`min_width` must be a whole number of channels, at least 1; got 0"),
        ({"min_width": 2.0}, "`min_width` must be a whole number"),
        ({"divisor": -8}, "`divisor` must be a whole number of channels, at least 1; got -8"),
        ({"divisor": True}, "`divisor` must be a whole number"),
        ({"min_kept_fraction": 1.5}, "`min_kept_fraction` must be from 0 to 1; got 1.5"),
        ({"min_kept_fraction": float("nan")}, "`min_kept_fraction` must be from 0 to 1; got nan"),
    ],
)
def test_impossible_spaces_are_refused(fields, message):
    with pytest.raises(BudgetError, match=message):
        SearchSpace(**fields)


def ruled(*rules: AxisRule, **fields) -> SearchSpace:
    return free(rules=rules, **fields)


@pytest.mark.parametrize(
    ("space", "first", "second"),
    [
        (ruled(AxisRule("conv1", divisor=4)), [4, 8], list(range(1, 13))),
        (ruled(AxisRule("conv2", min_width=10)), list(range(1, 9)), [10, 11, 12]),
        (ruled(AxisRule("*2", min_kept_fraction=0.75)), list(range(1, 9)), [9, 10, 11, 12]),
        # A rule replaces the general bound, be it tighter or looser.
        (ruled(AxisRule("conv2", divisor=1), divisor=4), [4, 8], list(range(1, 13))),
        (ruled(AxisRule("conv1", min_kept_fraction=0.0), min_kept_fraction=0.75), list(range(1, 9)), [9, 10, 11, 12]),
        # The last rule that sets a field holds; other fields of earlier rules stay.
        (ruled(AxisRule("*", 5, 2), AxisRule("conv1", divisor=4)), [8], [6, 8, 10, 12]),
        (ruled(AxisRule("conv1", divisor=4), AxisRule("*", 5, 2)), [6, 8], [6, 8, 10, 12]),
    ],
)
def test_rules_bound_the_axes_that_they_mean(space, first, second):
    _, graph = plain()
    assert [levels.tolist() for levels in space.levels(graph)] == [first, second]


def test_divisor_of_a_rule_is_combined_with_the_axis_own():
    assert ruled(AxisRule("a", divisor=4)).widths(axis(36, 6)).tolist() == [12, 24, 36]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"pattern": "a"}, BudgetError, "`AxisRule` must set min_width, divisor or min_kept_fraction; got only.*'a'"),
        (
            {"pattern": "a", "divisor": 0},
            BudgetError,
            "`divisor` must be a whole number of channels, at least 1; got 0",
        ),
        ({"pattern": "a", "min_width": 1.5}, BudgetError, "`min_width` must be a whole number"),
        ({"pattern": "a", "min_kept_fraction": -1}, BudgetError, "`min_kept_fraction` must be from 0 to 1; got -1"),
        ({"pattern": "", "divisor": 2}, SelectionError, "`pattern` must be a name pattern, such as .*; got ''"),
    ],
)
def test_impossible_rules_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        AxisRule(**fields)


def test_rules_in_words():
    assert str(AxisRule("layer1.*", 16, 8)) == "layer1.*: divisor 8, min_width 16"
    assert str(AxisRule("a", min_kept_fraction=0.5)) == "a: min_kept 0.5"


def test_rule_that_means_no_axis_is_refused():
    _, graph = plain()
    with pytest.raises(SelectionError, match=r"`rules` must match an axis.*'conv7' matches none\. Did you mean conv"):
        ruled(AxisRule("conv7", divisor=2)).levels(graph)


def test_prefix_of_the_fit_is_the_largest_threshold_within_the_budget():
    _, graph = residual(300, 250)
    generator = np.random.default_rng(0)
    keys = [np.sort(generator.random(299)), np.sort(generator.random(249))]
    posed = problem(graph, "macs=40%")
    found = widen_to_budget(posed, keys)

    def at(t: float) -> np.ndarray:
        return np.array([[1 + (row < t).sum() for row in keys]])

    assert posed.utilization(at(found.threshold))[0] <= 1
    assert posed.utilization(at(np.nextafter(found.threshold, 2)))[0] > 1
    assert (found.widths >= at(found.threshold)[0]).all()


def test_all_steps_taken_gives_an_infinite_threshold():
    _, graph = plain()
    found = widen_to_budget(problem(graph, "macs=100%"), [np.arange(7.0), np.arange(11.0)])
    assert found.threshold == np.inf
    assert found.widths.tolist() == [8, 12]


def test_equal_keys_go_by_step_then_by_axis():
    _, graph = residual(12, 12)
    model = CostModel(graph)
    target = int(model.of_widths(np.array([[3, 2]]))[0][0])
    found = widen_to_budget(problem(graph, f"macs={target}"), [np.zeros(11), np.zeros(11)])
    assert found.widths.tolist() == [3, 2]


def test_keys_that_fall_are_raised():
    _, graph = plain()
    falling = [np.linspace(1, 0, 7), np.linspace(1, 0, 11)]
    flat = [np.ones(7), np.ones(11)]
    assert (
        widen_to_budget(problem(graph, "macs=50%"), falling).widths.tolist()
        == widen_to_budget(problem(graph, "macs=50%"), flat).widths.tolist()
    )


def test_room_left_by_a_coarse_step_is_filled_in_order():
    _, graph = plain(64, 64)
    # All of axis conv1 is wanted first, but the last step of it that fits leaves room for others.
    posed = problem(graph, "macs=30%", free(divisor=16))
    keys = [np.zeros(3), np.ones(3)]
    found = widen_to_budget(posed, keys)
    widths = np.array(list(itertools.product((16, 32, 48, 64), repeat=2)))
    full = posed.utilization(widths)
    assert found.utilization <= 1
    one_up = [w for w, f in zip(widths, full, strict=True) if f <= 1 and (w >= found.widths).all()]
    assert [w.tolist() for w in one_up] == [found.widths.tolist()]


def neighbors(levels, widths):
    """All architectures one step up, or one step down and one up."""
    counts = [int(np.flatnonzero(row == width)[0]) for row, width in zip(levels, widths, strict=True)]
    for up in range(len(levels)):
        for down in (None, *range(len(levels))):
            moved = list(counts)
            moved[up] += 1
            if down is not None:
                moved[down] -= 1
            if all(0 <= c < len(row) for c, row in zip(moved, levels, strict=True)):
                yield [int(row[c]) for c, row in zip(moved, levels, strict=True)]


budgets = st.tuples(st.floats(0.5, 100), st.floats(0.5, 100), st.sampled_from(["macs", "params", "both"]))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    st.sampled_from(sorted(HAND_GRAPHS)), budgets, st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32 - 1)
)  # fmt: skip
def test_fit_is_never_over_and_as_full_as_the_widths_allow(name, bounds, divisor, min_width, seed):
    _, graph = HAND_GRAPHS[name]()
    space = free(divisor=divisor, min_width=min_width)
    macs, params, which = bounds
    text = {"macs": f"macs={macs}%", "params": f"params={params}%", "both": f"macs={macs}%, params={params}%"}[which]
    posed = problem(graph, text, space)
    generator = np.random.default_rng(seed)
    keys = [np.sort(generator.random(len(levels) - 1)) for levels in posed.levels]
    smallest = np.array([[levels[0] for levels in posed.levels]])
    if posed.utilization(smallest)[0] > 1:
        return
    found = widen_to_budget(posed, keys)
    everything = np.array(list(itertools.product(*posed.levels)))
    full = posed.utilization(everything)
    assert found.utilization == posed.utilization(found.widths[None])[0] <= 1
    assert all(width in levels for width, levels in zip(found.widths, posed.levels, strict=True))
    # These spaces are small enough to be searched completely, so the promise holds without exception.
    if (full[full <= 1] >= 0.99).any():
        assert found.utilization >= 0.99
    else:
        assert not any(
            found.utilization < posed.utilization(np.array([n]))[0] <= 1 for n in neighbors(posed.levels, found.widths)
        )


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.floats(5, 99.9), st.sampled_from(["macs", "params"]), st.integers(0, 2**32 - 1))
def test_fine_widths_always_land_within_one_percent(percent, name, seed):
    _, graph = residual(300, 250)  # one channel is below 1 % of anything above 5 %
    posed = problem(graph, f"{name}={percent}%")
    generator = np.random.default_rng(seed)
    found = widen_to_budget(posed, [np.sort(generator.random(299)), np.sort(generator.random(249))])
    assert 0.99 <= found.utilization <= 1


def chain(widths: list[int]):
    """A graph of convolutions in a row; costs only."""
    from secateur.graph import ChannelGraph, Extent, Operation

    axes = tuple(ChannelAxis(f"a{i}", w, ()) for i, w in enumerate(widths))
    ends = [Extent(3), *(Extent(0, ((a.name, 1),)) for a in axes), Extent(10)]
    operations = tuple(Operation("", "convolution", 9.0, pair) for pair in itertools.pairwise(ends))
    return ChannelGraph(axes, operations, {}, (), (), {}, ())


@pytest.mark.parametrize("percent", [20, 35, 50, 65, 80])
def test_many_coarse_axes_land_within_one_percent_by_exchange(percent):
    graph = chain([64] * 20)
    posed = problem(graph, f"macs={percent}%", free(divisor=16))
    found = widen_to_budget(posed, [levels[1:] / levels[-1] for levels in posed.levels])
    assert 0.99 <= found.utilization <= 1
    assert np.abs(found.widths - 64 * np.sqrt(percent / 100)).max() < 48


def test_exchange_stops_where_nothing_is_better():
    posed = problem(chain([4] * 14), "macs=30%", free(divisor=2))
    found = widen_to_budget(posed, [np.zeros(1)] * 14)
    assert found.utilization <= 1
    if found.utilization < 0.99:
        assert not any(
            found.utilization < posed.utilization(np.array([n]))[0] <= 1 for n in neighbors(posed.levels, found.widths)
        )


def test_an_axis_with_one_width_is_never_moved():
    _, graph = concat()
    found = widen_to_budget(problem(graph, "macs=60%", free(min_width=5)), [np.zeros(0), np.zeros(0), np.zeros(1)])
    assert found.widths.tolist()[:2] == [4, 5]
