"""The candidates, compared with enumeration, and their costs, compared with those of whole and cut networks."""

import itertools
from functools import cache

import numpy as np
import pytest
import slow_search
import torch
from cuts import EXACT, apart, zoo_net
from swp_runs import finest, options_of, problem_of, quick, staged
from tas_runs import Net, Recorder, net, run
from zoo import ZOO

from secateur.cost import CostModel, count_macs
from secateur.errors import BudgetError, SelectionError
from secateur.graph import trace, untie
from secateur.models import cifar_resnet20
from secateur.nas import Depths, Supernet, Widths, run_stages, stage_features
from secateur.nas.swp_candidates import CandidateSpace, StageCandidates
from secateur.prune import cut
from secateur.search import SearchSpace

FINELY = (
    "residual",
    "option_a_residual",
    "preact_residual",
    "inverted_residual_se",
    "inception",
    "nested",
    "attention",
)
"""Networks with as many stages as possible, so that most of their streams cross cuts."""


# --- choices ----------------------------------------------------------------------------------------------------------


def nearest(levels: list[int], fractions: tuple[float, ...]) -> set[int]:
    """The full width, and for each fraction the allowed width next to it, the narrower one of two."""
    return {min(levels, key=lambda w: (abs(w - f * levels[-1]), w)) for f in fractions} | {levels[-1]}


@pytest.mark.parametrize("divisor", [1, 3])
@pytest.mark.parametrize("depths", [None, Depths()], ids=["widths", "both"])
def test_candidates_are_all_combinations_of_widths_and_first_blocks(depths, divisor):
    """The second stage of the net in two: axes 5, 8.conv1 and 9.conv1, the chain 8, 9; the first has block 4 as end."""
    options = options_of(staged(), depths=depths, cuts=["4"], space=SearchSpace(divisor=divisor, min_kept_fraction=0))
    sizes = options.context.inputs.graph.sizes
    axes = [("3.conv1", "4.conv1"), ("5", "8.conv1", "9.conv1")]
    blocks = [[()], [(), ("9",), ("8", "9")]]  # What goes; chains lose their last blocks first.
    if depths is not None:
        blocks[0] = [(), ("3",)]
    else:
        blocks[1] = [()]
    for number, stage in enumerate(options.of_stage):
        levels = [[*range(divisor, sizes[n], divisor), sizes[n]] for n in axes[number]]
        widths = [sorted(nearest(row, (0.3, 0.6))) for row in levels]
        wanted = {(w, b) for w in itertools.product(*widths) for b in blocks[number]}
        got = []
        for row in itertools.product(*(range(top + 1) for top in stage.max_numbers.tolist())):
            rows = list(options.largest)
            rows[number] = np.array(row)
            subnet = options.subnet(tuple(rows))
            by_name = dict(zip(sizes, subnet.widths, strict=True))
            assert all(by_name[name] == size for name, size in sizes.items() if name not in axes[number])
            got.append((tuple(by_name[name] for name in axes[number]), subnet.removed_blocks))
        assert len(got) == len(set(got)) == stage.size == len(wanted)
        assert set(got) == wanted
        assert (got[0], got[-1]) == (
            (min(w for w, _ in wanted), max((b for _, b in wanted), key=len)),
            (max(wanted)[0], ()),
        )


def test_the_largest_and_the_smallest_network():
    options = options_of(staged())
    graph = options.context.inputs.graph
    full = options.subnet(options.largest)
    assert dict(zip(graph.sizes, full.widths, strict=True)) == dict(graph.sizes)
    assert full.removed_blocks == ()
    tiny = options.subnet(options.smallest)
    assert dict(zip(graph.sizes, tiny.widths, strict=True)) == {
        "0": 8, "3.conv1": 3, "4.conv1": 3, "5": 4, "8.conv1": 4, "9.conv1": 4
    }  # fmt: skip
    assert tiny.removed_blocks == ("8", "9")


def test_sampled_choices_are_uniform():
    options, draw = options_of(staged()), np.random.default_rng(0)
    drawn = [options.sample(draw) for _ in range(3000)]
    for number, stage in enumerate(options.of_stage):
        rows = np.stack([rows[number] for rows in drawn])
        for column, top in zip(rows.T, stage.max_numbers, strict=True):
            share = np.bincount(column, minlength=top + 1) / len(drawn)
            # Standard deviation below 0.009.
            np.testing.assert_allclose(share, 1 / (top + 1), atol=0.04)
    pairs = np.corrcoef(np.concatenate([np.stack([rows[n] for rows in drawn]) for n in range(3)], axis=1).T)
    assert np.abs(pairs - np.eye(len(pairs))).max() < 0.08


def test_widths_alone_and_depths_alone():
    given = staged()
    widths, depths = options_of(given, depths=None), options_of(given, widths=None)
    assert widths.subnet(widths.smallest).removed_blocks == ()
    assert depths.subnet(depths.smallest).widths == tuple(given.graph.sizes.values())
    assert [len(of.axes) for of in depths.of_stage] == [0, 0, 0]


def test_axes_with_a_single_width_offer_no_choice():
    options = options_of(staged(), space=SearchSpace(min_width=10), depths=None)
    names = options.context.costs.axes
    assert [[names[axis] for axis in of.axes] for of in options.of_stage] == [[], [], ["5", "8.conv1", "9.conv1"]]
    assert [of.size for of in options.of_stage] == [1, 1, 2 * 2 * 2]


# --- costs ------------------------------------------------------------------------------------------------------------


@cache
def graph_of(name: str, untied: bool):
    model, _, graph = zoo_net(name)
    return untie(model, graph) if untied else graph


def zoo_options(name: str, untied: bool, finely: bool) -> CandidateSpace:
    model, _, _ = zoo_net(name)
    graph = graph_of(name, untied)
    return options_of(Net(model, graph, ()), cuts=finest(model, graph) if finely else None)


def assert_costs_add_up(options: CandidateSpace, networks: int = 12) -> None:
    """Costs of random combinations of candidates equal the cost of the whole architecture exactly."""
    draw = np.random.default_rng(3)
    rows = [options.largest, options.smallest, *(options.sample(draw) for _ in range(networks))]
    candidates = StageCandidates(options, 0)
    candidates.record(rows, np.zeros((len(rows), len(options.stages))))
    table = candidates.table()
    assert table.limits == options.context.limits
    graph = options.context.inputs.graph
    supernet, costs = Supernet(options.context.inputs.model, graph), CostModel(graph)
    for _ in range(networks):
        picked = [int(draw.integers(len(known))) for known in candidates.rows]
        network = candidates.rows_of(picked)
        cost = costs.cost(supernet.architecture(options.subnet(network)))
        assert table.choose(picked).cost == {"macs": cost.macs, "params": cost.params}
    whole = [
        next(n for n, row in enumerate(known) if (row == top).all())
        for known, top in zip(candidates.rows, options.largest, strict=True)
    ]
    assert table.choose(whole).cost == {"macs": costs.original.macs, "params": costs.original.params}


ZOO_CASES = [(name, untied, False) for name in ZOO for untied in (False, True)]
ZOO_CASES += [(name, untied, True) for name in FINELY for untied in (False, True)]


def assert_boundaries_are_whole(options: CandidateSpace, images: torch.Tensor) -> None:
    """No axis that a cut or two stages see is narrowed, so that every network can be run stage by stage."""
    graph = options.context.inputs.graph
    inside = {name for stage in options.stages for name in stage.axes}
    draw = np.random.default_rng(4)
    supernet = Supernet(options.context.inputs.model, graph)
    with torch.no_grad():
        _, handed_on = stage_features(supernet, options.stages, images)
        for rows in (options.smallest, options.sample(draw)):
            subnet = options.subnet(rows)
            widths = dict(zip(graph.sizes, subnet.widths, strict=True))
            branches = {axis.name for axis in graph.prunable if axis.residual_axis in inside}
            assert all(widths[name] == graph.sizes[name] for name in graph.sizes.keys() - inside - branches)
            outputs = run_stages(supernet, subnet, options.stages, images, handed_on)
            assert len(outputs) == len(options.stages)


@pytest.mark.parametrize(("name", "untied", "finely"), ZOO_CASES)
def test_costs_add_up_and_boundaries_are_whole(name, untied, finely):
    options = zoo_options(name, untied, finely)
    assert_costs_add_up(options)
    assert_boundaries_are_whole(options, zoo_net(name)[1])


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_costs_of_a_resnet_add_up(untied):
    """Option A: the streams of its second and third stage are only sums, and one of them crosses a cut."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, images = cifar_resnet20().eval(), torch.randn(1, 3, 16, 16)
    graph = trace(model, images)
    graph = untie(model, graph) if untied else graph
    options = options_of(Net(model, graph, ()), widths=Widths())
    assert len(options.stages) == 3
    assert_costs_add_up(options)
    assert_boundaries_are_whole(options, images)
    rows = options.sample(np.random.default_rng(1))
    architecture = Supernet(model, graph).architecture(options.subnet(rows))
    small = cut(model, graph, architecture).model
    assert count_macs(small, images) == CostModel(graph).cost(architecture).macs
    assert sum(p.numel() for p in small.parameters()) == CostModel(graph).cost(architecture).params


def test_a_stream_that_crosses_a_cut_stays_whole_however_narrow_its_branches():
    """The cut model, in which some channels are never computed, equals what the supernet runs."""
    model, images, _ = zoo_net("option_a_residual")
    options = zoo_options("option_a_residual", untied=True, finely=False)
    graph = options.context.inputs.graph
    subnet = options.subnet(options.smallest)
    widths = dict(zip(graph.sizes, subnet.widths, strict=True))
    into = {axis.name: axis.residual_axis for axis in graph.prunable if axis.residual_axis}
    streams = set(into.values())
    narrow = {s for s in streams if max(widths[branch] for branch, stream in into.items() if stream == s) < widths[s]}
    assert any(widths[s] == graph.sizes[s] for s in narrow)
    supernet = Supernet(model, graph)
    small = cut(model, graph, supernet.architecture(subnet)).model.eval()
    with torch.no_grad():
        assert apart([small(images)], [supernet(subnet, images)]) <= EXACT[torch.float32]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_nothing_to_choose_is_refused():
    message = r"`space` must leave some axis inside of a stage two widths, or some chain of blocks two depths; got none"
    with pytest.raises(BudgetError, match=message):
        options_of(staged(), space=SearchSpace(min_kept_fraction=1.0), depths=None)
    assert options_of(staged(), space=SearchSpace(min_kept_fraction=1.0)).of_stage[2].size == 3
    seen = Recorder()
    model = slow_search.model().eval()
    plain = Net(model, trace(model, torch.zeros(1, 3, 8, 8)), net().batches)
    with pytest.raises(BudgetError, match="cut the model into fewer stages"):
        run(plain, quick(cuts=("2", "4")), callbacks=seen)
    assert seen.opened == []


@pytest.mark.parametrize(
    ("cuts", "message"),
    [(("nope",), "`cuts` must name modules of the model; got 'nope'"), (("4", "3"), "must be in order of execution")],
)
def test_bad_cuts_are_refused_before_anything_is_trained(cuts, message):
    seen = Recorder()
    with pytest.raises(SelectionError, match=message):
        run(net(), quick(cuts=cuts), callbacks=seen)
    assert seen.opened == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widths": None, "depths": None}, "`widths` or `depths` must be given"),
        ({"candidates": 5, "rounds": 3}, "`candidates` must be at least two for each of the `rounds`; got 5 in 3"),
        ({"rounds": 0}, "`candidates` must be at least two for each of the `rounds`; got 12 in 0"),
        ({"held_out": 0}, "`held_out` must be at least 1 image; got 0"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(BudgetError, match=message):
        quick(**fields)


def test_the_least_cost_is_that_of_the_smallest_network():
    given = staged()
    problem = problem_of(given.model, given.graph)
    options = options_of(given, widths=Widths())
    architecture = Supernet(given.model, given.graph).architecture(options.subnet(options.smallest))
    assert quick().least(problem) == CostModel(given.graph).cost(architecture)
