"""Which batch norms alone read the output of a layer."""

import torch
from torch import nn
from zoo import ZOO

from secateur.nas.mixture import find_following_norms


def test_a_freed_tensor_is_not_confused_with_a_later_one_of_the_same_id():
    """A depthwise convolution's output is freed before the gate is computed, which may then get its id."""
    model, example = ZOO["inverted_residual_se"]()
    plain = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and not is_depthwise(m)]
    held = []
    for count in range(200):  # About every fourth was wrong: what else is allocated decides.
        held.append([torch.zeros(1) for _ in range(count % 31)])
        assert find_following_norms(model, (example,), plain) == {
            "0.0": ("0.1",),
            **{f"{block}.{name}.0": (f"{block}.{name}.1",) for block in "12" for name in ("expand", "project")},
        }
        del held[:-5]


def is_depthwise(module: nn.Module) -> bool:
    return getattr(module, "groups", 1) > 1


def test_a_layer_that_others_read_too_is_left_out():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            stream = self.conv(x)
            return self.norm(stream) + stream

    assert find_following_norms(Both().eval(), (torch.zeros(1, 3, 2, 2),), ["conv"]) == {}
