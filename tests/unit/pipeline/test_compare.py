"""Comparisons: equal compute, failures on their own, resumed, with a page, a table and the winners' artifacts."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from torch import nn

import secateur
from secateur.errors import ArtifactError, BudgetError, KindError, SelectionError, TrainingError
from secateur.pipeline.compare import search_epochs
from secateur.search import Proposal, SearchContext, Strategy

compare_file = importlib.import_module("secateur.pipeline.compare")
CUT = secateur.CutConfig(calibration_images=64)
QUICK = secateur.RecoveryConfig(secateur.TrainConfig(epochs=1, batch_size=64))


@dataclass(frozen=True)
class Broken(Strategy):
    """A strategy that fails."""

    def find(self, context: SearchContext) -> Proposal:
        raise RuntimeError("no idea")


@pytest.fixture(scope="module")
def data() -> Any:
    return secateur.load_data("digits", limit=192)


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10),
    )  # fmt: skip


@pytest.fixture
def net() -> nn.Module:
    return small()


@pytest.fixture(autouse=True)
def _no_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_file, "latency_on", lambda *_: ((), ()))


def compared(net: nn.Module, data: Any, out: Path | None, strategies: Any = None, **others: Any):
    given = strategies or {"uniform": secateur.Uniform(), "broken": Broken()}
    settings: dict[str, Any] = {"race": secateur.Race(seeds=1), "cut": CUT, "recovery": QUICK} | others
    return secateur.compare(net, data, ["macs=60%"], given, out=out, **settings)


def test_a_failure_is_a_record_and_the_rest_goes_on(net: nn.Module, data: Any, tmp_path: Path):
    found = compared(net, data, tmp_path / "out")
    assert [run.error for run in found.runs] == ["", "RuntimeError: no idea"]
    (good, _) = found.runs
    assert good.macs <= 0.6 * found.original.macs
    assert len(good.right) == good.n == len(data.validation)
    assert good.right.count("1") / good.n == pytest.approx(good.score)
    assert [winner.strategy for winner in found.winners] == ["uniform"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.html", "records.parquet", "winners"]
    assert not (tmp_path / "out.work").exists()
    assert pq.read_table(tmp_path / "out" / "records.parquet").num_rows == 2
    (winner,) = (tmp_path / "out" / "winners").iterdir()
    assert winner in found.files
    kept = secateur.load(winner, factory=small).model[0].out_channels
    assert kept == good.widths["0"][1] < 8
    assert any("1 of 2 runs failed" in note for note in found.notes)


def test_an_interrupted_comparison_is_resumed_without_running_again(
    net: nn.Module, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    strategies = {"uniform": secateur.Uniform(), "pca": secateur.PCASlimming()}
    real, made = compare_file.compress, list[str]()

    def stopping(*args: Any, strategy: Any, **settings: Any) -> Any:
        made.append(type(strategy).__name__)
        if len(made) == 2:
            raise KeyboardInterrupt
        return real(*args, strategy=strategy, **settings)

    monkeypatch.setattr(compare_file, "compress", stopping)
    with pytest.raises(KeyboardInterrupt):
        compared(net, data, tmp_path / "out", strategies)
    with pytest.raises(ArtifactError, match="unfinished run"):
        compared(net, data, tmp_path / "out", strategies)
    resumed = secateur.RunConfig(on_existing=secateur.pipeline.OnExisting.RESUME)
    found = compared(net, data, tmp_path / "out", strategies, run=resumed)
    assert made == ["Uniform", "PCASlimming", "PCASlimming"]
    assert all(run.ok for run in found.runs)
    with pytest.raises(ArtifactError, match="new or empty"):
        compared(net, data, tmp_path / "out", strategies)


def test_search_epochs_count():
    assert search_epochs(secateur.Uniform()) == 0
    assert search_epochs(None) == 0
    assert search_epochs(secateur.TAS()) == secateur.TAS().train.epochs
    assert search_epochs(secateur.RemoveBlocks(secateur.SWP())) == secateur.SWP().train.epochs


def test_a_time_limit_ends_the_comparison(net: nn.Module, data: Any):
    strategies = {"uniform": secateur.Uniform(), "pca": secateur.PCASlimming()}
    found = compared(net, data, None, strategies, race=secateur.Race(seeds=2, seconds=0.001))
    assert len(found.runs) == 1
    assert any("The time ended after 1 of 4 runs" in note for note in found.notes)


def test_bad_input_is_refused_before_any_work(net: nn.Module, data: Any, tmp_path: Path):
    with pytest.raises(KindError, match=r"`budgets` must be a sequence, each of it of the type Budget or text"):
        secateur.compare(net, data, [None], {"a": None})
    with pytest.raises(BudgetError, match="must be a number with"):  # One budget may stand alone.
        secateur.compare(net, data, "macs=x%", {"a": None})
    with pytest.raises(BudgetError, match="at least one budget"):
        secateur.compare(net, data, [], {"a": None})
    with pytest.raises(SelectionError, match="at least one strategy"):
        secateur.compare(net, data, ["macs=50%"], {})
    with pytest.raises(TrainingError, match="`seeds` must be at least 1; got 0"):
        secateur.Race(seeds=0)
    with pytest.raises(TrainingError, match="`seconds` must be positive"):
        secateur.Race(seconds=0)
    with pytest.raises(TrainingError, match=r"`epochs` must be more than the search of tas trains, 5,.*got 1"):
        compared(net, data, None, {"tas": secateur.TAS()})
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").touch()
    with pytest.raises(ArtifactError, match=r"`out` must be new or empty; got .*taken with \['mine.txt'\]"):
        compared(net, data, tmp_path / "taken")
