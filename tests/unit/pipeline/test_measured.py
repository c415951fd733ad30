"""What a run measures, it decides by to its end: also when it is interrupted, and the machine has changed meanwhile."""

import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from noise_images import noise_data
from pretend import Pretend
from run_pipeline import run_compress
from torch import nn

from secateur.architecture import Architecture
from secateur.cost import LatencyCache, LatencyRecord, LayerShape, OnnxRuntime, Quartiles
from secateur.errors import ArtifactError, BudgetError
from secateur.export import Format
from secateur.export.onnx_config import OnnxConfig
from secateur.pipeline import CompressResult, OnExisting
from secateur.pipeline import finalize as _deliver
from secateur.search import L2, SearchSpace, Uniform
from secateur.search.latency import Measurements
from secateur.train import Silent, TrainConfig

RECORD = LatencyRecord(
    "pretend 1", 1, 2, 30, "elapsed time",
    before=Quartiles(1.0, 2.0, 3.0), after=Quartiles(0.1, 1 / 3, 0.5), speedup=Quartiles(5.0, 6.0, 7.0),
    load=(0.5, 1.25), machine={"cpu": "one", "cores": "2"},
)  # fmt: skip
ONE, OTHER = Architecture.of({"0": (0, 2)}), Architecture.of({"0": (0, 3)})


def never() -> LatencyRecord:
    raise AssertionError("measured twice")


def test_what_was_measured_is_read_again_to_the_last_bit(tmp_path: Path) -> None:
    kept = Measurements.at(tmp_path / "measured.json")
    assert (kept.seconds, kept.pairs) == ({}, {})
    kept.keep({"a layer": 1 / 3})
    assert kept.pair(ONE, lambda: RECORD) == RECORD
    assert kept.pair(ONE, never) == RECORD
    again = Measurements.at(tmp_path / "measured.json")
    assert (again.seconds, again.pairs) == (kept.seconds, kept.pairs)
    assert again.pair(ONE, never) == RECORD
    with pytest.raises(AssertionError, match="twice"):
        again.pair(OTHER, never)


def test_without_a_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = Measurements.at(None)
    kept.keep({"a layer": 1.0})
    kept.pair(ONE, lambda: RECORD)
    assert kept.pair(ONE, never) == RECORD
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"seconds": {}, "pairs": {"a": {"load": null}}}'])
def test_damage_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "measured.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"is damaged \(measured\.json: .*Begin again with --restart"):
        Measurements.at(tmp_path / "measured.json")


def test_a_bound_out_of_reach_leaves_no_unfinished_run(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="must be within reach"):
        run(Machine(0.0), tmp_path / "out", tmp_path / "cache", budget="latency=1%")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def model() -> nn.Module:
    layers = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 96, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 4),
    )  # fmt: skip
    for number, tensor in enumerate(layers.parameters()):
        tensor.data = 0.1 + ((tensor.data.new_ones(tensor.shape).cumsum(0) * (7 + number)) % 11) / 40
    return layers


class Machine:
    """Passes take what their parameters say, and more where the first layer is wide."""

    def __init__(self, slow: float) -> None:
        self.slow = slow
        self.measured = 0

    def whole(self, net: nn.Module, _inputs: object) -> float:
        self.measured += 1
        return 1e-4 + 1e-8 * sum(p.numel() for p in net.parameters()) + self.slow * len(net[0].weight)

    def layer(self, shape: LayerShape) -> float:
        self.measured += 1
        return 1e-6 + 1e-8 * shape.out * shape.read


def run(
    machine: Machine, out: Path, cache: Path, tell: Callable[[str], None] = len, budget: str = "latency=60%"
) -> CompressResult:
    target = Pretend(machine.whole, machine.layer)
    return run_compress(
        model(), noise_data(), budget=budget, strategy=Uniform(L2()), space=SearchSpace(divisor=4),
        train=TrainConfig(epochs=0), target=target, latency_cache=LatencyCache.of(target, cache), calibration_images=32,
        out=out, export=(), on_existing=OnExisting.RESUME, callbacks=Silent(), hear=tell,
    )  # fmt: skip


@pytest.mark.long
def test_a_resumed_run_decides_as_the_interrupted_one_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second machine is another one, as a busy machine is: from the start it would find another network."""
    monkeypatch.setattr(_deliver, "latency_between", lambda *_: ((), ()))
    monkeypatch.setattr(_deliver, "both_files", lambda *_: ())

    def stop(message: str) -> None:
        if message.startswith("Found an architecture"):
            shutil.copytree(tmp_path / "out.work", tmp_path / "killed")  # what kill -9 would leave
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Machine(0.0), tmp_path / "out", tmp_path / "cache", stop)
    assert not (tmp_path / "killed" / "run.json").exists()
    shutil.rmtree(tmp_path / "out.work")  # An interrupt keeps what was measured, as a kill does.
    (tmp_path / "killed").rename(tmp_path / "out.work")
    busy = Machine(1e-5)
    resumed = run(busy, tmp_path / "out", tmp_path / "empty")
    assert busy.measured == 2  # the proof at the end, of both networks, and nothing else
    whole = run(Machine(0.0), tmp_path / "whole", tmp_path / "fresh")
    other = run(Machine(1e-5), tmp_path / "other", tmp_path / "another")
    assert resumed.search.to_json() == whole.search.to_json()
    assert other.architecture != whole.architecture


@pytest.mark.parametrize(("settings", "exports"), [({}, 1), ({"onnx": OnnxConfig(opset=18)}, 2)])
def test_the_file_that_is_written_is_the_one_that_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], exports: int
) -> None:
    """Only the original is exported for its time, unless the file is of another kind than runtimes are timed with."""
    runtimes, timed = import_module("secateur.cost.runtimes"), list[nn.Module]()
    whole = runtimes.onnx_bytes
    monkeypatch.setattr(runtimes, "onnx_bytes", lambda net, images: timed.append(net) or whole(net, images))
    found = run_compress(
        model(), noise_data(), budget="macs=60%", strategy=Uniform(L2()), target=OnnxRuntime(), calibration_images=32,
        train=TrainConfig(epochs=0), out=tmp_path / "out", export=(Format.ONNX,), callbacks=Silent(), **settings,
    )  # fmt: skip
    assert len(timed) == exports
    assert [latency.runtime.split()[0] for latency in found.report.latency] == ["onnxruntime", "torch"]
    layers = found.report.layers
    assert sum(layer.macs[0] for layer in layers) == found.report.before.macs
    assert sum(layer.macs[1] for layer in layers) == found.report.after.macs
    assert all(layer.seconds is not None for layer in layers if any(layer.macs))
    assert "Time, original" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_without_times_no_layer_has_one(tmp_path: Path) -> None:
    found = run_compress(
        model(), noise_data(), budget="macs=60%", strategy=Uniform(L2()), target=OnnxRuntime(), calibration_images=32,
        train=TrainConfig(epochs=0), out=tmp_path / "out", export=(), callbacks=Silent(), times=False,
    )  # fmt: skip
    assert found.report.latency == ()
    assert {layer.seconds for layer in found.report.layers} == {None}
    assert sum(layer.macs[1] for layer in found.report.layers) == found.report.after.macs
