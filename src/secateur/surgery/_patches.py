"""Inputs and outputs of a layer at sampled positions: the rows of a least-squares problem."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Sampler:
    """Which output positions of a layer are looked at, the same in the original and the cut model.

    Attributes:
        module: Qualified name of a convolution (2-d, one group) or linear layer.
        positions: (count,) flat indices into the output positions of one image; None for all.
    """

    module: str
    positions: Tensor | None

    def rows_of_output(self, layer: nn.Module, out: Tensor) -> Tensor:
        """(samples, output channels). A linear layer may give four dimensions too: its channels are the last."""
        if isinstance(layer, nn.Conv2d):
            flat = out.flatten(2)
            if self.positions is not None:
                flat = flat[:, :, self.positions.to(out.device)]
            return flat.transpose(1, 2).reshape(-1, out.size(1))
        flat = out.reshape(out.size(0), -1, out.size(-1))
        if self.positions is not None:
            flat = flat[:, self.positions.to(out.device)]
        return flat.reshape(-1, out.size(-1))

    def rows_of_input(self, layer: nn.Module, x: Tensor) -> Tensor:
        """(samples, input channels x kernel positions), ordered as ``weight.flatten(1)``."""
        if isinstance(layer, nn.Conv2d):
            return self._patches(layer, x)
        flat = x.reshape(x.size(0), -1, x.size(-1))
        if self.positions is not None:
            flat = flat[:, self.positions.to(x.device)]
        return flat.reshape(-1, x.size(-1))

    def _patches(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
        ph, pw = layer.padding  # type: ignore[misc]
        x = F.pad(x, (int(pw), int(pw), int(ph), int(ph)))
        width = (x.size(3) - dw * (kw - 1) - 1) // sw + 1
        height = (x.size(2) - dh * (kh - 1) - 1) // sh + 1
        where = torch.arange(height * width) if self.positions is None else self.positions
        top, left = (where // width) * sh, (where % width) * sw
        rows = top[:, None] + torch.arange(kh).repeat_interleave(kw) * dh
        columns = left[:, None] + torch.arange(kw).repeat(kh) * dw
        index = (rows * x.size(3) + columns).to(x.device)
        taps = x.flatten(2)[:, :, index]
        return taps.permute(0, 2, 1, 3).reshape(-1, x.size(1) * kh * kw)


def is_plain(layer: nn.Module) -> bool:
    """True for layers whose output is exactly weight times patches (+ bias): 2-d convolutions of one group, linear."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def follows_weight(layer: nn.Module, x: Tensor, out: Tensor) -> bool:
    """Whether the layer really computes what its class says (a subclass may standardise weights or pad by itself)."""
    with torch.no_grad():
        plain: Any = nn.Conv2d.forward if isinstance(layer, nn.Conv2d) else nn.Linear.forward
        want = plain(layer, x[:1])
        return want.shape == out[:1].shape and torch.allclose(want, out[:1], rtol=1e-3, atol=1e-4)


def sample_positions(count: int, wanted: int, seed: int) -> Tensor | None:
    """``wanted`` of ``count`` positions, spread by a seeded permutation; None if that is all of them."""
    if wanted >= count:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:wanted].sort().values


def positions_per_image(unknowns: int, images: int, rows_per_unknown: int) -> int:
    """How many positions of each image give about ``rows_per_unknown`` equations per unknown."""
    return max(1, math.ceil(unknowns * rows_per_unknown / max(images, 1)))
