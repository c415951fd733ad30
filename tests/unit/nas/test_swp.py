"""SWP from end to end on a tiny net and tiny images: what it finds, what it refuses."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from cuts import zoo_net
from run_pipeline import run_compress
from slow_search import data as noise
from small_runs import Blobs
from swp_runs import DEPTHS, assert_same, problem_of, quick, recalibrated, staged
from tas_runs import Net, Recorder, run

import secateur
from secateur.cost import CostModel
from secateur.data import MemorySplit, Normalization
from secateur.errors import BudgetError, DataError
from secateur.graph import find_stages, untie
from secateur.nas import SWP, Evolution, ExactKnapsack, OriginalWeights, RandomInit, RandomSampler, Widths
from secateur.nas.common import set_aside
from secateur.prune import cut
from secateur.search import L1, L2, ScoringInputs, SearchSpace, search_architecture, stable_repr
from secateur.train import Silent, TrainConfig

each_graph = pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])


# --- what it finds ----------------------------------------------------------------------------------------------------


@each_graph
@pytest.mark.parametrize("budget", ["macs=50%", "params=60%", "macs=60%, params=55%"])
def test_it_ends_within_the_budget_and_in_the_space(budget, untied):
    given = staged(untied=untied)
    found = run(given, quick(1), budget=budget)
    full = max(found.notes["utilization"].values())  # type: ignore[attr-defined]
    assert 0.5 <= full <= 1  # Twelve candidates of a stage leave gaps; 128 are usual.
    made = cut(given.model, given.graph, found.architecture)
    assert made.architecture == found.architecture
    assert CostModel(given.graph).cost(found.architecture) == found.cost
    for axis in given.graph.prunable:
        if axis.residual_axis is None:
            assert len(found.architecture.by_name[axis.name]) in Widths().of(SearchSpace().widths(axis))
    # Depth goes from the end of each chain, and the axis that crosses the cuts is whole.
    removed = set(found.architecture.removed_blocks)
    assert removed in (set(), {"9"}, {"8", "9"})
    assert found.architecture.widths["0"] == 8


def test_the_chosen_candidates_are_the_best_of_those_judged_and_the_network_no_cheaper():
    """The notes' losses and costs lead to the same combination by enumeration; what it leaves is filled."""
    found = run(staged(), quick(1))
    stages: Any = found.notes["stages"]
    base: Any = found.notes["base"]
    limit = 0.5 * found.original.macs
    losses = np.zeros(1)
    costs = np.full(1, base["macs"])
    for stage in stages:
        losses = (losses[:, None] + np.array(stage["losses"])).reshape(-1)
        costs = (costs[:, None] + np.array(stage["costs"]["macs"])).reshape(-1)
    assert found.notes["loss"] == pytest.approx(losses[costs <= limit].min(), rel=1e-12)
    chosen = [stage["chosen"] for stage in stages]
    assert sum(stage["losses"][n] for stage, n in zip(stages, chosen, strict=True)) == pytest.approx(
        found.notes["loss"]
    )
    spent = base["macs"] + sum(stage["costs"]["macs"][n] for stage, n in zip(stages, chosen, strict=True))
    assert spent <= found.cost.macs <= limit


@dataclass(frozen=True)
class Entangled:
    """Seconds that are no sum over stages: what a layer takes grows with the widths of all others."""

    field: str = "latency_s"

    def of_widths(self, widths: np.ndarray, blocks: np.ndarray | None = None) -> np.ndarray:
        total = widths.sum(axis=1).astype(np.float64)
        return 1e-6 * (total + 0.02 * total**2)

    def of_tensor(self, widths: torch.Tensor, blocks: torch.Tensor | None = None) -> torch.Tensor:
        raise NotImplementedError


def test_costs_that_are_no_sums_over_stages_are_within_the_budget_too():
    """As a file's size is none, by some bytes: the combination by the sums alone would be over the limit."""
    asked: list[Mapping[str, float]] = []

    @dataclass(frozen=True)
    class Watched(ExactKnapsack):
        def combine(self, table: Any, seed: int) -> Any:
            asked.append(table.limits)
            return super().combine(table, seed)

    strategy = quick(0, depths=None, student_weights=OriginalWeights(), combination=Watched())
    found = run(staged(), strategy, budget="latency=40%", latency=Entangled())
    assert len(asked) > 1
    assert all(now["latency_s"] < before["latency_s"] for before, now in pairwise(asked))
    assert max(found.notes["utilization"].values()) <= 1  # type: ignore[attr-defined]
    stages: Any = found.notes["stages"]
    base: Any = found.notes["base"]
    summed = base["latency_s"] + sum(stage["costs"]["latency_s"][stage["chosen"]] for stage in stages)
    assert found.cost.latency_s is not None
    assert summed < found.cost.latency_s


def test_what_it_notes_can_be_written_as_json():
    given = staged()
    found = run(given, quick(2))
    notes = json.loads(json.dumps(found.to_json()))["notes"]
    assert [epoch["epoch"] for epoch in notes["training"]] == [1, 2]
    assert 0 < notes["fairness"] <= 1
    stages = find_stages(given.model, given.graph)
    assert [(s["name"], s["cut"]) for s in notes["stages"]] == [(stage.name, stage.cut) for stage in stages]
    assert [(s["axes"], s["blocks"]) for s in notes["stages"]] == [(1, 0), (1, 0), (3, 2)]
    for stage in notes["stages"]:
        possible = round(10 ** stage["candidates"]["log10"])
        assert len(stage["losses"]) == len(stage["costs"]["macs"]) == min(12, possible)
        # Two drawn networks in each of six steps, the full and the tiny one.
        assert 2 <= stage["candidates"]["trained"] <= min(14, possible)


@pytest.mark.parametrize("searched", [{"depths": None}, {"widths": None, "depths": DEPTHS}], ids=["widths", "depths"])
def test_widths_alone_and_depths_alone(searched):
    given = staged()
    found = run(given, quick(1, **searched), budget="macs=90%")
    if searched["depths"] is None:
        assert found.architecture.removed_blocks == ()
    else:
        assert found.architecture.removed_blocks in (("9",), ("8", "9"))
        assert found.architecture.widths == dict(given.graph.sizes)


def test_without_stages_the_net_is_one():
    found = run(staged(), quick(1, cuts=(), sampler=RandomSampler(2)))
    stages: Any = found.notes["stages"]
    assert [stage["cut"] for stage in stages] == [""]
    assert found.cost.macs <= 0.5 * found.original.macs


def test_streams_that_cross_cuts_are_nothing_but_sums_of_narrow_branches():
    """Untied, with the parameter-free shortcut: what is found can be cut and still has the stream whole."""
    model, images, graph = zoo_net("option_a_residual")
    given = Net(model, untie(model, graph), staged().batches)
    found = run(given, quick(1, widths=Widths((0.4, 0.7)), depths=None), budget="macs=35%")
    made = cut(model, given.graph, found.architecture)
    with torch.no_grad():
        assert made.model(images).shape == model(images).shape
    narrow = [
        axis for axis in given.graph.prunable if axis.residual_axis and axis.size > found.architecture.widths[axis.name]
    ]
    assert narrow
    assert CostModel(given.graph).cost(found.architecture).macs <= 0.35 * found.original.macs


@each_graph
def test_the_same_seed_finds_the_same_whatever_ran_before(untied):
    one = run(staged(untied=untied), quick(), seed=3)
    torch.manual_seed(99)
    torch.rand(7)
    other = run(staged(untied=untied), quick(1), seed=8)
    assert_same(one, run(staged(untied=untied), quick(), seed=3))
    assert one.weights is not None
    assert other.weights is not None
    assert any(not torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def test_every_width_keeps_the_most_important_channels():
    given = staged()
    found = run(given, quick(1, importance=L1()))
    scores = L1().scores(ScoringInputs(given.model, given.graph))
    for name, kept in found.architecture.kept:
        assert sorted(np.argsort(-scores[name], kind="stable")[: len(kept)].tolist()) == list(kept)


@each_graph
def test_searched_weights_are_those_of_the_training_with_norms_of_their_own(untied):
    given = staged(untied=untied)
    found = run(given, quick())
    assert found.weights is not None
    trained = copy.deepcopy(given.model)
    trained.load_state_dict(dict(found.weights), strict=True)
    assert not torch.equal(trained[0].weight, given.model[0].weight)
    wanted = recalibrated(trained, [images for images, _ in given.batches])
    for name, tensor in wanted.named_buffers():
        torch.testing.assert_close(found.weights[name], tensor, rtol=1e-4, atol=1e-5)


def test_original_weights_and_no_epochs():
    """Nothing is trained then, but candidates are judged all the same."""
    seen = Recorder()
    found = run(staged(), quick(0, student_weights=OriginalWeights()), callbacks=seen)
    assert found.weights is None
    assert found.notes["training"] == []
    assert found.notes["fairness"] == 1
    assert [opened["what"] for opened in seen.opened] == ["judge"]


def test_it_begins_with_new_weights_if_told_to():
    given = staged()
    before = copy.deepcopy(given.model.state_dict())
    found = {begin: run(given, quick(1, init=begin), seed=1) for begin in (RandomInit(), quick().init)}
    assert all(torch.equal(before[name], tensor) for name, tensor in given.model.state_dict().items())
    far, near = (
        float((weights["3.conv1.weight"] - before["3.conv1.weight"]).norm())
        for weights in (f.weights for f in found.values())
        if weights is not None
    )
    assert far > 2 * near


def test_evolution_combines_too_and_never_better_than_exactly(tmp_path):
    """The same candidates: how they are combined, and where they are judged, may change when a search goes on."""
    exact = run(staged(), quick(1), folder=tmp_path)
    seen = Recorder()
    strategy = quick(1, combination=Evolution(population=20, generations=10))
    evolved = run(staged(), strategy, folder=tmp_path, callbacks=seen)
    assert seen.opened == []
    assert evolved.cost.macs <= 0.5 * evolved.original.macs
    assert evolved.notes["loss"] >= exact.notes["loss"] - 1e-12  # type: ignore[operator]
    assert_same(evolved, run(staged(), strategy, folder=tmp_path))


# --- what it refuses --------------------------------------------------------------------------------------------------


def test_a_budget_out_of_reach_is_refused_before_anything_is_trained():
    given, seen = staged(), Recorder()
    least = quick().least(problem_of(given.model, given.graph))
    part = 100 * least.macs / CostModel(given.graph).original.macs
    message = rf"`budget` must be within reach; got macs<=.* Reachable: macs .* \({part:.1f} %\) to "
    with pytest.raises(BudgetError, match=message):
        run(given, quick(), budget=f"macs={least.macs - 1}", callbacks=seen)
    assert seen.opened == []
    assert run(given, quick(0), budget=f"macs={least.macs}").cost == least


def split_of(labels: torch.Tensor) -> MemorySplit:
    images = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
    return MemorySplit(images, labels, Normalization.default(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": replace(noise(), train=split_of(torch.zeros(20, dtype=torch.int64)))}, "got 1 in one of them"),
        ({"data": replace(noise(), train=split_of(torch.tensor([1])))}, r"got 0 in one of them \(1 images of 1"),
        ({"data": replace(noise(), train=Blobs(32))}, "`data.train` must have `labels` and `subset"),
        ({"batches": ()}, "`batches` must hold training images for SupernetWeights"),
        (
            {"batches": (), "strategy": quick(student_weights=OriginalWeights())},
            "`batches` must hold training images for SWP",
        ),
    ],
    ids=["one class", "one image", "no labels", "no batches", "no batches to judge with"],
)
def test_data_that_is_not_enough_is_refused_before_anything_is_trained(settings, message):
    seen = Recorder()
    with pytest.raises(DataError, match=message):
        run(staged(), **{"strategy": quick(), "callbacks": seen, **settings})
    assert seen.opened == []


def test_no_data_is_refused():
    given = staged()
    with pytest.raises(DataError, match=r"`data` must hold training images for SWP; got none\. Pass data="):
        search_architecture(given.model, given.graph, quick(), budget="macs=50%", batches=given.batches)


@pytest.mark.parametrize(("n", "count"), [(40, 10), (41, 7), (12, 100), (9, 3)])
def test_images_held_out_are_of_each_class_its_share(n, count):
    labels = torch.arange(n) % 4 % 3  # Class 0 is twice as frequent.
    images = torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    split = MemorySplit(images, labels, Normalization(mean=(0.0,) * 3, std=(1.0,) * 3))
    numbers = []
    for part in set_aside(split, count, seed=1):
        ((pixels, found),) = part.batches(1000, device=torch.device("cpu"))
        numbers.append((pixels[:, 0, 0, 0] * 255).round().long())
        assert torch.equal(labels[numbers[-1]], found)
    assert sorted(torch.cat(numbers).tolist()) == list(range(n))
    aside = min(count, n // 2)
    assert len(numbers[1]) == aside
    share = torch.bincount(labels, minlength=3) * aside / n
    assert bool(((torch.bincount(labels[numbers[1]], minlength=3) - share).abs() < 1).all())


def test_it_is_told_in_the_same_words_by_every_process():
    """No addresses: a checkpoint is recognized by them."""
    text = stable_repr(SWP(importance=L2()))
    assert text == stable_repr(SWP(importance=L2()))
    assert "0x" not in text
    words = ("SWP(", "Widths(", "SandwichSampler(random=2)", "InPlace()", "ExactKnapsack()", "L2()")
    assert all(word in text for word in words)
    assert SWP().trains


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_it_compresses_a_model_to_an_artifact(tmp_path):
    given = staged()
    done = run_compress(
        given.model, noise(), budget="macs=60%", strategy=quick(1, combination=ExactKnapsack()),
        train=TrainConfig(epochs=0), out=tmp_path / "out", export=(), callbacks=Silent(), seed=3,
    )  # fmt: skip
    loaded = secateur.load(tmp_path / "out", factory=lambda: copy.deepcopy(given.model))
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.model.eval()(images), done.model.eval()(images))
    assert sum(p.numel() for p in loaded.model.parameters()) < sum(p.numel() for p in given.model.parameters())
    assert not (tmp_path / "out.work").exists()
