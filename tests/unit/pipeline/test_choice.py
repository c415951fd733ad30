"""What a run leaves open is found by measuring, said, kept for a resumed run, and can be repeated by naming it."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest
import torch
from noise_images import noise_data, noise_split
from pretend import Pretend
from run_pipeline import run_compress
from torch import Tensor, nn

import secateur
from secateur.cost import Budget, OnnxRuntime
from secateur.nas.tas import TAS
from secateur.pipeline import CompressResult, OnExisting
from secateur.pipeline.config import DEFAULT_STRATEGY, strategy_of_run
from secateur.search import L2, Fastest, Knapsack, PCASlimming, RemoveBlocks, SearchSpace, Uniform, WithinLatency
from secateur.train import Silent, TrainConfig

MACS, TIME = Budget(macs="50%"), Budget(latency="50%")
OPEN, PINNED = SearchSpace(), SearchSpace(divisor=8)


def seconds(model: nn.Module, inputs: Sequence[Tensor]) -> float:
    """Kernels compute 8 channels at once."""
    del inputs
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return sum(1e-4 + 1e-6 * (-(-len(one.weight) // 8) * 8) * one.weight.shape[1] for one in layers)


def backward(model: nn.Module, inputs: Sequence[Tensor]) -> float:
    """A machine on which narrower networks take longer."""
    return 1e-2 / sum(parameter.numel() for parameter in model.parameters()) + 0 * len(inputs)


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(),
            nn.Conv2d(48, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
        )  # fmt: skip


def run(**settings: object) -> CompressResult:
    usual = {
        "budget": "macs=50%",
        "strategy": None,
        "target": Pretend(seconds),
        "calibration_images": 64,
        "train": TrainConfig(epochs=0),
        "callbacks": Silent(),
    }
    return run_compress(model(), noise_data(noise_split(128, 0)), **{**usual, **settings})


@pytest.mark.parametrize(
    ("named", "budget", "space", "expected"),
    [
        (None, MACS, OPEN, Fastest()),
        (None, MACS, PINNED, Fastest()),
        (Uniform(), MACS, OPEN, Fastest((Uniform(),), fewer_blocks=())),
        (Uniform(), MACS, PINNED, Uniform()),
        (Fastest((Uniform(),)), MACS, PINNED, Fastest((Uniform(),))),
        (RemoveBlocks(Uniform()), MACS, OPEN, Fastest((RemoveBlocks(Uniform()),), fewer_blocks=())),
        (None, TIME, OPEN, RemoveBlocks(Knapsack(), max_fraction=1.0)),
        (Uniform(), TIME, OPEN, Uniform()),
        (WithinLatency(Uniform()), TIME, OPEN, WithinLatency(Uniform())),
    ],
)
def test_what_is_named_is_not_compared(named: object, budget: Budget, space: SearchSpace, expected: object) -> None:
    assert strategy_of_run(named, budget, space, OnnxRuntime()) == expected
    target = Pretend(threads=2)
    found = strategy_of_run(named, budget, space, target)
    assert not isinstance(found, Fastest) or found.target is target


def test_a_strategy_that_trains_trains_once() -> None:
    tas = TAS()
    assert strategy_of_run(tas, MACS, OPEN, OnnxRuntime()) is tas


@pytest.mark.long
def test_the_choice_is_in_result_report_and_log_and_can_be_repeated(tmp_path: Path) -> None:
    said: list[str] = []
    found = run(hear=said.append, out=tmp_path / "out", export=())
    rows = found.search.notes["candidates"]
    assert len(rows) > 3
    assert len([line for line in said if line.startswith(("Taken: ", "Compared: "))]) == len(rows)
    assert any(note.startswith(f"{len(rows)} networks were compared") for note in found.report.notes)
    assert "networks were compared" in (tmp_path / "out" / "report.html").read_text()
    recorded = secateur.load(tmp_path / "out", factory=model).manifest.recipe.metrics
    assert recorded["search"]["divisor"] == found.search.notes["divisor"]
    assert len(recorded["search"]["candidates"]) == len(rows)
    named = {"Knapsack": Knapsack(), "PCASlimming": PCASlimming(), "Uniform": Uniform()}
    strategy = named[found.search.strategy.partition("(")[0]]
    again = run(strategy=strategy, space=SearchSpace(divisor=found.search.notes["divisor"]))
    assert again.architecture == found.architecture
    for one, other in zip(again.model.parameters(), found.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("images", [9, 40, 64, 128])
def test_the_choice_works_with_any_number_of_images(images: int) -> None:
    found = run_compress(
        model(), noise_data(noise_split(images, 0)), budget="macs=50%", strategy=None, target=Pretend(seconds),
        train=TrainConfig(epochs=0), callbacks=Silent(),
    )  # fmt: skip
    assert found.search.cost.macs <= 0.5 * found.search.original.macs
    assert not found.failed


def test_the_latency_on_the_target_is_in_every_result() -> None:
    found = run(strategy=Uniform(L2()), space=PINNED)
    (latency,) = found.latency
    assert latency.runtime == "pretend 1"
    assert latency.before[1] == pytest.approx(seconds(model(), ()))
    assert latency.after[1] == pytest.approx(seconds(found.model, ()))
    assert f"{latency.speedup[1]:.2f} times the speed" in repr(found)


def test_slower_than_before_is_said_with_what_to_do() -> None:
    said: list[str] = []
    found = run(strategy=Uniform(L2()), space=SearchSpace(divisor=1), target=Pretend(backward), hear=said.append)
    slower = 100 * (1 / found.latency[0].speedup[1] - 1)
    (note,) = [note for note in found.report.notes if "slower than the original" in note]
    assert f"{slower:.0f} % slower than the original on pretend 1 (1 thread, batch 1)" in note
    assert "although its MACs fell by" in note
    assert "--divisor 8 or 16" in note
    assert "--budget latency=50%" in note
    assert any(note in line for line in said)


def test_a_target_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("No module named 'onnxruntime'")

    monkeypatch.setattr(import_module("secateur.pipeline.finalize"), "measure_pairs", missing)
    found = run(strategy=Uniform(L2()), space=PINNED)
    assert found.latency == ()
    assert any(note == "Latency was not measured: No module named 'onnxruntime'" for note in found.report.notes)


@pytest.mark.long
def test_a_run_that_is_stopped_while_it_chooses_ends_as_it_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run()
    repaired, calls = import_module("secateur.search.repaired"), list[int]()
    real = repaired.cut

    def cut(*args: object, **more: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **more)

    settings = {"out": tmp_path / "out", "export": ()}
    with monkeypatch.context() as patch:
        patch.setattr(repaired, "cut", cut)
        with pytest.raises(KeyboardInterrupt):
            run(**settings)
    assert (tmp_path / "out.work" / "choice.json").is_file()
    resumed = run(**settings, on_existing=OnExisting.RESUME)
    assert resumed.architecture == whole.architecture
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not (tmp_path / "out.work").exists()


@pytest.mark.long
def test_times_that_were_measured_before_the_interruption_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that has become another one meanwhile, the first measurements count."""
    whole = run()
    module = import_module("secateur.pipeline.search_and_cut")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    settings = {"out": tmp_path / "out", "export": ()}
    with monkeypatch.context() as patch:
        patch.setattr(module, "_describe", stop)
        with pytest.raises(KeyboardInterrupt):
            run(**settings)
    resumed = run(**settings, on_existing=OnExisting.RESUME, target=Pretend(backward))
    assert resumed.architecture == whole.architecture
    assert resumed.search.notes["candidates"] == whole.search.notes["candidates"]


def test_the_default_is_the_public_one() -> None:
    assert secateur.Fastest() == DEFAULT_STRATEGY
