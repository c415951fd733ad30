"""A bound on latency is met by measuring, on a machine whose times are known exactly."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from noise_images import noise_data
from pretend import Pretend
from run_pipeline import run_compress
from torch import Tensor, nn
from zoo import ZOO

from secateur.architecture import Architecture
from secateur.cost import Budget, LatencyCache, LatencyRecord, LayerShape, Quartiles
from secateur.cost.budget import limits_latency
from secateur.errors import BudgetError
from secateur.graph import trace
from secateur.pipeline import (
    DEFAULT_STRATEGY,
    CompressResult,
    OnExisting,
    default_blocks,
)
from secateur.pipeline import (
    finalize as _deliver,
)
from secateur.pipeline import (
    finalize as _slow,
)
from secateur.pipeline.config import default_strategy
from secateur.search import (
    L2,
    Knapsack,
    Proposal,
    RemoveBlocks,
    SearchContext,
    SearchResult,
    SearchSpace,
    Uniform,
    search_architecture,
    stable_repr,
)
from secateur.search import latency as _timed
from secateur.train import Silent, TrainConfig

TIMED = Budget(latency="50%")


def _model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 96, 3, padding=1), nn.ReLU(),
            nn.Conv2d(96, 64, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4),
        )  # fmt: skip


def _up(width: int) -> int:
    """Kernels for vectors of 16 channels."""
    return -(-width // 16) * 16


def layer(shape: LayerShape) -> float:
    return 1e-6 + 1e-8 * _up(shape.out) * shape.read


def whole(model: nn.Module, inputs: Sequence[Tensor]) -> float:
    """Wide layers are slower in a net than alone, and a pass costs a tenth of a millisecond."""
    del inputs
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return 1e-4 + sum(
        1e-6 + (1.2 + m.weight.shape[1] / 200) * 1e-8 * _up(len(m.weight)) * m.weight.shape[1] for m in layers
    )


@pytest.fixture(autouse=True)
def _no_other_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the pretended machine counts here; what real runtimes take is measured elsewhere."""
    monkeypatch.setattr(_deliver, "latency_between", lambda *_: ((), ()))
    monkeypatch.setattr(_deliver, "both_files", lambda *_: ())


def run(folder: Path, budget: str, **more: object) -> tuple[CompressResult, list[str]]:
    target, told = Pretend(whole, layer), list[str]()
    arguments = {
        "budget": budget,
        "strategy": Uniform(L2()),
        "space": SearchSpace(divisor=8),
        "train": TrainConfig(epochs=0),
        "target": target,
        "latency_cache": LatencyCache.of(target, folder),
        "calibration_images": 32,
        "callbacks": Silent(),
        "hear": told.append,
        **more,
    }
    return run_compress(_model(), noise_data(), **arguments), told


@pytest.mark.parametrize("budget", ["latency=60%", "latency=0.14ms", "macs=90%, latency=45%, size<=300kB"])
def test_a_bound_is_met_by_measuring(tmp_path: Path, budget: str) -> None:
    result, told = run(tmp_path, budget, space=SearchSpace())
    before, after = whole(_model(), ()), whole(result.model, ())
    limit = _timed.limit_of(Budget.parse(budget), before)
    assert 0.8 * limit <= after <= limit
    assert (result.search.original.latency_s, result.search.cost.latency_s) == pytest.approx((before, after))
    assert str(result.search.budget) == str(Budget.parse(budget))
    assert not result.failed
    proof = next(check for check in result.report.checks if check.name.startswith("Latency within"))
    assert f"{100 * after / limit:.1f} % of the bound" in proof.detail
    first = result.report.latency[0]
    assert (first.runtime, first.after[1]) == ("pretend 1", pytest.approx(after))
    notes = result.search.notes["latency"]
    assert notes["target"] == "pretend 1, 1 thread, batch 1"
    assert len({trial["divisor"] for trial in notes["trials"]}) > 1
    assert any("of the bound" in line for line in told)


def test_predictions_are_corrected_by_what_was_measured(tmp_path: Path) -> None:
    result, _ = run(tmp_path, "latency=50%", space=SearchSpace(divisor=8, min_kept_fraction=0.1))
    trials = result.search.notes["latency"]["trials"]
    limit = 0.5 * whole(_model(), ())
    assert all(trial["divisor"] == 8 for trial in trials)
    assert trials[-1]["measured_s"] == pytest.approx(result.search.cost.latency_s)
    assert trials[-1]["measured_s"] <= limit
    assert trials[-1]["of_the_bound"] == pytest.approx(trials[-1]["measured_s"] / limit)


def test_blocks_may_go_where_time_is_limited() -> None:
    assert default_strategy(Budget.parse("macs=50%")) == DEFAULT_STRATEGY
    timed = RemoveBlocks(Knapsack(), max_fraction=default_blocks(TIMED))
    assert default_strategy(Budget.parse("macs=50%, latency=50%")) == timed
    assert default_blocks(TIMED) > 0


def test_a_divisor_of_the_user_is_kept(tmp_path: Path) -> None:
    result, _ = run(tmp_path, "latency=60%", space=SearchSpace(divisor=4))
    assert {trial["divisor"] for trial in result.search.notes["latency"]["trials"]} == {4}


def test_a_bound_that_cannot_be_met_names_the_reach(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"Reachable: latency [\d.]+ us \([\d.]+ %\) to"):
        run(tmp_path, "latency=3us")


def test_networks_that_are_all_slower_than_predicted_are_refused_with_what_they_took(tmp_path: Path) -> None:
    coarse = SearchSpace(divisor=32, min_kept_fraction=0.3)
    run(tmp_path, "latency=1s", space=coarse)  # What is measured for predictions is now known.
    target = Pretend(lambda model, inputs: whole(model, inputs) * (1 if len(model[3].weight) == 96 else 5), layer)
    with pytest.raises(BudgetError, match=r"quickest network that was found takes .* when measured"):
        run(tmp_path, "latency=60%", target=target, space=coarse)


def test_a_model_that_is_quick_enough_stays_whole(tmp_path: Path) -> None:
    result, _ = run(tmp_path, "latency=1s")
    assert result.search.cost.macs == result.search.original.macs


def test_an_artifact_holds_the_proof_and_is_resumed_by_the_same_target(tmp_path: Path) -> None:
    result, _ = run(tmp_path, "latency=60%", out=tmp_path / "out", export=())
    assert result.folder is not None
    text = (result.folder / "secateur.json").read_text()
    assert "Latency within the budget, measured again" in text
    assert '"latency_s"' in text
    assert "pretend 1" in (result.folder / "report.html").read_text()


def record(before: float, after: float, spread: float = 0.0) -> LatencyRecord:
    def around(middle: float) -> Quartiles:
        return Quartiles(middle * (1 - spread), middle, middle * (1 + spread))

    return LatencyRecord("x 1", 1, 1, 9, "ours", around(before), around(after), around(before / after))


def test_use_of_a_bound() -> None:
    relative, seconds = Budget(latency="50%"), Budget(latency=0.3, macs="50%")
    assert _timed.limit_of(relative, 0.8) == pytest.approx(0.4)
    assert _timed.limit_of(seconds, 0.8) == 0.3
    assert _timed.used(relative, record(0.8, 0.3)) == pytest.approx(0.75)
    assert _timed.used(seconds, record(0.8, 0.3)) == pytest.approx(1)
    assert _timed.lower_quartile_ratio(relative, record(0.8, 0.4, 0.1)) == pytest.approx(1 / 1.1)
    assert _timed.lower_quartile_ratio(seconds, record(0.8, 0.4, 0.1)) == pytest.approx(1.2)
    assert limits_latency(seconds)
    assert not limits_latency(Budget(macs="50%"))


def test_spaces_are_those_that_differ() -> None:
    graph = trace(_model().eval(), torch.zeros(1, 3, 8, 8))
    assert [space.divisor for space in _timed.spaces_of(SearchSpace(), graph)] == [8, 16, 32]
    assert [space.divisor for space in _timed.spaces_of(SearchSpace(divisor=2), graph)] == [2]
    assert [space.divisor for space in _timed.spaces_of(SearchSpace(min_width=80), graph)] == [8, 16]
    small = trace(nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)).eval(), torch.zeros(1, 3, 4, 4))
    assert _timed.spaces_of(SearchSpace(), small) == [SearchSpace()]


def test_the_nearest_of_the_fullest_is_taken(tmp_path: Path) -> None:
    found, _ = run(tmp_path, "latency=60%")

    def trial(divisor: int, used: float) -> _timed.Trial:
        return _timed.Trial(SearchSpace(divisor=divisor), found.search, 1.0, record(2.0, 1.0), used)

    trials = [trial(8, 0.8), trial(8, 0.99), trial(8, 1.1), trial(16, 0.97), trial(32, 1.2)]
    best, distances = _timed.best_of(trials, lambda each: {8: 0.3, 16: 0.2}[each.space.divisor])
    assert best is trials[3]
    assert distances == {8: 0.3, 16: 0.2}
    alone, distances = _timed.best_of(trials[:3], lambda _: pytest.fail("there is no choice"))
    assert alone is trials[1]
    assert distances == {}
    with pytest.raises(BudgetError, match=r"takes 1 s when measured, 110\.0 % of the bound"):
        _timed.best_of(trials[2:3], lambda _: 0.0)


@given(power=st.floats(0.4, 2.5), start=st.floats(0.3, 3.0))
def test_what_is_allowed_next_follows_a_power_of_the_prediction(power: float, start: float) -> None:
    aim = 0.98

    def after(predicted: float) -> SimpleNamespace:
        return SimpleNamespace(predicted=predicted, used=aim * predicted**power)

    one = [after(start)]
    assert _timed._allowed(one, aim) == pytest.approx(start ** (1 - power))
    both = [after(start), after(0.5 * start), after(0.9 / start), after(1.2 / start)]
    if min(trial.used for trial in both) < aim <= max(trial.used for trial in both):
        assert _timed._allowed(both, aim) == pytest.approx(1.0)


def test_noise_that_turns_two_trials_round_is_borne() -> None:
    trials = [SimpleNamespace(predicted=2.0, used=0.9), SimpleNamespace(predicted=1.9, used=1.02)]
    assert _timed._allowed(trials, 0.98) == pytest.approx(1.9 * 0.98 / 1.02)


def test_a_network_whose_time_falls_faster_than_predicted_is_found_in_three_trials(tmp_path: Path) -> None:
    full = whole(_model(), ())
    steep = Pretend(lambda model, inputs: 1e-4 * (whole(model, inputs) / full) ** 2, layer)
    fine = SearchSpace(divisor=2, min_kept_fraction=0.05)
    result, _ = run(tmp_path, "latency=30%", target=steep, latency_cache=LatencyCache.of(steep, tmp_path), space=fine)
    trials = result.search.notes["latency"]["trials"]
    assert len(trials) <= 3
    assert 0.955 <= trials[-1]["of_the_bound"] <= 1


@dataclasses.dataclass(frozen=True)
class Near(Uniform):
    """Says that it was asked again; out of reach if it shall be."""

    lost: bool = False
    asked: list[str] = dataclasses.field(default_factory=list)

    def again(self, found: Architecture) -> Uniform:
        return dataclasses.replace(self, asked=[*self.asked, "again"])

    def find(self, problem: SearchContext) -> Proposal:
        if self.asked and self.lost:
            raise BudgetError("`blocks` must be others.")
        proposal = super().find(problem)
        return dataclasses.replace(proposal, notes={"first" if not self.asked else "near": True})


@pytest.mark.parametrize("lost", [False, True])
def test_later_trials_stay_near_to_the_first_where_they_can(tmp_path: Path, lost: bool) -> None:
    full = whole(_model(), ())
    steep = Pretend(lambda model, inputs: 1e-4 * (whole(model, inputs) / full) ** 2, layer)
    fine = SearchSpace(divisor=2, min_kept_fraction=0.05)
    strategy = Near(L2(), lost)
    result, _ = run(
        tmp_path,
        "latency=30%",
        strategy=strategy,
        target=steep,
        latency_cache=LatencyCache.of(steep, tmp_path),
        space=fine,
    )
    assert result.search.cost.latency_s <= 0.3 * result.search.original.latency_s
    assert len(result.search.notes["latency"]["trials"]) > 1
    assert result.search.notes["first"]
    assert ("near" in result.search.notes) is not lost
    assert result.search.strategy == stable_repr(strategy)


def test_a_slow_network_is_told_why(tmp_path: Path) -> None:
    found, _ = run(tmp_path, "latency=60%")

    def at(macs: float, **changed: object) -> SearchResult:
        original = dataclasses.replace(found.search.original, macs=1000)
        cost = dataclasses.replace(found.search.cost, macs=round(1000 * macs))
        return dataclasses.replace(found.search, **{"cost": cost, "original": original, **changed})

    assert _slow.slow_because(at(0.5), record(1.0, 0.6)) == ()
    assert _slow.slow_because(at(0.95), record(1.0, 1.0)) == ()
    (said,) = _slow.slow_because(at(0.5), record(1.0, 0.9))
    assert said.startswith("The MACs fell by 50 %, the time on x 1 by 10 % only (1 thread, batch 1).")
    assert "not spent in convolutions" in said
    odd = Architecture.of({name: range(width - 1) for name, width in found.architecture.widths.items()})
    assert "3 of 3 widths are no multiple of 8" in _slow.slow_because(at(0.5, architecture=odd), record(1.0, 0.9))[0]
    assert "layers are so small" in _slow.slow_because(at(0.5, notes={}), record(1.0, 0.9))[0]


def test_a_strategy_that_trains_searches_with_one_divisor_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    places: list[object] = []

    @dataclasses.dataclass(frozen=True)
    class Trained(Uniform):
        @property
        def trains(self) -> bool:
            return True

        def find(self, problem):
            places.append((problem.run.folder, problem.space.divisor))
            return super().find(problem)

    assert RemoveBlocks(Trained()).trains
    assert not RemoveBlocks(Uniform()).trains
    result, _ = run(tmp_path, "latency=50%", strategy=Trained(L2()), space=SearchSpace())
    assert len(set(places)) == 1
    assert places[0][0] is not None
    assert result.search.cost.latency_s <= 0.5 * result.search.original.latency_s


class Interrupted:
    """Times layers and passes until there were so many, then ends like Ctrl-C does."""

    def __init__(self, layers: int, passes: int) -> None:
        self.layers, self.passes = layers, passes

    def layer(self, shape: LayerShape) -> float:
        self.layers -= 1
        if self.layers < 0:
            raise KeyboardInterrupt
        return layer(shape)

    def whole(self, model: nn.Module, inputs: Sequence[Tensor]) -> float:
        self.passes -= 1
        if self.passes < 0:
            raise KeyboardInterrupt
        return whole(model, inputs)


@pytest.mark.long
@pytest.mark.parametrize(("layers", "passes"), [(30, 99), (10**6, 3), pytest.param(10**6, 8, marks=pytest.mark.slow)])
def test_what_was_measured_until_an_interrupt_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int, passes: int
) -> None:
    monkeypatch.setattr(_timed, "_KEEP_S", -1.0)
    settings = {"space": SearchSpace(), "out": tmp_path / "out", "export": ()}
    uncut, _ = run(tmp_path / "a", "latency=60%", **{**settings, "out": None})
    dying = Interrupted(layers, passes)
    first = Pretend(dying.whole, dying.layer)
    # No cache of the machine: it is the run's own folder that remembers.
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", "latency=60%", target=first, latency_cache=LatencyCache(tmp_path / "b.json"), **settings)
    kept = _timed.Measurements.at(tmp_path / "out.work" / "measured.json")
    assert len(kept.seconds) >= min(layers - 1, 30)
    again = Pretend(whole, layer)
    resumed, _ = run(
        tmp_path / "c", "latency=60%", target=again, latency_cache=LatencyCache(tmp_path / "c.json"),
        on_existing=OnExisting.RESUME, **settings,
    )  # fmt: skip
    assert resumed.architecture == uncut.architecture
    assert not (set(map(repr, again.timed)) & kept.seconds.keys())
    assert not (tmp_path / "out.work").exists()


def test_a_bound_out_of_reach_leaves_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(BudgetError):
        run(tmp_path, "latency=3us", out=tmp_path / "out", export=())
    assert not list(tmp_path.glob("out*"))


def test_a_search_says_how_far_it_is(tmp_path: Path) -> None:
    said: list[tuple[float, str]] = []
    model, target = _model().eval(), Pretend(whole, layer)
    images = torch.rand(32, 3, 8, 8)
    search_architecture(
        model,
        trace(model, images[:2]),
        _timed.WithinLatency(Uniform(L2()), target, LatencyCache.of(target, tmp_path)),
        budget="latency=60%",
        batches=[(images, torch.arange(32) % 4)],
        progress=lambda fraction, what: said.append((fraction, what)),
    )
    fractions = [fraction for fraction, _ in said]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] < fractions[-1] <= 1
    words = " ".join(what for _, what in said)
    for step in ("timing layer 1 of", "whole models", "with divisor 8", "with divisor 32", "comparing divisors"):
        assert step in words


def test_fresh_weights_under_a_loose_bound_are_written(tmp_path: Path) -> None:
    """Without one block all channels fit: the knapsack's threshold is then minus infinity."""
    model = nn.Sequential(ZOO["residual"]()[0], nn.Linear(5, 4))

    def by_layers(net: nn.Module, inputs: Sequence[Tensor]) -> float:
        del inputs
        return 1e-5 + 1e-4 * sum(isinstance(module, nn.Conv2d) for module in net.modules())

    result = run_compress(
        model, noise_data(), budget="latency=95%", strategy=RemoveBlocks(max_fraction=1.0, images=16),
        train=TrainConfig(epochs=0), target=Pretend(by_layers, lambda _: 1e-4), calibration_images=16,
        latency_cache=LatencyCache(tmp_path / "c.json"), callbacks=Silent(), out=tmp_path / "out", export=(),
    )  # fmt: skip
    assert result.architecture.removed_blocks
    text = (tmp_path / "out" / "secateur.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
