"""A seeded input and the outputs for it: how a model can be recognised on another machine."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

_SEED = 20260101
_IMAGES = 2
TOLERANCE = 1e-4
"""Largest difference, relative to the largest logit, that another machine's kernels may make in float32."""


def probe_images(size: Sequence[int]) -> Tensor:
    """Two images of standard normal noise, the same everywhere.

    Args:
        size: Channels, height, width.
    """
    return torch.randn(_IMAGES, *size, generator=torch.Generator().manual_seed(_SEED))


def probe_json(model: nn.Module, size: Sequence[int]) -> dict[str, object]:
    """The logits of a model in eval mode on the CPU for the probe, as JSON."""
    with torch.no_grad():
        return {"seed": _SEED, "logits": model(probe_images(size)).double().tolist()}


def probe_difference(model: nn.Module, size: Sequence[int], recorded: Mapping[str, object]) -> tuple[float, float]:
    """Largest absolute and relative difference of a model's logits from recorded ones; infinite if not comparable."""
    with torch.no_grad():
        found = model(probe_images(size)).double()
    wanted = torch.tensor(cast(Any, recorded["logits"]), dtype=torch.float64)
    if found.shape != wanted.shape:
        return float("inf"), float("inf")
    absolute = float((found - wanted).abs().max())
    return absolute, absolute / max(float(wanted.abs().max()), 1e-30)


def same_bits(one: nn.Module, other: nn.Module, images: Tensor) -> bool:
    """Whether two models in eval mode on the CPU give the same bits."""
    with torch.no_grad():
        return torch.equal(one(images), other(images))
