import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hand_graphs import concat, plain, residual

from secateur.architecture import Architecture
from secateur.cost import Budget, Cost, CostModel
from secateur.errors import BudgetError, ModelError, SurgeryError
from secateur.graph import ChannelGraph
from secateur.search import (
    L1,
    L2,
    Activations,
    Correlation,
    FilterWeights,
    GlobalImportance,
    Importance,
    PCASlimming,
    Proposal,
    RandomImportance,
    RawWeights,
    SearchSpace,
    Strategy,
    Uniform,
    as_scored,
    by_axis_max,
    by_axis_mean,
    by_axis_norm,
    by_axis_rank,
    search_architecture,
    stable_repr,
)


@dataclass(frozen=True)
class Fixed(Strategy):
    """Proposes the same thing whatever it is asked."""

    architecture: Architecture

    def find(self, problem):
        return Proposal(self.architecture, {"asked": str(problem.budget)})


@dataclass(frozen=True, eq=False)
class Given(Importance):
    """Scores given from outside."""

    values: dict

    def scores(self, inputs):
        return self.values


def test_a_budget_that_is_met_already_returns_the_whole_model():
    model, graph = plain()
    found = search_architecture(model, graph, Fixed(Architecture()), budget="macs=100%, params<=1G")
    assert found.architecture.widths == {"conv1": 8, "conv2": 12}
    assert found.cost == found.original == CostModel(graph).original
    assert found.notes["utilization"]["macs"] == 1


def test_what_is_found_is_complete_and_plain():
    model, graph = plain(64, 64)
    found = search_architecture(model, graph, Uniform(L1()), budget=Budget(macs="40%"))
    assert found.budget == Budget(macs="40%")
    assert found.strategy == "Uniform(importance=L1())"
    assert found.cost == CostModel(graph).cost(found.architecture)
    assert found.notes["utilization"]["macs"] == found.cost.macs / (0.4 * found.original.macs)
    data = json.loads(json.dumps(found.to_json()))
    assert Architecture.from_json(data["architecture"]) == found.architecture
    assert Cost.from_json(data["cost"]) == found.cost
    assert Budget.parse(data["budget"]) == found.budget


def test_an_unreachable_budget_is_refused_before_the_strategy_is_asked():
    model, graph = plain(64, 64)
    least = CostModel(graph).cost(Architecture.of({"conv1": range(8), "conv2": range(8)})).macs
    message = (
        rf"must be within reach; got macs<=1%\. Reachable: macs {least / 1e3:.1f} k \(3\.3 %\) to 701 k\. "
        r"Raise the budget or lower min_width \(now 1\), divisor \(now 8\) or min_kept_fraction \(now 0\)"
    )
    space = SearchSpace(divisor=8, min_kept_fraction=0)
    with pytest.raises(BudgetError, match=message):
        search_architecture(model, graph, Fixed(Architecture()), budget="macs=1%", space=space)


def test_every_limited_field_shows_its_reach():
    model, graph = plain()
    with pytest.raises(BudgetError, match=r"Reachable: macs .* \(\d+\.\d %\) to .*, params .* to "):
        search_architecture(model, graph, Uniform(), budget="macs=50%, params=5")


def test_a_model_with_nothing_to_slim_is_refused():
    model, _ = plain()
    graph = ChannelGraph((), (), {}, (), (), {}, ())
    assert search_architecture(model, graph, Uniform(), budget="macs=50%").architecture == Architecture()
    frozen = plain()[1].with_frozen({"conv1": "it is the output", "conv2": "it is the output"})
    with pytest.raises(BudgetError, match="No axis of this model may be slimmed"):
        search_architecture(model, frozen, Uniform(), budget="macs=50%")


def test_a_graph_of_another_model_is_refused():
    with pytest.raises(SurgeryError, match=r"must be traced from this model; 'conv1.weight' has shape \(8, 3, 3, 3\)"):
        search_architecture(plain(9, 9)[0], plain()[1], Uniform(), budget="macs=50%")
    with pytest.raises(SurgeryError, match=r"'stem.weight' has shape \(8, 3, 3, 3\) there and None here"):
        search_architecture(plain()[0], residual()[1], Uniform(), budget="macs=50%")


def test_a_strategy_over_budget_is_refused():
    model, graph = plain()
    whole = Architecture.of({"conv1": range(8)})
    with pytest.raises(BudgetError, match=r"`architecture` must be within macs<=50%; got Cost\(macs="):
        search_architecture(model, graph, Fixed(whole), budget="macs=50%")


def test_a_strategy_outside_the_space_is_refused():
    model, graph = plain()
    odd = Architecture.of({"conv1": range(3), "conv2": range(4)})
    with pytest.raises(SurgeryError, match=r"keeps 3 channels of 'conv1', SearchSpace.* allows 2 widths from 4 to 8"):
        search_architecture(model, graph, Fixed(odd), budget="macs=50%", space=SearchSpace(divisor=4))


def test_an_unreadable_budget_is_refused():
    with pytest.raises(BudgetError, match="separated by commas"):
        search_architecture(*plain(), Uniform(), budget="half")


def test_scores_that_cannot_be_ranked_are_refused():
    model, graph = plain()
    scores = {"conv1": np.ones(8), "conv2": np.full(12, np.nan)}
    for strategy in (Uniform(Given(scores)), GlobalImportance(Given(scores)), PCASlimming(importance=Given(scores))):
        with pytest.raises(ModelError, match="must be finite; got nan for channel 0"):
            search_architecture(model, graph, strategy, budget="macs=50%")


def test_progress_is_reported():
    seen = []
    search_architecture(
        *plain(), PCASlimming(), budget="macs=50%", progress=lambda done, what: seen.append((done, what))
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert all(0 <= done <= 1 and what for done, what in seen)
    assert seen


@pytest.mark.parametrize(
    ("thing", "text"),
    [
        (GlobalImportance(), "GlobalImportance(importance=L2(), normalize=by_axis_mean)"),
        (
            PCASlimming(FilterWeights(Correlation())),
            "PCASlimming(source=FilterWeights(matrix=Correlation(), stretched=True), importance=L2())",
        ),
        (SearchSpace(divisor=8), "SearchSpace(min_width=1, divisor=8, min_kept_fraction=0.25, rules=())"),
        (L2, "<class 'secateur.search.importance.L2'>"),
    ],
)
def test_strategies_are_described_without_addresses(thing, text):
    assert stable_repr(thing) == text


def test_uniform_keeps_the_same_fraction_everywhere():
    model, graph = residual(200, 100)
    found = search_architecture(model, graph, Uniform(), budget="macs=49%")
    fractions = [len(found.architecture.by_name[name]) / size for name, size in graph.sizes.items()]
    assert abs(fractions[0] - fractions[1]) <= 0.02
    assert found.notes["kept_fraction"] == pytest.approx(0.7, abs=0.02)


def test_the_channels_with_the_highest_scores_stay_and_ties_go_to_the_first():
    model, graph = plain()
    scores = {"conv1": np.array([1.0, 5, 1, 5, 5, 0, 9, 1]), "conv2": np.ones(12)}
    widths = np.array([[4, 6]])
    budget = int(CostModel(graph).of_widths(widths)[0][0])
    found = search_architecture(model, graph, Uniform(Given(scores)), budget=f"macs={budget}")
    order = {"conv1": [6, 1, 3, 4, 0, 2, 7, 5], "conv2": list(range(12))}
    for name, kept in found.architecture.by_name.items():
        assert set(kept) == set(order[name][: len(kept)])


def test_global_importance_keeps_the_best_of_all_axes():
    model, graph = plain(150, 200)
    generator = np.random.default_rng(0)
    scores = {"conv1": generator.random(150), "conv2": generator.random(200)}
    found = search_architecture(model, graph, GlobalImportance(Given(scores), as_scored), budget="params=45%")
    threshold = found.notes["threshold"]
    for name, kept in found.architecture.by_name.items():
        above = set(np.flatnonzero(scores[name] > threshold))
        assert above <= set(kept)
        assert len(kept) - len(above) <= 3


def test_global_importance_ranks_groups_of_channels_by_their_mean():
    model, graph = plain(8, 8)
    # First allowed width is 4 for both. The next four: mean 0.5 in conv1 (with one of 1), 0.6 in conv2.
    scores = {
        "conv1": np.array([9, 9, 9, 9, 1, 1 / 3, 1 / 3, 1 / 3]),
        "conv2": np.array([9, 9, 9, 9, 0.6, 0.6, 0.6, 0.6]),
    }
    budget = int(CostModel(graph).of_widths(np.array([[4, 8]]))[1][0])
    strategy = GlobalImportance(Given(scores), as_scored)
    found = search_architecture(model, graph, strategy, budget=f"params={budget}", space=SearchSpace(divisor=4))
    assert found.architecture.widths == {"conv1": 4, "conv2": 8}


def test_normalizers():
    scores = np.array([1.0, 3.0, 0.0, 3.0])
    np.testing.assert_allclose(as_scored(scores), scores)
    np.testing.assert_allclose(by_axis_mean(scores), scores / 1.75)
    np.testing.assert_allclose(by_axis_max(scores), scores / 3)
    np.testing.assert_allclose(by_axis_norm(scores), scores / np.sqrt(19))
    np.testing.assert_allclose(by_axis_rank(scores), [0.25, 0.5, 0, 0.5])
    for normalize in (as_scored, by_axis_mean, by_axis_max, by_axis_norm, by_axis_rank):
        assert (normalize(np.zeros(3)) == 0).all()


def test_normalizing_makes_the_scale_of_an_axis_irrelevant():
    model, graph = plain(40, 60)
    generator = np.random.default_rng(1)
    scores = {"conv1": generator.random(40), "conv2": generator.random(60)}
    scaled = scores | {"conv1": scores["conv1"] * 1024}
    for normalize in (by_axis_mean, by_axis_max, by_axis_norm, by_axis_rank):
        first, second = (
            search_architecture(model, graph, GlobalImportance(Given(given), normalize), budget="macs=50%")
            for given in (scores, scaled)
        )
        assert first.architecture == second.architecture
    biased = search_architecture(model, graph, GlobalImportance(Given(scaled), as_scored), budget="macs=50%")
    assert biased.architecture.widths["conv1"] == 40


def test_pca_widths_are_the_fewest_components_that_explain_tau():
    model, graph = residual(120, 100)
    found = search_architecture(model, graph, PCASlimming(RawWeights()), budget="macs=45%")
    from secateur.search import ScoringInputs

    rest = RawWeights().unexplained(ScoringInputs(model, graph))
    tau = found.notes["tau"]
    assert 0 < tau < 1
    for name, width in found.architecture.widths.items():
        explained = 1 - rest[name]
        fewest = int(np.flatnonzero(explained >= tau - 1e-12)[0])
        # Filling the room left over may add a channel, and never takes one away.
        assert fewest <= width <= fewest + 1
        assert found.notes["explained"][name] == pytest.approx(explained[width])


def test_pca_tells_a_redundant_layer_from_a_rich_one():
    model, graph = plain(48, 48)
    with torch.no_grad():
        weight = model.conv2.weight
        weight.copy_(weight[:6].repeat(8, 1, 1, 1) + 0.01 * weight)
        model.bn2.weight.fill_(1.0)
        model.bn2.running_var.fill_(1.0)
    found = search_architecture(model, graph, PCASlimming(), budget="macs=40%")
    assert found.architecture.widths["conv2"] < 15
    assert found.architecture.widths["conv1"] > 30


def test_pca_can_keep_all_filters_of_a_layer_beyond_its_rank():
    model, graph = plain(64, 64)
    # conv1 has 64 filters of rank 26; with a budget just below the whole it must not be cut to 26.
    found = search_architecture(model, graph, PCASlimming(RawWeights()), budget="macs=99%")
    assert min(found.architecture.widths.values()) >= 60


def test_pca_on_activations_needs_and_uses_batches():
    model, graph = plain(16, 16)
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 3, 8, 8, generator=generator), torch.zeros(8, dtype=torch.int64))]
    found = search_architecture(model, graph, PCASlimming(Activations()), budget="macs=50%", batches=batches)
    other = search_architecture(
        model, graph, PCASlimming(Activations(Correlation())), budget="macs=50%", batches=batches
    )
    assert found.strategy != other.strategy
    assert 0 < found.notes["tau"] < 1


def test_random_importance_follows_the_seed_of_the_search():
    model, graph = concat()
    state = torch.get_rng_state()
    one, same, other = (
        search_architecture(model, graph, Uniform(RandomImportance()), budget="macs=50%", seed=seed).architecture
        for seed in (1, 1, 2)
    )
    assert one == same != other
    assert one.widths == other.widths
    assert torch.equal(state, torch.get_rng_state())
