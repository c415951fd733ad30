"""The fastest of the networks that are near the best is taken, on a machine whose times are known exactly."""

import contextlib
import itertools
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from pretend import Pretend
from torch import Tensor, nn
from zoo import ZOO

from secateur._arrays import FloatArray
from secateur.architecture import Architecture
from secateur.cost import Budget, Cost, LatencyRecord, Quartiles
from secateur.errors import ArtifactError, BudgetError, DataError, ExportError
from secateur.graph import trace
from secateur.search import (
    L2,
    Candidate,
    CandidateRecords,
    Fastest,
    Importance,
    Knapsack,
    PCASlimming,
    ScoringInputs,
    SearchResult,
    SearchSpace,
    Strategy,
    Uniform,
    candidates,
    repaired,
    search_architecture,
)


def seconds(model: nn.Module, inputs: Sequence[Tensor]) -> float:
    """Kernels compute 8 channels at once; whatever else a layer costs is the same for all widths."""
    del inputs
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return sum(1e-4 + 1e-6 * (-(-len(one.weight) // 8) * 8) * one.weight.shape[1] for one in layers)


def branches() -> nn.Module:
    class Branch(nn.Module):
        def __init__(self, scale: float):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)
            with torch.no_grad():
                self.conv2.weight.mul_(scale)
                self.conv2.bias.zero_()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv2(self.conv1(x).relu())

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        parts = [Branch(scale) for scale in (1e-4, 2.0, 1e-4, 2.0, 2.0, 2.0, 2.0, 2.0)]
        return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def plain() -> nn.Module:
    widths = (3, 32, 48, 64, 48, 32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers = [
            part
            for reads, out in itertools.pairwise(widths)
            for part in (nn.Conv2d(reads, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU())
        ]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 5)).eval()


def batches(count: int = 64, seed: int = 0) -> tuple[tuple[Tensor, Tensor], ...]:
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return tuple((part, torch.zeros(len(part), dtype=torch.long)) for part in images.split(16))


def search(model: nn.Module, strategy: Strategy, budget: str = "macs=50%", **more: object) -> SearchResult:
    images = batches()
    return search_architecture(
        model, trace(model, images[0][0]), strategy, budget=budget, **{"batches": images, **more}
    )


def quick(**fields: object) -> Fastest:
    return Fastest(**{"strategies": (Knapsack(L2()), PCASlimming(), Uniform()), "target": Pretend(seconds), **fields})


def candidate(error: float, speed: float | None, divisor: int = 1, macs: float = 0.5) -> Candidate:
    def around(middle: float) -> Quartiles:
        return Quartiles(middle, middle, middle)

    record = None if speed is None else LatencyRecord("x", 1, 1, 9, "ours", around(1), around(1 / speed), around(speed))
    cost, original = Cost(round(1000 * macs), 100, 0), Cost(1000, 200, 0)
    result = SearchResult(Architecture(), cost, original, Budget(macs="50%"), "")
    return Candidate(Uniform(), SearchSpace(divisor=divisor), result, error, record)


@pytest.mark.parametrize(
    ("found", "taken"),
    [
        # The fastest within the margin of the least error.
        ([(0.10, 1.5), (0.11, 1.8), (0.13, 2.0)], 1),
        # One that does not pay is no measure for the others, however near it is.
        ([(0.01, 1.1), (0.10, 1.5), (0.11, 1.6)], 2),
        # None pays: those that are faster at all.
        ([(0.10, 0.9), (0.20, 1.05), (0.30, 1.06)], 1),
        # None is faster.
        ([(0.10, 0.7), (0.11, 0.8), (0.20, 0.9)], 1),
        # A single one is taken, whatever it is.
        ([(9.0, 0.1)], 0),
        # Outputs that are not finite are never taken where others are.
        ([(math.inf, 3.0), (0.5, 1.5)], 1),
    ],
)
def test_the_fastest_that_is_near_the_best_is_taken(found: list[tuple[float, float]], taken: int) -> None:
    made = [candidate(error, speed) for error, speed in found]
    assert Fastest()._taken(made) is made[taken]


def test_progress_names_what_is_done_and_counts_only_what_is_finished() -> None:
    told: list[tuple[float, str]] = []
    search(plain(), quick(), progress=lambda *said: told.append(said))
    fractions, words = [fraction for fraction, _ in told], [what for _, what in told]
    assert (fractions[0], words[0]) == (0, "network 1, widths divisible by 1")
    assert fractions == sorted(fractions)
    assert 0.5 < fractions[-1] <= 0.95  # Not far from the end: as many networks are expected as there usually are.
    assert [what for what in words if what.startswith("measuring the time of 4 networks")]


def test_without_times_the_divisor_is_eight() -> None:
    made = [candidate(0.1 * divisor, None, divisor) for divisor in (1, 4, 8, 16)]
    assert Fastest()._taken(made).space.divisor == 8
    assert Fastest()._taken(made[:2]).space.divisor == 4


def test_divisors_and_strategies_are_compared_and_the_choice_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model, strategy = plain(), quick()
    with caplog.at_level(logging.INFO, "secateur"):
        found = search(model, strategy)
    rows = found.notes["candidates"]
    assert [row["divisor"] for row in rows if row["strategy"].startswith("Knapsack")] == [1, 4, 8, 16]
    # Uniform finds a network that was judged already.
    assert {row["strategy"].partition("(")[0] for row in rows} == {"Knapsack", "PCASlimming"}
    assert found.cost.macs <= 0.5 * found.original.macs
    assert {width % found.notes["divisor"] for width in found.architecture.widths.values()} == {0}
    (taken,) = (line for line in caplog.messages if line.startswith("Taken: "))
    assert f"divisor {found.notes['divisor']}" in taken
    assert "times the speed" in taken
    assert len([line for line in caplog.messages if line.startswith("Compared: ")]) == len(rows) - 1
    (note,) = candidates.describe_choice(found.notes)
    assert note.startswith(f"{len(rows)} networks were compared")
    # Knapsack with a divisor of 8 is a network that the same strategy finds alone.
    if found.strategy.startswith("Knapsack"):
        space = SearchSpace(divisor=found.notes["divisor"])
        fit = candidates.split_calibration(batches()).fit
        alone = search(model, Knapsack(L2()), space=space, batches=fit)
        assert alone.architecture == found.architecture


@pytest.mark.long
@pytest.mark.parametrize("name", ["plain", "residual", "dense", "depthwise_separable", "inception", "mlp"])
def test_the_result_is_never_worse_than_what_other_strategies_have_with_the_same_divisor(name: str) -> None:
    model, _ = ZOO[name]()
    for divisor in (1, 2):
        space = SearchSpace(divisor=divisor)
        found = search(model, quick(), "macs=60%", space=space)
        (mine,) = (row for row in found.notes["candidates"] if row["taken"])
        assert mine["macs"] == found.cost.macs
        for strategy in (Uniform(), PCASlimming()):
            alone = search(model, quick(strategies=(strategy,), fewer_blocks=()), "macs=60%", space=space)
            assert mine["error"] <= alone.notes["candidates"][0]["error"]


def test_a_divisor_of_the_user_is_kept_and_a_single_strategy_has_no_rivals() -> None:
    pinned = search(plain(), quick(), space=SearchSpace(divisor=4))
    assert {row["divisor"] for row in pinned.notes["candidates"]} == {4}
    assert len(pinned.notes["candidates"]) > 1
    alone = search(plain(), quick(strategies=(Uniform(),)))
    assert {row["strategy"].partition("(")[0] for row in alone.notes["candidates"]} == {"Uniform"}


def test_divisors_out_of_reach_are_left_out_and_an_impossible_budget_is_refused() -> None:
    found = search(plain(), quick(), "macs=12%", space=SearchSpace(min_kept_fraction=0.26))
    assert {row["divisor"] for row in found.notes["candidates"]} == {1, 4}
    with pytest.raises(BudgetError, match=r"must be within reach; got macs<=1%\. Reachable"):
        search(plain(), quick(), "macs=1%")


def test_a_model_within_the_budget_stays_whole_and_is_not_measured() -> None:
    target = Pretend(seconds)
    found = search(plain(), quick(target=target), "macs=100%")
    assert found.cost == found.original
    assert target.played == []


@pytest.mark.long
def test_blocks_that_hardly_matter_go_too() -> None:
    found = search(branches(), quick(fewer_blocks=(1 / 8, 1 / 4, 3 / 8)))
    removed = [row["removed_blocks"] for row in found.notes["candidates"]]
    assert max(removed) >= 1
    assert set(found.architecture.removed_blocks) <= {"1", "3"}
    assert found.architecture.removed_blocks
    kept = search(branches(), quick(fewer_blocks=()))
    assert not kept.architecture.removed_blocks


@dataclass(frozen=True, eq=False)
class Spy(Importance):
    """Remembers the images it was asked to score."""

    seen: list[Tensor] = field(default_factory=list)

    def scores(self, inputs: ScoringInputs) -> dict[str, FloatArray]:
        self.seen.extend(images for images, _ in inputs.batches)
        return L2().scores(inputs)


def test_the_images_that_judge_neither_score_nor_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[Tensor] = []
    judged: list[Tensor] = []
    real_cut, real_distance = repaired.cut, repaired.OutputDistance

    def cut(*args: object, calibration: Sequence[Tensor], **more: object) -> object:
        fitted.extend(calibration)
        return real_cut(*args, calibration=calibration, **more)

    def distance(model: nn.Module, images: Sequence[Tensor]) -> object:
        judged.extend(images)
        return real_distance(model, images)

    monkeypatch.setattr(repaired, "cut", cut)
    monkeypatch.setattr(repaired, "OutputDistance", distance)

    def rows(parts: Sequence[Tensor]) -> set[bytes]:
        return {image.numpy().tobytes() for part in parts for image in part}

    spy = Spy()
    search(plain(), quick(strategies=(Knapsack(spy),)))
    assert len(spy.seen) == 3  # Scores do not depend on the divisor.
    assert len(rows(judged)) >= 16
    assert not rows(judged) & (rows(fitted) | rows(spy.seen))
    for parts in (spy.seen, fitted, judged):
        parts.clear()
    held_out = tuple(images for images, _ in batches(32, seed=9))
    search(plain(), quick(strategies=(Knapsack(spy),), held_out=held_out))
    assert rows(judged) == rows(held_out)
    assert rows(spy.seen) == rows([images for images, _ in batches()])


def test_a_search_that_goes_on_decides_the_same_and_measures_nothing_again(tmp_path: Path) -> None:
    file = tmp_path / "choice.json"
    first = search(plain(), quick(records=CandidateRecords.at(file)))
    contrary = Pretend(lambda model, inputs: 1 / seconds(model, inputs))
    again = search(plain(), quick(records=CandidateRecords.at(file), target=contrary))
    assert again.architecture == first.architecture
    assert again.notes == first.notes
    assert contrary.played == []


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_a_search_that_was_interrupted_ends_as_it_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    whole = search(plain(), quick())
    file, calls, real = tmp_path / "choice.json", [], repaired.cut

    def cut(*args: object, **more: object) -> object:
        calls.append(1)
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        return real(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(repaired, "cut", cut)
        with pytest.raises(KeyboardInterrupt):
            search(plain(), quick(records=CandidateRecords.at(file)))
    known = len(json.loads(file.read_text())["errors"]) if file.exists() else 0
    assert known == stop_after - 1
    assert search(plain(), quick(records=CandidateRecords.at(file))).architecture == whole.architecture


def test_damaged_records_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "choice.json"
    file.write_text('{"errors": 3}')
    with pytest.raises(ArtifactError, match=r"choice\.json.*Begin again with --restart"):
        CandidateRecords.at(file)


@dataclass(frozen=True)
class Absent(Pretend):
    """A runtime that is not there."""

    error: type[Exception] = ExportError

    @contextlib.contextmanager
    def opened(self, model: nn.Module, inputs: tuple[Tensor, ...]):
        raise self.error("it is not installed")
        yield


@pytest.mark.parametrize("error", [ExportError, ImportError, RuntimeError])
def test_a_runtime_that_cannot_run_the_model_is_replaced_by_pytorch(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    monkeypatch.setattr(candidates, "_ROUNDS", 3)
    with caplog.at_level(logging.INFO, "secateur"):
        found = search(plain(), quick(target=Absent(error=error)))
    assert any("by their time in PyTorch, because of Absent: it is not installed" in line for line in caplog.messages)
    assert all("torch" in row["runtime"] for row in found.notes["candidates"] if row["runtime"])


def test_where_nothing_can_be_timed_the_divisor_is_eight_by_rule(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "TorchEager", lambda *_: Absent())
    with caplog.at_level(logging.INFO, "secateur"):
        found = search(branches(), quick(target=Absent(error=ImportError)))
    assert found.notes["divisor"] == 8
    assert not found.architecture.removed_blocks
    assert any("the divisor is 8 by rule" in line for line in caplog.messages)


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(BudgetError, match="`strategies` must be at least one strategy"):
        Fastest(())
    with pytest.raises(BudgetError, match=r"`margin` must be at least 1.*got 0\.5"):
        Fastest(margin=0.5)
    with pytest.raises(DataError, match="`batches` must hold images to compare networks on"):
        search(plain(), quick(), batches=())


def test_models_of_several_inputs_are_compared() -> None:
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.middle = nn.Conv2d(3, 32, 3), nn.Conv2d(3, 32, 3), nn.Conv2d(32, 48, 3)
            self.out = nn.Conv2d(48, 4, 1)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            middle = self.middle(self.left(x).relu() + self.right(y))
            return {"sum": self.out(middle.relu()), "mean": middle.mean((1, 2, 3))}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Two().eval()
    pairs = tuple(((images, images.flip(0)), labels) for images, labels in batches())
    found = search_architecture(model, trace(model, pairs[0][0]), quick(), budget="macs=50%", batches=pairs)
    assert found.cost.macs <= 0.5 * found.original.macs
    assert len(found.notes["candidates"]) > 1


def test_descriptions_do_not_depend_on_what_was_measured(tmp_path: Path) -> None:
    plainly = quick(target=Pretend())
    kept = replace(plainly, records=CandidateRecords(tmp_path / "x"), held_out=(torch.zeros(1),))
    assert plainly == replace(kept, target=plainly.target)
