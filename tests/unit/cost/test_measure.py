"""Latency is measured in turns and reported with its spread. No test depends on how fast this machine is."""

import gc
import sys
import time
from importlib import import_module

import pytest
import torch
from pretend import Pretend
from torch import nn

from secateur import _runtime as _clock
from secateur._runtime import Clock
from secateur.cost import (
    OnnxRuntime,
    Quartiles,
    Target,
    TorchCompiled,
    TorchEager,
    measure,
    measure_all,
    measure_latency,
    measure_pairs,
)
from secateur.cost import (
    timing as _turns,
)
from secateur.errors import ExportError
from secateur.export.onnx import onnx_bytes

_measure = sys.modules["secateur.cost.measure"]


def of_size(size: int) -> nn.Module:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(size))
    return model


def test_records_of_both_runtimes() -> None:
    threads = torch.get_num_threads()
    model, small = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 4, 3)
    by_onnx, by_torch = measure_latency(model, small, torch.randn(1, 3, 8, 8), rounds=4, warmup=1)
    for record, runtime in ((by_onnx, "onnxruntime"), (by_torch, "torch")):
        assert record.runtime.startswith(runtime)
        assert (record.batch_size, record.threads, record.rounds) == (1, 1, 4)
        assert record.clock == _clock.PROCESSOR_TIME.name
        for spread in (record.before, record.after, record.speedup):
            assert 0 < spread.lower <= spread.median <= spread.upper
        assert record.machine["cpu"]
        assert record.to_json()["before"] == {
            "lower": record.before.lower,
            "median": record.before.median,
            "upper": record.before.upper,
        }
    assert torch.get_num_threads() == threads
    assert model.training


def test_turns_alternate() -> None:
    played: list[int] = []
    now = [0.0]
    clock = Clock("ours", lambda: now[0])

    def player(number: int, seconds: float):
        def play() -> None:
            played.append(number)
            now[0] += seconds

        return play

    seconds = _turns.time_in_turns([player(0, 0.04), player(1, 0.03)], clock, rounds=4, warmup=1)
    assert played[8:] == [0, 1, 1, 0, 0, 1, 1, 0, 0, 1]
    assert [pair[0] for pair in seconds] == pytest.approx([0.04] * 4)
    assert [pair[1] for pair in seconds] == pytest.approx([0.03] * 4)


def test_record_takes_the_median_of_pairwise_ratios() -> None:
    target = OnnxRuntime(threads=4, batch=2)
    record = _measure._record(target, [(2.0, 1.0), (9.0, 3.0), (4.0, 1.0)])
    assert record.speedup == Quartiles(2.5, 3.0, 3.5)
    assert record.before == Quartiles(3.0, 4.0, 6.5)
    assert (record.batch_size, record.threads, record.clock) == (2, 4, "elapsed time")


def test_time_of_other_programs_is_not_counted() -> None:
    """A thread that sleeps stands for one that has to wait for the processor."""
    assert _turns.seconds_per_call(lambda: time.sleep(0.02), 2, _clock.ELAPSED_TIME) >= 0.02
    assert _turns.seconds_per_call(lambda: time.sleep(0.02), 2, _clock.PROCESSOR_TIME) < 0.01


def test_settings_come_back_when_a_model_fails() -> None:
    threads, collecting = torch.get_num_threads(), gc.isenabled()

    def fail() -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), _clock.torch_threads(threads + 1):
        fail()
    with pytest.raises(RuntimeError, match="stop"), _clock.no_garbage_collection():
        fail()

    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            fail()
            return x

    with pytest.raises(RuntimeError, match="stop"):
        measure(Failing(), TorchEager(threads=threads + 1), (3, 4, 4))
    assert (torch.get_num_threads(), gc.isenabled()) == (threads, collecting)


@pytest.mark.parametrize("wrong", [{"rounds": 2}, {"threads": 0}, {"warmup": -1}])
def test_settings_are_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(ExportError, match="`rounds` must be at least 3, `threads` at least 1"):
        measure_latency(nn.ReLU(), nn.ReLU(), torch.zeros(1, 2), **wrong)


def test_several_models_take_turns_and_get_their_own_times() -> None:
    target = Pretend()
    found = measure_all([of_size(3), of_size(2), of_size(7)], target, (1,), rounds=4, warmup=0)
    assert [latency.seconds.median for latency in found] == pytest.approx([0.03, 0.02, 0.07])
    assert [latency.seconds.spread for latency in found] == pytest.approx([0, 0, 0])
    assert target.played[-12:] == pytest.approx([0.03, 0.02, 0.07, 0.07, 0.02, 0.03] * 2)
    assert (found[0].runtime, found[0].rounds, found[0].clock) == ("pretend 1", 4, "pretended time")


def test_pairs_give_the_ratio() -> None:
    record = measure_pairs(of_size(6), of_size(3), Pretend(batch=2), (1,), rounds=3, warmup=1)
    assert record.speedup.median == pytest.approx(2)
    assert (record.before.median, record.after.median) == pytest.approx((0.12, 0.06))


def test_real_samples_are_repeated_to_fill_the_batch() -> None:
    (inputs,) = _measure.inputs_for(OnnxRuntime(batch=5), torch.arange(3.0)[:, None])
    assert inputs[:, 0].tolist() == [0, 1, 2, 0, 1]
    (noise,) = _measure.inputs_for(OnnxRuntime(batch=2), (3, 4, 5))
    assert noise.shape == (2, 3, 4, 5)


def test_load_is_recorded_and_json_is_plain() -> None:
    latency = measure(of_size(2), Pretend(), (1,), rounds=3)
    assert latency.load is None or len(latency.load) == 2
    assert latency.to_json()["seconds"] == pytest.approx({"lower": 0.02, "median": 0.02, "upper": 0.02})


@pytest.mark.parametrize("target", [OnnxRuntime(batch=2), TorchEager(batch=2), TorchCompiled(batch=2)])
def test_every_target_runs_a_model_and_leaves_it_alone(target: Target) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    latency = measure(model, target, (3, 8, 8), rounds=3, warmup=0)
    assert latency.seconds.median > 0
    assert (latency.batch_size, latency.threads) == (2, 1)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_targets_have_different_keys() -> None:
    targets = [OnnxRuntime(), OnnxRuntime(2), OnnxRuntime(1, 2), TorchEager(), TorchCompiled()]
    assert len({target.key for target in targets}) == 5
    assert OnnxRuntime(2).clock is _clock.ELAPSED_TIME
    assert OnnxRuntime(1).clock is _clock.PROCESSOR_TIME


@pytest.mark.parametrize("kind", [OnnxRuntime, TorchEager, TorchCompiled])
def test_a_target_needs_threads_and_samples(kind: type[Target]) -> None:
    with pytest.raises(ExportError, match="`threads` must be a whole number, at least 1; got 0"):
        kind(threads=0)
    with pytest.raises(ExportError, match="`batch` must be a whole number, at least 1; got -1"):
        kind(batch=-1)


def test_a_shape_and_a_model_are_needed() -> None:
    with pytest.raises(ExportError, match="`shape` must be that of one input"):
        measure(of_size(1), Pretend(), (3, 0))
    with pytest.raises(ExportError, match="`models` must be at least one model"):
        measure_all([], Pretend(), (1,))


def test_a_file_that_is_there_is_opened_and_only_other_models_are_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    runtimes = import_module("secateur.cost.runtimes")
    small, other = (nn.Sequential(nn.Conv2d(3, width, 3)).eval() for width in (2, 5))
    inputs = (torch.zeros(1, 3, 8, 8),)
    content, exported = onnx_bytes(small, inputs), list[nn.Module]()
    whole = runtimes.onnx_bytes
    monkeypatch.setattr(runtimes, "onnx_bytes", lambda model, given: exported.append(model) or whole(model, given))
    target = OnnxRuntime(threads=2).with_file(small, content)
    assert (target.key, target.clock) == (OnnxRuntime(threads=2).key, OnnxRuntime(threads=2).clock)
    for model, width, count in ((small, 2, 0), (other, 5, 1)):
        with target.opened(model, inputs) as run:
            assert run()[0].shape == (1, width, 6, 6)
        assert len(exported) == count
    both = target.with_file(other, whole(other, inputs))
    for model in (small, other):
        with both.opened(model, inputs) as run:
            run()
    assert len(exported) == 1
