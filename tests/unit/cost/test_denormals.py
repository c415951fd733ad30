"""Denormal numbers: counted, set to 0, and never credited to a cut."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pretend import Pretend
from torch import Tensor, nn

from secateur.cost import count_denormals, flush_denormals_, measure_pairs
from secateur.cost.denormals import without_denormals

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


class Holds(nn.Module):
    """One tensor."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)


@pytest.mark.parametrize("dtype", TYPES)
def test_exactly_the_numbers_below_the_smallest_normal_are_counted(dtype: torch.dtype) -> None:
    normal = torch.finfo(dtype).smallest_normal
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    kept = [0.0, -0.0, 1.0, normal, -normal, float("inf"), float("nan"), torch.finfo(dtype).max]
    small = [least, -least, 3 * least, normal - least, -(normal - least)]
    model = Holds(torch.tensor(kept + small, dtype=torch.float64).to(dtype))
    assert count_denormals(model).counts == {"values": len(small)}
    assert flush_denormals_(model) is model
    wanted = torch.tensor([*kept, *[0.0] * len(small)], dtype=torch.float64).to(dtype)
    torch.testing.assert_close(model.values, wanted, rtol=0, atol=0, equal_nan=True)
    assert count_denormals(model).counts == {}


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_any_float_is_told_as_numpy_tells_it(values: list[float]) -> None:
    array = np.array(values, dtype=np.float32)
    small = (array != 0) & (np.abs(array) < np.finfo(np.float32).smallest_normal)
    found = count_denormals(Holds(torch.from_numpy(array.copy())))
    assert found.numbers == len(array)
    assert sum(found.counts.values()) == small.sum()
    assert found.fraction == small.sum() / len(array)


def _net(denormal: float = 0.6) -> nn.Sequential:
    """A net of which a part of the weights and of the running statistics is denormal."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3))
    with torch.no_grad():
        for tensor in (model[0].weight, model[1].running_var, model[3].weight):
            flat = tensor.view(-1)
            flat[: round(denormal * len(flat))] = 1e-40
    return model.eval()


def test_parameters_and_running_statistics_are_counted_by_name() -> None:
    found = count_denormals(_net())
    assert found.counts == {"0.weight": 259, "1.running_var": 10, "3.weight": 346}
    assert found.notable
    assert "denormal" in str(found)
    assert str(found).endswith("3.weight (346), 0.weight (259), 1.running_var (10)")
    assert (count_denormals(_net(0)).counts, str(count_denormals(_net(0)))) == ({}, "")
    assert not count_denormals(_net(0)).notable


def test_odd_tensors_are_passed_over_or_counted() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4, device="meta"))
    model.register_buffer("steps", torch.tensor(3))
    model.register_buffer("strided", torch.full((4, 6), 1e-40)[:, ::2])
    model.register_buffer("empty", torch.empty(0))
    assert count_denormals(model).counts == {"strided": 12}
    assert float(flush_denormals_(model).strided.abs().max()) == 0


def test_a_processor_that_flushes_denormals_hides_none() -> None:
    model = _net()
    before = count_denormals(model)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormal numbers")
    try:
        assert count_denormals(model).counts == before.counts
    finally:
        torch.set_flush_denormal(False)


def test_outputs_hardly_change() -> None:
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(without_denormals(_net())(images), _net()(images), rtol=1e-6, atol=1e-30)
    clean = _net(0)
    assert without_denormals(clean) is clean


def slow_by_denormals(model: nn.Module, inputs: object) -> float:
    """A pass takes a millisecond for each parameter, and fifty for a denormal one."""
    del inputs
    numbers = sum(parameter.numel() for parameter in model.parameters())
    return 1e-3 * (numbers + 49 * sum(count_denormals(model).counts.values()))


def test_a_cut_gets_no_credit_for_denormals_that_it_removes() -> None:
    original, small = _net(), _net(0)
    record = measure_pairs(original, small, Pretend(slow_by_denormals), (3, 8, 8), rounds=3, warmup=0)
    assert record.speedup.median == pytest.approx(1.0)
    assert count_denormals(original).counts  # it is not changed
    record = measure_pairs(small, original, Pretend(slow_by_denormals), (3, 8, 8), rounds=3, warmup=0)
    assert record.speedup.median < 0.1  # a slow student is not made faster than it is
