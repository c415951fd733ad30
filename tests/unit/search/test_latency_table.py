"""The table of layers: which widths are timed, that each is timed once, and that it is kept."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pretend import Pretend
from torch import nn

from secateur.cost import (
    ConvolutionShape,
    LatencyCache,
    LayerShape,
    LinearShape,
    OnnxRuntime,
    alignment,
    cache_folder,
    layer_extents,
)
from secateur.cost import timing as _layers
from secateur.graph import Extent, trace
from secateur.search import SearchSpace
from secateur.search import latency_fit as _table

EXAMPLE = torch.zeros(1, 3, 6, 6)


def by_macs(shape: LayerShape) -> float:
    return 1e-6 + 1e-9 * _layers.macs_of(shape)


def net() -> nn.Module:
    """A convolution, a depthwise one, one with two groups, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.Conv2d(64, 64, 3, padding=1, groups=64),
        nn.Conv2d(64, 32, 1, groups=2),
        nn.Flatten(),
        nn.Linear(32 * 36, 10),
    ).eval()


def cache_in(folder: Path, target: Pretend) -> LatencyCache:
    return LatencyCache.of(target, folder)


def table(folder: Path, target: Pretend, space: SearchSpace):
    model = net()
    graph = trace(model, EXAMPLE)
    told: list[float] = []
    times = _table.layer_times(
        model, graph, target, space, cache=cache_in(folder, target), tell=lambda fraction, _: told.append(fraction)
    )
    return graph, times, told


def test_times_are_those_of_layers_of_these_widths(tmp_path: Path):
    graph, times, _ = table(tmp_path, Pretend(layer=by_macs), SearchSpace(divisor=8))
    assert list(times) == ["0", "1", "2", "4"]
    for name, grid in times.items():
        out, read = (extent.at(graph.sizes) for extent in layer_extents(graph, name))
        assert (grid.outs[-1], grid.reads[-1]) == (out, read)
    # 36 positions, 9 taps, 3 inputs; a depthwise layer reads one channel; 18 of each 36 by two groups.
    # The groups tie their halves, so all widths are even numbers of channels.
    assert times["0"].at(np.array([64, 16]), np.array([3, 3])) == pytest.approx(
        [1e-6 + 1e-9 * 36 * 9 * 3 * width for width in (64, 16)]
    )
    assert times["1"].at(np.array([64, 16]), np.array([1, 1])) == pytest.approx(
        [1e-6 + 1e-9 * 36 * 9 * width for width in (64, 16)]
    )
    assert times["2"].seconds[-1, -1] == pytest.approx(1e-6 + 1e-9 * 36 * 32 * 32)
    assert times["4"].seconds[-1, -1] == pytest.approx(1e-6 + 1e-9 * 32 * 36 * 10)


def test_each_layer_is_timed_once_and_then_known(tmp_path: Path):
    target = Pretend(layer=by_macs)
    _, first, told = table(tmp_path, target, SearchSpace(divisor=16))
    assert len(target.timed) == len(set(target.timed)) > 0
    assert told[0] == 0
    again = Pretend(layer=by_macs)
    _, second, told = table(tmp_path, again, SearchSpace(divisor=16))
    assert (again.timed, told) == ([], [])
    for name, grid in first.items():
        assert np.array_equal(grid.seconds, second[name].seconds)
    more = Pretend(layer=by_macs)
    table(tmp_path, more, SearchSpace(divisor=8))
    assert more.timed
    assert not set(more.timed) & set(target.timed)


def test_groups_go_whole_where_each_reads_a_fixed_number():
    depthwise = ConvolutionShape(64, 1, 64, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1))
    assert _table.resized(depthwise, 24, 1, Extent(1)).groups == 24
    grouped = ConvolutionShape(32, 32, 2, (6, 6), (1, 1), (1, 1), (0, 0), (1, 1))
    narrower = _table.resized(grouped, 16, 8, Extent(0, (("0", 1),)))
    assert (narrower.groups, narrower.out, narrower.read) == (2, 16, 8)
    assert _table.resized(LinearShape(4, 5, 1), 2, 3, Extent(5)) == LinearShape(2, 3, 1)


@pytest.mark.parametrize("divisor", [1, 2, 4, 8, 16])
def test_nodes_hold_both_ends_and_every_alignment(divisor: int):
    levels = {"a": np.append(np.arange(divisor, 100, divisor), 100)}
    nodes = _table.nodes(Extent(0, (("a", 1),)), levels)
    assert nodes[-1] == 100
    assert set(nodes) <= set(levels["a"])
    assert set(alignment(nodes)) == set(alignment(levels["a"]))
    for kind in set(alignment(nodes)):
        mine, all_of_it = nodes[alignment(nodes) == kind], levels["a"][alignment(levels["a"]) == kind]
        assert 1 <= len(mine) <= 4
        assert (mine[0], mine[-1]) == (all_of_it[0], all_of_it[-1])


def test_nodes_of_sums_and_multiples_lie_between_the_least_and_the_whole():
    levels = {"a": np.array([8, 16, 24]), "b": np.array([4, 8])}
    nodes = _table.nodes(Extent(2, (("a", 1), ("b", 3))), levels)
    assert (nodes[0], nodes[-1]) == (2 + 8 + 12, 2 + 24 + 24)
    assert _table.nodes(Extent(7), {}).tolist() == [7]


def test_another_target_or_version_has_another_file(tmp_path: Path):
    files = {cache_in(tmp_path, target).path for target in (Pretend(), Pretend(batch=2), Pretend(threads=2))}
    assert len(files) == 3


def test_two_writers_lose_nothing_and_the_newest_wins(tmp_path: Path):
    first, second = (cache_in(tmp_path, Pretend()) for _ in "ab")
    first.get("one", lambda: 1.0)
    second.get("two", lambda: 2.0)
    second.get("one", lambda: 1.5)
    first.write()
    second.write()
    assert cache_in(tmp_path, Pretend()).seconds == {"one": 1.5, "two": 2.0}
    assert json.loads(first.path.read_text())["target"] == "pretend 1, 1 thread, batch 1"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"format": 1}', '{"format": 2, "seconds": {"a": 1}}', '{"format": 1, "seconds": {"a": "soon"}}'],
)
def test_a_file_that_cannot_be_read_is_as_good_as_none(tmp_path: Path, content: str):
    path = cache_in(tmp_path, Pretend()).path
    path.write_text(content)
    cache = cache_in(tmp_path, Pretend())
    assert cache.seconds == {}
    cache.get("a", lambda: 3.0)
    cache.write()
    assert cache_in(tmp_path, Pretend()).seconds == {"a": 3.0}


def test_times_that_cannot_be_are_measured_again(tmp_path: Path):
    path = cache_in(tmp_path, Pretend()).path
    path.write_text('{"format": 1, "seconds": {"a": -1, "b": 0, "c": Infinity, "d": NaN, "e": 2}}')
    assert cache_in(tmp_path, Pretend()).seconds == {"e": 2.0}


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path):
    (tmp_path / "file").write_text("")
    cache = cache_in(tmp_path / "file", Pretend())
    assert cache.get("a", lambda: 3.0) == 3.0
    cache.write()
    assert cache.seconds == {"a": 3.0}


def test_the_folder_is_where_the_user_wants_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "secateur" / "latency"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "secateur" / "latency"


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_without_a_home_measurements_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", _no_home)
    cache = LatencyCache.of(OnnxRuntime())
    assert cache.get("a", lambda: 1.0) == 1.0
    cache.write()
    assert not cache.path.exists()
