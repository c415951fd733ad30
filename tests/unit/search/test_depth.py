"""Fewer blocks, then fewer channels: which blocks, how many, and what is left to the inner strategy."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO

from secateur.architecture import Architecture
from secateur.cost import CostModel
from secateur.errors import BudgetError, DataError
from secateur.graph import ChannelGraph, Replacement, StandIn, trace
from secateur.prune import Refit, apply_architecture, cut, mask_removed, output_distance, split_calibration
from secateur.search import (
    L2,
    Importance,
    Knapsack,
    RemoveBlocks,
    ScoreCache,
    SearchSpace,
    Uniform,
    search_architecture,
)
from secateur.search import depth as _depth
from secateur.search.depth import _between, _spread

Batches = tuple[tuple[Tensor, Tensor], ...]


def zoo(name: str, images: int = 24) -> tuple[nn.Module, ChannelGraph, Batches]:
    model, example = ZOO[name]()
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(images, *example.shape[1:], generator=generator)
    labels = torch.arange(images) % 5
    half = images // 2
    return model, trace(model, example), ((pictures[:half], labels[:half]), (pictures[half:], labels[half:]))


class Chain(nn.Module):
    """Residual blocks of which some do next to nothing."""

    def __init__(self, strengths: tuple[float, ...], width: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1))
            for _ in strengths
        )
        self.head = nn.Linear(width, 5)
        with torch.no_grad():
            for block, strength in zip(self.blocks, strengths, strict=True):
                block[2].weight.mul_(strength)
                block[2].bias.mul_(strength)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def chain(*strengths: float) -> tuple[nn.Module, ChannelGraph, Batches]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Chain(strengths).eval()
    images = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return model, trace(model, images[:1]), ((images, torch.zeros(32, dtype=torch.int64)),)


def test_blocks_that_do_nothing_go_first():
    model, graph, batches = chain(1.0, 1e-4, 1.0, 1e-4, 1.0, 1.0)
    found = search_architecture(model, graph, RemoveBlocks(Uniform()), budget="macs=70%", batches=batches)
    assert found.architecture.removed_blocks == ("blocks.1", "blocks.3")
    assert set(found.notes["disturbance"]) == {f"blocks.{n}" for n in range(6)}
    alone = search_architecture(model, graph, Uniform(), budget="macs=70%")
    assert alone.architecture.removed_blocks == ()
    images = [batches[0][0]]
    mine, theirs = (
        output_distance(model, apply_architecture(model, graph, f.architecture), images) for f in (found, alone)
    )
    assert mine < 0.3 * theirs


def test_disturbance_is_the_distance_with_the_branch_zeroed():
    model, graph, batches = zoo("residual")
    notes = search_architecture(model, graph, RemoveBlocks(), budget="macs=70%", batches=batches).notes
    assert set(notes["disturbance"]) == {"1", "3"}
    for name, found in notes["disturbance"].items():
        masked = mask_removed(model, graph, Architecture.of({}, [name]))
        assert found == pytest.approx(output_distance(model, masked, [x for x, _ in batches]), rel=1e-6)


@pytest.mark.parametrize("name", ["residual", "preact_residual", "attention", "layer_scale"])
@pytest.mark.parametrize("inner", [Uniform(), Knapsack()])
def test_never_further_from_the_original_than_the_inner_strategy(name, inner):
    model, graph, batches = zoo(name)
    images = [x for x, _ in batches]
    for budget in ("macs=80%", "macs=75%"):
        found = search_architecture(
            model, graph, RemoveBlocks(inner, max_fraction=1.0, repairs=()), budget=budget, batches=batches
        )
        alone = search_architecture(model, graph, inner, budget=budget, batches=batches)
        distances = found.notes["distance"]
        chosen = str(len(found.architecture.removed_blocks))
        assert distances[chosen] == min(distances.values())
        assert distances["0"] == pytest.approx(
            output_distance(model, apply_architecture(model, graph, alone.architecture), images)
        )
        if chosen == "0":
            assert found.architecture == alone.architecture


def test_without_blocks_it_is_the_inner_strategy():
    model, graph, batches = zoo("plain")
    for inner in (Uniform(), Knapsack()):
        found = search_architecture(model, graph, RemoveBlocks(inner), budget="macs=50%", batches=batches)
        alone = search_architecture(model, graph, inner, budget="macs=50%", batches=batches)
        assert (found.architecture, found.notes) == (alone.architecture, alone.notes)
    assert search_architecture(
        model, graph, RemoveBlocks(Uniform()), budget="macs=50%"
    ).architecture.widths  # it needs no images then


def test_searches_that_share_what_they_remember_disturb_the_model_once(monkeypatch: pytest.MonkeyPatch):
    model, graph, batches = chain(1.0, 1e-4, 1.0, 1e-4)
    strategy, cache, asked = RemoveBlocks(Uniform()), ScoreCache(), []
    apart = [search_architecture(model, graph, strategy, budget=f"macs={part}%", batches=batches) for part in (80, 60)]
    real = _depth._Trials.disturbances

    def counted(trials):
        asked.append(trials)
        return real(trials)

    monkeypatch.setattr(_depth._Trials, "disturbances", counted)
    together = [
        search_architecture(model, graph, strategy, budget=f"macs={part}%", batches=batches, score_cache=cache)
        for part in (80, 60)
    ]
    assert together == apart
    assert len(asked) == 1


def test_the_same_search_again_finds_the_same_without_looking_at_blocks(monkeypatch: pytest.MonkeyPatch):
    model, graph, batches = chain(1.0, 1e-4, 1.0, 1e-4, 1.0, 1.0)
    strategy = RemoveBlocks(Uniform(), repairs=())
    found = search_architecture(model, graph, strategy, budget="macs=60%", batches=batches)
    monkeypatch.setattr(_depth._Trials, "__init__", lambda *_: pytest.fail("blocks are known"))
    near = strategy.again(found.architecture)
    again = search_architecture(model, graph, near, budget="macs=60%", batches=batches)
    assert (again.architecture, again.cost) == (found.architecture, found.cost)
    assert near.again(found.architecture) is near
    less = search_architecture(model, graph, near, budget="macs=40%", batches=batches)
    assert less.architecture.removed_blocks == found.architecture.removed_blocks
    assert 0.38 * found.original.macs < less.cost.macs <= 0.4 * found.original.macs
    with pytest.raises(BudgetError, match="must be within reach"):
        search_architecture(model, graph, near, budget="macs=1%", batches=batches)


def test_max_fraction_bounds_the_blocks():
    model, graph, batches = chain(1e-4, 1e-4, 1e-4, 1e-4)
    for most, blocks in ((0.0, 0), (0.49, 1), (0.5, 2), (1.0, 4)):
        found = search_architecture(
            model,
            graph,
            RemoveBlocks(Uniform(), max_fraction=most, repairs=()),
            budget="macs=9%",
            batches=batches,
            space=SearchSpace(min_kept_fraction=0.0),
        )
        assert len(found.architecture.removed_blocks) == blocks


def test_a_budget_below_the_smallest_widths_is_reached_by_depth():
    model, graph, batches = chain(1.0, 1.0, 1.0, 1.0)
    space = SearchSpace(min_kept_fraction=0.8)
    with pytest.raises(BudgetError, match="must be within reach"):
        search_architecture(model, graph, Uniform(), budget="macs=50%", space=space)
    found = search_architecture(model, graph, RemoveBlocks(Uniform()), budget="macs=50%", batches=batches, space=space)
    assert found.architecture.removed_blocks
    assert found.cost.macs <= 0.5 * found.original.macs
    with pytest.raises(BudgetError, match=r"Reachable: macs .* \((29|3\d)\.\d %\) to"):
        search_architecture(model, graph, RemoveBlocks(Uniform()), budget="macs=10%", batches=batches, space=space)


def test_layers_of_removed_blocks_are_called_whole():
    model, graph, batches = chain(1.0, 1e-5)
    found = search_architecture(model, graph, RemoveBlocks(Uniform()), budget="macs=50%", batches=batches)
    assert found.architecture.removed_blocks == ("blocks.1",)
    inside = [axis for axis in graph.prunable if all(s.tensor.startswith("blocks.1.") for s in axis.sites)]
    assert len(inside) == 1
    assert found.architecture.widths[inside[0].name] == inside[0].size
    assert CostModel(graph).cost(found.architecture) == found.cost


def test_a_block_that_cannot_be_removed_exactly_stays():
    model, graph, batches = chain(1.0, 1e-4, 1.0)
    wrong = (Replacement("blocks.1.0", StandIn.SILENCE),)  # what follows adds its bias
    graph = replace(
        graph, blocks=tuple(replace(b, replacements=wrong) if b.name == "blocks.1" else b for b in graph.blocks)
    )
    found = search_architecture(
        model, graph, RemoveBlocks(Uniform(), max_fraction=1.0), budget="macs=50%", batches=batches
    )
    assert "blocks.1" not in found.architecture.removed_blocks
    assert set(found.notes["disturbance"]) == {"blocks.0", "blocks.2"}


@dataclass(frozen=True)
class Counting(Importance):
    """Counts how often it is asked."""

    asked: list

    def scores(self, inputs):
        self.asked.append(1)
        return L2().scores(inputs)


def test_scores_of_the_whole_model_are_asked_for_once():
    model, graph, batches = chain(1.0, 1.0, 1.0, 1.0)
    importance = Counting([])
    search_architecture(
        model, graph, RemoveBlocks(Uniform(importance), max_fraction=1.0), budget="macs=60%", batches=batches
    )
    assert len(importance.asked) == 1


def test_only_so_many_images_are_looked_at():
    model, graph, batches = zoo("residual")
    few = search_architecture(model, graph, RemoveBlocks(Uniform(), images=5), budget="macs=60%", batches=batches)
    same = search_architecture(
        model, graph, RemoveBlocks(Uniform()), budget="macs=60%", batches=((batches[0][0][:5], batches[0][1][:5]),)
    )
    assert few.notes == same.notes


def test_the_repaired_model_decides_between_the_nearest_three():
    model, graph, batches = chain(1.0, 0.5, 0.2, 0.1, 1.0)
    images = [x for x, _ in batches]
    repairs = (Refit(),)
    strategy = RemoveBlocks(Uniform(), max_fraction=1.0, repairs=repairs)
    found = search_architecture(model, graph, strategy, budget="macs=40%", batches=batches)
    assert "repairs=(Refit(" in found.strategy
    distance, repaired = found.notes["distance"], found.notes["repaired"]
    assert len(distance) == 6
    assert set(repaired) == set(sorted(distance, key=distance.get)[:3])
    chosen = str(len(found.architecture.removed_blocks))
    assert repaired[chosen] == min(repaired.values())
    # By images that the repairs were not fitted to.
    split = split_calibration(images)
    made = cut(model, graph, found.architecture, calibration=split.fit, repairs=repairs, held_out=split.held_out).model
    assert repaired[chosen] == pytest.approx(output_distance(model, made, split.held_out))


def test_without_repairs_the_nearest_is_taken():
    model, graph, batches = zoo("residual")
    found = search_architecture(
        model, graph, RemoveBlocks(Uniform(), max_fraction=1.0, repairs=()), budget="macs=50%", batches=batches
    )
    distance = found.notes["distance"]
    assert found.notes["repaired"] == {}
    assert distance[str(len(found.architecture.removed_blocks))] == min(distance.values())


def test_images_are_needed():
    model, graph, _ = zoo("residual")
    with pytest.raises(DataError, match="`batches` must hold images for RemoveBlocks; got none"):
        search_architecture(model, graph, RemoveBlocks(Uniform()), budget="macs=60%")


@pytest.mark.parametrize("most", [-0.1, 1.5, float("nan")])
def test_max_fraction_must_be_a_fraction(most):
    with pytest.raises(BudgetError, match="`max_fraction` must be a fraction of the blocks, 0 to 1; got"):
        RemoveBlocks(max_fraction=most)


@pytest.mark.parametrize("images", [0, 2.5, True])
def test_images_must_be_a_number_of_images(images):
    with pytest.raises(BudgetError, match="`images` must be a whole number of images, at least 1; got"):
        RemoveBlocks(images=images)


def test_which_numbers_are_tried():
    assert _spread(0) == [0]
    assert _spread(5) == [0, 1, 2, 3, 4, 5]
    assert _spread(24) == [0, 3, 6, 9, 12, 15, 18, 21, 24]
    assert _between({0, 3, 6, 9}, 3, 9) == [1, 2, 4, 5]
    assert _between({0, 3, 6, 9}, 9, 9) == [7, 8]
    assert _between({0, 1, 2}, 1, 2) == []
    assert _between({0, 1}, -1, 1) == []
