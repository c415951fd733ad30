"""TAS from end to end on a tiny net and tiny images: what it finds, what it leaves alone, what it refuses."""

import copy
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from poisoned import Exploding, poisoned
from small_runs import Blobs
from tas_runs import Interrupted, Net, Recorder, Stopped, net, noise, quick, run
from torch import Tensor, nn

from secateur.cost import Budget, CostModel
from secateur.data import MemorySplit, Normalization
from secateur.errors import BudgetError, DataError, TrainingError
from secateur.graph import ChannelGraph, trace
from secateur.nas import (
    TAS,
    AlphaOptimizer,
    CosineTemperature,
    Depths,
    Interpolate,
    OriginalWeights,
    SupernetWeights,
    Widths,
)
from secateur.nas.common import split_in_half
from secateur.prune import cut
from secateur.search import (
    L1,
    L2,
    AxisRule,
    Reconstruction,
    ScoringInputs,
    SearchContext,
    SearchResult,
    SearchSpace,
    search_architecture,
    stable_repr,
)
from secateur.train import AdamW, Precision

SEARCHES = {
    "widths": {"depths": None},
    "depths": {"widths": None},
    "both": {},
    "interpolated": {"expansion": Interpolate(), "temperature": CosineTemperature()},
}


def without_seconds(found: SearchResult) -> object:
    return [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in found.notes["search"]]  # type: ignore[attr-defined]


def assert_same(one: SearchResult, other: SearchResult) -> None:
    """Bit by bit, but for the time it took."""
    assert one.architecture == other.architecture
    assert one.weights is not None
    assert other.weights is not None
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    assert without_seconds(one) == without_seconds(other)


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("budget", ["macs=50%", "params=60%", "macs=70%, params=45%"])
@pytest.mark.parametrize("search", ["widths", "both", "interpolated"])
def test_it_ends_within_three_percent_under_the_budget(search, budget, untied):
    given = net(untied=untied)
    found = run(given, quick(**SEARCHES[search]), budget=budget)
    full = max(found.notes["utilization"].values())  # type: ignore[attr-defined]
    assert 0.97 <= full <= 1
    made = cut(given.model, given.graph, found.architecture)
    assert made.architecture == found.architecture
    assert CostModel(given.graph).cost(found.architecture) == found.cost


def test_depths_alone_leave_all_axes_whole():
    given = net(blocks=4)
    found = run(given, quick(widths=None), budget="macs=60%")
    assert found.architecture.removed_blocks
    assert found.architecture.widths == dict(given.graph.sizes)
    names = [block.name for block in given.graph.chains[0]]
    kept = [name not in found.architecture.removed_blocks for name in names]
    assert kept == sorted(kept, reverse=True)


def test_depths_of_a_net_without_prunable_axes():
    given = net()
    frozen = given.graph.with_frozen({axis.name: "it shall stay" for axis in given.graph.prunable})
    found = run(Net(given.model, frozen, given.batches), quick(widths=None), budget="macs=60%")
    assert found.architecture.removed_blocks
    assert found.architecture.kept == ()


def test_widths_alone_leave_all_blocks():
    assert run(net(), quick(depths=None)).architecture.removed_blocks == ()


@pytest.mark.parametrize("search", ["both", "interpolated"])
def test_the_same_seed_finds_the_same(search):
    one, other = (run(net(), quick(**SEARCHES[search]), seed=3) for _ in range(2))
    assert_same(one, other)


def test_another_seed_learns_other_weights():
    one, other = (run(net(), quick(), seed=seed) for seed in (0, 1))
    assert one.weights is not None
    assert any(not torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def test_nothing_of_the_callers_is_changed():
    given = net()
    given.model.train()
    given.model[1].eval()
    given.model[0].weight.requires_grad = False
    before = {name: tensor.clone() for name, tensor in given.model.state_dict().items()}
    modes = [module.training for module in given.model.modules()]
    state, rng = torch.get_rng_state(), np.random.get_state()[1].copy()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            run(given, quick(1))
    assert all(torch.equal(before[name], tensor) for name, tensor in given.model.state_dict().items())
    assert modes == [module.training for module in given.model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(rng, np.random.get_state()[1])
    assert all(parameter.grad is None for parameter in given.model.parameters())
    assert [parameter.requires_grad for parameter in given.model.parameters()].count(False) == 1


def test_searches_do_not_depend_on_what_ran_before():
    one = run(net(), quick(), seed=3)
    torch.manual_seed(99)
    torch.rand(7)
    run(net(), quick(1), seed=8)
    assert_same(one, run(net(), quick(), seed=3))


def test_frozen_weights_are_not_trained():
    given = net()
    given.model[0].weight.requires_grad = False
    found = run(given, quick())
    assert found.weights is not None
    assert torch.equal(found.weights["0.weight"], given.model[0].weight)
    assert not torch.equal(found.weights["3.conv1.weight"], given.model[3].conv1.weight)


def test_every_width_keeps_the_most_important_channels():
    given = net()
    found = run(given, quick(importance=L1()))
    scores = L1().scores(ScoringInputs(given.model, given.graph))
    for name, kept in found.architecture.kept:
        best = np.argsort(-scores[name], kind="stable")[: len(kept)]
        assert sorted(best.tolist()) == list(kept)


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_searched_weights_are_the_supernet_in_the_models_own_order(untied):
    """They load strictly; the whole model with them computes what the supernet does, calibrated on the batches."""
    supernets = []

    @dataclass(frozen=True)
    class Kept(SupernetWeights):
        def of(self, supernet: Any, calibration: Any, problem: Any) -> Any:
            supernets.append(supernet)
            return super().of(supernet, calibration, problem)

    given = net(untied=untied)
    found = run(given, quick(student_weights=Kept()))
    assert found.weights is not None
    trained = copy.deepcopy(given.model)
    trained.load_state_dict(dict(found.weights), strict=True)
    supernet = supernets[0].eval()
    assert any(not np.array_equal(order, np.arange(len(order))) for order in supernet.order.values())
    images = torch.cat([images for images, _ in given.batches])
    with torch.no_grad():
        torch.testing.assert_close(trained.eval()(images), supernet(supernet.full, images), rtol=1e-4, atol=1e-5)
        # The statistics of the first norm are those of its input on the batches: means of means, unbiased variances.
        features = [trained[0](batch) for batch, _ in given.batches]
        torch.testing.assert_close(trained[1].running_mean, torch.stack([f.mean((0, 2, 3)) for f in features]).mean(0))
        variances = torch.stack([f.transpose(0, 1).flatten(1).var(1) for f in features]).mean(0)
        torch.testing.assert_close(trained[1].running_var, variances)
    assert not torch.equal(trained[0].weight, given.model[0].weight)


def test_original_weights_are_the_models_own():
    assert run(net(), quick(student_weights=OriginalWeights())).weights is None


def test_searched_weights_need_batches_for_their_norms():
    """Asked for before anything is trained."""
    seen = Recorder()
    with pytest.raises(DataError, match=r"`batches` must hold .*images.*; got none"):
        run(net(), quick(), batches=(), callbacks=seen)
    assert seen.opened == []
    assert run(net(), quick(student_weights=OriginalWeights()), batches=()).architecture


def test_what_is_found_can_be_written_as_json():
    given = net()
    found = run(given, quick(3))
    data = json.loads(json.dumps(found.to_json()))
    history = data["notes"]["search"]
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3]
    for epoch in history:
        assert epoch["widths"].keys() == dict(given.graph.sizes).keys()
        for name, (mean, likely) in epoch["widths"].items():
            assert 1 <= mean <= given.graph.sizes[name]
            assert 1 <= likely <= given.graph.sizes[name]
        (mean, likely, blocks) = epoch["depths"][given.graph.chains[0][0].name]
        assert 0 <= min(mean, likely) <= max(mean, likely) <= blocks == 3
        assert 0 <= epoch["entropy"] <= 1
        assert 0 < epoch["expected"]["macs"] <= 1
        assert 0 <= epoch["validation"] <= 1
    assert history[-1]["temperature"] == pytest.approx(0.1)
    assert data["notes"]["unsearched"] == []


def test_it_can_be_watched():
    seen = Recorder()
    found = run(net(), quick(2), callbacks=seen)
    assert seen.opened == [{"what": "search", "epochs": 2, "steps": 2, "done": 0}]
    assert [epoch for epoch, _, _ in seen.epochs] == [1, 2]
    assert {epoch for epoch, _, _ in seen.steps} == {1, 2}
    for _, step, numbers in seen.steps:
        assert 1 <= step <= 2
        assert all(np.isfinite(value) for value in numbers.values()), numbers
        assert {"loss", "macs", "entropy", "temperature"} <= numbers.keys()
    for epoch, numbers, line in seen.epochs:
        assert line.startswith(f"epoch {epoch}/2  loss ")
        assert all(np.isfinite(value) for value in numbers.values())
        expected = found.notes["search"][epoch - 1]["expected"]["macs"]  # type: ignore[index]
        assert f"macs {100 * expected:.1f} %" in line


def test_without_validation_images_or_batches_nothing_is_validated():
    data = noise()
    none = replace(data, validation=Blobs(0))  # type: ignore[arg-type]
    for settings in ({"data": none}, {"batches": ()}):
        found = run(net(), quick(1, student_weights=OriginalWeights()), **settings)
        assert found.notes["search"][0]["validation"] is None  # type: ignore[index]


def test_it_searches_in_bfloat16_and_with_another_optimizer():
    strategy = quick()
    schedule = replace(strategy.train, precision=Precision.BF16_MIXED, optimizer=AdamW(), learning_rate=0.001)
    found = run(net(), replace(strategy, train=schedule))
    assert 0.97 <= max(found.notes["utilization"].values()) <= 1  # type: ignore[attr-defined]
    assert found.weights is not None
    assert all(tensor.isfinite().all() for tensor in found.weights.values())


def test_the_cost_draws_the_choice_to_the_budget():
    """From even probabilities, by the gradient of the cost alone: the widest becomes the least likely, or the most."""
    expected = {}
    for budget in ("macs=25%", "macs=90%"):
        strategy = quick(8, depths=None, alpha_optimizer=AlphaOptimizer(0.1, weight_decay=0.0))
        history: Any = run(net(), strategy, budget=budget).notes["search"]
        expected[budget] = [epoch["expected"]["macs"] for epoch in history]
    assert expected["macs=25%"][-1] < expected["macs=25%"][0]
    assert expected["macs=90%"][-1] > expected["macs=90%"][0]


# Resuming. A process that is killed is in tests/integration/test_tas_killed.py.


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_search_goes_on_where_it_was_interrupted(epoch, tmp_path):
    """Interrupted before the checkpoint of that epoch is written: the epoch is run again."""
    whole = run(net(), quick(3), seed=2)
    with pytest.raises(Interrupted):
        run(net(), quick(3), seed=2, folder=tmp_path, callbacks=Stopped(epoch))
    seen = Recorder()
    assert_same(whole, run(net(), quick(3), seed=2, folder=tmp_path, callbacks=seen))
    assert seen.opened[0]["done"] == epoch - 1
    assert [number for number, _, _ in seen.epochs] == list(range(epoch, 4))


def test_interrupted_twice_and_in_the_middle_of_an_epoch(tmp_path):
    whole = run(net(untied=True), quick(3), seed=2)

    def stop(epoch: int, step: int) -> None:
        if epoch == 2 and step:
            raise Interrupted

    for watch in (Recorder(at_step=stop), Stopped(3)):
        with pytest.raises(Interrupted):
            run(net(untied=True), quick(3), seed=2, folder=tmp_path, callbacks=watch)
    assert_same(whole, run(net(untied=True), quick(3), seed=2, folder=tmp_path))


def test_a_finished_search_is_not_run_again(tmp_path):
    first = run(net(), quick(2), folder=tmp_path)
    seen = Recorder()
    assert_same(first, run(net(), quick(2), folder=tmp_path, callbacks=seen))
    assert seen.epochs == []


def other_batches() -> Any:
    draw = torch.Generator().manual_seed(9)
    return tuple((torch.randn(images.shape, generator=draw), labels) for images, labels in net().batches)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"budget": "macs=60%"}, "budget was macs<=50%, now macs<=60%"),
        ({"space": SearchSpace(divisor=2)}, "space was"),
        ({"strategy": quick(2, tolerance=0.1)}, "strategy was"),
        ({"strategy": quick(2, importance=L1())}, "strategy was"),
        ({"given": net(untied=True)}, "was"),
        ({"given": net(blocks=4)}, "model was"),
        ({"data": replace(noise(), train=noise().train.subset(torch.arange(40)))}, "images was 32 and 32, now"),
    ],
    ids=["seed", "budget", "space", "strategy", "importance", "untied", "model", "images"],
)
def test_a_checkpoint_of_another_search_is_refused(settings, what, tmp_path):
    run(net(), quick(2), folder=tmp_path)
    changed = {"given": net(), "strategy": quick(2), **settings}
    with pytest.raises(TrainingError, match=f"`checkpoint` must be continued with the settings it was begun.*{what}"):
        run(changed.pop("given"), changed.pop("strategy"), folder=tmp_path, **changed)


def test_a_checkpoint_with_its_channels_in_another_order_is_refused(tmp_path):
    """Scores of other batches: the weights in the checkpoint would stand at the wrong places."""
    strategy = quick(2, importance=Reconstruction())
    run(net(), strategy, folder=tmp_path)
    with pytest.raises(TrainingError, match="`checkpoint` must be continued with the settings it was begun"):
        run(net(), strategy, folder=tmp_path, batches=other_batches())


# Losses that are not finite.


@pytest.mark.parametrize(("epoch", "step"), [(1, 1), (2, 1), (3, 2)])
def test_a_loss_that_is_not_finite_stops_the_search(epoch, step, tmp_path):
    """It says when; what was good is kept, and with good images the search goes on from there."""
    message = rf"the loss \(.*nan.*\) must stay finite; that failed at epoch {epoch}, step {step} \(learning rate"
    with pytest.raises(TrainingError, match=message):
        run(net(), quick(3), data=poisoned(epoch, step), folder=tmp_path)
    seen = Recorder()
    assert_same(run(net(), quick(3)), run(net(), quick(3), folder=tmp_path, callbacks=seen))
    assert seen.opened[0]["done"] == epoch - 1


def test_weights_that_are_not_finite_leave_no_checkpoint(tmp_path):
    """The last step of an epoch spoils the weights; no loss has shown it yet."""
    given = net()
    model = nn.Sequential(*given.model, Exploding()).eval()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    strategy = quick(3)
    one_step = replace(strategy, train=replace(strategy.train, batch_size=32))
    with pytest.raises(TrainingError, match="must stay finite; that failed at epoch 1"):
        run(Net(model, graph, given.batches), one_step, folder=tmp_path)
    assert list(tmp_path.glob("epoch-*")) == []


# Bad input.


def split_of(labels: Tensor) -> MemorySplit:
    images = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
    return MemorySplit(images, labels, Normalization.default(3))


def test_no_data_is_refused():
    given = net()
    with pytest.raises(DataError, match=r"`data` must hold training images for TAS; got none\. Pass data="):
        search_architecture(given.model, given.graph, quick(), budget="macs=50%", batches=given.batches)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(20, dtype=torch.int64), r"got 1 in one of them \(20 images of 1 classes in all\)"),
        (torch.tensor([0, 0, 0, 0, 1]), r"got 1 in one of them \(5 images of 2 classes in all\)"),
        (torch.tensor([1]), r"got 1 in one of them \(1 images of 1 classes in all\)"),
    ],
    ids=["one class", "one image of a class", "one image"],
)
def test_images_that_cannot_be_halved_are_refused(labels, message):
    data = replace(noise(), train=split_of(labels))
    with pytest.raises(DataError, match=r"`data.train` must give both parts images of two classes or more; " + message):
        run(net(), quick(), data=data)


def test_images_without_labels_are_refused():
    data = replace(noise(), train=Blobs(32))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"`data.train` must have `labels` and `subset\(index\)`.*; got Blobs\. Use"):
        run(net(), quick(), data=data)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("n", [2, 3, 7, 10, 51])
def test_halves_are_disjoint_and_even_class_by_class(n, seed):
    labels = torch.arange(4 * n) % 4 if n > 3 else torch.arange(2 * n) % 2
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    first, second = split_in_half(MemorySplit(images, labels, Normalization(mean=(0.0,) * 3, std=(1.0,) * 3)), seed)
    numbers = []
    for half in (first, second):
        (pixels, found), *rest = half.batches(1000, device=torch.device("cpu"))
        assert not rest
        numbers.append((pixels[:, 0, 0, 0] * 255).round().long())
        assert torch.equal(labels[numbers[-1]], found)
        counts = torch.bincount(found)
        assert counts.max() - counts.min() <= 1
    assert sorted(torch.cat(numbers).tolist()) == list(range(len(labels)))
    assert abs(len(first) - len(second)) <= 1


def test_a_search_never_mixes_the_halves():
    """Weights and choice are taught by images that the other has never seen."""
    seen: dict[bool, set[float]] = {True: set(), False: set()}
    given = net()

    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                seen[self.scale.requires_grad].update(x.mean((1, 2, 3)).tolist())
            return x * self.scale

    model = nn.Sequential(Watching(), *given.model).eval()
    data = replace(noise(), augment=None)  # type: ignore[arg-type]
    run(Net(model, trace(model, torch.zeros(1, 3, 8, 8)), given.batches), quick(2), data=data)
    # Cuts are verified in train mode too, on the example, which is zero.
    seen[True].discard(0.0)
    assert len(seen[True]) == len(seen[False]) == 32
    assert not seen[True] & seen[False]


def test_a_budget_outside_of_the_space_is_refused_with_its_reach():
    given, seen = net(), Recorder()
    strategy = quick(depths=None, widths=Widths((0.5,)))
    least = CostModel(given.graph).of_widths(np.array([[8, 10, 10, 10]]))[0][0]
    part = 100 * least / CostModel(given.graph).original.macs
    message = rf"`budget` must be within reach; got macs<=5%\. Reachable: macs .* \({part:.1f} %\) to "
    with pytest.raises(BudgetError, match=message):
        run(given, strategy, budget="macs=5%", callbacks=seen)
    assert seen.opened == []


@pytest.mark.parametrize("fields", [{}, {"depths": None}, {"widths": None}], ids=["both", "widths", "depths"])
def test_the_least_cost_is_that_of_the_smallest_candidates(fields):
    given = net()
    strategy = quick(**fields)
    least = strategy.least(problem_of(given))
    assert run(given, strategy, budget=f"macs={least.macs}").cost.macs == least.macs
    with pytest.raises(BudgetError, match="`budget` must be within reach"):
        run(given, strategy, budget=f"macs={least.macs - 1}")


def problem_of(given: Net) -> Any:
    inputs = ScoringInputs(given.model, given.graph)
    return SearchContext(
        inputs, CostModel(given.graph), Budget.parse("macs=50%"), SearchSpace(), lambda _done, _what: None
    )


class PartlyHidden(nn.Module):
    """A convolution by hand, whose channels no module shows."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(64, 16, 3, 3) / 12)
        self.last = nn.Conv2d(64, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.conv2d(self.stem(x).relu(), self.weight, padding=1).relu()
        return self.head(self.last(x).relu().mean((2, 3)))


def hidden() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PartlyHidden().eval()
    return Net(model, trace(model, torch.zeros(1, 3, 8, 8)), net().batches)


def test_axes_that_cannot_be_searched_stay_whole_and_are_named():
    given = hidden()
    assert given.graph.sizes["weight"] == 64
    found = run(given, quick(depths=None), budget="macs=60%")
    assert found.architecture.widths["weight"] == 64
    assert found.notes["unsearched"] == ["weight"]


def test_a_budget_that_they_leave_no_room_for_is_refused_before_anything_is_trained():
    seen = Recorder()
    with pytest.raises(BudgetError, match=r"`budget` must be within reach; got macs<=25%\."):
        run(hidden(), quick(depths=None), budget="macs=25%", callbacks=seen)
    assert seen.opened == []


def test_axes_with_a_single_candidate_stay_whole():
    given = net()
    space = SearchSpace(rules=(AxisRule("3.conv1", min_kept_fraction=1.0),))
    found = run(given, quick(depths=None), space=space)
    assert found.architecture.widths["3.conv1"] == 20
    assert "3.conv1" not in found.notes["search"][0]["widths"]  # type: ignore[index]
    assert 0.97 <= max(found.notes["utilization"].values()) <= 1  # type: ignore[attr-defined]


def test_a_schedule_without_epochs_is_refused():
    with pytest.raises(BudgetError, match="`train` must have at least one epoch of search; got 0"):
        quick(0)


def test_a_tolerance_of_zero_works():
    assert 0.97 <= max(run(net(), quick(tolerance=0.0)).notes["utilization"].values()) <= 1  # type: ignore[attr-defined]


def test_strategies_are_told_in_the_same_words_by_every_process():
    """No addresses: a checkpoint is recognized by them."""
    text = stable_repr(TAS(importance=L2(), depths=Depths()))
    assert text == stable_repr(TAS(importance=L2(), depths=Depths()))
    assert "0x" not in text
    words = ("TAS(", "Widths(", "Depths(stride=2", "LinearTemperature(first=10", "ZeroPad()", "L2()")
    assert all(word in text for word in words)
    assert stable_repr(quick(tolerance=0.1)) != stable_repr(quick())


def test_the_graph_of_the_net_is_what_these_tests_take_it_for():
    graph: ChannelGraph = net().graph
    assert dict(graph.sizes) == {"0": 16, "3.conv1": 20, "4.conv1": 20, "5.conv1": 20}
    assert [[block.name for block in chain] for chain in graph.chains] == [["3", "4", "5"]]
