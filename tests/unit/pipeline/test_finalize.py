"""What is recorded of a model's outputs, so that another machine can tell that it rebuilt the same one."""

import json

import pytest
import torch
from torch import Tensor, nn

from secateur.pipeline.finalize import probe_difference, probe_json

SIZE = (3, 40, 60)


def segmenter(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Conv2d(3, 5, 3, padding=1).eval()


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = segmenter()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).mean((2, 3))


@pytest.mark.parametrize("make", [segmenter, Pooled])
def test_the_same_model_has_the_recorded_outputs(make: type[nn.Module]) -> None:
    recorded = json.loads(json.dumps(probe_json(make(), SIZE)))
    assert probe_difference(make(), SIZE, recorded) == (0, 0)


def test_large_outputs_are_recorded_in_part_and_another_model_is_still_noticed() -> None:
    recorded = probe_json(segmenter(), SIZE)
    assert recorded is not None
    assert recorded["shape"] == [2, 5, 40, 60]
    assert len(json.dumps(recorded)) < 100_000
    assert probe_difference(segmenter(1), SIZE, recorded)[1] > 0.1
    # A single weight shows.
    changed = segmenter()
    with torch.no_grad():
        changed.weight[4, 0, 0, 0] += 0.01
    assert probe_difference(changed, SIZE, recorded)[1] > 1e-3
    wider = nn.Conv2d(3, 6, 3, padding=1).eval()
    assert probe_difference(wider, SIZE, recorded) == (float("inf"), float("inf"))


def test_small_outputs_are_recorded_whole() -> None:
    recorded = probe_json(Pooled(), SIZE)
    assert recorded is not None
    assert torch.tensor(recorded["logits"]).shape == (2, 5)
