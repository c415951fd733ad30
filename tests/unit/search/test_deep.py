"""Twice the depth takes twice the time: trace, scores, search with the knapsack, and cut of a chain."""

import gc
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from secateur.graph import trace
from secateur.prune import cut
from secateur.search import Knapsack, Reconstruction, search_architecture
from secateur.search.importance import ScoringInputs

EXAMPLE = torch.zeros(2, 3, 8, 8)
IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = ((IMAGES, torch.arange(16) % 10),)


def chain(depth: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inner = [layer for _ in range(depth - 2) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *inner, *head).eval()


def steps(depth: int) -> dict[str, float]:
    """Processor seconds of each step."""
    found, seconds = {"model": chain(depth)}, dict[str, float]()

    def timed(name: str, step: Callable[[], object]) -> None:
        gc.collect()
        began = time.process_time()
        found[name] = step()
        seconds[name] = time.process_time() - began

    model = found["model"]
    timed("trace", lambda: trace(model, EXAMPLE))
    graph = found["trace"]
    timed("scores", lambda: Reconstruction().scores(ScoringInputs(model, graph, BATCHES)))
    timed("search", lambda: search_architecture(model, graph, Knapsack(), budget="macs=50%", batches=BATCHES))
    timed("cut", lambda: cut(model, graph, found["search"].architecture))
    assert found["search"].notes["utilization"]["macs"] > 0.98
    return seconds


@pytest.mark.slow
def test_a_thousand_layers_take_twice_the_time_of_five_hundred() -> None:
    """Without the pauses of the garbage collector, which come when they come."""
    steps(20)
    rows: dict[int, list[dict[str, float]]] = {501: [], 1001: []}
    gc.disable()
    try:
        for _ in range(3):
            for depth, found in rows.items():
                found.append(steps(depth))
    finally:
        gc.enable()
    short, long = (
        {name: statistics.median(row[name] for row in rows[depth]) for name in rows[depth][0]} for depth in (501, 1001)
    )
    ratios = {name: long[name] / short[name] / (1001 / 501) for name in short}
    print(short, long, ratios)
    assert max(ratios.values()) <= 1.3, (short, long)
