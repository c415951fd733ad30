"""Predicted latency against whole models, on a machine whose times are known exactly."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pretend import Pretend
from torch import nn

from secateur.architecture import Architecture
from secateur.cost import LatencyCache, LayerShape, TorchEager, count_macs
from secateur.cost import timing as _layers
from secateur.graph import trace, untie
from secateur.models import load_model
from secateur.prune import apply_architecture
from secateur.search import SearchSpace, fit_latency
from secateur.search.latency_fit import probes

SHAPE = (3, 8, 8)
SPACE = SearchSpace(divisor=8, min_kept_fraction=0)


def by_macs(shape: LayerShape) -> float:
    return 1e-6 + 1e-9 * _layers.macs_of(shape)


def slower_in_a_net(model: nn.Module, inputs: object) -> float:
    """Layers take a tenth more than alone, and the session half a millisecond."""
    convolutions = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())
    return 1.1 * (convolutions * 1e-6 + 1e-9 * count_macs(model, torch.zeros(1, *SHAPE))) + 5e-4


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 48, 3, padding=1), nn.ReLU(),
        nn.Conv2d(48, 96, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10),
    ).eval()  # fmt: skip


def fit(folder: Path, target: Pretend):
    model = net()
    graph = trace(model, torch.zeros(1, *SHAPE))
    return model, graph, fit_latency(model, graph, target, SHAPE, space=SPACE, cache=LatencyCache.of(target, folder))


def test_other_widths_are_predicted(tmp_path: Path):
    model, graph, found = fit(tmp_path, Pretend(slower_in_a_net, by_macs))
    assert found.measured[0] == pytest.approx(slower_in_a_net(model, ()))
    assert np.abs(found.errors).max() < 0.05  # The constant is 70 % of the smallest, and known from others only.
    widths = np.array([[40, 24, 72], [8, 40, 16]])
    for row in widths:
        kept = {axis.name: range(width) for axis, width in zip(graph.prunable, row.tolist(), strict=True)}
        small = apply_architecture(model, graph, Architecture.of(kept))
        # Bilinear in the widths within each pair of alignments, so exact up to the fit of the constant.
        assert found.model.of_widths(row[None])[0] == pytest.approx(slower_in_a_net(small, ()), rel=0.02)
    said = found.to_json()
    assert said["largest_error"] == np.abs(found.errors).max()
    assert said["target"] == "pretend 1, 1 thread, batch 1"


def test_whole_models_are_measured_once(tmp_path: Path):
    _, _, first = fit(tmp_path, Pretend(slower_in_a_net, by_macs))
    again = Pretend(slower_in_a_net, by_macs)
    _, _, second = fit(tmp_path, again)
    assert (again.played, again.timed) == ([], [])
    assert np.array_equal(first.measured, second.measured)
    assert first.model.coefficients == second.model.coefficients


def test_no_measurement_is_predicted_from_itself(tmp_path: Path):
    def one_is_odd(model: nn.Module, inputs: object) -> float:
        return slower_in_a_net(model, inputs) * (3 if model[0].out_channels == 64 else 1)

    _, _, found = fit(tmp_path, Pretend(one_is_odd, by_macs))
    assert found.errors[0] < -0.5


def test_probes_are_different_allowed_widths_beginning_with_the_whole_model():
    graph = trace(net(), torch.zeros(1, *SHAPE))
    rows = probes(graph, SPACE)
    assert rows[0].tolist() == [64, 48, 96]
    assert len(np.unique(rows, axis=0)) == len(rows) == 5
    levels = SPACE.levels(graph)
    assert all(width in mine for row in rows for width, mine in zip(row, levels, strict=True))


def test_probes_of_an_untied_graph_can_be_cut():
    model, _ = load_model("cifar_resnet20", seed=0)
    example = torch.zeros(1, 3, 8, 8)
    graph = untie(model.eval(), trace(model.eval(), example))
    column = {axis.name: number for number, axis in enumerate(graph.prunable)}
    for row in probes(graph, SearchSpace(divisor=4)):
        for number, axis in enumerate(graph.prunable):
            if axis.residual_axis in column:
                assert row[number] <= row[column[axis.residual_axis]]


def test_a_real_runtime_and_a_real_net(tmp_path: Path):
    """No number of this is known; that every part of it works is."""
    model, _ = load_model("digits_resnet", seed=0)
    graph = trace(model.eval(), torch.zeros(1, 1, 8, 8))
    target = TorchEager()
    space = SearchSpace(divisor=16)
    found = fit_latency(model, graph, target, (1, 8, 8), space=space, cache=LatencyCache.of(target, tmp_path))
    assert (found.measured > 0).all()
    assert (found.predicted > 0).all()
    assert len(found.model.layers) > 3
