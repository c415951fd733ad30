"""Latency is measured in turns and reported with its spread. No test depends on how fast this machine is."""

import gc
import time

import pytest
import torch
from torch import nn

from secateur.errors import ExportError
from secateur.export import Quartiles, _latency, measure_latency


def test_records_of_both_runtimes() -> None:
    threads = torch.get_num_threads()
    model, small = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 4, 3)
    by_onnx, by_torch = measure_latency(model, small, torch.randn(1, 3, 8, 8), rounds=4, warmup=1)
    for record, runtime in ((by_onnx, "onnxruntime"), (by_torch, "torch")):
        assert record.runtime.startswith(runtime)
        assert (record.batch_size, record.threads, record.rounds) == (1, 1, 4)
        assert record.clock == _latency.ONE_THREAD.name
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
    clock = _latency.Clock("ours", lambda: now[0])

    def player(number: int, seconds: float):
        def play() -> None:
            played.append(number)
            now[0] += seconds

        return play

    seconds = _latency._take_turns([player(0, 0.04), player(1, 0.03)], clock, rounds=4, warmup=1)
    assert played[8:] == [0, 1, 1, 0, 0, 1, 1, 0, 0, 1]
    assert [pair[0] for pair in seconds] == pytest.approx([0.04] * 4)
    assert [pair[1] for pair in seconds] == pytest.approx([0.03] * 4)


def test_record_takes_the_median_of_pairwise_ratios() -> None:
    record = _latency._record("x 1", (torch.zeros(2, 3),), 4, _latency.ELAPSED, [(2.0, 1.0), (9.0, 3.0), (4.0, 1.0)])
    assert record.speedup == Quartiles(2.5, 3.0, 3.5)
    assert record.before == Quartiles(3.0, 4.0, 6.5)
    assert (record.batch_size, record.threads, record.clock) == (2, 4, "elapsed time")


def test_time_of_other_programs_is_not_counted() -> None:
    """A thread that sleeps stands for one that has to wait for the processor."""
    assert _latency._seconds(lambda: time.sleep(0.02), 2, _latency.ELAPSED) >= 0.02
    assert _latency._seconds(lambda: time.sleep(0.02), 2, _latency.ONE_THREAD) < 0.01


def test_settings_come_back_when_a_model_fails() -> None:
    threads, collecting = torch.get_num_threads(), gc.isenabled()

    def fail() -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), _latency._torch_threads(threads + 1):
        fail()
    with pytest.raises(RuntimeError, match="stop"), _latency._no_garbage_collection():
        fail()
    assert (torch.get_num_threads(), gc.isenabled()) == (threads, collecting)


@pytest.mark.parametrize("wrong", [{"rounds": 2}, {"threads": 0}, {"warmup": -1}])
def test_settings_are_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(ExportError, match="`rounds` must be at least 3, `threads` at least 1"):
        measure_latency(nn.ReLU(), nn.ReLU(), torch.zeros(1, 2), **wrong)
